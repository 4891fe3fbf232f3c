"""Vector: arithmetic on the few integers that say which axes, positions and sizes an operator has, where the model computes them while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...tvm import relax
from .node import Node
from .symbolic import Dim
from .values import Host, Refusal, Value


class Vector:
    """An int64 (or bool) tensor of a node, with the operators of numpy; other operands may be ints and numpy arrays."""

    def __init__(self, node: Node, expr: relax.Expr):
        self.node, self.expr = node, expr

    @classmethod
    def of(cls, node: Node, index: int) -> Vector:
        """Input `index`, flattened."""
        value = node.tensor(index)
        value = value if node.dtype(value) == "int64" else node.emit(relax.op.astype(value, "int64"))
        return cls(node, node.reshape(value, [node.dims.product(node.shape(value))]))

    @classmethod
    def sizes(cls, node: Node, dims: Sequence[Dim]) -> Vector:
        """Known dims as a vector."""
        if all(isinstance(dim, int) for dim in dims):
            return cls(node, node.array(np.array(dims, np.int64), "int64"))
        return cls(node, node.emit(relax.op.shape_to_tensor(relax.ShapeExpr(dims))))

    def __len__(self) -> int:
        return self.node.static(self.node.shape(self.expr)[:1], "the number of values")[0]

    def column(self) -> Vector:
        """[n] as [n, 1]"""
        return Vector(self.node, self.node.reshape(self.expr, [len(self), 1]))

    def take(self, index: Vector | int) -> Vector:
        """The elements at the places `index`, which raise where they lie outside; a scalar for an int."""
        place = self.node.scalar(index, "int64") if isinstance(index, int) else index.expr
        return self._new(relax.op.take(self.expr, place, 0, mode="fast"))

    def any(self) -> Vector:
        """Whether any row of a bool [n, m] holds, per column: bool [m]."""
        return self._new(relax.op.max(self.integers().expr, [0])) != 0

    def total(self, axis: int = 0) -> Vector:
        return self._new(relax.op.sum(self.integers().expr, [axis]))

    def product(self) -> Vector:
        """Of all elements, a scalar."""
        return self._new(relax.op.prod(self.expr, [0]))

    def running(self) -> Vector:
        """Sums up to and with each element."""
        return self._new(relax.op.cumsum(self.integers().expr, 0, "int64"))

    def integers(self) -> Vector:
        return self if self.node.dtype(self.expr) == "int64" else self._new(relax.op.astype(self.expr, "int64"))

    def where(self, yes: Vector | int, no: Vector | int) -> Vector:
        return self._new(relax.op.where(self.expr, self._operand(yes), self._operand(no)))

    def clip(self, low: Vector | int, high: Vector | int) -> Vector:
        return self._binary(relax.op.minimum, high)._binary(relax.op.maximum, low)

    def at_least(self, low: Vector | int) -> Vector:
        return self._binary(relax.op.maximum, low)

    def __add__(self, other: Vector | int | np.ndarray) -> Vector:
        return self._binary(relax.op.add, other)

    def __sub__(self, other: Vector | int | np.ndarray) -> Vector:
        return self._binary(relax.op.subtract, other)

    def __mul__(self, other: Vector | int | np.ndarray) -> Vector:
        return self._binary(relax.op.multiply, other)

    def __floordiv__(self, other: Vector | int | np.ndarray) -> Vector:
        return self._binary(relax.op.floor_divide, other)

    def __lt__(self, other: Vector | int | np.ndarray) -> Vector:
        return self._binary(relax.op.less, other)

    def __ge__(self, other: Vector | int | np.ndarray) -> Vector:
        return self._binary(relax.op.greater_equal, other)

    def __eq__(self, other: Vector | int | np.ndarray) -> Vector:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._binary(relax.op.equal, other)

    def __ne__(self, other: Vector | int | np.ndarray) -> Vector:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._binary(relax.op.not_equal, other)

    def __and__(self, other: Vector) -> Vector:
        return self._binary(relax.op.logical_and, other)

    def __or__(self, other: Vector) -> Vector:
        return self._binary(relax.op.logical_or, other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def dims(self) -> list[Dim]:
        """The elements as dims; see `Node.runtime_sizes`."""
        return self.node.runtime_sizes(self.expr)

    def _binary(self, make: Callable[[relax.Expr, relax.Expr], relax.Expr], other: Vector | int | np.ndarray) -> Vector:
        return self._new(make(self.expr, self._operand(other)))

    def _operand(self, value: Vector | int | np.ndarray) -> relax.Expr:
        return value.expr if isinstance(value, Vector) else self.node.array(np.asarray(value, np.int64), "int64")

    def _new(self, expr: relax.Expr) -> Vector:
        return Vector(self.node, self.node.emit(expr))


def counted_axes(node: Node, index: int, rank: int, distinct: bool = False) -> Vector:
    """Input `index` with axes, counted from the front. Those outside of the rank raise at run time, as do equal ones where all must be distinct."""
    axes = Vector.of(node, index)
    axes = (axes < 0).where(axes + rank, axes)
    if distinct and len(axes) > 1:
        row = Vector(node, node.reshape(axes.expr, [1, len(axes)]))
        axes = ((axes.column() == row).integers().total() >= 2).where(rank, axes)
    return Vector(node, node.array(np.arange(rank), "int64")).take((axes < 0).where(rank, axes))


def chosen_axes(node: Node, index: int, rank: int, distinct: bool = False) -> Vector:
    """Input `index` with axes as bool [rank]: whether an axis is among them."""
    return (counted_axes(node, index, rank, distinct).column() == np.arange(rank)).any()


def from_the_front(node: Node, places: Value) -> Value:
    """Indices that must not count from the end: negative ones raise in the operator that uses them, at run time or now."""
    if isinstance(places, Host) and not places.symbolic:
        if (places.array < 0).any():
            raise Refusal(f"position {places.array.min()} is negative")
        return places
    tensor = node.to_tensor(places)
    dtype = node.dtype(tensor)
    negative = node.emit(relax.op.less(tensor, node.scalar(0, dtype)))
    return node.emit(relax.op.where(negative, node.scalar(np.iinfo(dtype).min, dtype), tensor))


def spread(values: Vector, axes: Vector, default: Vector | int, rank: int) -> Vector:
    """values[i] at axis axes[i], `default` at the other axes: [rank]."""
    hit = axes.column() == np.arange(rank)
    return hit.any().where((hit.integers() * values.column()).total(0), default)


def compact(values: Vector, kept: Vector, count: int) -> Vector:
    """The `count` elements of `values` that `kept` (bool) marks, in order; 0 where there are fewer."""
    place = kept.running() - 1
    hit = (place.column() == np.arange(count)) & Vector(values.node, values.node.reshape(kept.expr, [len(kept), 1]))
    return (hit.integers() * values.column()).total(0)
