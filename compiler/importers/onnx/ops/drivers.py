"""Control flow that is decided while the model runs: inner graphs become functions, which the drivers of `compiler/tvm_control.py` call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ....control import BRANCH, LOOP
from ....tvm import relax
from ..node import Node
from ..outline import Outlined, call, outline
from ..subgraph import Subgraph
from ..symbolic import Dim, symbols
from ..values import Absent, Host, Refusal, Stored, Value
from ..values import Sequence as OnnxSequence

#: (iteration, carried tensors) -> (condition, carried tensors, collected tensors)
Step = Callable[[relax.Expr, list[relax.Expr]], tuple[relax.Expr, list[relax.Expr], list[relax.Expr]]]


def branch(node: Node, yes: Subgraph, no: Subgraph) -> tuple[Value, ...]:
    """Outputs whose shapes differ between the branches get sizes that are only known while the model runs. Raises Refusal where ranks or types differ."""
    shapes: list[list[int] | None] = []

    def computed(graph: Subgraph) -> Outlined:
        def compute() -> list[relax.Expr]:
            results = graph()
            shapes.append([len(value.items) if isinstance(value, OnnxSequence) else -1 for value in results])
            items = [item for value in results for item in (value.items if isinstance(value, OnnxSequence) else (value,))]
            return [tensor_of(node, item) for item in items]

        return outline(node, [], compute)[1]()

    flag = _scalar(node, node.tensor(0), "bool")
    chosen = [computed(graph) for graph in (yes, no)]
    if shapes[0] != shapes[1]:
        raise Refusal("its branches give sequences of different lengths")
    types = [_common(node, *pair, *chosen) for pair in zip(*(outlined.results for outlined in chosen), strict=True)]
    spec = {"functions": [outlined.name for outlined in chosen], "counts": [len(outlined.context) for outlined in chosen]}
    values = iter(call(node, BRANCH, spec, [flag, *chosen[0].context, *chosen[1].context], types))
    lengths = shapes[0] or []
    return tuple(next(values) if length < 0 else OnnxSequence(tuple(next(values) for _ in range(length))) for length in lengths)


def loop(node: Node, trips: relax.Expr | None, condition: relax.Expr | None, carried: Sequence[Value], step: Step) -> list[relax.Expr]:
    """The carried tensors at the end, and the collected ones along a new axis 0.

    A dim of a carried tensor that may change from one iteration to the next is only known while the model runs. Raises Refusal where a rank or type changes.
    """
    start = [tensor_of(node, value) for value in carried]
    start = [value if isinstance(value, relax.Var) else node.emit(value) for value in start]
    # what varied in an earlier walk of the same loop, in which an outer one was walked the first time, varies: walks would double at every level otherwise
    known = node.builder.varying.get((node.label, *node.proto.output), ())
    wanted: list[list[Dim | None]] = [  # None: varies
        [None if (place, axis) in known else dim for axis, dim in enumerate(node.shape(value))] for place, value in enumerate(start)
    ]
    while True:
        first = node.builder.functions
        inputs = [relax.Var("iteration", relax.TensorType([], "int64"))]
        inputs += [
            relax.Var(f"carried{place}", relax.TensorType([node.dims.fresh(node.hint) if dim is None else dim for dim in dims], node.dtype(value)))
            for place, (dims, value) in enumerate(zip(wanted, start, strict=True))
        ]
        own = node.dims.made[-sum(dim is None for dims in wanted for dim in dims) or len(node.dims.made) :]

        def compute(inputs: list[relax.Var] = inputs) -> list[relax.Expr]:
            again, following, collected = step(inputs[0], list(inputs[1:]))
            return [_scalar(node, again, "bool"), *following, *collected]

        results, finish = outline(node, inputs, compute)
        following = results[1 : 1 + len(start)]
        varying = [_varying(node, dims, param, value) for dims, param, value in zip(wanted, inputs[1:], following, strict=True)]
        if varying == [[dim is None for dim in dims] for dims in wanted]:
            break
        node.builder.abandon(first)
        wanted = [[None if flag else dim for flag, dim in zip(flags, dims, strict=True)] for flags, dims in zip(varying, wanted, strict=True)]
    outlined = finish()
    found = {(place, axis) for place, dims in enumerate(wanted) for axis, dim in enumerate(dims) if dim is None}
    node.builder.varying[(node.label, *node.proto.output)] = found
    inner = outlined.inner | {symbol.name for symbol in own}
    collected = [([_outside(dim, inner) for dim in node.shape(value)], node.dtype(value)) for value in results[1 + len(start) :]]
    empty = [0 if dim is None else dim for dims, _ in collected for dim in dims]
    length = node.dims.fresh(node.hint)
    types = [(_filled(node, dims), node.dtype(value)) for dims, value in zip(wanted, start, strict=True)]
    types += [([length, *_filled(node, dims)], dtype) for dims, dtype in collected]
    spec = {"function": outlined.name, "context": len(outlined.context), "collected": [[len(dims), dtype] for dims, dtype in collected]}
    limit = node.scalar(-1, "int64") if trips is None else node.emit(relax.op.maximum(_scalar(node, trips, "int64"), node.scalar(0, "int64")))
    going = node.scalar(True, "bool") if condition is None else _scalar(node, condition, "bool")
    return call(node, LOOP, spec, [limit, going, relax.ShapeExpr(empty), *outlined.context, *start], types)


def tensor_of(node: Node, value: Value) -> relax.Expr:
    if isinstance(value, (OnnxSequence, Absent, Stored)) or isinstance(value, Host) and value.dtype not in _COMPUTED:
        raise Refusal("only tensors of ordinary types can leave or enter a graph that is chosen while the model runs")
    return node.to_tensor(value)


_COMPUTED = frozenset("float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split())


def _scalar(node: Node, value: relax.Expr, dtype: str) -> relax.Expr:
    bound = value if isinstance(value, relax.Var) else node.emit(value)
    bound = node.reshape(bound, [])
    if node.dtype(bound) != dtype:
        bound = node.emit(relax.op.astype(bound, dtype))
    return bound


def _common(node: Node, left: relax.Expr, right: relax.Expr, first: Outlined, second: Outlined) -> tuple[list[Dim], str]:
    """The type of an output that is `left` or `right`."""
    one, other = node.shape(left), node.shape(right)
    if node.dtype(left) != node.dtype(right) or len(one) != len(other):
        raise Refusal(f"its branches give {node.dtype(left)} of rank {len(one)} and {node.dtype(right)} of rank {len(other)}")
    pairs = [(_outside(a, first.inner), _outside(b, second.inner)) for a, b in zip(one, other, strict=True)]
    return _filled(node, [a if a is not None and b is not None and node.dims.equal(a, b) else None for a, b in pairs]), node.dtype(left)


def _varying(node: Node, dims: list[Dim | None], param: relax.Expr, result: relax.Expr) -> list[bool]:
    """Per dim, whether it changes from one iteration to the next."""
    before, after = node.shape(param), node.shape(result)
    if len(before) != len(after) or node.dtype(param) != node.dtype(result):
        raise Refusal(
            f"a carried tensor is {node.dtype(param)} of rank {len(before)} before, and {node.dtype(result)} of rank {len(after)} after an iteration"
        )
    return [known is None or not node.dims.equal(a, b) for known, a, b in zip(dims, before, after, strict=True)]


def _outside(dim: Dim, inner: frozenset[str]) -> Dim | None:
    """The dim where it is known outside of the function, too."""
    if isinstance(dim, int):
        return dim
    return None if not inner.isdisjoint(symbols(dim)) else dim


def _filled(node: Node, dims: Sequence[Dim | None]) -> list[Dim]:
    return [node.dims.fresh(node.hint) if dim is None else dim for dim in dims]


def picked(node: Node, value: relax.Expr, axis: int, place: relax.Expr) -> relax.Expr:
    """The slice at `place` along `axis`, without that axis."""
    return node.emit(relax.op.take(value, place, axis, mode="fast"))


def turned(node: Node, value: relax.Expr, axis: int, backward: bool) -> relax.Expr:
    """Axis 0 moved to `axis`, in reverse order if `backward`."""
    rank = node.rank(value)
    if backward:
        value = node.emit(relax.op.flip(value, 0))
    order = [*range(1, axis + 1), 0, *range(axis + 1, rank)]
    return value if axis == 0 else node.emit(relax.op.permute_dims(value, order))


def number(node: Node, value: int) -> relax.Expr:
    return node.array(np.array(value), "int64")
