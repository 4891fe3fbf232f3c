"""Options of one compilation that are not properties of the program or the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError


@dataclass(frozen=True)
class CompileOptions:
    """recipe: a TOML file with passes and options, None for the target's default. compression: flag -> value of the passes that change the model
    (`{"quantize": "int8", "token_keep": 0.7}`; None: not asked for), which win over the recipe's. dump_ir: directory for the module after every pass. seed: of every random
    choice. profile: time every kernel on this machine and report it. threads: worker count the schedules are chosen for, None for all physical cores of the target.
    precision: of products; on a CPU "fp32" | "bf16" | "bf16x2" | "bf16x3", on a GPU "fp32" | "tf32" | "fp16" | "bf16", None for fp32. emit_only: sources alone, no library.
    tuning_db: the tuning database whose winners take precedence over predictions. quick: a CPU's schedules are chosen without emitting the candidates, for
    results that run a few times only.
    """

    recipe: Path | None = None
    compression: Mapping[str, Any] = field(default_factory=dict)
    dump_ir: Path | None = None
    seed: int = 0
    profile: bool = False
    threads: int | None = None
    precision: str | None = None
    emit_only: bool = False
    tuning_db: Path | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        if self.recipe is not None and not self.recipe.is_file():
            raise UsageError(f"recipe file {self.recipe} does not exist")
        if self.dump_ir is not None and self.dump_ir.exists() and not self.dump_ir.is_dir():
            raise UsageError(f"--dump-ir needs a directory; {self.dump_ir} is a file")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed must be an integer of at least 0, not {self.seed!r}")
