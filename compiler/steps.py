"""Steps: a program on its way through the passes and a target's lowering, with what each step reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..passes.base import PassContext, PassReport
from ..targets.base import Target
from .accuracy import Accuracy
from .lowered import Lowered
from .options import CompileOptions
from .program import Program
from .progress import stage

if TYPE_CHECKING:
    from .tvm import relax


@dataclass
class Steps:
    """The program as it stands, the reports so far, and the dump directory. scope: makes the context in which TVM's passes see the target."""

    program: Program
    target: Target
    options: CompileOptions
    scope: Callable[[Target], AbstractContextManager[Any]]
    accuracy: Accuracy | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    reports: list[PassReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.options.dump_ir is not None:
            self.options.dump_ir.mkdir(parents=True, exist_ok=True)
        self._dump("imported")

    def step(self, name: str, work: Callable[[Program, PassContext], Program]) -> PassReport:
        """Run one step, time it, report it, dump what it left."""
        context = PassContext(self.target, self.options.seed, PassReport(name), self.accuracy)
        with stage(name) as current, self.scope(self.target):
            self.program = work(self.program, context)
        context.report.seconds = current.seconds
        self.reports.append(context.report)
        self._dump(name)
        return context.report

    def lowered(
        self,
        *,
        report: Mapping[str, Any],
        weights: Mapping[str, np.ndarray],
        sources: Mapping[str, str],
        executable: relax.VMExecutable | None = None,
        library: bytes = b"",
    ) -> Lowered:
        """What the target hands over; arguments as in `Lowered`."""
        program = self.program
        return Lowered(
            executable=executable,
            library=library,
            weights=dict(weights),
            inputs=program.inputs,
            outputs=program.outputs,
            target=self.target,
            provenance=program.provenance,
            dims=program.dims,
            recipe=dict(self.recipe),
            report={"passes": [entry.to_dict() for entry in self.reports], **report},
            sources=dict(sources),
        )

    def _dump(self, name: str) -> None:
        if self.options.dump_ir is not None:
            path = self.options.dump_ir / f"{len(self.reports):02d}_{name}.py"
            path.write_text(self.program.module.script(show_meta=False) + "\n")
