"""Settings of the whole test run."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What the imports of all tests made, torch's and TVM's millions of objects, stays: Python would look through it again and again for garbage."""
    gc.collect()
    gc.freeze()
