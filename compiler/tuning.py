"""Tuning a model: its kernels as tasks, a session of the tuner over them, the database that compilations read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..autotune.database import Database
from ..autotune.learned import default_model
from ..autotune.tuner import Outcome, Progress, Setting, summary, tune
from ..targets.base import Target
from . import threads as pool
from .accuracy import Accuracy
from .artifact import versions
from .errors import ToolchainError, UsageError
from .options import CompileOptions
from .pipeline import graph_passes
from .program import Program
from .progress import stage

__all__ = ["TRIALS", "parse_budget", "summary", "tune_program"]

#: candidates per kernel when nobody says how many
TRIALS = 64


def tune_program(
    program: Program,
    target: Target,
    options: CompileOptions,
    database: str | Path,
    *,
    accuracy: Accuracy | None = None,
    trials: int = TRIALS,
    seconds: float | None = None,
    show: Callable[[Sequence[Progress]], None] = lambda _: None,
) -> Outcome:
    """Search the schedules of every kernel of a program on this machine and keep the winners in `database`.

    accuracy: what compressing passes observe. trials: candidates per kernel; seconds: budget for all. Kernels with sizes known only at run time, and those of no template, keep their schedules. Raises UsageError for a
    target other than this machine's kind or a bad database, ToolchainError where this machine cannot run the target's code.
    """
    if target.kind != "cpu":
        raise UsageError(f"tuning measures on this machine's CPU; {target.text} cannot be measured here")
    if trials < 1:
        raise UsageError(f"tuning needs at least 1 trial per kernel, not {trials}")
    from ..targets.cpu.host import host_features
    from ..targets.cpu.tasks import fused_module, hardware, tasks

    if missing := sorted(target.features - host_features()):
        raise ToolchainError(f"this CPU lacks {', '.join(missing)}, so code for {target.text} cannot be measured here; tune on such a machine")
    threads = pool.checked(min(target.cores, len(pool.CPUS)) if options.threads is None else options.threads)
    target = replace(target, cores=threads)
    records = Database(database)
    try:
        with stage("kernels to tune"):
            found = tasks(fused_module(graph_passes(program, target, options, accuracy)), target)
        if not found:
            raise UsageError(
                "no kernel of this model has schedules to choose from: all sizes are known only at run time, or no template takes its operators"
            )
        model = default_model("cpu")
        setting = Setting(records, model, target.text, hardware(target), threads, _versions(), trials, seconds, options.seed)
        return tune(found, setting, show)  # no stage: it would raise Ctrl-C again, after the tuner has ended the search for it
    finally:
        records.close()


def _versions() -> dict[str, str]:
    return {**versions(), "python": sys.version.split()[0]}


def parse_budget(text: Any) -> float | None:
    """Seconds of a time budget: a number of seconds, or "90s", "10m", "1.5h". Raises UsageError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text).strip())
    if found is None or not (seconds := float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]):
        raise UsageError(f"time budget {text!r}: expected seconds or a number with s, m or h, such as 90s, 10m or 1.5h")
    return seconds
