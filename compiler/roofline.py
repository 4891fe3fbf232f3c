"""Arithmetic and memory traffic of a program by layer, and the least time they take on a machine: the roofline model (Williams et al., 2009).

Counted on the imported program, without compiling it. A layer is a node of the source. A multiply-add is two operations; an element of an element-wise
operator or reduction is one, of a softmax or normalization five; moving data is none. A layer reads each of its operands once and writes each result that
another layer or the caller takes once; a gather reads only what it takes, a grouped product the weights of no more groups than it has rows. Reshapes cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..targets.base import Target
from .dialect import attention, attention_quantized, grouped, recurrent, weight_only
from .element_types import numpy_dtype
from .program import DimRange, Program
from .tvm import Constant, relax, structural_map, tirx, tvm

#: operators that hand on what they get, without touching it
_FREE = frozenset(
    "relax." + name for name in ("reshape", "flatten", "expand_dims", "squeeze", "shape_of", "shape_to_tensor", "tensor_to_shape", "memory_view")
) | {"tcompile.hide_shape", "tcompile.bitcast"}
#: operators that only move or make elements
_MOVING = frozenset(
    "relax." + name
    for name in (
        *(
            "permute_dims",
            "concat",
            "split",
            "stack",
            "strided_slice",
            "dynamic_strided_slice",
            "slice_scatter",
            "take",
            "gather_elements",
            "gather_nd",
        ),
        *("scatter_elements", "scatter_nd", "index_tensor", "index_put", "broadcast_to", "repeat", "tile", "flip", "astype", "where", "one_hot"),
        *("full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "arange", "tril", "triu", "eye", "nn.pad", "nn.pixel_shuffle"),
        *("reverse_sequence", "meshgrid", "layout_transform"),
    )
)
#: operators that read as much of their first operand as they make
_PARTS = frozenset("relax." + name for name in ("take", "gather_elements", "gather_nd", "index_tensor", "strided_slice"))
_OPERATIONS_OF_A_NORM = 5


@dataclass(frozen=True)
class Layer:
    """One source node. flops: operations, a multiply-add is two. bytes: read and written. milliseconds: the larger of what the two take at the machine's peak rates;
    bound: which of them that is. dtype: of the arithmetic."""

    name: str
    operators: tuple[str, ...]
    dtype: str
    flops: int
    bytes: int
    milliseconds: float
    bound: str

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def default_size(bounds: DimRange) -> int:
    """The size that a symbolic dim is evaluated at: its `opt`, else the least positive one in its range."""
    return bounds.opt if bounds.opt is not None else max(1, bounds.min)


def parameters(program: Program) -> tuple[int, int]:
    """Elements and bytes of all constants; scalars of the program's own making are among them."""
    found: dict[Any, Constant] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, Constant) and isinstance(expr.ty, relax.TensorType):
            found[expr] = expr

    relax.analysis.post_order_visit(program.main, visit)
    return sum(_elements(value.ty, {}) for value in found.values()), sum(bytes_of(value.ty, {}) for value in found.values())


def layers(program: Program, target: Target, sizes: Mapping[str, int] | None = None) -> list[Layer]:
    """The layers in the program's order. sizes: of symbolic dims by name, `default_size` for those left out; sizes that only a run knows count as 1."""
    known = {name: default_size(bounds) for name, bounds in program.dims.items()} | dict(sizes or {})
    groups: dict[str, list[Any]] = {}
    for binding in (binding for block in program.main.body.blocks for binding in block.bindings):
        groups.setdefault(program.node(binding.var.name), []).append(binding)
    maker = {binding.var: name for name, group in groups.items() for binding in group}
    outside = set(_operands(program.main.body.body))
    for name, group in groups.items():
        outside |= {operand for binding in group for operand in _operands(binding) if maker.get(operand) not in (None, name)}
    result = [_layer(name, group, maker, outside, target, known) for name, group in groups.items()]
    return [layer for layer in result if layer.operators]


def _layer(name: str, group: list[Any], maker: Mapping[Any, str], outside: set[Any], target: Target, known: Mapping[str, int]) -> Layer:
    flops, read, operators, width = 0, {}, [], ""
    for binding in group:
        call = getattr(binding, "value", None)
        operator = getattr(getattr(call, "op", None), "name", "")
        if not operator:
            continue
        operators.append(operator.removeprefix("relax."))
        count = _flops(call, operator, known)
        if count >= flops:  # the largest part of the arithmetic
            width = _dtype(call.args[0].ty if operator not in _MOVING | _FREE and call.args else binding.var.ty)
        flops += count
        if operator in _FREE:
            continue
        for position, operand in enumerate(_operands(call)):
            if maker.get(operand) != name:
                taken = operator in _PARTS and position == 0
                size = bytes_of(binding.var.ty if taken else operand.ty, known)
                if operator == grouped.NAME and position == 1:
                    size = _of_owners(call, size, known)
                read[operand] = max(read.get(operand, 0), size)
    free = all(operator in _FREE for operator in ("relax." + text if "." not in text or text.startswith("nn.") else text for text in operators))
    written = 0 if free else sum(bytes_of(binding.var.ty, known) for binding in group if binding.var in outside)
    moved = sum(read.values()) + written
    compute, memory = flops / (_rate(target, width) * 1e6), moved / (target.bandwidth_gbs * _memory_cores(target) * 1e6)
    return Layer(name, tuple(operators), width, flops, moved, max(compute, memory), "compute" if compute > memory else "memory")


def _of_owners(call: Any, size: int, known: Mapping[str, int]) -> int:
    """Bytes of the weights that a grouped product reads of so many: those of as many groups as there are rows at most."""
    rows, groups = _shape(call.args[0].ty, known)[0], _shape(call.args[1].ty, known)[0]
    return size // groups * min(rows, groups)


def _rate(target: Target, dtype: str) -> float:
    """GFLOP/s of all cores. Formats without arithmetic of their own are computed in float32."""
    native = dtype if dtype in target.formats else "float32"
    return target.peak_gflops(native) * target.cores / (2 if dtype in ("float64", "int64", "uint64") else 1)


def _memory_cores(target: Target) -> int:
    """Bandwidth is that of one core of a CPU, and of the whole card elsewhere; all cores together get at most so many times that of one."""
    return target.cores if target.kind == "cpu" else 1


def _flops(call: Any, operator: str, known: Mapping[str, int]) -> int:
    if operator in _FREE or operator in _MOVING:
        return 0
    result = _elements(call.ty, known)
    shapes = [_shape(operand.ty, known) for operand in call.args if isinstance(operand.ty, relax.TensorType)]
    if operator == "relax.matmul":
        return 2 * result * shapes[0][-1]
    if operator.startswith("relax.nn.conv"):
        # every element of the result, or of what a transposed one spreads, meets the weights of its own output, or input
        own = dict(zip(str(call.attrs.kernel_layout), shapes[1], strict=True))["I" if "transpose" in operator else "O"]
        return 2 * (math.prod(shapes[0]) if "transpose" in operator else result) * (math.prod(shapes[1]) // max(own, 1))
    if operator == attention.NAME:
        dims = attention.dims_of(*shapes[:3], attention.attrs_of(call).layouts)
        return _attention(dims)
    if operator == attention_quantized.NAME:
        return _attention(attention_quantized.dims_of(*shapes[:3], attention_quantized.attrs_of(call)))
    if operator in (weight_only.NAME, grouped.NAME):
        return 2 * result * shapes[0][-1]
    if operator == recurrent.NAME:
        steps = math.prod(shapes[0][:2])
        return 2 * steps * math.prod(shapes[1])
    if "norm" in operator or "softmax" in operator:
        return _OPERATIONS_OF_A_NORM * result
    if "pool" in operator and call.attrs is not None and hasattr(call.attrs, "pool_size"):
        return result * math.prod(int(size) for size in call.attrs.pool_size)
    return max(result, math.prod(shapes[0]) if shapes else 0)


def _attention(dims: Any) -> int:
    """Scores and weighted sum: a product of size queries x keys x depth each."""
    return 2 * dims.batch * dims.heads * dims.queries * dims.keys * (dims.depth + dims.width)


def _operands(expr: Any) -> list[Any]:
    """The variables and constants that a binding or expression reads."""
    if isinstance(expr, (relax.VarBinding, relax.MatchCast)):
        expr = expr.value
    if isinstance(expr, (relax.Var, Constant)):
        return [expr]
    parts = expr.args if isinstance(expr, relax.Call) else expr.fields if isinstance(expr, relax.Tuple) else ()
    parts = [expr.tuple_value] if isinstance(expr, relax.TupleGetItem) else parts
    return [operand for part in parts for operand in _operands(part)]


def _shape(ty: Any, known: Mapping[str, int]) -> list[int]:
    shape = getattr(ty, "shape", None)
    return [_size(dim, known) for dim in shape.values] if isinstance(shape, relax.ShapeExpr) else []


def _size(dim: Any, known: Mapping[str, int]) -> int:
    if isinstance(dim, tirx.IntImm):
        return int(dim)
    value = structural_map(dim, (tirx.Var, lambda symbol: tirx.IntImm("int64", known.get(symbol.name, 1))))
    value = tvm.sym.Analyzer().simplify(value)
    return max(0, int(value)) if isinstance(value, tirx.IntImm) else 1


def _elements(ty: Any, known: Mapping[str, int]) -> int:
    if isinstance(ty, relax.TupleType):
        return sum(_elements(field, known) for field in ty.fields)
    return math.prod(_shape(ty, known)) if isinstance(ty, relax.TensorType) else 0


def bytes_of(ty: Any, known: Mapping[str, int]) -> int:
    """Size of a tensor, or of all in a tuple. known: sizes of symbolic dims by name."""
    if isinstance(ty, relax.TupleType):
        return sum(bytes_of(field, known) for field in ty.fields)
    return _elements(ty, known) * numpy_dtype(_dtype(ty)).itemsize if isinstance(ty, relax.TensorType) else 0


def _dtype(ty: Any) -> str:
    return _dtype(ty.fields[0]) if isinstance(ty, relax.TupleType) and len(ty.fields) else str(getattr(ty, "dtype", ""))
