"""Copies of rows into whole tiles of K, for products whose rows do not lie in memory as AMX tiles want them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import T, tirx
from .amx import ROW_BYTES
from .dot import Dot, splat, vector


@dataclass(frozen=True)
class Gathered:
    """Rows that are copied: gather(target, slot, row) emits a copy of one, `width` elements with what fills its last tile, to row `slot` of a buffer."""

    gather: Callable[[Any, Any, Any], None]
    width: int
    dot: Dot

    def prepare(self, first: Any, size: Any, most: Any) -> tuple[Callable[[Any, Any], Any], int]:
        gathered = T.alloc_buffer((most, self.width), stored_type(self.dot))
        with T.serial(size) as slot:
            self.gather(gathered, slot, first + slot)
        return lambda row, k: gathered[row, k], self.width * self.dot.activation_bytes

    def inside(self, lead: Sequence[Any]) -> Any:
        return None


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


def copy_run(target: Any, lead: tuple[Any, ...], place: Any, source: Callable[[Any, int], Any] | None, count: int, dot: Dot) -> None:
    """Emits target[*lead, place : place + count] = source(first, lanes), vector by vector, or zeros."""
    whole = ROW_BYTES // dot.activation_bytes
    loops, rest = divmod(count, whole)

    def copied(first: Any, length: int) -> None:
        kind = stored_type(dot) if length == 1 else f"{stored_type(dot)}x{length}"
        value = splat(tirx.const(0, stored_type(dot)), length) if source is None else source(first, length)
        T.buffer_store(
            target,
            value if source is None or stored_type(dot) == dot.activation else T.reinterpret(kind, value),
            [*lead, vector(place + first, length)],
        )

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
