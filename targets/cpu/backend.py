"""The CPU backend as the registry sees it: names, manifests, and lowering of a program to an executable."""

from __future__ import annotations

from ...compiler.errors import UsageError
from ..base import Target


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
