"""Canonical form: constants folded, dead code gone, identities and reshape chains removed, scale factors folded into weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import is_constant, mutator, relax, tirx, tvm
from .base import Pass, PassContext
from .folding import fold_constants
from .products import FOLLOWING, VIEWS, constant_value
from .rewriting import same_dims

_VIEWS, _FOLLOWING = set(VIEWS), set(FOLLOWING)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring a freshly imported module into the form that the other passes match on. Numbers change only by the rounding of folded scales."""

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program, context: PassContext) -> Program:
        transform = relax.transform
        module = transform.DeadCodeElimination()(transform.CanonicalizeBindings()(program.module))
        for _ in range(4):
            peephole = _Peephole(module)
            module = peephole.apply()
            context.matched(**peephole.counts)
            if not peephole.counts:
                break
            module = transform.DeadCodeElimination()(module)
        module, folded = fold_constants(module)
        context.matched(constant_folded=folded)
        module = transform.CanonicalizeBindings()(module) if folded else module  # folded constants stand where they are read
        module = transform.EliminateCommonSubexpr()(module)
        return program.with_module(transform.DeadCodeElimination()(module))


@mutator
class _Peephole(relax.PyExprMutator):
    """Local rewrites, one visit per binding; the builder's lookup sees through variables."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.module = module
        self.counts: dict[str, int] = {}
        self.uses: dict[Any, int] = {}

    def apply(self) -> Any:
        self.uses = count_uses(self.module["main"])
        variable = self.module.get_global_var("main")
        self.builder_.update_func(variable, self.visit_expr(self.module["main"]))
        return self.builder_.get() if self.counts else self.module

    def _count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _defining(self, expr: Any, op: str | set[str]) -> Any:
        """The call that defines `expr` when it is one of the operators."""
        value = self.lookup_binding(expr) if isinstance(expr, relax.Var) else expr
        names = {op} if isinstance(op, str) else op
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name in names:
            return value
        return None

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if not isinstance(call.op, tvm.ir.Op):
            return call
        rule = _RULES.get(call.op.name)
        result = rule(self, call) if rule else None
        return call if result is None else result

    def visit_tuple_getitem_(self, item: Any) -> Any:
        item = super().visit_tuple_getitem_(item)
        call = self._defining(item.tuple_value, "relax.nn.batch_norm") if item.index == 0 else None
        result = _batch_norm(self, call) if call is not None else None
        return item if result is None else result


def count_uses(function: Any) -> dict[Any, int]:
    """How often each variable is read."""
    uses: dict[Any, int] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call | relax.Tuple):
            for arg in expr.args if isinstance(expr, relax.Call) else expr.fields:
                if isinstance(arg, relax.Var):
                    uses[arg] = uses.get(arg, 0) + 1
                elif isinstance(arg, relax.Tuple):
                    visit(arg)

    relax.analysis.post_order_visit(function, visit)
    return uses


def _view(self: _Peephole, call: Any) -> Any:
    """One reshape instead of a chain; none when the shape stays."""
    if call.ty.shape is None:
        return None
    source = call.args[0]
    if same_dims(call.ty.shape, source.ty.shape):
        self._count("identity")
        return source
    inner = self._defining(source, _VIEWS)
    if inner is not None:
        self._count("reshape_chain")
        return relax.op.reshape(inner.args[0], list(call.ty.shape))
    if call.op.name != "relax.reshape":
        self._count("reshape_form")
        return relax.op.reshape(source, list(call.ty.shape))
    return _unflattened(self, source, list(call.ty.shape))


def _unflattened(self: _Peephole, result: Any, shape: list[Any]) -> Any:
    """reshape(f(reshape(x) @ W), shape) -> f(reshape(x) @ W) with the rows of `shape`: what follows is then element-wise on the product's own dims and runs in its kernel.

    f: element-wise operators with a constant per column, as of a Linear that was exported over flattened rows. None: no such product, or one that others read in its flat form.
    """
    chain: list[Any] = []
    value, flat = result, result.ty.shape
    if flat is None or len(flat) != 2 or not same_dims([flat[1]], shape[-1:]):
        return None
    while self.uses.get(value, 2) == 1 and (call := self._defining(value, _FOLLOWING)) is not None:
        first = next((place for place, arg in enumerate(call.args) if isinstance(arg, relax.Var)), None)
        others = [arg for place, arg in enumerate(call.args) if place != first]
        if first is None or not all(_per_column(arg) for arg in others) or not same_dims(call.args[first].ty.shape, flat):
            return None
        chain.append((value, call, first))
        value = call.args[first]
    product = self._defining(value, "relax.matmul") if self.uses.get(value, 2) == 1 else None
    if product is None or not is_constant(product.args[1]) or product.args[1].ty.ndim != 2 or self._defining(product.args[0], _VIEWS) is None:
        return None
    rows = self.builder_.emit(relax.op.reshape(product.args[0], [*shape[:-1], product.args[0].ty.shape[-1]]), product.args[0].name)
    made = self.builder_.emit(relax.Call(product.op, [rows, product.args[1]], product.attrs), value.name)
    for var, call, place in reversed(chain):
        made = self.builder_.emit(relax.Call(call.op, [*call.args[:place], made, *call.args[place + 1 :]], call.attrs), var.name)
    self._count("unflattened")
    return made


def _per_column(arg: Any) -> bool:
    """A number, or a constant that broadcasts over rows."""
    return not isinstance(arg.ty, relax.TensorType) or (is_constant(arg) and math.prod(arg.value.shape[:-1]) == 1)


def _permute(self: _Peephole, call: Any) -> Any:
    rank = len(call.ty.shape)
    axes = [int(axis) for axis in call.attrs.axes] if call.attrs.axes is not None else list(range(rank))[::-1]
    if axes == list(range(rank)):
        self._count("identity")
        return call.args[0]
    inner = self._defining(call.args[0], "relax.permute_dims")
    if inner is not None and inner.attrs.axes is not None:
        first = [int(axis) for axis in inner.attrs.axes]
        self._count("transpose_chain")
        return relax.op.permute_dims(inner.args[0], [first[axis] for axis in axes])
    return None


def _cast(self: _Peephole, call: Any) -> Any:
    if call.ty.dtype == call.args[0].ty.dtype:
        self._count("identity")
        return call.args[0]
    return None


def _neutral(value: float) -> Callable[[_Peephole, Any], Any]:
    """x op value == x, for a constant filled with `value` that does not broaden x."""

    def rule(self: _Peephole, call: Any) -> Any:
        constant = constant_value(call.args[1])
        if constant is not None and constant.size <= 4096 and same_dims(call.ty.shape, call.args[0].ty.shape) and np.all(constant == value):
            self._count("identity")
            return call.args[0]
        return _fold_scale(self, call) if call.op.name == "relax.multiply" else None

    return rule


def _batch_norm(self: _Peephole, call: Any) -> Any:
    """x * scale + shift, for statistics that are constants."""
    values = [constant_value(arg) for arg in call.args[1:]]
    attrs = call.attrs
    if attrs.training or any(value is None for value in values):
        return None
    shape = [-1 if axis == int(attrs.axis) % call.args[0].ty.ndim else 1 for axis in range(call.args[0].ty.ndim)]
    gamma, beta, mean, variance = (value.astype(np.float64).reshape(shape) for value in values if value is not None)
    factor = (gamma if attrs.scale else 1.0) / np.sqrt(variance + attrs.epsilon)
    shift = (beta if attrs.center else 0.0) - mean * factor
    dtype = str(call.args[0].ty.dtype)
    scale, shift = (relax.const(value.astype(dtype), dtype) for value in (factor, shift))
    self._count("batch_norm")
    return relax.op.add(self.builder_.emit(relax.op.multiply(call.args[0], scale)), shift)


#: convolutions by the axis of their weight that a scale of the output channels runs along, where there is one
_CONVOLUTIONS = {
    f"relax.nn.conv{axes}d{suffix}": (axis, layout)
    for axes, layout in ((1, "NCW"), (2, "NCHW"), (3, "NCDHW"))
    for suffix, axis in (("", 0), ("_transpose", 1))
}


def _fold_scale(self: _Peephole, call: Any) -> Any:
    """conv(x, W) * s -> conv(x, W * s), also transposed: the scale half of a batch-norm."""
    for scale_arg, other in ((call.args[1], call.args[0]), (call.args[0], call.args[1])):
        scale = constant_value(scale_arg)
        conv = self._defining(other, set(_CONVOLUTIONS))
        if scale is None or conv is None or self.uses.get(other, 2) > 1:
            continue
        axis, layout = _CONVOLUTIONS[conv.op.name]
        weight, groups = constant_value(conv.args[1]), int(conv.attrs.groups)
        if weight is None or weight.dtype.itemsize < 4 or conv.attrs.data_layout != layout:  # a scale would not fit short numbers
            continue
        channels, spatial = weight.shape[axis] * (groups if axis else 1), (1,) * (weight.ndim - 2)
        if scale.size > 1 and scale.shape[-weight.ndim + 1 :] != (channels, *spatial):
            continue
        if scale.size not in (1, channels):
            continue
        self._count("scale_into_weight")
        scale = np.broadcast_to(scale.reshape(-1), (channels,))
        # transposed: [Ci, Co / groups, ...], where every input channel has the outputs of its group
        factor = np.repeat(scale.reshape(groups, -1), len(weight) // groups, axis=0) if axis else scale[:, None]
        scaled = (weight * factor.reshape(*factor.shape, *spatial)).astype(weight.dtype)
        return relax.Call(conv.op, [conv.args[0], relax.const(scaled, str(scaled.dtype))], conv.attrs)
    return None


def _slice(self: _Peephole, call: Any) -> Any:
    """A slice along the axis of a concatenation, of the part that it lies in."""
    concat = self._defining(call.args[0], "relax.concat")
    if concat is None or call.ty.shape is None or not all(isinstance(arg, relax.Tuple) for arg in call.args[1:]):
        return None
    fields = self.lookup_binding(concat.args[0]) if isinstance(concat.args[0], relax.Var) else concat.args[0]
    axes, begins, _, *strides = (list(arg.fields) for arg in call.args[1:])
    rank = call.args[0].ty.ndim
    axis = int(concat.attrs.axis) % rank
    if not isinstance(fields, relax.Tuple) or len(axes) != 1 or int(axes[0]) % rank != axis or not isinstance(begins[0].ty, tvm.ir.PrimType):
        return None
    if any(not isinstance(stride, tirx.IntImm) or int(stride) != 1 for stride in (each[0] for each in strides)):
        return None
    analyzer, whole, length = tvm.sym.Analyzer(), call.args[0].ty.shape[axis], call.ty.shape[axis]
    if not analyzer.can_prove(length >= 1):  # an empty one may begin anywhere
        return None
    first = begins[0] + whole if analyzer.can_prove(begins[0] < 0) else begins[0]
    offset: Any = tirx.const(0, "int64")
    for part in fields.fields:
        size = part.ty.shape[axis]
        begin = analyzer.simplify(first - offset)
        if analyzer.can_prove(begin >= 0) and analyzer.can_prove(begin + length <= size):
            self._count("slice_of_concat")
            return part if analyzer.can_prove_equal(length, size) else relax.op.strided_slice(part, [axis], [begin], [begin + length])
        offset = offset + size
    return None


_RULES: dict[str, Callable[[_Peephole, Any], Any]] = {
    **dict.fromkeys(_VIEWS, _view),
    "relax.permute_dims": _permute,
    "relax.astype": _cast,
    "relax.strided_slice": _slice,
    "relax.add": _neutral(0.0),
    "relax.subtract": _neutral(0.0),
    "relax.multiply": _neutral(1.0),
    "relax.divide": _neutral(1.0),
}
