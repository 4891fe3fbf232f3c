"""How an axis of tokens goes through an operator.

Every operator says which axes of its operands and results belong together, as index notation does: a matrix product is `b m k, b k n -> b m n`. An axis of tokens in one
operand makes all axes with its label axes of tokens. Reshapes and slices have rules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...compiler.dialect import attention
from ...compiler.tvm import Constant, relax, tirx, tvm

#: what an axis is called; those that start with ! cannot hold tokens, None is a dim of one that is repeated
Label = str | None


class Unfollowable(Exception):
    """The axis cannot be followed through an operator; the message is the reason."""


@dataclass(frozen=True)
class Axis:
    """An axis of outer * (tokens - lost) * inner places; `lost` is 1 where the class token was cut off."""

    outer: Any = 1
    inner: Any = 1
    lost: int = 0

    @property
    def plain(self) -> bool:
        """The tokens themselves and nothing else."""
        return self.lost == 0 and same(self.outer, 1) and same(self.inner, 1)

    def size(self, tokens: Any) -> Any:
        return simplify(self.outer * (tokens - self.lost) * self.inner)


@dataclass
class Notation:
    """Labels of every operand's axes and of every result's."""

    operands: list[Sequence[Label]]
    results: list[Sequence[Label]]


@dataclass
class Followed:
    """results: the axes in every result. wanted: per operand, axes that have to be axes of tokens too and are not yet."""

    results: list[dict[int, Axis]]
    wanted: list[set[int]] = field(default_factory=list)


def simplify(value: Any) -> Any:
    return value if isinstance(value, int) else tvm.sym.Analyzer().simplify(value)


def same(a: Any, b: Any) -> bool:
    """Two dims are provably equal."""
    if isinstance(a, int | tirx.IntImm) and isinstance(b, int | tirx.IntImm):
        return int(a) == int(b)
    return bool(tvm.sym.Analyzer().can_prove_equal(a, b))


def dims(expr: Any) -> list[Any]:
    """The shape of a tensor; Unfollowable where it is not known."""
    shape = getattr(expr.ty, "shape", None)
    if shape is None or not isinstance(expr.ty, relax.TensorType):
        raise Unfollowable(f"a tensor of unknown shape: {expr.ty}")
    return list(shape)


def product(values: Sequence[Any]) -> Any:
    result: Any = 1
    for value in values:
        result = result * value
    return simplify(result)


def operands(call: Any) -> list[Any]:
    """The tensors that a call reads, those of a tuple one by one; shapes and numbers are left out."""
    found = []
    for arg in call.args:
        for expr in arg.fields if isinstance(arg, relax.Tuple) else [arg]:
            if isinstance(expr.ty, relax.TensorType):
                found.append(expr)
    return found


def name_of(call: Any) -> str:
    return getattr(call.op, "name", "a function") if isinstance(call, relax.Call) else type(call).__name__


def follow(call: Any, tagged: Sequence[dict[int, Axis]], tokens: Any) -> Followed:
    """Axes of the results from those of the operands (`operands(call)`); `tokens` is their number in the program as it stands before pruning."""
    name = name_of(call)
    if name in _OWN:
        if any(tagged[1:]):
            raise Unfollowable("it looks tokens up by values that hold one per token")
        return Followed([_OWN[name](call, tagged[0], tokens)], [set() for _ in tagged])
    notation = notate(call)
    labels: dict[str, Axis] = {}
    for axes, marks in zip(tagged, notation.operands, strict=True):
        for place, axis in axes.items():
            label = marks[place]
            if label is None or label.startswith("!"):
                raise Unfollowable("it mixes the tokens in a way that fewer tokens would change" if label else "it repeats them")
            known = labels.setdefault(label, axis)
            if not (same(known.outer, axis.outer) and same(known.inner, axis.inner) and known.lost == axis.lost):
                raise Unfollowable("it brings different forms of the tokens together")
    wanted = [
        {place for place, label in enumerate(marks) if label in labels and place not in axes}
        for axes, marks in zip(tagged, notation.operands, strict=True)
    ]
    return Followed([{place: labels[label] for place, label in enumerate(marks) if label in labels} for marks in notation.results], wanted)  # pyright: ignore


def notate(call: Any) -> Notation:
    """The index notation of a call; Unfollowable for an operator without a rule."""
    rule = NOTATIONS.get(name_of(call))
    if rule is None:
        raise Unfollowable("no rule says what becomes of the tokens in it")
    return rule(call)


def _aligned(shapes: Sequence[Sequence[Any]], rank: int, prefix: str = "a") -> list[list[Label]]:
    """Labels of operands that broadcast to `rank` dims: a dim of one beside a wider one is repeated."""
    wide = [not all(same(shape[place - rank], 1) for shape in shapes if len(shape) >= rank - place) for place in range(rank)]
    return [
        [None if wide[rank - len(shape) + at] and same(dim, 1) else f"{prefix}{rank - len(shape) + at}" for at, dim in enumerate(shape)]
        for shape in shapes
    ]


def _elementwise(call: Any) -> Notation:
    rank = len(dims(call))
    return Notation(_aligned([dims(expr) for expr in operands(call)], rank), [[f"a{at}" for at in range(rank)]])


def _broadcast(call: Any) -> Notation:
    rank = len(dims(call))
    labels = _aligned([dims(call.args[0]), dims(call)], rank)
    return Notation(labels[:1], labels[1:])


def _permute(call: Any) -> Notation:
    rank = len(dims(call))
    axes = [int(axis) % rank for axis in call.attrs.axes] if call.attrs.axes is not None else list(range(rank))[::-1]
    return Notation([[f"a{at}" for at in range(rank)]], [[f"a{axis}" for axis in axes]])


def _matmul(call: Any) -> Notation:
    a, b = (dims(expr) for expr in call.args)
    if len(a) < 2 or len(b) < 2:
        raise Unfollowable("it multiplies vectors")
    rank = len(dims(call))
    left, right = _aligned([a[:-2], b[:-2]], rank - 2)
    return Notation([[*left, "m", "k"], [*right, "k", "n"]], [[*(f"a{at}" for at in range(rank - 2)), "m", "n"]])


def _over(attribute: str, hard: bool) -> Callable[[Any], Notation]:
    """Operators along axes. hard: their parameters or order are bound to the places, so none may be an axis of tokens."""

    def rule(call: Any) -> Notation:
        rank = len(dims(call))
        value = getattr(call.attrs, attribute)
        axes = {int(axis) % rank for axis in (value if hasattr(value, "__iter__") else [value])}
        first = [f"!{at}" if hard and at in axes else f"a{at}" for at in range(rank)]
        rest = [[f"!{at}" for at in range(len(dims(expr)))] for expr in operands(call)[1:]]
        return Notation([first, *rest], [first])

    return rule


def _reduce(hard: bool) -> Callable[[Any], Notation]:
    def rule(call: Any) -> Notation:
        rank = len(dims(call.args[0]))
        value = call.attrs.axis
        chosen = [value] if isinstance(value, int) else value
        axes = set(range(rank)) if chosen is None else {int(axis) % rank for axis in chosen}
        source = [f"!{at}" if hard and at in axes else f"a{at}" for at in range(rank)]
        kept = [None if at in axes else label for at, label in enumerate(source) if call.attrs.keepdims or at not in axes]
        return Notation([source], [kept])

    return rule


def _concat(call: Any) -> Notation:
    rank = len(dims(call))
    axis = int(call.attrs.axis) % rank
    labels = [f"!{at}" if at == axis else f"a{at}" for at in range(rank)]
    return Notation([labels for _ in operands(call)], [labels])


def _split(call: Any) -> Notation:
    rank = len(dims(call.args[0]))
    axis = int(call.attrs.axis) % rank
    labels = [f"!{at}" if at == axis else f"a{at}" for at in range(rank)]
    return Notation([labels], [labels for _ in call.ty.fields])


def layouts(call: Any) -> list[str]:
    """Layouts of an attention's queries, keys, values and result: BHSD or BSHD."""
    given = attention.attrs_of(call).layout.split(",")
    return given * 4 if len(given) == 1 else given


def _attention(call: Any) -> Notation:
    def ordered(labels: list[str], layout: str) -> list[str]:
        return labels if layout == "BHSD" else [labels[0], labels[2], labels[1], labels[3]]

    kinds = [["b", "!h", "s", "!d"], ["b", "!g", "t", "!d"], ["b", "!g", "t", "!e"], ["b", "!h", "s", "!e"]]
    q, k, v, out = map(ordered, kinds, layouts(call))
    marks: list[Sequence[Label]] = [q, k, v]
    if len(call.args) == 4:
        shape = dims(call.args[3])
        full = ["b", "!h", "s", "t"][4 - len(shape) :]
        marks.append([None if same(dim, 1) and not _one(call, label) else label for dim, label in zip(shape, full, strict=True)])
    attrs = attention.attrs_of(call)
    return Notation(marks, [out, *([["b", "t"]] if attrs.received else []), *([["b", "!h", "s"]] if attrs.logsum else [])])


def _one(call: Any, label: str) -> bool:
    """The batch or token count of an attention is itself one."""
    queries, keys = (layout.index("S") for layout in layouts(call)[:2])
    place = {"b": (0, 0), "s": (0, queries), "t": (1, keys)}.get(label)
    return place is not None and same(dims(call.args[place[0]])[place[1]], 1)


def _reshape(call: Any, axes: dict[int, Axis], tokens: Any) -> dict[int, Axis]:
    """An axis goes where as many places lie before it and after it; it may join others, or part from them, but not be torn."""
    before, after = dims(call.args[0]), dims(call)
    found: dict[int, Axis] = {}
    for place, axis in axes.items():
        left, right = product([*before[:place], axis.outer]), product([axis.inner, *before[place + 1 :]])
        choices = []
        for at in range(len(after)):
            outer, inner = _divided(left, product(after[:at])), _divided(right, product(after[at + 1 :]))
            if outer is not None and inner is not None and same(after[at], Axis(outer, inner, axis.lost).size(tokens)):
                choices.append((at, Axis(outer, inner, axis.lost)))
        if not choices:
            raise Unfollowable(f"it tears the axis of {shown(tokens)} tokens apart: {_text(before)} becomes {_text(after)}")
        at, new = min(choices, key=lambda choice: not choice[1].plain)
        if at in found:
            raise Unfollowable("it flattens two axes of tokens into one")
        found[at] = new
    return found


def _divided(value: Any, by: Any) -> Any:
    """value / by, None unless it is exact."""
    if isinstance(value, int | tirx.IntImm) and isinstance(by, int | tirx.IntImm):
        return int(value) // int(by) if int(by) and int(value) % int(by) == 0 else None
    if same(value, by):
        return 1
    quotient = simplify(tirx.floordiv(value, by))
    return quotient if same(quotient * by, value) else None


def _text(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(shown(dim) for dim in shape) + "]"


def shown(dim: Any) -> str:
    """A dim as text."""
    return str(int(dim)) if isinstance(dim, int | tirx.IntImm) else re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(dim))


def sliced(call: Any) -> list[tuple[int, Any, Any, Any]]:
    """(axis, begin, end, stride) of a slice with bounds known in the graph."""
    rank = len(dims(call.args[0]))
    fields = [[getattr(field, "value", field) for field in arg.fields] if hasattr(arg, "fields") else None for arg in call.args[1:]]
    if any(field is None for field in fields[:3]):
        raise Unfollowable("its bounds are computed at run time")
    strides = fields[3] if len(fields) > 3 and fields[3] is not None else [1] * len(fields[0])
    return [(int(axis) % rank, begin, end, stride) for axis, begin, end, stride in zip(*fields[:3], strides, strict=True)]


def _slice(call: Any, axes: dict[int, Axis], tokens: Any) -> dict[int, Axis]:
    found = dict(axes)
    shape = dims(call.args[0])
    for place, begin, end, stride in sliced(call):
        axis = axes.get(place)
        if axis is None:
            continue
        if not same(stride, 1):
            raise Unfollowable("it takes tokens in steps")
        whole = same(dims(call)[place], shape[place] - begin)
        if whole and same(begin, 0):
            continue
        if axis.plain and same(begin, 0) and same(end, 1):
            del found[place]
        elif axis.plain and whole and same(begin, 1):
            found[place] = Axis(lost=1)
        else:
            raise Unfollowable(f"it takes the tokens {begin}..{end}; only the first one, or all others, can be told apart when tokens are dropped")
    return found


def _take(call: Any, axes: dict[int, Axis], tokens: Any) -> dict[int, Axis]:
    rank = len(dims(call.args[0]))
    place = None if call.attrs.axis is None else int(call.attrs.axis) % rank
    indices = call.args[1]
    added = len(dims(indices))
    if place is None:
        raise Unfollowable("it takes elements of a flattened tensor")
    if place in axes and not (axes[place].plain and isinstance(indices, Constant) and not indices.value.numpy().any()):
        raise Unfollowable("it takes tokens by position; only the first one stays in its place when tokens are dropped")
    return {at if at < place else at + added - 1: axis for at, axis in axes.items() if at != place}


_OWN: dict[str, Callable[[Any, dict[int, Axis], Any], dict[int, Axis]]] = {
    **dict.fromkeys(("relax.reshape", "relax.flatten", "relax.expand_dims", "relax.squeeze"), _reshape),
    "relax.strided_slice": _slice,
    "relax.take": _take,
}

_ELEMENTWISE = """abs acos acosh asin asinh atan atanh ceil cos cosh erf exp floor log negative round rsqrt sigmoid sign sin sinh sqrt square tan tanh clip
isfinite isinf isnan logical_not bitwise_not astype add divide floor_divide multiply power subtract mod floor_mod atan2 equal greater greater_equal less less_equal
not_equal maximum minimum logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor left_shift right_shift where
nn.relu nn.leakyrelu nn.gelu nn.gelu_tanh nn.silu nn.selu nn.softplus nn.dropout""".split()

NOTATIONS: dict[str, Callable[[Any], Notation]] = {
    **{f"relax.{name}": _elementwise for name in _ELEMENTWISE},
    "relax.broadcast_to": _broadcast,
    "relax.permute_dims": _permute,
    "relax.matmul": _matmul,
    **dict.fromkeys(("relax.nn.softmax", "relax.nn.log_softmax"), _over("axis", hard=False)),
    **dict.fromkeys(("relax.nn.layer_norm", "relax.nn.rms_norm"), _over("axes", hard=True)),
    "relax.cumsum": _over("axis", hard=True),
    **dict.fromkeys((f"relax.{name}" for name in ("mean", "max", "min", "sum")), _reduce(hard=False)),
    **dict.fromkeys((f"relax.{name}" for name in ("prod", "std", "variance", "argmax", "argmin")), _reduce(hard=True)),
    "relax.concat": _concat,
    "relax.split": _split,
    attention.NAME: _attention,
}
