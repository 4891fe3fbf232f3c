"""The backends, by the word before the colon. A new target is one line here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from .base import Target
from .cpu import backend as cpu
from .cuda import backend as cuda
from .fpga import backend as fpga

if TYPE_CHECKING:
    from ..compiler.lowered import Lowered
    from ..compiler.steps import Steps


class Backend(Protocol):
    """What a backend module offers."""

    def resolve(self, name: str) -> Target: ...

    def names(self) -> list[str]: ...

    def having(self, target: Target, precision: str) -> Target:
        """The target with products in a precision that is none of the pass `precision`, but a matter of its kernels."""
        ...

    def scope(self, target: Target) -> AbstractContextManager[Any]:
        """The context in which TVM's passes see the target."""
        ...

    def lower(self, steps: Steps) -> Lowered:
        """Lower the program that the graph passes left; further steps go through `steps.step`, the result through `steps.lowered`."""
        ...


BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "fpga": fpga}
