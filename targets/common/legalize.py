"""Relax operators to tensor expressions, for every target. Families register their functions; what none claims, TVM's own legalization takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...compiler.tvm import relax

Legalizer = Callable[[Any, Any], Any]

LEGALIZERS: dict[str, Legalizer] = {}


def legalizer(*names: str) -> Callable[[Legalizer], Legalizer]:
    """Register a function (BlockBuilder, call) -> expression for Relax operators."""

    def register(function: Legalizer) -> Legalizer:
        for name in names:
            if name in LEGALIZERS:
                raise ValueError(f"{name} has two legalizers")
            LEGALIZERS[name] = function
        return function

    return register


def default_legalization(builder: Any, call: Any) -> Any:
    """TVM's own legalization of a call."""
    return call.op.get_attr("FLegalize")(builder, call)


def legalize(module: Any, own: Mapping[str, Legalizer] | None = None, keep: tuple[str, ...] = ()) -> Any:
    """Lower every Relax operator to `call_tir`, but for reshapes and the operators named in `keep`. own: what a target defines in its own way."""
    from . import ops_cast, ops_constants, ops_conv, ops_index, ops_linear, ops_logic, ops_norm, scaled_rows  # noqa: F401

    return relax.transform.LegalizeOps({**LEGALIZERS, **(own or {})}, skip_ops=["relax.reshape", *keep])(module)
