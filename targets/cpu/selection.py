"""Kernels of `tcompile.positions`, `tcompile.unique` and `tcompile.suppress`: serial loops, as every step depends on the ones before it.

positions    one pass
unique       a stable merge sort of row numbers, bottom up, then one pass over neighbours
suppress     per image and class, the best box that is left, until none is: N * chosen steps, no sorting
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...compiler.dialect.selection import POSITIONS_NAME, SUPPRESS_NAME, UNIQUE_NAME, room_of
from ...compiler.tvm import IRBuilder, T, relax, tirx
from ..common.fused import static
from ..common.legalize import Legalizer
from .emit import ATTRS, i64

#: Relax's pattern kind "opaque": nothing joins it
_OPAQUE = 8


@contextmanager
def function() -> Iterator[IRBuilder]:
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({**ATTRS, "op_pattern": _OPAQUE})
        yield builder


def _call(builder: Any, call: Any, function: Any, name: str) -> Any:
    return relax.call_tir(builder.add_func(function, name), list(call.args), list(call.ty.fields))


def dims_of(kind: Any, *names: str) -> list[Any]:
    """The dims of a tensor type, with a variable of their own where they are not known."""
    return [i64(static(dim)) if static(dim) is not None else tirx.Var(name, "int64") for dim, name in zip(kind.shape, names, strict=True)]


class Number:
    """A number in memory that loops change."""

    def __init__(self, value: Any = 0, dtype: str = "int64"):
        self.buffer, self.dtype = T.alloc_buffer((1,), dtype), dtype
        self.set(value)

    @property
    def now(self) -> Any:
        return self.buffer[0]

    def set(self, value: Any) -> None:
        T.buffer_store(self.buffer, tirx.const(value, self.dtype) if isinstance(value, (int, float)) else value, [0])

    def add(self, value: Any) -> None:
        self.set(self.now + value)


def when(condition: Any, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    with T.If(condition):
        with T.Then():
            then()
        if otherwise is not None:
            with T.Else():
                otherwise()


def _positions(builder: Any, call: Any) -> Any:
    (size,) = dims_of(call.args[0].ty, "n")
    with function() as made:
        mask = T.arg("mask", T.buffer((size,), "bool"))
        places, number = T.arg("places", T.buffer((size,), "int64")), T.arg("number", T.buffer((1,), "int64"))
        with T.sblock("root"):
            found = Number()
            with T.serial(size) as place:

                def keep() -> None:
                    T.buffer_store(places, place, [found.now])
                    found.add(1)

                when(mask[place], keep)
            T.buffer_store(number, found.now, [0])
    return _call(builder, call, made.get(), "positions")


def _unique(builder: Any, call: Any) -> Any:
    kind = call.args[0].ty
    rows, columns = dims_of(kind, "n", "m")
    with function() as made:
        x = T.arg("x", T.buffer((rows, columns), str(kind.dtype)))
        first, group, count = (T.arg(name, T.buffer((rows,), "int64")) for name in ("first", "group", "count"))
        number = T.arg("number", T.buffer((1,), "int64"))
        with T.sblock("root"):
            order = _sorted_rows(x, rows, columns)
            total, found = Number(), Number(dtype="int32")
            with T.serial(rows) as place:
                row = T.bind(order(place))
                found.set(1)
                when(place > 0, lambda: _compare(x, columns, order(place - 1), row, found))

                def begin() -> None:
                    T.buffer_store(first, row, [total.now])
                    T.buffer_store(count, T.int64(0), [total.now])
                    total.add(1)

                when(found.now != 0, begin)
                T.buffer_store(group, total.now - 1, [row])
                T.buffer_store(count, count[total.now - 1] + 1, [total.now - 1])
            T.buffer_store(number, total.now, [0])
            if not bool(call.attrs["ordered"]):
                _in_order_of_appearance(rows, first, group, count, total)
    return _call(builder, call, made.get(), "unique")


def _compare(x: Any, columns: Any, left: Any, right: Any, found: Number) -> None:
    """found = 1 where row `left` comes before row `right`, 2 where it comes after it, 0 where they are alike."""
    column = Number()
    found.set(0)
    floating = "float" in str(x.dtype)

    def before(a: Any, b: Any) -> Any:
        if str(x.dtype) == "bool":
            return tirx.And(tirx.Not(a), b)
        return tirx.Or(a < b, tirx.And(tirx.Not(tirx.isnan(a)), tirx.isnan(b))) if floating else a < b

    with T.While(tirx.And(column.now < columns, found.now == 0)):
        a, b = T.bind(x[left, column.now]), T.bind(x[right, column.now])
        found.set(tirx.Select(before(a, b), T.int32(1), tirx.Select(before(b, a), T.int32(2), T.int32(0))))
        column.add(1)


def _sorted_rows(x: Any, rows: Any, columns: Any) -> Callable[[Any], Any]:
    """Emits the sort; the result gives the row at a place of the order."""
    order = T.alloc_buffer((2, rows), "int64")
    width, side = Number(1), Number()
    left, right, found = Number(), Number(), Number(dtype="int32")
    with T.serial(rows) as row:
        T.buffer_store(order, row, [T.int64(0), row])

    def merge(low: Any, middle: Any, high: Any) -> None:
        left.set(low)
        right.set(middle)
        with T.serial(high - low) as step:
            found.set(1)  # take from the left, unless its next row comes after that of the right
            when(
                left.now >= middle,
                lambda: found.set(2),
                lambda: when(right.now < high, lambda: _compare(x, columns, order[side.now, left.now], order[side.now, right.now], found)),
            )

            def take(source: Number) -> None:
                T.buffer_store(order, order[side.now, source.now], [1 - side.now, low + step])
                source.add(1)

            when(found.now == 2, lambda: take(right), lambda: take(left))

    with T.While(width.now < rows):
        with T.serial(T.floordiv(rows + 2 * width.now - 1, 2 * width.now)) as pair:
            low = T.bind(pair * 2 * width.now)
            merge(low, T.bind(tirx.min(low + width.now, rows)), T.bind(tirx.min(low + 2 * width.now, rows)))
        side.set(1 - side.now)
        width.set(2 * width.now)
    return lambda place: order[side.now, place]


def _in_order_of_appearance(rows: Any, first: Any, group: Any, count: Any, total: Number) -> None:
    """Numbers the groups anew, by the first row of each."""
    name, old = T.alloc_buffer((rows,), "int64"), T.alloc_buffer((2, rows), "int64")
    with T.serial(total.now) as index:
        T.buffer_store(old, first[index], [T.int64(0), index])
        T.buffer_store(old, count[index], [T.int64(1), index])
    total.set(0)
    with T.serial(rows) as row:
        own = T.bind(group[row])

        def begin() -> None:
            T.buffer_store(name, total.now, [own])
            T.buffer_store(first, row, [total.now])
            T.buffer_store(count, old[1, own], [total.now])
            total.add(1)

        when(old[0, own] == row, begin)
        T.buffer_store(group, name[own], [row])


def _suppress(builder: Any, call: Any) -> Any:
    kind = call.args[0].ty
    dtype = str(kind.dtype)
    images, size, _ = dims_of(kind, "b", "n", "four")
    classes = dims_of(call.args[1].ty, "b", "c", "n")[1]
    with function() as made:
        boxes, scores = T.arg("boxes", T.buffer((images, size, 4), dtype)), T.arg("scores", T.buffer((images, classes, size), dtype))
        most, overlap = T.arg("most", T.buffer((1,), "int64")), T.arg("overlap", T.buffer((1,), "float32"))
        least = T.arg("least", T.buffer((1,), "float32")) if len(call.args) == 5 else None
        chosen = T.arg("chosen", T.buffer((images * classes * room_of(call, size), 3), "int64"))
        number = T.arg("number", T.buffer((1,), "int64"))
        with T.sblock("root"):
            left, total = T.alloc_buffer((size,), "int8"), Number()
            best, taken, box = Number(dtype=dtype), Number(), Number()
            with T.serial(images) as image, T.serial(classes) as label:
                with T.serial(size) as place:
                    enough = T.int8(1) if least is None else tirx.Cast("int8", tirx.Cast("float32", scores[image, label, place]) > least[0])
                    T.buffer_store(left, enough, [place])
                taken.set(0)
                box.set(0)
                with T.While(tirx.And(taken.now < most[0], box.now >= 0)):
                    box.set(-1)
                    with T.serial(size) as place:

                        def better(place: Any = place, image: Any = image, label: Any = label) -> None:
                            box.set(place)
                            best.set(scores[image, label, place])

                        score = T.bind(scores[image, label, place])
                        when(tirx.And(left[place] != 0, tirx.Or(box.now < 0, score > best.now)), better)

                    def choose(image: Any = image, label: Any = label) -> None:
                        for column, value in enumerate((image, label, box.now)):
                            T.buffer_store(chosen, value, [total.now, T.int64(column)])
                        total.add(1)
                        taken.add(1)
                        T.buffer_store(left, T.int8(0), [box.now])
                        own = _corners(boxes, image, box.now, bool(call.attrs["centred"]))
                        with T.serial(size) as other:

                            def drop() -> None:
                                meets = _overlaps(own, _corners(boxes, image, other, bool(call.attrs["centred"])), tirx.Cast(dtype, overlap[0]))
                                when(meets, lambda: T.buffer_store(left, T.int8(0), [other]))

                            when(left[other] != 0, drop)

                    when(box.now >= 0, choose)
            T.buffer_store(number, total.now, [0])
    return _call(builder, call, made.get(), "suppress")


def _corners(boxes: Any, image: Any, box: Any, centred: bool) -> list[Any]:
    """[low y, low x, high y, high x] of a box, bound."""
    a, b, c, d = (boxes[image, box, T.int64(place)] for place in range(4))
    half = tirx.const(0.5, str(boxes.dtype))
    if centred:
        corners = [b - d * half, a - c * half, b + d * half, a + c * half]
    else:
        corners = [tirx.min(a, c), tirx.min(b, d), tirx.max(a, c), tirx.max(b, d)]
    return [T.bind(corner) for corner in corners]


def _overlaps(a: list[Any], b: list[Any], limit: Any) -> Any:
    """Whether the intersection over the union of two boxes is above the limit; boxes without area overlap nothing."""
    zero = tirx.const(0, str(limit.ty.dtype))
    height, width = tirx.min(a[2], b[2]) - tirx.max(a[0], b[0]), tirx.min(a[3], b[3]) - tirx.max(a[1], b[1])
    common = T.bind(tirx.max(height, zero) * tirx.max(width, zero))
    areas = [T.bind((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    together = T.bind(areas[0] + areas[1] - common)
    proper = tirx.And(tirx.And(areas[0] > zero, areas[1] > zero), tirx.And(common > zero, together > zero))
    return tirx.And(proper, common / tirx.Select(proper, together, zero + 1) > limit)


OWN: dict[str, Legalizer] = {POSITIONS_NAME: _positions, UNIQUE_NAME: _unique, SUPPRESS_NAME: _suppress}
