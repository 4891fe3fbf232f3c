"""Pass: a frozen dataclass from Program to Program; and the context that carries what passes need and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..compiler.program import Program
from ..targets.base import Target


@dataclass
class PassReport:
    """What one pass did: `matches` counts by kind, `notes` in words, wall time in seconds."""

    name: str
    matches: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "matches": dict(self.matches), "notes": list(self.notes), "seconds": round(self.seconds, 4)}


@dataclass
class PassContext:
    """Handed to every pass: the target manifest, the seed, and the report of the pass that runs."""

    target: Target
    seed: int = 0
    report: PassReport = field(default_factory=lambda: PassReport(""))

    def matched(self, **counts: int) -> None:
        """Add to the running pass's match counts: `context.matched(batch_norm=3)`."""
        for kind, count in counts.items():
            if count:
                self.report.matches[kind] = self.report.matches.get(kind, 0) + count

    def note(self, text: str) -> None:
        self.report.notes.append(text)


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Fields of a subclass are its options: recipe keys and command-line flags carry the same names.

    A pass that finds nothing returns the very same Program object; every pass leaves a well-formed module.
    """

    name: ClassVar[str] = ""

    def run(self, program: Program, context: PassContext) -> Program:
        raise NotImplementedError

    def options(self) -> Mapping[str, Any]:
        from dataclasses import asdict

        return asdict(self)
