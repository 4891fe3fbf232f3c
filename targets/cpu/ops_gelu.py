"""GELU and its form with tanh as functions of their own, which `math` has for whole vectors; not as what they are defined by, where all of it would be computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...compiler.tvm import T, register_intrinsic, relax, te, tirx
from ..common.legalize import Legalizer, default_legalization

#: functions of a float32
GELU, GELU_TANH = "tirx.tcompile_gelu", "tirx.tcompile_gelu_tanh"


def _by_erf(call: Any) -> Any:
    x = call.args[0]
    return x * (T.float32(0.5) + T.float32(0.5) * T.erf(x * T.float32(math.sqrt(0.5))))


def _by_tanh(call: Any) -> Any:
    x = call.args[0]
    return x * (T.float32(0.5) + T.float32(0.5) * T.tanh(T.float32(math.sqrt(2.0 / math.pi)) * (x + T.float32(0.044715) * x * x * x)))


register_intrinsic(GELU, _by_erf)
register_intrinsic(GELU_TANH, _by_tanh)


def _function(name: str, hint: str) -> Callable[[Any, Any], relax.Expr]:
    def legalize(builder: Any, call: Any) -> relax.Expr:
        if str(call.args[0].ty.dtype) != "float32":
            return default_legalization(builder, call)
        return builder.call_te(
            lambda x: te.compute(x.shape, lambda *axes: tirx.call_intrin("float32", name, x[axes]), name=hint), call.args[0], primfunc_name_hint=hint
        )

    return legalize


OWN: dict[str, Legalizer] = {"relax.nn.gelu": _function(GELU, "gelu"), "relax.nn.gelu_tanh": _function(GELU_TANH, "gelu_tanh")}
