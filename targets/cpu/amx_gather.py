"""Copies of rows into whole tiles of K, for products whose rows do not lie in memory as AMX tiles want them: of other lengths, windows of an image, or float32.

A float32 becomes several bfloat16 that add up to it (Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision Computations", 2019): the nearest one, the
one nearest to what that leaves, and so on. Three of 8 bits hold all 24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import T, tirx
from ..common.ops_cast import ROUNDED
from .amx import ROW_BYTES
from .dot import Dot, splat, vector


@dataclass(frozen=True)
class Room:
    """A buffer that elements are copied to: those of the first term as the buffer has them, those of the others `plane` elements behind each other."""

    buffer: Any
    plane: int
    dot: Dot

    @property
    def run(self) -> int:
        """Elements to copy at a time: a row of a tile, or a vector of float32."""
        return ROW_BYTES // (4 if self.dot.terms > 1 else self.dot.activation_bytes)

    def put(self, lead: Sequence[Any], place: Any, value: Any, lanes: int) -> None:
        """Stores `lanes` elements from `place` on, zeros if value is None."""
        stored = stored_type(self.dot)
        kind = stored if lanes == 1 else f"{stored}x{lanes}"
        if value is None:
            terms = [splat(tirx.const(0, stored), lanes)] * self.dot.terms
        elif self.dot.terms > 1:
            terms = list(split(value, self.dot.terms, lanes))
        else:
            terms = [value if stored == self.dot.activation else T.reinterpret(kind, value)]
        for number, term in enumerate(terms):
            T.buffer_store(self.buffer, term, [*lead, vector(place + T.int64(number * self.plane) if number else place, lanes)])


def split(value: Any, terms: int, lanes: int) -> Iterator[Any]:
    """The bits of so many bfloat16 that add up to a float32."""

    def typed(dtype: str) -> str:
        return dtype if lanes == 1 else f"{dtype}x{lanes}"

    rest = T.bind(value)
    for term in range(terms):
        bits = T.bind(tirx.call_intrin(typed("uint16"), ROUNDED, rest))
        yield bits
        if term < terms - 1:
            rest = T.bind(rest - T.reinterpret(typed("float32"), T.cast(bits, typed("uint32")) << splat(T.uint32(16), lanes)))


@dataclass(frozen=True)
class Gathered:
    """Rows that are copied: gather(room, slot, row) emits a copy of one, `width` elements with what fills its last tile, to row `slot` of a buffer."""

    gather: Callable[[Room, Any, Any], None]
    width: int
    dot: Dot

    def prepare(self, first: Any, size: Any, most: Any) -> tuple[Callable[[Any, Any, int], Any], int]:
        plane = apart(self.width, self.dot)
        room = Room(T.alloc_buffer((most, self.dot.terms * plane), stored_type(self.dot)), plane, self.dot)
        if plane > self.width:
            # TVM would cut off what nothing touches, and rows would lie closer to each other
            room.put((T.int64(0),), T.int64(plane - 1), None, 1)
        with T.serial(size) as slot:
            self.gather(room, slot, first + slot)
        return lambda row, k, term: room.buffer[row, k + term * plane], self.dot.terms * plane * self.dot.activation_bytes

    def inside(self, lead: Sequence[Any]) -> Any:
        return None


def apart(width: int, dot: Dot) -> int:
    """Elements from term to term of `width` elements: where there are several, an odd number of cache lines, so that rows of a tile do not meet in a set."""
    line = ROW_BYTES // dot.activation_bytes
    return width if dot.terms == 1 else (-(-width // line) | 1) * line


def run_copies(count: int, before: int) -> Iterator[tuple[int, int]]:
    """(first, length) of vectors that copy `count` elements behind `before` others of the same run: the last one overlaps what was copied, where there is enough of it."""
    first = 0
    while first < count:
        rest = count - first
        length = 1 << (rest - 1).bit_length()
        if length - rest > before + first:
            length //= 2
        yield first + min(0, rest - length), length
        first += min(rest, length)


def copy_run(room: Room, lead: tuple[Any, ...], place: Any, source: Callable[[Any, int], Any] | None, count: int) -> None:
    """Emits room[*lead, place : place + count] = source(first, lanes), vector by vector, or zeros."""
    whole = room.run
    loops, rest = divmod(count, whole)

    def copied(first: Any, length: int) -> None:
        room.put(lead, place + first, None if source is None else source(first, length), length)

    if loops > 1:
        with T.serial(T.int64(loops)) as part:
            copied(part * T.int64(whole), whole)
    elif loops:
        copied(T.int64(0), whole)
    for first, length in run_copies(rest, loops * whole):
        copied(T.int64(loops * whole + first), length)


def stored_type(dot: Dot) -> str:
    """Type of gathered elements: TVM would keep a buffer of bfloat16 in float32."""
    return "uint16" if dot.activation == "bfloat16" else dot.activation
