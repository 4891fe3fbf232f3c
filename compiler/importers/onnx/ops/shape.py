"""Operators that move elements without computing: reshape, transpose, concat, split, expand, tile, pad, and the sources of constants.

Values known at import are moved with numpy, so that arithmetic on shapes stays known.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from ....program import LARGEST_DIM
from ....tvm import relax
from ..load import dtype_name, read_tensor
from ..node import Node
from ..registry import converter, evaluator
from ..symbolic import Dim
from ..values import Host, Refusal, Value, concrete, host
from ..vectors import Vector, chosen_axes, compact
from .host_arithmetic import FOLD_LIMIT, fits


def known_shape(node: Node, value: Value) -> list[Dim]:
    return list(value.array.shape) if isinstance(value, Host) else node.shape(node.to_tensor(value))


def sizes_host(sizes: list[Dim]) -> Host:
    array = np.empty(len(sizes), object)
    array[:] = sizes
    return host(array, "int64")


def is_int(value: Dim, number: int) -> bool:
    return isinstance(value, int) and value == number


@converter("Identity")
def identity(node: Node) -> Value:
    return node.value(0)


@converter("Shape")
def shape_of(node: Node) -> Host:
    dims = known_shape(node, node.value(0))
    return sizes_host(dims[slice(node.attr("start", 0), node.attr("end"))])


@converter("Size")
def size_of(node: Node) -> Host:
    total = np.empty((), object)
    total[()] = node.dims.product(known_shape(node, node.value(0)))
    return host(total, "int64")


@converter("Constant")
def constant(node: Node) -> Host:
    for name, dtype in (("value_float", "float32"), ("value_floats", "float32"), ("value_int", "int64"), ("value_ints", "int64")):
        if node.attr(name) is not None:
            return concrete(np.asarray(node.attr(name)), dtype)
    if node.attr("value") is None:
        raise Refusal("only tensors, floats and ints are supported as constants")
    return read_tensor(node.attr("value"), None)


@converter("ConstantOfShape", since=9)
def constant_of_shape(node: Node) -> Value:
    tensor = node.attr("value")
    fill = Host(np.zeros(1, np.float32), "float32") if tensor is None else read_tensor(tensor, None)
    sizes = node.sizes(0)
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= FOLD_LIMIT:
        return concrete(np.full(sizes, fill.array.reshape(-1)[0]), fill.dtype)
    return relax.op.full(sizes, node.scalar(fill.array.reshape(-1)[0], fill.dtype), fill.dtype)


@converter("Range", since=11)
def arange(node: Node) -> Value:
    if any(node.at_run_time(index) for index in range(3)):
        return _range_at_run_time(node)
    hosts = [node.host(index) for index in range(3)]
    if all(not value.symbolic for value in hosts):
        start, limit, delta = (value.array.reshape(()).item() for value in hosts)
        if delta == 0:
            raise Refusal("delta is zero")
        if (limit - start) / delta <= FOLD_LIMIT:
            return concrete(np.arange(start, limit, delta), hosts[0].dtype)
    if "int" not in hosts[0].dtype:
        raise Refusal("a floating-point range must not depend on dynamic dims")
    start, limit, delta = (node.sizes(index)[0] for index in range(3))
    if not isinstance(delta, int) or delta == 0:
        raise Refusal("delta must be a constant other than zero")
    length = node.dims.maximum(node.dims.ceil_divide(limit - start, delta) if delta > 0 else node.dims.ceil_divide(start - limit, -delta), 0)
    steps = node.emit(relax.op.arange(0, length, 1, hosts[0].dtype))
    if delta != 1:
        steps = node.emit(relax.op.multiply(steps, node.scalar(delta, hosts[0].dtype)))
    if isinstance(start, int):
        return steps if start == 0 else relax.op.add(steps, node.scalar(start, hosts[0].dtype))
    return relax.op.add(steps, node.tensor(0))


def _range_at_run_time(node: Node) -> Value:
    start, limit, delta = (node.reshape(node.tensor(index), []) for index in range(3))
    wide = [node.emit(relax.op.astype(value, "float64")) for value in (start, limit, delta)]
    steps = node.emit(relax.op.ceil(node.emit(relax.op.divide(node.emit(relax.op.subtract(wide[1], wide[0])), wide[2]))))
    zero = node.emit(relax.op.equal(wide[2], node.scalar(0, "float64")))
    some = node.emit(relax.op.logical_not(node.emit(relax.op.less_equal(steps, node.scalar(0, "float64")))))  # as does NaN
    most = node.emit(relax.op.less_equal(steps, node.scalar(LARGEST_DIM, "float64")))
    dtype = node.dtype(start)
    if "int" in dtype:  # the quotient is exact as long as the difference does not overflow, and then there are too many steps
        first, last, step = (Vector(node, value).integers() for value in (start, limit, delta))
        length = (last - first + step + (step < 0).where(1, -1)) // Vector(node, zero).where(1, step)
    else:
        length = Vector(node, node.emit(relax.op.astype(node.emit(relax.op.where(most, steps, node.scalar(-1, "float64"))), "int64")))
    # a size of -1 raises: a delta of 0, a range without end, NaN
    length = Vector(node, zero).where(-1, Vector(node, some).where(Vector(node, most).where(length, -1), 0)).dims()
    places = node.emit(relax.op.astype(node.emit(relax.op.arange(0, length[0], 1, "int64")), dtype))
    return relax.op.add(node.emit(relax.op.multiply(places, delta)), start)


@converter("Cast", since=6)
def cast(node: Node) -> Value:
    value, dtype = node.tensor(0), dtype_name(node.attr("to"))
    if node.dtype(value) == dtype:
        return value
    if dtype == "bool":
        return node.nonzero(value)
    return relax.op.astype(value, dtype)


@converter("CastLike", since=15)
def cast_like(node: Node) -> Value:
    value, like = node.tensor(0), node.value(1)
    dtype = like.dtype if isinstance(like, Host) else node.dtype(node.to_tensor(like))
    if node.dtype(value) == dtype:
        return value
    return node.nonzero(value) if dtype == "bool" else relax.op.astype(value, dtype)


@converter("Reshape", since=5)
def reshape(node: Node) -> Value:
    value = node.value(0)
    current = known_shape(node, value)
    if node.at_run_time(1):
        return _reshape_checked(node, node.tensor(0), current, _computed_shape(node, current))
    wanted = node.sizes(1)
    target = [
        current[axis] if size is not None and not node.attr("allowzero", 0) and isinstance(size, int) and size == 0 and axis < len(current) else size
        for axis, size in enumerate(wanted)
    ]
    free = [axis for axis, size in enumerate(target) if isinstance(size, int) and size == -1]
    if len(free) > 1:
        raise Refusal(f"the target shape {wanted} leaves more than one dim open")
    if free and node.attr("allowzero", 0) and any(isinstance(size, int) and size == 0 for size in wanted):
        raise Refusal(f"the target shape {wanted} leaves a dim open beside a 0")
    if free:
        target[free[0]] = node.dims.quotient(current, [size for axis, size in enumerate(target) if axis != free[0]])
    if isinstance(value, Host):
        return Host(value.array.reshape(target), value.dtype)
    if not node.dims.equal(node.dims.product(current), node.dims.product(target)) and not all(isinstance(dim, int) for dim in [*current, *target]):
        return _reshape_checked(node, node.tensor(0), current, target)
    return node.reshape(node.tensor(0), target)


def _computed_shape(node: Node, current: list[Dim]) -> list[Dim]:
    """The target of a reshape that is computed at run time, with its -1 and 0 resolved there."""
    wanted, rank = Vector.of(node, 1), len(current)
    if not node.attr("allowzero", 0):
        known = Vector.sizes(node, current + [0] * len(wanted))
        wanted = (wanted == 0).where(known.take(Vector(node, node.array(np.arange(len(wanted)), "int64"))) if rank else 0, wanted)
    total = Vector.sizes(node, [node.dims.product(current)])
    free = wanted == -1
    others = free.where(1, wanted).product()
    rest = total // others.at_least(1)
    # two that are open stay -1, and raise, as does one beside a 0, which any size would fit
    return free.where(((free.integers().total() >= 2) | (others == 0)).where(-1, rest), wanted).dims()


def _reshape_checked(node: Node, value: relax.Expr, current: list[Dim], target: list[Dim]) -> relax.Expr:
    """The element counts agree only for some sizes: flatten, assert the count at run time, reshape."""
    flat = node.reshape(value, [node.dims.product(current)])
    return node.reshape(node.cast_shape(flat, [node.dims.product(target)]), target)


@converter("Flatten")
def flatten(node: Node) -> relax.Expr:
    value = node.tensor(0)
    shape = node.shape(value)
    axis = node.attr("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return node.reshape(value, [node.dims.product(shape[:axis]), node.dims.product(shape[axis:])])


@converter("Transpose")
def transpose(node: Node) -> Value:
    value = node.value(0)
    rank = len(known_shape(node, value))
    order = node.attr("perm") or list(reversed(range(rank)))
    if isinstance(value, Host):
        return Host(value.array.transpose(order), value.dtype)
    return node.value(0) if order == list(range(rank)) else relax.op.permute_dims(node.tensor(0), order)


@converter("Squeeze")
def squeeze(node: Node) -> Value:
    value = node.value(0)
    shape = known_shape(node, value)
    if node.at_run_time(1):
        count = len(shape) - len(Vector.of(node, 1))
        dims = compact(Vector.sizes(node, shape), chosen_axes(node, 1, len(shape), distinct=True) == 0, count).dims()
        return _reshape_checked(node, node.tensor(0), shape, dims)
    axes = node.axes(1, len(shape))
    if axes is None:
        axes = [axis for axis, size in enumerate(shape) if isinstance(size, int) and size == 1]
    if isinstance(value, Host):
        return Host(value.array.squeeze(tuple(axes)), value.dtype)
    tensor = node.tensor(0)
    if any(not isinstance(shape[axis], int) for axis in axes):  # a dynamic dim that must be 1
        tensor = node.cast_shape(tensor, [1 if axis in axes else size for axis, size in enumerate(shape)])
    return node.reshape(tensor, [size for axis, size in enumerate(shape) if axis not in axes])


@converter("Unsqueeze")
def unsqueeze(node: Node) -> Value:
    value = node.value(0)
    shape = known_shape(node, value)
    if node.at_run_time(1):
        return _reshape_checked(node, node.tensor(0), shape, _unsqueezed_at_run_time(node, shape))
    listed = node.ints(1) if node.has(1) else node.attr("axes")
    rank = len(shape) + len(listed)
    axes = sorted(node.axis(axis, rank) for axis in listed)
    if len(set(axes)) != len(axes):
        raise Refusal(f"axes {listed} are not distinct")
    if isinstance(value, Host):
        return Host(np.expand_dims(value.array, tuple(axes)), value.dtype)
    remaining = iter(shape)
    return node.reshape(node.tensor(0), [1 if axis in axes else next(remaining) for axis in range(rank)])


def _unsqueezed_at_run_time(node: Node, shape: list[Dim]) -> list[Dim]:
    """The shape with a 1 at each of the axes that are computed at run time."""
    added = chosen_axes(node, 1, len(shape) + len(Vector.of(node, 1)), distinct=True)
    place = (added == 0).running() - 1
    return added.where(1, Vector.sizes(node, [*shape, 1]).take(place.clip(0, len(shape)))).dims()


@evaluator("Concat", since=4)
def concat_hosts(node: Node) -> Host | None:
    arrays = [node.host(index).array for index in range(len(node.inputs))]
    if not fits(node, sum(array.size for array in arrays)):
        return None
    return host(
        np.concatenate([array.astype(object) if any(a.dtype == object for a in arrays) else array for array in arrays], node.attr("axis")),
        node.host(0).dtype,
    )


@converter("Concat", since=4)
def concat(node: Node) -> relax.Expr:
    tensors = node.tensors()
    if len(tensors) == 1:
        return tensors[0]
    return join(node, tensors, node.axis(node.attr("axis"), node.rank(tensors[0])))


def join(node: Node, tensors: list[relax.Expr], axis: int) -> relax.Expr:
    """Concatenate; dims other than `axis` that cannot be proven equal are asserted equal to the first tensor's."""
    first = node.shape(tensors[0])
    parts = [tensors[0]]
    for tensor in tensors[1:]:
        shape = node.shape(tensor)
        same = all(position == axis or node.dims.equal(a, b) for position, (a, b) in enumerate(zip(first, shape, strict=True)))
        parts.append(
            tensor
            if same
            else node.cast_shape(tensor, [b if position == axis else a for position, (a, b) in enumerate(zip(first, shape, strict=True))])
        )
    return relax.op.concat(parts, axis)


@converter("Split", since=2)
def split(node: Node) -> tuple[Value, ...]:
    value = node.value(0)
    shape = known_shape(node, value)
    axis = node.axis(node.attr("axis", 0), len(shape))
    sizes = node.sizes(1) if node.has(1) else node.attr("split")
    if node.at_run_time(1):  # the sizes must add up to the dim
        total = node.dims.simplify(sum(sizes, 0))
        value = node.cast_shape(node.tensor(0), [total if position == axis else size for position, size in enumerate(shape)])
    if sizes is None:
        count = len(node.proto.output)
        if node.attr("num_outputs", count) != count:
            raise Refusal(f"num_outputs is {node.attr('num_outputs')} where the node has {count} outputs")
        part = node.dims.ceil_divide(shape[axis], count)
        sizes = [part] * (count - 1) + [node.dims.simplify(shape[axis] - part * (count - 1))]
    bounds = [0]
    for size in sizes:
        bounds.append(node.dims.simplify(bounds[-1] + size))
    if isinstance(value, Host):
        parts = np.split(value.array, node.static(bounds[1:-1], "split sizes"), axis)
        return tuple(host(part, value.dtype) for part in parts)
    if len(sizes) == 1:
        return (value,)
    if all(isinstance(bound, int) for bound in bounds) and all(isinstance(dim, int) for dim in shape):
        result = node.emit(relax.op.split(node.tensor(0), bounds[1:-1], axis))
        return tuple(relax.TupleGetItem(result, index) for index in range(len(sizes)))
    return tuple(relax.op.strided_slice(node.tensor(0), [axis], [low], [high], assume_inbound=True) for low, high in pairwise(bounds))


@evaluator("Expand")
def expand_host(node: Node) -> Host | None:
    value, target = node.host(0), node.sizes(1)
    if not all(isinstance(size, int) for size in target):
        return None
    shape = np.broadcast_shapes(value.array.shape, tuple(target))
    return host(np.broadcast_to(value.array, shape), value.dtype) if fits(node, math.prod(shape)) else None


@converter("Expand", since=8)
def expand(node: Node) -> Value:
    value, computed = node.tensor(0), node.at_run_time(1)
    shape = node.shape(value)
    target = _broadcast_at_run_time(node, shape) if computed else node.sizes(1)
    rank = max(len(shape), len(target))
    padded = [1] * (rank - len(shape)) + shape
    wanted = [1] * (rank - len(target)) + target
    result = [have if is_int(want, 1) else want for have, want in zip(padded, wanted, strict=True)]
    if len(shape) == rank and all(node.dims.equal(a, b) for a, b in zip(shape, result, strict=True)):
        return value
    meeting = [
        have if is_int(have, 1) or node.dims.equal(have, want) else want for have, want in zip(shape, result[rank - len(shape) :], strict=True)
    ]
    if any(not node.dims.equal(a, b) for a, b in zip(meeting, shape, strict=True)):
        value = node.cast_shape(value, meeting)
    return relax.op.broadcast_to(value, result)


def _broadcast_at_run_time(node: Node, shape: list[Dim]) -> list[Dim]:
    """The shape that `shape` and the one computed at run time broadcast to; where they do not, the dims differ."""
    wanted = Vector.of(node, 1)
    rank = max(len(shape), len(wanted))
    have = Vector.sizes(node, [1] * (rank - len(shape)) + shape)
    if rank > len(wanted):
        wanted = Vector(node, node.emit(relax.op.concat([node.array(np.ones(rank - len(wanted)), "int64"), wanted.expr], 0)))
    return (wanted == 1).where(have, wanted).dims()


@evaluator("Tile", since=6)
def tile_host(node: Node) -> Host | None:
    value, repeats = node.host(0), node.sizes(1)
    if not all(isinstance(repeat, int) for repeat in repeats) or not fits(node, value.array.size * math.prod(repeats)):
        return None
    return host(np.tile(value.array, repeats), value.dtype)


@converter("Tile", since=6)
def tile(node: Node) -> Value:
    """Each repeated axis gets a new axis in front of it: [a, b] -> [1, a, 1, b] -> [r0, a, r1, b] -> [r0*a, r1*b]. Repeats may be dynamic."""
    value, repeats = node.tensor(0), node.sizes(1)
    shape = node.shape(value)
    if all(is_int(repeat, 1) for repeat in repeats):
        return value
    split_shape = [size for pair in zip([1] * len(shape), shape, strict=True) for size in pair]
    wide = node.reshape(value, split_shape)
    wide = node.emit(relax.op.broadcast_to(wide, [size for pair in zip(repeats, shape, strict=True) for size in pair]))
    return node.reshape(wide, [repeat * size for repeat, size in zip(repeats, shape, strict=True)])


@converter("DepthToSpace", "SpaceToDepth")
def depth_and_space(node: Node) -> relax.Expr:
    value, block = node.tensor(0), node.attr("blocksize")
    batch, channels, height, width = node.shape(value)
    divide = node.dims.floor_divide
    if node.op == "SpaceToDepth":
        split_value = node.reshape(value, [batch, channels, divide(height, block), block, divide(width, block), block])
        moved = node.emit(relax.op.permute_dims(split_value, [0, 3, 5, 1, 2, 4] if node.attr("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]))
        return node.reshape(moved, [batch, channels * block * block, divide(height, block), divide(width, block)])
    depth = divide(channels, block * block)
    if node.attr("mode", "DCR") == "DCR":
        moved = node.emit(relax.op.permute_dims(node.reshape(value, [batch, block, block, depth, height, width]), [0, 3, 4, 1, 5, 2]))
    else:
        moved = node.emit(relax.op.permute_dims(node.reshape(value, [batch, depth, block, block, height, width]), [0, 1, 4, 2, 5, 3]))
    return node.reshape(moved, [batch, depth, height * block, width * block])
