"""Named stages of long work: silent in the API, shown on stderr by the command, timed for the report."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

#: a stage shorter than this is not worth a line
QUIET_SECONDS = 1.0


@dataclass
class Stage:
    """One stage; `seconds` is its wall time once it has ended."""

    name: str
    seconds: float = 0.0


_show: Callable[[str], AbstractContextManager[object]] = nullcontext


@contextmanager
def stage(name: str) -> Iterator[Stage]:
    """Mark work as `name`: `with stage("lowering") as lowering: ...; report["seconds"] = lowering.seconds`."""
    current, start = Stage(name), time.perf_counter()
    try:
        with _show(name):
            yield current
    finally:
        current.seconds = time.perf_counter() - start


@contextmanager
def shown() -> Iterator[None]:
    """Within this context stages appear on stderr: a spinner on a terminal, else one line for each that takes over a second."""
    global _show
    previous, _show = _show, _spinner() if sys.stderr.isatty() else _lines
    try:
        yield
    finally:
        _show = previous


def _spinner() -> Callable[[str], AbstractContextManager[object]]:
    from rich.console import Console

    console, nesting = Console(stderr=True), threading.local()

    @contextmanager
    def show(name: str) -> Iterator[None]:
        if getattr(nesting, "active", False):  # rich allows one live display at a time
            yield
            return
        nesting.active = True
        try:
            with console.status(name):
                yield
        finally:
            nesting.active = False

    return show


@contextmanager
def _lines(name: str) -> Iterator[None]:
    timer = threading.Timer(QUIET_SECONDS, lambda: print(f"tcompile: {name} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
