"""Exceptions of tcompile. Each mirrors one exit code of the command; every message says what was expected, what came and the next step."""

from __future__ import annotations

from dataclasses import dataclass


class TcompileError(Exception):
    """Base of all expected failures. `exit_code` is what the `tcompile` command returns for it."""

    exit_code = 1


class UsageError(TcompileError):
    """The request itself is wrong: a flag, a path, a shape, an input name or dtype (exit code 2)."""

    exit_code = 2


@dataclass(frozen=True)
class Blocker:
    """One reason why a model cannot be compiled.

    node: name of the source node (or "" when the whole file is concerned), op: its operator as `domain::Op`, reason: one sentence.
    """

    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        place = f"node '{self.node}' " if self.node else ""
        return f"{place}({self.op}): {self.reason}" if self.op else f"{place}{self.reason}"


class UnsupportedModel(TcompileError):
    """The model cannot be compiled; `blockers` lists every reason at once (exit code 3)."""

    exit_code = 3

    def __init__(self, blockers: list[Blocker] | str):
        if isinstance(blockers, str):
            blockers = [Blocker("", "", blockers)]
        self.blockers = list(blockers)
        lines = [str(blocker) for blocker in self.blockers]
        super().__init__(lines[0] if len(lines) == 1 else f"{len(lines)} blockers:\n" + "\n".join(f"  - {line}" for line in lines))


class ToolchainError(TcompileError):
    """A tool, device or ISA feature is missing where it is needed (exit code 4)."""

    exit_code = 4


class VerificationError(TcompileError):
    """A result differs from the reference, or an artifact from its recorded hashes (exit code 5)."""

    exit_code = 5
