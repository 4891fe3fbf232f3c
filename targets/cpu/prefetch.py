"""Software prefetch of weights: while rows of an activation pass one packed panel, the next panel comes from memory.

Every call reads all weights, from memory once they are more than the last-level cache holds. Hardware prefetchers begin with a panel when its first rows are read, and begin again at
every page, so that the first register tile of each panel waits for memory. Here every tile asks for its share of the next panel instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ...autotune.tir_features import PREFETCH
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import static
from .dot import Dot
from .vectors import element_bits

#: words of a cache line
LINE = 16
#: register tiles that pass a panel, at least: one alone waits for its own panel already, and more requests delay it
FEWEST_TILES = 2
#: steps of k between two lines asked for, at most. They are unrolled: leaving a loop over so few would be predicted wrongly every time, at the cost of a tenth; and bursts of many lines
#: would keep what a tile loads waiting
STEPS = 8
#: bytes between weights that are multiplied and those that are asked for, where a panel is passed once
SOON = 1 << 15
#: (panel, line): asks for one cache line of a panel
Ahead = Callable[[Any, Any], None]
#: (element, count): asks for as many elements of the flat buffer of packed weights, some way behind that one
Once = Callable[[Any, int], None]
#: the first line that a register tile asks for, and steps of k between lines
Share = tuple[Any, int]


def prefetch(element: Any, level: int = 1) -> None:
    """Ask for the cache line of an element of a buffer, to be read from the cache of this level on. It never faults, wherever the element would be."""
    # read, locality, data
    arguments = T.address_of(element), T.int32(0), T.int32(4 - level), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", T.llvm_lookup_intrinsic_id("llvm.prefetch"), *arguments))


def expect(buffers: Sequence[Any], leads: Iterable[Sequence[Any]], column: Any, columns: int, level: int) -> None:
    """Ask for rows of buffers of one shape, each from `column` on, to be in the cache of this level when an epilogue comes to them. leads: a row's indices but the last."""
    for lead in leads:
        for buffer in buffers:
            for place in range(0, columns, 32 * LINE // element_bits(str(buffer.dtype))):
                prefetch(buffer[(*lead, column + place)], level)


def panels_ahead(shape: Sequence[int], weights: Any, dot: Dot, target: Target) -> Ahead | None:
    """Prefetch of weights packed to panels of this shape, their number first; None where the second-level cache does not hold a panel beside the one in use. Products of short numbers go without
    where vectors have 256 bits: they lost 3 % (with AVX512 `vpdpbusd` takes 0.84 of BERT-base's time, 0.93 of ResNet-50's).

    A panel behind the last one may be asked for: a prefetch never faults.
    """
    unsuited = dot.separate or (dot.activation != "float32" and target.vector_bits < 512)
    return None if unsuited or 2 * math.prod(shape[1:]) * 4 > target.l2_bytes else lines_of(shape, weights)


def lines_of(shape: Sequence[int], weights: Any) -> Ahead:
    """Prefetch of packed words, of lines that there may not be, too."""
    panels, size = shape[0], math.prod(shape[1:])
    flat, last = T.decl_buffer((panels, size), weights.dtype, data=weights.data), -(-size // LINE) - 1

    def ahead(panel: Any, line: Any) -> None:
        prefetch(flat[panel, T.min(line, T.int64(last)) * T.int64(LINE)], level=2)

    return ahead


def passed_once(weights: Any, target: Target) -> Once | None:
    """Prefetch of packed weights that one register tile passes alone. Where others load the memory, that is up
    to a third of the time of a product of few rows. None with AVX2: requests for the next panel delayed the panel in use there, and these have not been measured."""
    return soon(weights) if target.vector_bits == 512 else None


def soon(weights: Any) -> Once:
    """The same for any machine."""
    size = element_bits(str(weights.dtype)) // 8
    flat = T.decl_buffer((math.prod(int(dim) for dim in weights.shape),), weights.dtype, data=weights.data)

    def ask(first: Any, count: int) -> None:
        for place in range(0, count, 4 * LINE // size):
            prefetch(flat[first + T.int64(SOON // size + place)], level=2)

    return ask


def share(tile: Any, tiles: int | None, words: int, nr: int) -> Share | None:
    """How a register tile, one of so many (None: not known) that pass a panel of `words` rows of nr, asks for the next panel; None where it does not."""
    if tiles is not None and tiles < FEWEST_TILES:
        return None
    between = steps(tiles, nr)
    return tile * T.int64(-(-words // between)), between


def asking(count: Any, share: Share | None, ask: Callable[[Any], None]) -> Iterator[Any]:
    """Emits a loop over `count` k and yields k where its body belongs; ask(line) for those of a share, from its first on."""
    if share is None:
        with T.serial(count) as step:
            yield step
        return
    line, between = share
    whole = T.floordiv(count, T.int64(between))
    with T.serial(whole, annotations={PREFETCH: 1}) as few:
        ask(line + few)
        with T.unroll(T.int64(between)) as step:
            yield few * between + step
    known = static(count)
    if known is None or known % between:
        with T.serial(count - whole * between) as step:
            yield whole * between + step


def steps(tiles: Any, nr: int) -> int:
    """Steps of k between two lines, so that `tiles` register tiles (None: not known) ask for a whole panel of rows of `nr` words."""
    return STEPS if tiles is None else max(1, min(STEPS, LINE * tiles // nr))
