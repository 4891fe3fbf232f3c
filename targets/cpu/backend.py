"""The CPU backend as the registry sees it: names, manifests, and lowering of a program to an executable."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...compiler.errors import UsageError
from ..base import Target

if TYPE_CHECKING:
    from ...compiler.lowered import Lowered
    from ...compiler.steps import Steps


def names() -> list[str]:
    """Machines that `cpu:NAME` takes."""
    from .machines import MACHINES

    return ["host", *sorted(MACHINES)]


def resolve(name: str) -> Target:
    """`""` or `host`: this machine as detected; otherwise a manifest by name (UsageError lists the names)."""
    from .host import host
    from .machines import MACHINES

    if name in ("", "host"):
        return host()
    if name not in MACHINES:
        raise UsageError(f"unknown CPU 'cpu:{name}': expected one of {', '.join(names())}")
    return MACHINES[name]


def having(target: Target, precision: str) -> Target:
    """The target with the kernels for float32 products by tiles of bfloat16, where it has such tiles. UsageError for other precisions."""
    from ...passes.precision import FOR_TARGETS
    from .amx import TERMS

    if precision not in TERMS:
        raise UsageError(f"precision: {target.text} multiplies in {', '.join((*FOR_TARGETS['cpu'], *TERMS))}, not in '{precision}'")
    return replace(target, formats=target.formats | {precision})


def scope(target: Target) -> AbstractContextManager[Any]:
    """TVM's view of the machine."""
    from .lower import tvm_target

    return tvm_target(target)


def lower(steps: Steps) -> Lowered:
    """See `pipeline.lower`."""
    from . import pipeline

    return pipeline.lower(steps)
