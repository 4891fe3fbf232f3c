"""Named stages of long work: silent in the API, shown on stderr by the command, timed for the report."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NoReturn

#: a stage shorter than this is not worth a line
QUIET_SECONDS = 1.0


@dataclass
class Stage:
    """One stage; `seconds` is its wall time once it has ended."""

    name: str
    seconds: float = 0.0


#: what a signal handler has asked for, see `interrupt`
_pending: BaseException | None = None
_show: Callable[[str], AbstractContextManager[object]] = nullcontext


@contextmanager
def stage(name: str) -> Iterator[Stage]:
    """Mark work as `name`: `with stage("lowering") as lowering: ...; report["seconds"] = lowering.seconds`."""
    current, start = Stage(name), time.perf_counter()
    try:
        with _show(name):
            raise_pending()
            yield current
            raise_pending()
    finally:
        current.seconds = time.perf_counter() - start


def interrupt(reason: BaseException) -> NoReturn:
    """Raise `reason` from a signal handler, and again at the next end of a stage: inside of a callback from TVM it comes out as some other error."""
    global _pending
    _pending = reason
    raise reason


def raise_pending() -> None:
    """Raise what `interrupt` was last given, if it was called since `shown` began."""
    if _pending is not None:
        raise _pending


@contextmanager
def shown() -> Iterator[None]:
    """Within this context stages appear on stderr: a spinner on a terminal, else one line for each that takes over a second."""
    global _pending, _show
    previous, _show, _pending = _show, _spinner() if sys.stderr.isatty() else _lines, None
    try:
        yield
    finally:
        _show, _pending = previous, None


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
