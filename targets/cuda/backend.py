"""The CUDA backend as the registry sees it: GPUs by compute capability, and lowering of a program to CUDA source and a library."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ...compiler.errors import UsageError
from ..base import Target

if TYPE_CHECKING:
    from ...compiler.lowered import Lowered
    from ...compiler.steps import Steps


def names() -> list[str]:
    """GPUs that `cuda:NAME` takes."""
    from .machines import MACHINES

    return sorted(MACHINES)


def resolve(name: str) -> Target:
    """`""`: this machine's GPU, the default one where there is none; otherwise a manifest by name (UsageError lists the names)."""
    from .machines import MACHINES, detected

    name = name or detected()
    if name not in MACHINES:
        raise UsageError(f"unknown GPU 'cuda:{name}': expected one of {', '.join(names())}")
    return MACHINES[name]


def having(target: Target, precision: str) -> Target:
    """The same: see `pipeline.PRECISIONS`."""
    return target


def scope(target: Target) -> AbstractContextManager[Any]:
    """What TVM's passes see: they only rewrite the graph, no code of theirs is used."""
    from ...compiler.tvm import tvm

    return tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu"})


def lower(steps: Steps) -> Lowered:
    """See `pipeline.lower`."""
    from . import pipeline

    return pipeline.lower(steps)
