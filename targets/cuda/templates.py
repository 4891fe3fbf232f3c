"""Which kernels a fused function gets, and an operator that is one of its own: the order in which templates are asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...compiler.dialect import attention as attention_dialect
from ...compiler.dialect import attention_quantized as quantized_dialect
from ...compiler.dialect import recurrent as recurrent_dialect
from ...compiler.tvm import TensorLoad, relax, tirx
from ...passes.products import operator
from ..base import Target
from ..common.fused import Unfusable, analyze, static
from ..common.stages import Unreadable, read_stages, reads_in_place
from . import attention, attention_codes, attention_hopper, generic, recurrent, scan, scatter, sort
from .blocks import BlockGemm, HopperBlockGemm
from .depthwise import Depthwise
from .gemm import Gemm
from .gemm_hopper import HopperGemm
from .grouped import Grouped
from .kernel import SHORT, Plan, Unsupported
from .product import Product, Request, plan
from .sizes import FIXED, Known
from .sparse import SparseGemm
from .symbols import dims_of
from .weight_only import WeightOnly
from .weight_only_hopper import HopperWeightOnly
from .zeros import Zeros

#: templates of products in the order in which they are asked: by weights that have zeros in whole tiles, by any; those of core operators that others do not take
SPARSE: tuple[type[Product], ...] = (HopperBlockGemm, BlockGemm)
DENSE: tuple[type[Product], ...] = (HopperGemm, Gemm, Depthwise)
TEMPLATES: dict[str, tuple[type[Product], ...]] = {"weight_only_matmul": (HopperWeightOnly, WeightOnly), "grouped_matmul": (Grouped,)}
ATTENTION: tuple[Callable[..., Plan], ...] = (attention_hopper.kernel, attention.kernel)
#: Relax operators that are kernels of their own: call -> its plan
WHOLE: dict[str, Callable[[Any], Plan]] = {name: part.kernel for part in (scan, scatter, sort) for name in part.OPERATORS}


def plan_of(
    func: Any,
    target: Target,
    policy: str,
    constants: frozenset[int] = frozenset(),
    rounded: str = "",
    zeros: Mapping[int, Zeros] | None = None,
    known: Known = FIXED,
) -> Plan:
    """The kernels of one fused function: a template where one takes it, the generic scheduler otherwise. Raises Unsupported when neither does.

    constants: positions of parameters that are known at compile time; zeros: those of them that templates may leave out. rounded: a type of two bytes in which the
    float32 result is written, too, as a last parameter. known: what is known of the function's symbols.
    """
    try:
        fused = analyze(func)
    except Unfusable as problem:
        return generic.schedule(func, str(problem), rounded, known)
    reason, templates = "", TEMPLATES.get(fused.core["op"], DENSE)
    pattern = (zeros or {}).get(fused.param_index(fused.inputs[1])) if len(fused.inputs) > 1 else None
    if pattern is not None:
        templates = (*SPARSE, *((SparseGemm,) if pattern.two_of_four else ()), *templates)
    asked = Request(fused, target, policy, constants, rounded, known, pattern)
    for template in templates:
        try:
            return plan(template, asked)
        except Unfusable as problem:
            reason = str(problem)
    return generic.schedule(func, reason, rounded, known)


def whole(call: Any, target: Target, policy: str, known: Known) -> Callable[[], Plan] | None:
    """What makes the kernels of an operator that takes part in no fusion, and may raise Unsupported; None for other operators."""
    name = getattr(call.op, "name", str(call.op))
    if name == attention_dialect.NAME:
        return lambda: _first_of(ATTENTION, call, target, policy, known)
    if name == quantized_dialect.NAME:
        return lambda: attention_codes.kernel(call, target, policy, known)
    if name == recurrent_dialect.NAME:
        return lambda: recurrent.kernel(_of_known_sizes(call), target)
    if name in WHOLE:
        return lambda: WHOLE[name](call if name in scan.OPERATORS else _of_known_sizes(call))
    return None


def _of_known_sizes(call: Any) -> Any:
    """The call; raises Unsupported when a size of its operands is open."""
    for arg in call.args:
        if isinstance(arg.ty, relax.TensorType) and any(static(dim) is None for dim in dims_of(arg.ty) or [None]):
            raise Unsupported("sizes known only at run time")
    return call


def _first_of(templates: Sequence[Callable[..., Plan]], *args: Any) -> Plan:
    """The plan of the first template that has one; raises the last one's Unsupported."""
    for template in templates[:-1]:
        with contextlib.suppress(Unsupported):
            return template(*args)
    return templates[-1](*args)


def rounded_copies(module: Any) -> dict[Any, tuple[Any, str]]:
    """Variable of a kernel's only result -> (variable that is the same rounded to two bytes, its type): one kernel writes both."""
    made, found = {}, {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if operator(call) != "relax.call_tir" or isinstance(call.ty_args[0], relax.TupleType):
                continue
            made[binding.var] = call
            source = call.args[1].fields[0] if len(call.args[1].fields) == 1 else None
            dtype = str(call.ty_args[0].dtype)
            if source in made and source not in found and dtype in SHORT and str(source.ty.dtype) == "float32" and _is_cast(module[call.args[0]]):
                found[source] = binding.var, dtype
    return found


def _is_cast(func: Any) -> bool:
    """The function is nothing but a cast."""
    try:
        (stage,) = read_stages(func)
    except (Unreadable, ValueError):
        return False
    value = stage.value
    return not stage.reduced and isinstance(value, tirx.Cast) and isinstance(value.value, TensorLoad) and reads_in_place(value.value, stage)
