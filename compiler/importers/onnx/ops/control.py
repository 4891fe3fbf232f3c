"""If, Loop and Scan. What is known at import vanishes: a branch is walked in place, a short loop is unrolled; the rest is left to drivers (`drivers.py`)."""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..subgraph import Subgraph
from ..values import Host, Refusal, Value, concrete
from . import drivers
from .sequences import part, stack, without
from .shape import known_shape, sizes_host

#: nodes that a loop is unrolled to at most, and all loops of a model together
UNROLL_LIMIT, UNROLL_LIMIT_OF_ALL = 1024, 8 * 1024
_TRUE = concrete(np.array(True), "bool")


@converter("If")
def choose(node: Node) -> tuple[Value, ...]:
    if node.at_run_time(0):
        return drivers.branch(node, node.subgraph(node.attr("then_branch")), node.subgraph(node.attr("else_branch")))
    condition = bool(node.constant(0).reshape(()))
    return tuple(node.subgraph(node.attr("then_branch" if condition else "else_branch"))())


@converter("Loop", since=11)
def loop(node: Node) -> tuple[Value, ...]:
    """body(iteration, condition, carried...) -> (condition, carried..., scanned...)"""
    body = node.subgraph(node.attr("body"))
    carried = [node.value(index) for index in range(2, len(node.inputs))]
    unrolled = _unrolled_loop(node, body, carried)
    if unrolled is not None:
        return unrolled
    count = len(carried)

    def step(iteration: relax.Expr, state: list[relax.Expr]) -> tuple[relax.Expr, list[relax.Expr], list[relax.Expr]]:
        again, *results = [drivers.tensor_of(node, value) for value in body([iteration, _TRUE, *state])]
        return again, results[:count], results[count:]

    trips, condition = (node.tensor(index) if node.has(index) else None for index in (0, 1))
    return tuple(drivers.loop(node, trips, condition, carried, step))


def _unrolled_loop(node: Node, body: Subgraph, carried: list[Value]) -> tuple[Value, ...] | None:
    """None where the loop is too long, or its end is decided by data."""
    trips = node.maybe_host(0)
    if node.has(0) and (trips is None or trips.symbolic):
        return None
    limit = None if trips is None else int(trips.array.reshape(()))
    condition = node.value(1) if node.has(1) else _TRUE
    columns: list[list[Value]] = [[] for _ in range(len(body.graph.output) - 1 - len(carried))]
    done, fits = 0, False
    while limit is None or done < limit:
        going = _known(condition)
        if going is False:
            break
        if going and limit is None:
            fits = (done + 1) * body.size <= UNROLL_LIMIT and _reserve(node, body, 1)
        elif going:
            fits = fits or _reserve(node, body, limit or 0)
        if going is None or not fits:
            return None
        condition, *results = body([_number(done), _TRUE, *carried], hoist=True)
        carried = results[: len(carried)]
        for column, value in zip(columns, results[len(carried) :], strict=True):
            column.append(value)
        done += 1
    if not done and columns:  # the types of what would have been collected
        results = body([_number(0), _TRUE, *carried])[1 + len(carried) :]
        return (*carried, *(_empty(node, value, 0) for value in results))
    return (*carried, *(_collect(node, column, 0) for column in columns))


@converter("Scan", since=9)
def scan(node: Node) -> tuple[Value, ...]:
    """body(states..., one slice of every scanned input) -> (states..., one slice of every scanned output)"""
    body = node.subgraph(node.attr("body"))
    count = node.attr("num_scan_inputs")
    states, scanned = _split_inputs(node, list(node.inputs), count)
    axes = _axes(node, "scan_input_axes", [len(known_shape(node, value)) for value in scanned])
    backward = _flags(node, "scan_input_directions", count)
    outputs = len(body.graph.output) - len(states)
    out_backward = _flags(node, "scan_output_directions", outputs)
    lengths = [known_shape(node, value)[axis] for value, axis in zip(scanned, axes, strict=True)]
    if lengths[0] == 0 or not isinstance(lengths[0], int) or not _reserve(node, body, lengths[0]):
        return _driven_scan(node, body, states, scanned, axes, backward, out_backward)
    states, columns = _unrolled_scan(node, body, states, scanned, axes, backward, outputs)
    out_axes = _axes(node, "scan_output_axes", [len(known_shape(node, column[0])) + 1 for column in columns])
    collected = (_collect(node, column[::-1] if flag else column, axis) for column, flag, axis in zip(columns, out_backward, out_axes, strict=True))
    return (*states, *collected)


@converter("Scan", since=8)
def scan_batches(node: Node) -> tuple[Value, ...]:
    """Opset 8: axis 0 is a batch of independent scans over axis 1."""
    if node.has(0):
        raise Refusal("lengths of sequences (input 0) are not supported")
    body = node.subgraph(node.attr("body"))
    count = node.attr("num_scan_inputs")
    states, scanned = _split_inputs(node, list(node.inputs[1:]), count)
    backward = _flags(node, "directions", count)
    outputs = len(body.graph.output) - len(states)
    batch = node.static(known_shape(node, scanned[0])[:1], "the batch of a Scan")[0]
    if batch == 0:
        raise Refusal("a Scan over an empty batch is not supported")
    rows: list[list[Value]] = []
    for entry in range(batch):
        own_states = [_slice(node, value, 0, entry) for value in states]
        own_inputs = [_slice(node, value, 0, entry) for value in scanned]
        length = node.static(known_shape(node, own_inputs[0])[:1], "the length of a Scan")[0]
        if entry == 0 and not _reserve(node, body, batch * length):
            raise Refusal(f"{batch * length} iterations of {body.size} nodes are too many to unroll ({UNROLL_LIMIT} nodes)")
        finals, columns = _unrolled_scan(node, body, own_states, own_inputs, [0] * count, backward, outputs)
        rows.append([*finals, *(_collect(node, column, 0) for column in columns)])
    return tuple(_collect(node, list(column), 0) for column in zip(*rows, strict=True))


def _unrolled_scan(
    node: Node, body: Subgraph, states: list[Value], scanned: list[Value], axes: list[int], backward: list[bool], outputs: int
) -> tuple[list[Value], list[list[Value]]]:
    """The final states, and what every iteration gave for each scanned output, in order of time."""
    lengths = node.static([known_shape(node, value)[axis] for value, axis in zip(scanned, axes, strict=True)], "the length of a Scan")
    if len(set(lengths)) != 1:
        raise Refusal(f"scanned inputs are of different lengths: {lengths}")
    if not lengths[0]:
        raise Refusal("a Scan over nothing is not supported")
    columns: list[list[Value]] = [[] for _ in range(outputs)]
    for step in range(lengths[0]):
        slices = [
            _slice(node, value, axis, lengths[0] - 1 - step if flag else step) for value, axis, flag in zip(scanned, axes, backward, strict=True)
        ]
        results = body([*states, *slices], hoist=True)
        states = results[: len(states)]
        for column, value in zip(columns, results[len(states) :], strict=True):
            column.append(value)
    return states, columns


def _split_inputs(node: Node, inputs: list[Value | None], count: int) -> tuple[list[Value], list[Value]]:
    values = [value for value in inputs if value is not None]
    if len(values) != len(inputs) or not 0 < count <= len(values):
        raise Refusal(f"{len(values)} inputs are given, {count} of them to scan")
    return values[: len(values) - count], values[len(values) - count :]


def _axes(node: Node, name: str, ranks: list[int]) -> list[int]:
    axes = node.attr(name) or [0] * len(ranks)
    if len(axes) != len(ranks):
        raise Refusal(f"{name} has {len(axes)} entries instead of {len(ranks)}")
    return [node.axis(axis, rank) for axis, rank in zip(axes, ranks, strict=True)]


def _flags(node: Node, name: str, count: int) -> list[bool]:
    flags = node.attr(name) or [0] * count
    if len(flags) != count or any(flag not in (0, 1) for flag in flags):
        raise Refusal(f"{name} must be {count} numbers 0 or 1, but is {flags}")
    return [bool(flag) for flag in flags]


def _driven_scan(
    node: Node, body: Subgraph, states: list[Value], scanned: list[Value], axes: list[int], backward: list[bool], out_backward: list[bool]
) -> tuple[Value, ...]:
    tensors = [drivers.tensor_of(node, value) for value in scanned]
    tensors = [tensor if isinstance(tensor, relax.Var) else node.emit(tensor) for tensor in tensors]
    length = node.shape(tensors[0])[axes[0]]
    for place, (tensor, axis) in enumerate(zip(tensors, axes, strict=True)):
        shape = node.shape(tensor)
        if not node.dims.equal(shape[axis], length):
            tensors[place] = node.cast_shape(tensor, [length if position == axis else dim for position, dim in enumerate(shape)])

    def step(iteration: relax.Expr, state: list[relax.Expr]) -> tuple[relax.Expr, list[relax.Expr], list[relax.Expr]]:
        last = node.emit(relax.op.subtract(node.to_tensor(sizes_host([node.dims.simplify(length - 1)])), iteration)) if any(backward) else None
        places = [node.reshape(last, []) if flag and last is not None else iteration for flag in backward]
        slices = [drivers.picked(node, tensor, axis, place) for tensor, axis, place in zip(tensors, axes, places, strict=True)]
        results = [drivers.tensor_of(node, value) for value in body([*state, *slices])]
        return node.scalar(True, "bool"), results[: len(state)], results[len(state) :]

    trips = node.emit(node.to_tensor(sizes_host([length])))
    results = drivers.loop(node, trips, None, states, step)
    finals, collected = results[: len(states)], results[len(states) :]
    out_axes = _axes(node, "scan_output_axes", [node.rank(value) for value in collected])
    collected = [  # there are as many as were scanned
        node.cast_shape(value, [length, *node.shape(value)[1:]]) for value in collected
    ]
    return (*finals, *(drivers.turned(node, value, axis, flag) for value, axis, flag in zip(collected, out_axes, out_backward, strict=True)))


def _known(condition: Value) -> bool | None:
    if not isinstance(condition, Host) or condition.symbolic or condition.array.size != 1:
        return None
    return bool(condition.array.reshape(()))


def _reserve(node: Node, body: Subgraph, trips: int) -> bool:
    """Whether so many iterations may be unrolled; they are counted then, as loops inside of unrolled loops multiply."""
    nodes = trips * max(body.size, 1)
    if nodes > UNROLL_LIMIT or node.builder.unrolled + nodes > UNROLL_LIMIT_OF_ALL:
        return False
    node.builder.unrolled += nodes
    return True


def _number(value: int) -> Host:
    return concrete(np.array(value), "int64")


def _slice(node: Node, value: Value, axis: int, place: int) -> Value:
    return without(node, part(node, value, axis, place, place + 1), axis)


def _collect(node: Node, values: list[Value], axis: int) -> Value:
    """The values behind one another along a new axis."""
    hosts = [value.array for value in values if isinstance(value, Host) and not value.symbolic]
    if len(hosts) == len(values):
        assert isinstance(values[0], Host)
        return concrete(np.stack(hosts, axis), values[0].dtype)
    return node.emit(stack(node, [node.to_tensor(value) for value in values], axis))


def _empty(node: Node, value: Value, axis: int) -> Host:
    """No values of that type along a new axis."""
    sizes = node.static(known_shape(node, value), "the shape of what a loop collects")
    dtype = value.dtype if isinstance(value, Host) else node.dtype(node.to_tensor(value))
    return concrete(np.zeros([*sizes[:axis], 0, *sizes[axis:]]), dtype)
