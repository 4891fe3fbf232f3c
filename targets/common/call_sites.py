"""Where kernels are called in a legalized module, and which of their arguments are known at compile time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...compiler.tvm import Constant, relax, relax_functions


def call_sites(module: Any) -> dict[str, list[Sequence[Any]]]:
    """Per PrimFunc: the arguments of each of its calls, in the program's order."""
    sites: dict[str, list[Sequence[Any]]] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir":
            sites.setdefault(expr.args[0].name_hint, []).append(list(expr.args[1].fields))

    for _, function in relax_functions(module):
        relax.analysis.post_order_visit(function, visit)
    return sites


def constant_positions(sites: list[Sequence[Any]]) -> frozenset[int]:
    """The argument positions that hold a constant at every one of a kernel's call sites."""
    return frozenset.intersection(*(frozenset(position for position, arg in enumerate(args) if isinstance(arg, Constant)) for args in sites))
