"""Names that the importers, the targets and the runtime share about control flow that is decided while a model runs."""

from __future__ import annotations

import json
from typing import Any

#: begins the names of the functions that drivers call; the first one of a program is number 0
FUNCTION_PREFIX = "control_"
#: begins the names of the drivers
DRIVER_PREFIX = "tcompile.control."
BRANCH, LOOP = f"{DRIVER_PREFIX}branch", f"{DRIVER_PREFIX}loop"


def drivers(module: Any) -> set[tuple[str, str]]:
    """(source node, operator) of every call of a driver in the module."""
    from .tvm import relax, relax_functions

    found: set[tuple[str, str]] = set()

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_pure_packed":
            driver = str(expr.args[0].global_symbol)
            if driver.startswith(DRIVER_PREFIX):
                found.add((json.loads(expr.args[1].value)["node"], driver.removeprefix(DRIVER_PREFIX)))

    for _, function in relax_functions(module):
        relax.analysis.post_order_visit(function, visit)
    return found
