"""Settings of the whole test run."""

from __future__ import annotations

import collections
import gc
import zlib

import numpy as np
import pytest


def pytest_collection_finish() -> None:
    """What the imports of all tests made, torch's and TVM's millions of objects, stays: Python would look through it again and again for garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a sweep a sixth is fast, one case at least: the same ones on every machine."""
    sweeps = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep"):
            sweeps[item.nodeid.partition("[")[0]].append(item)
    for cases in sweeps.values():
        for item in sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))[-(-len(cases) // 6) :]:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def numbers_of_its_own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test draws the same numbers from its module's `RNG` whatever ran before it, on whichever worker."""
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(zlib.crc32(request.node.nodeid.encode())))
