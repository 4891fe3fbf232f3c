"""Definitions of the core operators, as tensor expressions that carry their attributes; the semantics, not the speed."""

from __future__ import annotations

from typing import Any

from ...compiler.dialect.grouped import NAME as GROUPED
from ...compiler.dialect.weight_only import NAME as WEIGHT_ONLY
from ...compiler.dialect.weight_only import attrs_of, middle
from ...compiler.tvm import te, tirx
from .fused import Fused, core_attrs
from .legalize import default_legalization, legalizer

#: Relax's pattern kind "an operator whose element-wise consumers may join it"; casts of integers and the condition for padding hide it from TVM's own analysis
OUT_ELEMENTWISE_FUSABLE = 4
#: nothing joins it
OPAQUE = 8


def matmul(a: Any, b: Any, dtype: str = "") -> Any:
    """a: [..., M, K], b: [..., K, N] -> [..., M, N] of `dtype` (that of a when empty); batch dims broadcast as in numpy. 1-D operands are for the caller to expand."""
    k = te.reduce_axis((0, a.shape[-1]), "k")
    a_lead, b_lead = list(a.shape[:-2]), list(b.shape[:-2])
    rank = max(len(a_lead), len(b_lead))

    def dim(position: int) -> Any:
        sizes = [lead[position - rank + len(lead)] for lead in (a_lead, b_lead) if position - rank + len(lead) >= 0]
        return next((size for size in sizes if not _unit(size)), sizes[0])

    def pick(lead: list[Any], batch: list[Any]) -> list[Any]:
        tail = batch[rank - len(lead) :]
        return [0 if _unit(size) and not _unit(dim(rank - len(lead) + position)) else tail[position] for position, size in enumerate(lead)]

    def element(*axes: Any) -> Any:
        *batch, m, n = axes
        return te.sum(widened(a[(*pick(a_lead, batch), m, k)], dtype) * widened(b[(*pick(b_lead, batch), k, n)], dtype), axis=k)

    shape = [*(dim(position) for position in range(rank)), a.shape[-2], b.shape[-1]]
    return te.compute(shape, element, name="matmul", attrs=core_attrs("matmul"))


def widened(value: Any, dtype: str) -> Any:
    """An operand of a product as `dtype`, in which the products are added up."""
    if not dtype or str(getattr(value, "dtype", "") or value.ty.dtype) == dtype:
        return value
    return tirx.Cast(dtype, value)


def _unit(size: Any) -> bool:
    return str(size) in ("1", "T.int64(1)")


@legalizer("relax.matmul")
def _matmul(builder: Any, call: Any) -> Any:
    a, b = call.args
    if len(a.ty.shape) < 2 or len(b.ty.shape) < 2:
        return default_legalization(builder, call)
    return builder.call_te(matmul, a, b, str(call.ty.dtype), primfunc_name_hint="matmul", primfunc_attrs={"op_pattern": OUT_ELEMENTWISE_FUSABLE})


def weight_only_matmul(x: Any, packed: Any, scales: Any, *rest: Any, bits: int, group: int) -> Any:
    """x: [..., M, K] of floats times codes of `bits` with a scale and perhaps a zero per `group`, see `compiler.dialect.weight_only` -> [..., M, N]."""
    k = te.reduce_axis((0, x.shape[-1]), "k")

    def element(*axes: Any) -> Any:
        *lead, n = axes
        code = code_at(packed, k, n, bits)
        zero = rest[0][k // group, n].astype("float32") if rest else tirx.const(middle(bits), "float32")
        return te.sum(widened(x[(*lead, k)], "float32") * (scales[k // group, n] * (code.astype("float32") - zero)), axis=k)

    attrs = core_attrs("weight_only_matmul", bits=bits, group=group)
    return te.compute((*x.shape[:-1], packed.shape[1]), element, name="weight_only_matmul", attrs=attrs)


def code_at(packed: Any, k: Any, n: Any, bits: int) -> Any:
    """Code k of column n of `packed`, uint8; see `compiler.dialect.weight_only`."""
    if bits == 8:
        return packed[k, n]
    mask = tirx.const((1 << bits) - 1, "uint8")
    if 8 % bits == 0:
        per_byte = 8 // bits
        return (packed[k // per_byte, n] >> ((k % per_byte) * bits).astype("uint8")) & mask
    # it may lie in two bytes
    byte, last = k * bits // 8, packed.shape[0] - 1
    high = packed[tirx.min(byte + 1, last), n].astype("uint16")
    return ((packed[byte, n].astype("uint16") | high << tirx.const(8, "uint16")) >> (k * bits % 8).astype("uint16")).astype("uint8") & mask


@legalizer(WEIGHT_ONLY)
def _weight_only_matmul(builder: Any, call: Any) -> Any:
    bits, group = attrs_of(call)
    attrs = {"op_pattern": OUT_ELEMENTWISE_FUSABLE}
    return builder.call_te(weight_only_matmul, *call.args, bits=bits, group=group, primfunc_name_hint="weight_only_matmul", primfunc_attrs=attrs)


def weight_only_operands(fused: Fused) -> list[Any]:
    """x, packed codes, scales and perhaps zeros of a function whose core is `weight_only_matmul`, whatever the order in which the core reads them."""
    scales = next(buffer for buffer in fused.inputs[1:] if str(buffer.ty.dtype) == "float32")
    codes = [buffer for buffer in fused.inputs if str(buffer.ty.dtype) == "uint8"]
    return [fused.inputs[0], codes[0], scales, *codes[1:]]


def owners(ends: Any, rows: Any) -> Any:
    """ends: [E] -> int32 [S], ascending: of each row the first group that ends behind it, E where none does."""
    e, groups = te.reduce_axis((0, ends.shape[0]), "e"), tirx.Cast("int32", ends.shape[0])
    number = lambda row: tirx.if_then_else(ends[e] > tirx.Cast(ends.dtype, row), tirx.Cast("int32", e), groups)  # noqa: E731
    return te.compute((rows,), lambda row: te.min(number(row), axis=e), name="owners")


def grouped_matmul(x: Any, weight: Any, owner: Any, dtype: str) -> Any:
    """x: [S, K], weight: [E, K, N], owner: [S] as `owners` gives it -> [S, N] of `dtype`: rows by the weight of their owner, zeros where there is none."""
    k, groups = te.reduce_axis((0, x.shape[1]), "k"), tirx.Cast("int32", weight.shape[0])

    def element(row: Any, n: Any) -> Any:
        inside = tirx.min(owner[row], groups - 1).astype("int64")
        products = widened(x[row, k], dtype) * widened(weight[inside, k, n], dtype)
        return te.sum(tirx.if_then_else(owner[row] < groups, products, tirx.const(0, dtype)), axis=k)

    return te.compute((x.shape[0], weight.shape[2]), element, name="grouped_matmul", attrs=core_attrs("grouped_matmul"))


@legalizer(GROUPED)
def _grouped_matmul(builder: Any, call: Any) -> Any:
    x, weight, ends = call.args
    # kernels may trust owners, which are made here whatever the ends are
    owner = builder.emit(builder.call_te(owners, ends, x.ty.shape[0], primfunc_name_hint="owners", primfunc_attrs={"op_pattern": OPAQUE}))
    attrs = {"op_pattern": OUT_ELEMENTWISE_FUSABLE}
    return builder.call_te(grouped_matmul, x, weight, owner, str(call.ty.dtype), primfunc_name_hint="grouped_matmul", primfunc_attrs=attrs)


def grouped_operands(fused: Fused) -> tuple[Any, Any, Any]:
    """x, weights and owners of a function whose core is `grouped_matmul`, whatever the order in which the core reads them."""
    by_rank = {len(buffer.shape): buffer for buffer in fused.inputs}
    return by_rank[2], by_rank[3], by_rank[1]
