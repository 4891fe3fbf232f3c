"""What the scripts that write the pages of supported operators share."""

from __future__ import annotations

import sys
from pathlib import Path


def short_reason(reason: str) -> str:
    """A refusal's reason without its operator, as a cell of a table."""
    text = reason.split("::", 1)[-1].strip(" :").replace("|", "/")
    return text if len(text) <= 120 else text[:117] + "..."


def written(path: Path, text: str) -> int:
    """Write a page; with --check on the command line, 1 when it is not what is there."""
    if "--check" in sys.argv:
        return 0 if path.read_text() == text else 1
    path.write_text(text)
    return 0
