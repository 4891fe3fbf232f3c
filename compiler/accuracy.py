"""What a changed program loses against the original on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .calibration import Feeds
from .metrics import METRICS, drop
from .program import Program

#: makes a program ready to run on this machine, uncompressed and unchanged: feeds by input name -> outputs in the order of `main`
Executor = Callable[[Program], Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]]


@dataclass
class Accuracy:
    """The original program beside changed ones, on the same data.

    calibration: the calls; executor: runs a program; metric: the one that limits refer to; max_drop: its largest value allowed (None: no limit).
    """

    original: Program
    calibration: tuple[Feeds, ...]
    executor: Executor
    metric: str = "cosine"
    max_drop: float | None = None
    _reference: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def outputs(self, program: Program) -> list[tuple[np.ndarray, ...]]:
        """Outputs of a program for every call."""
        run = self.executor(program)
        return [run(feeds) for feeds in self.calibration]

    @property
    def reference(self) -> list[tuple[np.ndarray, ...]]:
        """Outputs of the original program, computed once."""
        if not self._reference:
            self._reference = self.outputs(self.original)
        return self._reference

    def drop(self, program: Program) -> float:
        """Loss of a program in `metric`; NaN where results cannot be compared."""
        return drop(self.metric, self.outputs(program), self.reference)

    def all_drops(self, program: Program) -> dict[str, float]:
        """Loss of a program in every metric."""
        outputs = self.outputs(program)
        return {name: drop(name, outputs, self.reference) for name in METRICS}
