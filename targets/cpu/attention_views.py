"""Where an attention kernel finds q, k and v: in tensors of their own, or within the tensor that slices and transposes would have copied them from.

An operand is an affine map of its four indices into the dims of the tensor that holds it. A product that makes Q, K and V at once, [B, S, 3 * H * D], is read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.dialect.attention import SWAPPED
from ...compiler.tvm import relax, tirx, tvm
from ..common.fused import Fused, static

#: per dim of the holding tensor: a constant, and a factor for each of the indices b, h, s, d
Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class View:
    """`tensor` holds element (b, h, s, d) of an operand at [row . (1, b, h, s, d) for row in rows]. dims: sizes along b, h, s, d."""

    tensor: Any
    rows: Rows
    dims: tuple[Any, ...]

    def size(self, axis: int) -> int | list[int] | None:
        """The size along an axis: a number, or which dim of `tensor` it is, as a list of one; None if it is neither."""
        known = static(self.dims[axis])
        if known is not None:
            return known
        unit = tuple(int(place == axis + 1) for place in range(5))
        return next(([dim] for dim, row in enumerate(self.rows) if row == unit and _equal(self.tensor.ty.shape[dim], self.dims[axis])), None)


def operand(x: Any, layout: str) -> View:
    """A tensor of its own."""
    order = range(4) if layout == "BHSD" else SWAPPED
    shape = list(x.ty.shape)
    return View(x, tuple(tuple(int(place == axis + 1) for place in range(5)) for axis in order), tuple(shape[axis] for axis in order))


def element(rows: Sequence[Sequence[int]], *indices: Any) -> tuple[Any, ...]:
    """The place of element (b, h, s, d) by `View.rows`; d may be a vector."""
    return tuple(_affine(row, indices) for row in rows)


def _affine(row: Sequence[int], indices: Sequence[Any]) -> Any:
    constant, *factors = row
    total: Any = None
    # scalars first: a vector joins the sum once
    for factor, index in zip(factors, indices, strict=True):
        if factor:
            term = index if factor == 1 else index * tirx.const(factor, "int64")
            total = term if total is None else total + term
    if total is None:
        return tirx.const(constant, "int64")
    return total + tirx.const(constant, "int64") if constant else total


def rows_apart(fused: Fused) -> bool:
    """Whether consecutive rows of the keys or of the values do not lie side by side, but with those of other heads between them."""
    return any(_stride(fused.core["rows"][place], fused.inputs[place].shape) != static(fused.inputs[place].shape[-1]) for place in (1, 2))


def bytes_between_rows(fused: Fused, operand: int) -> int | None:
    """From a row of k (operand 1) or v (2) to the next; None if it is known at run time only."""
    buffer = fused.inputs[operand]
    elements = _stride(fused.core["rows"][operand], buffer.shape)
    return None if elements is None else elements * tvm.DataType(str(buffer.ty.dtype)).itemsize


def _stride(rows: Sequence[Sequence[int]], shape: Sequence[Any]) -> int | None:
    """Elements from row s to row s + 1; None if sizes known at run time only decide it."""
    total, inner = 0, 1
    for row, dim in zip(reversed(rows), reversed(shape), strict=True):
        if row[3]:
            if inner is None:
                return None
            total += row[3] * inner
        size = static(dim)
        inner = None if inner is None or size is None else inner * size
    return total


def find_view(bindings: dict[Any, Any], x: Any, layout: str) -> View:
    """The operand x, in the tensor before the slices, splits, transposes, reshapes and casts that it comes from if it can be read there."""
    plain = operand(x, layout)
    best, tensor, rows, copied = plain, x, [list(row) for row in plain.rows], False
    while isinstance(tensor, relax.Var) and tensor in bindings:
        value = bindings[tensor]
        if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Var):
            value, part = bindings.get(value.tuple_value), int(value.index)
        else:
            part = 0
        if getattr(getattr(value, "op", None), "name", "") == "relax.astype":  # element by element: whoever reads in place casts the whole
            tensor = value.args[0]
            continue
        before = _before(value, part, rows)
        if before is None:
            break
        copied = copied or value.op.name not in ("relax.reshape", "relax.expand_dims", "relax.squeeze")
        tensor, rows = value.args[0], before
        view = View(tensor, tuple(tuple(row) for row in rows), plain.dims)
        depths = [row[4] for row in rows]
        if copied and depths == [0] * (len(rows) - 1) + [1] and all(view.size(axis) is not None for axis in (0, 2)):
            best = view
    return best


def _before(call: Any, part: int, rows: list[list[int]]) -> list[list[int]] | None:
    """Rows for the operand of an operator that only moves elements, from those for its result (for one of its results); None for any other."""
    name = getattr(getattr(call, "op", None), "name", "")
    if name in ("relax.reshape", "relax.expand_dims", "relax.squeeze"):
        return _reshaped(list(call.args[0].ty.shape), list(call.ty.shape), rows)
    if name == "relax.permute_dims":
        axes = call.attrs.axes
        order = [int(axis) for axis in axes] if axes is not None else list(reversed(range(len(rows))))
        return [rows[order.index(axis)] for axis in range(len(rows))]
    if name == "relax.split":
        axis, cut = int(call.attrs.axis), call.attrs.indices_or_sections
        size = static(call.args[0].ty.shape[axis])
        if size is None:
            return None
        starts = [0, *(int(index) for index in cut)] if not isinstance(cut, (int, tirx.IntImm)) else list(range(0, size, -(-size // int(cut))))
        return [[row[0] + starts[part], *row[1:]] if place == axis % len(rows) else row for place, row in enumerate(rows)]
    if name == "relax.strided_slice":
        return _sliced(call, rows)
    return None


def _sliced(call: Any, rows: list[list[int]]) -> list[list[int]] | None:
    fields = [
        [getattr(field, "value", None) for field in argument.fields] if isinstance(argument, relax.Tuple) else None for argument in call.args[1:]
    ]
    axes, begin = fields[:2]
    strides = fields[3] if len(fields) > 3 else [1] * len(axes or ())
    if axes is None or begin is None or strides is None or not all(isinstance(value, (int, tirx.IntImm)) for value in (*axes, *begin, *strides)):
        return None
    found = [list(row) for row in rows]
    for axis, first, stride in zip(axes, begin, strides, strict=True):
        size, first, place = static(call.args[0].ty.shape[int(axis)]), int(first), int(axis) % len(rows)
        if int(stride) < 1 or (first < 0 and size is None):
            return None
        first = first + size if first < 0 else first  # pyright: ignore[reportOptionalOperand]
        found[place] = [factor * int(stride) for factor in found[place]]
        found[place][0] += max(first, 0) if size is None else min(max(first, 0), size)
    return found


def _reshaped(before: list[Any], after: list[Any], rows: list[list[int]]) -> list[list[int]] | None:
    """Where each dim before is one after, a unit, or split into several; None when dims were merged."""
    found: list[list[int]] = []
    at = 0
    for dim in before:
        if static(dim) == 1:
            found.append([0] * 5)
            continue
        while at < len(after) and static(after[at]) == 1:
            at += 1
        if at == len(after):
            return None
        if _equal(dim, after[at]):
            found.append(rows[at])
            at += 1
            continue
        size, first = 1, at
        while static(dim) is not None and at < len(after) and static(after[at]) is not None and size < static(dim):  # pyright: ignore[reportOptionalOperand]
            size *= int(after[at])
            at += 1
        if size != static(dim):
            return None
        row, stride = [0] * 5, 1
        for place in reversed(range(first, at)):
            row = [have + stride * more for have, more in zip(row, rows[place], strict=True)]
            stride *= int(after[place])
        found.append(row)
    return found


def _equal(one: Any, other: Any) -> bool:
    return tvm.sym.Analyzer().can_prove_equal(one, other)
