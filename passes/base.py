"""Pass: a frozen dataclass from Program to Program; and the context that carries what passes need and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..compiler.accuracy import Accuracy, Executor
from ..compiler.calibration import Feeds
from ..compiler.errors import UsageError
from ..compiler.program import Program
from ..targets.base import Target


@dataclass
class PassReport:
    """What one pass did: `matches` counts by kind, `notes` in words, `tables` by title (a row is a dict), `lossy` as on the pass, `loss` by
    metric, wall time in seconds."""

    name: str
    matches: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lossy: bool = False
    loss: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": self.name, "matches": dict(self.matches), "notes": list(self.notes)}
        entry |= {"tables": self.tables} if self.tables else {}
        entry |= {"lossy": True} if self.lossy else {}
        entry |= {"loss": self.loss} if self.loss else {}
        return entry | {"seconds": round(self.seconds, 4)}


@dataclass
class PassContext:
    """Handed to every pass: the target manifest, the seed, the report of the pass that runs, and the data that a pass may observe the model on."""

    target: Target
    seed: int = 0
    report: PassReport = field(default_factory=lambda: PassReport(""))
    accuracy: Accuracy | None = None

    def matched(self, **counts: int) -> None:
        """Add to the running pass's match counts: `context.matched(batch_norm=3)`."""
        for kind, count in counts.items():
            if count:
                self.report.matches[kind] = self.report.matches.get(kind, 0) + count

    def note(self, text: str) -> None:
        self.report.notes.append(text)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table to the running pass's report; every row has the same keys, values are numbers or text."""
        self.report.tables[title] = [dict(row) for row in rows]

    @property
    def calibration(self) -> tuple[Feeds, ...]:
        """The calls to observe the model on; empty without calibration data."""
        return self.accuracy.calibration if self.accuracy is not None else ()

    @property
    def executor(self) -> Executor:
        """Runs any program on this machine as it is: give it one whose `main` returns what is to be observed. UsageError without calibration data."""
        return self.measured().executor

    def measured(self) -> Accuracy:
        """The accuracy measurement; UsageError naming the flag when there is no calibration data."""
        if self.accuracy is None:
            raise UsageError(f"'{self.report.name}' needs data to observe the model on: give --calibration DATA.npz (Python: calibration=...)")
        return self.accuracy


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Fields of a subclass are its options: recipe keys and command-line flags carry the same names.

    A pass that finds nothing returns the very same Program object; every pass leaves a well-formed module. `lossy`: it may change the model's results, so it
    runs only where asked for, has a setting at which it is the identity, and its loss is measured when there is calibration data. `flag`: the name of the
    compile option that asks for it ("quantize").
    """

    name: ClassVar[str] = ""
    lossy: ClassVar[bool] = False
    flag: ClassVar[str] = ""

    def run(self, program: Program, context: PassContext) -> Program:
        raise NotImplementedError

    @classmethod
    def from_flag(cls, value: Any) -> Pass:
        """The pass for the value of its flag: a ready pass as it is, anything else is the pass's first option. UsageError for a value it does not take."""
        if isinstance(value, Pass):
            if not isinstance(value, cls):
                raise UsageError(f"{cls.flag} takes a {cls.__name__}, not a {type(value).__name__}")
            return value
        return cls(value)

    def options(self) -> Mapping[str, Any]:
        return asdict(self)
