"""How each operator takes its operands in another order of dims: one rule per family, for the layout pass.

A rule gets the rewriter and a call of the source program. It returns the form of the result, or None to have the operator run in the source order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compiler.tvm import is_constant, relax, tirx, tvm

Perm = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """A value as it exists: `expr` = permute_dims(source value, perm). For a tuple, the perm of every field."""

    expr: Any
    perm: Perm


Rule = Callable[[Any, Any], Form | None]

RULES: dict[str, Rule] = {}

NCHW_TO_NHWC: Perm = (0, 2, 3, 1)
OIHW_TO_HWIO: Perm = (2, 3, 1, 0)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, named without the leading `relax.`."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"relax.{name}"] = function
        return function

    return register


def identity(rank: int) -> Perm:
    return tuple(range(rank))


def inverse(perm: Perm) -> Perm:
    return tuple(perm.index(axis) for axis in range(len(perm)))


def reshaped(expr: Any, shape: Sequence[Any]) -> Any:
    return relax.op.reshape(expr, relax.ShapeExpr(list(shape)))


@rule("nn.conv2d")
def _conv2d(rewriter: Any, call: Any) -> Form | None:
    attrs = call.attrs
    if attrs.data_layout != "NCHW" or attrs.kernel_layout != "OIHW" or attrs.out_layout not in ("", "NCHW"):
        return None
    x, w = rewriter.taken(call.args[0], NCHW_TO_NHWC), rewriter.taken(call.args[1], OIHW_TO_HWIO)
    rewriter.convolutions += 1
    return Form(_nhwc(x, w, attrs.strides, attrs.padding, attrs.dilation, attrs.groups, attrs.out_dtype), NCHW_TO_NHWC)


def _nhwc(x: Any, w: Any, strides: Any, padding: Any, dilation: Any, groups: int, out_dtype: Any) -> Any:
    return relax.op.nn.conv2d(x, w, list(strides), list(padding), list(dilation), groups, "NHWC", "HWIO", "NHWC", out_dtype)


def constant_or(expr: Any, now: Callable[[np.ndarray], np.ndarray], later: Callable[[Any], Any]) -> Any:
    """`now` on the array of a constant, `later` on any other expression."""
    if is_constant(expr):
        array = np.ascontiguousarray(now(expr.value.numpy()))
        return relax.const(array, str(array.dtype))
    return later(expr)


@rule("nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "image.resize2d")
def _spatial(rewriter: Any, call: Any) -> Form | None:
    """Operators over height and width that know a layout."""
    attrs = call.attrs
    form = rewriter.form(call.args[0])
    if attrs.layout != "NCHW" or form.perm != NCHW_TO_NHWC:
        return None
    x = form.expr
    name = call.op.name
    if name == "relax.nn.adaptive_avg_pool2d":
        return Form(relax.op.nn.adaptive_avg_pool2d(x, attrs.output_size, "NHWC", "NHWC"), form.perm)
    if name == "relax.image.resize2d":
        options = (attrs.method, attrs.coordinate_transformation_mode, attrs.rounding_method)
        numbers = (attrs.cubic_alpha, attrs.cubic_exclude, attrs.extrapolation_value)
        roi = tuple(attrs.roi)
        roi = tuple(roi[axis + half] for half in (0, 4) for axis in NCHW_TO_NHWC) if len(roi) == 8 else roi
        return Form(relax.op.image.resize2d(x, call.args[1], roi, "NHWC", *options, *numbers, attrs.out_dtype or None), form.perm)
    pool = relax.op.nn.max_pool2d if name == "relax.nn.max_pool2d" else relax.op.nn.avg_pool2d
    window = (attrs.pool_size, attrs.strides, attrs.padding, attrs.dilation, attrs.ceil_mode, attrs.count_include_pad)
    return Form(pool(x, *window, "NHWC", "NHWC"), form.perm)


UNARY = [
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "ceil",
    "cos",
    "cosh",
    "erf",
    "exp",
    "floor",
    "log",
    "negative",
    "round",
    "rsqrt",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "clip",
    "astype",
    "isnan",
    "isinf",
    "isfinite",
    "logical_not",
    "bitwise_not",
    "nn.relu",
    "nn.gelu",
    "nn.gelu_tanh",
    "nn.silu",
    "nn.leakyrelu",
    "nn.softplus",
    "nn.selu",
    "nn.relu6",
]
BINARY = [
    "add",
    "subtract",
    "multiply",
    "divide",
    "floor_divide",
    "power",
    "mod",
    "floor_mod",
    "maximum",
    "minimum",
    "equal",
    "not_equal",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "where",
]


@rule(*UNARY)
def _unary(rewriter: Any, call: Any) -> Form | None:
    form = rewriter.form(call.args[0])
    if form.perm == identity(len(form.perm)):
        return None
    return Form(_again(rewriter, call, [form.expr, *call.args[1:]]), form.perm)


@rule(*BINARY)
def _broadcast(rewriter: Any, call: Any) -> Form | None:
    """Element-wise with broadcasting: the largest permuted operand decides, the others follow."""
    rank = len(call.ty.shape)
    forms = [rewriter.form(arg) for arg in call.args]
    perm = next((form.perm for form in forms if len(form.perm) == rank and form.perm != identity(rank)), None)
    if perm is None:
        return None
    return Form(_again(rewriter, call, [_follow(rewriter, arg, form, perm) for arg, form in zip(call.args, forms, strict=True)]), perm)


def _follow(rewriter: Any, arg: Any, form: Form, perm: Perm) -> Any:
    """An operand of a broadcasting operator whose result is permuted by `perm`."""
    if len(form.perm) == len(perm):
        return rewriter.taken(arg, perm)
    if not form.perm:
        return form.expr
    plain = rewriter.source_order(form)
    shape = [1] * (len(perm) - len(form.perm)) + list(plain.ty.shape)
    wide = constant_or(plain, lambda array: array.reshape([int(dim) for dim in shape]), lambda expr: rewriter.emit(reshaped(expr, shape)))
    return rewriter.permuted(wide, perm)


def _again(rewriter: Any, call: Any, args: Sequence[Any]) -> Any:
    """The same call on other operands; remaining expressions are rewritten first."""
    return relax.Call(
        call.op, [rewriter.visit_expr(arg) if isinstance(arg, relax.Var) and arg in rewriter.forms else arg for arg in args], call.attrs
    )


@rule("permute_dims")
def _permute_dims(rewriter: Any, call: Any) -> Form | None:
    """Only renames: the new source order's axis i is the old one's axes[i]."""
    form = rewriter.form(call.args[0])
    axes = call.attrs.axes
    axes = tuple(reversed(range(len(form.perm)))) if axes is None else tuple(int(axis) % len(form.perm) for axis in axes)
    if form.perm == identity(len(form.perm)):
        return None
    return Form(form.expr, tuple(axes.index(axis) for axis in form.perm))


@rule("concat")
def _concat(rewriter: Any, call: Any) -> Form | None:
    fields = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else None
    if fields is None:
        return None
    perm = next((form.perm for form in map(rewriter.form, fields) if form.perm != identity(len(form.perm))), None)
    if perm is None or call.attrs.axis is None:
        return None
    return Form(relax.op.concat([rewriter.taken(field, perm) for field in fields], perm.index(int(call.attrs.axis) % len(perm))), perm)


@rule("nn.pad")
def _pad(rewriter: Any, call: Any) -> Form | None:
    """What surrounds a quantised convolution's input is its zero point."""
    form, attrs = rewriter.form(call.args[0]), call.attrs
    if form.perm == identity(len(form.perm)):
        return None
    widths = [int(width) for width in attrs.pad_width]
    pairs = [widths[2 * axis + side] for axis in form.perm for side in (0, 1)]
    return Form(relax.op.nn.pad(form.expr, pairs, attrs.pad_mode, attrs.pad_value), form.perm)


@rule("strided_slice")
def _strided_slice(rewriter: Any, call: Any) -> Form | None:
    form = rewriter.form(call.args[0])
    rank = len(form.perm)
    if form.perm == identity(rank):
        return None
    axes = relax.Tuple([tirx.IntImm("int64", form.perm.index(int(axis) % rank)) for axis in call.args[1].fields])
    return Form(relax.Call(call.op, [form.expr, axes, *call.args[2:]], call.attrs), form.perm)


@rule("split")
def _split(rewriter: Any, call: Any) -> Form | None:
    form = rewriter.form(call.args[0])
    if form.perm == identity(len(form.perm)):
        return None
    pieces = call.attrs.indices_or_sections
    pieces = int(pieces) if isinstance(pieces, int | tirx.IntImm) else [int(piece) for piece in pieces]
    return Form(relax.op.split(form.expr, pieces, form.perm.index(int(call.attrs.axis) % len(form.perm))), form.perm)


@rule("mean", "sum", "max", "min", "prod", "variance", "std")
def _reduce(rewriter: Any, call: Any) -> Form | None:
    form = rewriter.form(call.args[0])
    rank = len(form.perm)
    if form.perm == identity(rank) or call.attrs.axis is None:
        return None
    axes = [int(axis) % rank for axis in call.attrs.axis]
    reduce = getattr(relax.op, call.op.name.removeprefix("relax."))
    result = reduce(form.expr, [form.perm.index(axis) for axis in axes], call.attrs.keepdims)
    return Form(result, form.perm if call.attrs.keepdims else _without(form.perm, axes))


@rule("nn.softmax", "nn.log_softmax")
def _softmax(rewriter: Any, call: Any) -> Form | None:
    form = rewriter.form(call.args[0])
    if form.perm == identity(len(form.perm)):
        return None
    op = relax.op.nn.softmax if call.op.name == "relax.nn.softmax" else relax.op.nn.log_softmax
    return Form(op(form.expr, form.perm.index(int(call.attrs.axis) % len(form.perm))), form.perm)


@rule("squeeze")
def _squeeze(rewriter: Any, call: Any) -> Form | None:
    form = rewriter.form(call.args[0])
    if form.perm == identity(len(form.perm)) or call.attrs.axis is None:
        return None
    axes = [int(axis) % len(form.perm) for axis in call.attrs.axis]
    return Form(relax.op.squeeze(form.expr, [form.perm.index(axis) for axis in axes]), _without(form.perm, axes))


def _without(perm: Perm, axes: Sequence[int]) -> Perm:
    """The permutation of what is left when source axes disappear."""
    kept = [axis for axis in range(len(perm)) if axis not in axes]
    return tuple(kept.index(axis) for axis in perm if axis not in axes)


@rule("expand_dims", "reshape")
def _reshape(rewriter: Any, call: Any) -> Form | None:
    """A reshape that maps groups of neighbouring dims to groups of dims keeps the order of the groups when each group lies together."""
    form = rewriter.form(call.args[0])
    rank = len(form.perm)
    target = list(call.ty.shape)
    if form.perm == identity(rank):
        return None
    shape = [form.expr.ty.shape[form.perm.index(axis)] for axis in range(rank)]
    groups = _groups(shape, target)
    if groups is None:
        return None
    order = []
    for axis in form.perm:
        position = next(index for index, (inside, _) in enumerate(groups) if axis in inside)
        if not order or order[-1] != position:
            order.append(position)
    order = list(dict.fromkeys(order))
    together = tuple(axis for position in order for axis in groups[position][0])
    perm = tuple(axis for position in order for axis in groups[position][1])
    if together != form.perm and perm != NCHW_TO_NHWC:
        return None
    # dims that are joined and lie apart have to be moved; to where images want them
    return Form(reshaped(rewriter.taken(call.args[0], together), [target[axis] for axis in perm]), perm)


def _groups(source: list[Any], target: list[Any]) -> list[tuple[list[int], list[int]]] | None:
    """Cut both shapes into the smallest groups of neighbouring dims with equal products; None when that cannot be proved. New units join the group before."""
    prover = tvm.sym.Analyzer()
    sizes = sorted(((a, b) for a in range(5) for b in range(5) if a + b), key=lambda size: (size != (1, 1), sum(size)))
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        for a, b in sizes:
            if i + a <= len(source) and j + b <= len(target) and prover.can_prove_equal(_product(source[i : i + a]), _product(target[j : j + b])):
                break
        else:
            return None
        if a:
            groups.append((list(range(i, i + a)), list(range(j, j + b))))
        elif groups:
            groups[-1][1].extend(range(j, j + b))
        else:
            return None
        i, j = i + a, j + b
    return groups


def _product(dims: list[Any]) -> Any:
    result: Any = tirx.IntImm("int64", 1)
    for dim in dims:
        result = result * dim
    return result
