"""Intel AMX: products of tiles of 16 rows x 64 bytes, by instructions on eight tile registers that know nothing of vectors.

    c[16][16] += a[16][16 words] @ b[16 words][16]       # a word: 4 codes (tdpbusd, int32) or 2 bfloat16 (tdpbf16ps, float32)

A tile of A is 16 rows of a row-major matrix as it lies in memory; a tile of B is 16 words of a panel that is packed as for `vpdpbusd` (see dot.py). Sums of bytes are exact, those of bfloat16 round
to float32 after every pair of products. LLVM's intrinsics on numbered tiles are used: it allocates none, so a kernel keeps to one configuration at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import T, tirx
from ..base import Target
from .dot import Dot
from .emit import i64

#: rows of a tile, and lanes of 32 bits in one of its rows
ROWS = 16
#: bytes of a row of a tile
ROW_BYTES = 64
_TILES = 8
#: cycles until a sum can be added to again
LATENCY = 52.0
#: kind of a product -> (instruction, feature of the target)
_PRODUCTS = {"bf16": ("tdpbf16ps", "amx-bf16"), "u8s8": ("tdpbusd", "amx-int8")}
#: kinds whose operands are sums of several bfloat16, by how many; for those who ask for them, see `Target.formats`
TERMS = {"bf16x2": 2, "bf16x3": 3}


def available(kind: str, target: Target) -> bool:
    """Whether a machine multiplies this kind (see `dot.dot_kind`) by tiles."""
    if kind in TERMS:
        return kind in target.formats and available("bf16", target)
    _, feature = _PRODUCTS.get(kind.partition("/")[0], ("", "none"))
    return {"amx-tile", feature} <= target.features


@dataclass(frozen=True)
class Tiles:
    """A block of `rows` x `columns` tiles of sums in registers: sums first, then one tile of A for each row, the others take turns for B."""

    rows: int
    columns: int

    @property
    def fits(self) -> bool:
        return self.rows * self.columns + self.rows < _TILES

    def c(self, i: int, j: int) -> int:
        return i * self.columns + j

    def a(self, i: int) -> int:
        return self.rows * self.columns + i

    def b(self, j: int) -> int:
        first = self.rows * self.columns + self.rows
        return first + j % (_TILES - first)

    def configure(self, memory: Any, last: Any = ROWS) -> None:
        """Make the tiles of this block ready and zero all; memory: an int32 buffer of 16 elements; last: rows in the last row of tiles, the others have 16."""
        shorter = {self.a(self.rows - 1), *(self.c(self.rows - 1, j) for j in range(self.columns))}
        height = T.int32(last) if isinstance(last, int) else T.cast(last, "int32")

        def heights(tiles: range) -> Any:
            """Four heights in one word."""
            return sum(((height if tile in shorter else T.int32(ROWS)) << T.int32(8 * place) for place, tile in enumerate(tiles)), T.int32(0))

        widths = T.int32(ROW_BYTES << 16 | ROW_BYTES)
        words = {0: T.int32(1), **dict.fromkeys(range(4, 8), widths), 12: heights(range(4)), 13: heights(range(4, _TILES))}
        for place in range(16):
            T.buffer_store(memory, words.get(place, T.int32(0)), [place])
        _instruction("ldtilecfg", T.address_of(memory[0]))


def zero(tile: int) -> None:
    _instruction("tilezero", T.uint8(tile))


def load(tile: int, element: Any, stride: Any) -> None:
    """A tile from memory, its rows `stride` bytes apart, the first from this element of a buffer on."""
    _instruction("tileloadd64", T.uint8(tile), T.address_of(element), i64(stride))


def store(tile: int, element: Any, stride: Any) -> None:
    """The counterpart of `load`."""
    _instruction("tilestored64", T.uint8(tile), T.address_of(element), i64(stride))


def multiply(dot: Dot, c: int, a: int, b: int) -> None:
    """c += a @ b."""
    name, _ = _PRODUCTS["bf16" if dot.accumulator == "float32" else "u8s8"]
    _instruction(name, T.uint8(c), T.uint8(a), T.uint8(b))


def release() -> None:
    """Give the tiles back: the system saves them at every switch of threads until then."""
    _instruction("tilerelease")


def _instruction(name: str, *arguments: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), *arguments))


def steps(k: int, dot: Dot) -> int:
    """Tiles that K elements fill, the last one in part."""
    return -(-k * dot.activation_bytes // ROW_BYTES)


def step_elements(dot: Dot) -> int:
    """Elements of K in a tile."""
    return ROW_BYTES // dot.activation_bytes


def whole(k: int, dot: Dot) -> int:
    """K elements with what fills their last tile."""
    return steps(k, dot) * step_elements(dot)


def sums(size: int, dtype: str) -> Any:
    """Memory for tiles of sums. TVM cuts off what no statement touches, and does not know what tiles write."""
    memory = T.alloc_buffer((size,), dtype)
    T.buffer_store(memory, tirx.const(0, dtype), [size - 1])
    return memory


def shapes(rows: int | None, columns: int) -> Sequence[Tiles]:
    """Blocks worth trying for an output of so many rows (None: unknown) and columns."""
    most_rows, most_columns = 3 if rows is None else -(-rows // ROWS), -(-columns // ROWS)
    options = [Tiles(r, c) for r, c in ((2, 2), (1, 4), (3, 1), (1, 3), (2, 1), (1, 2), (1, 1))]
    return [tiles for tiles in options if tiles.rows <= most_rows and tiles.columns <= most_columns and tiles.fits]
