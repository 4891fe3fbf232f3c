"""Sorting along an axis, and its greatest or least elements: `relax.sort`, `relax.argsort` and `relax.topk`.

block: a tile of up to 4096 elements of a row, or as many rows as fill it, as (key, place) in shared memory    # tc::sort_tile in include/sort.cuh
       bitonic network; results <- the first elements wanted

Longer rows are sorted by tiles to the workspace. Where few elements of each tile are wanted, those of all tiles are sorted by tiles again, until one is left; otherwise sorted runs
are merged two by two, where every entry finds its place by a binary search in the other run. Equal elements stay in their order, so equal inputs give equal bits.

The limit is shared memory: a tile of P moves log2(P)^2 / 6 times through it, of 4096 elements 30 times. A merge moves its entries once through memory, a top-k of a long row reads it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import relax, tirx
from .kernel import Kernel, Plan, Signature, ctype, elements
from .sizes import require_fixed

OPERATORS = ("relax.sort", "relax.argsort", "relax.topk")
#: entries of a tile, and the least of them that one block takes, in several rows where those are short
TILE, LEAST = 4096, 1024
_WIDE = ("int64", "uint64", "float64")
#: (row, place in it, entry) in C -> statements that store it
Store = Callable[[Signature, str, str, str], list[str]]


@dataclass(frozen=True)
class Keys:
    """Keys of `rows` rows of `length`. dtype: theirs; read(signature, row, place) -> C of a key."""

    rows: int
    length: int
    dtype: str
    read: Callable[[Signature, str, str], str]
    descending: bool = False

    @property
    def entry(self) -> str:
        return f"tc::Entry{64 if self.dtype in _WIDE else 32}"

    def buffer(self, count: int) -> Any:
        """Room for `count` entries of every row."""
        return tirx.decl_buffer((self.rows, count, 2 if self.dtype in _WIDE else 1), "uint64", "entries")


def kernel(call: Any) -> Plan:
    """The kernels of a call of static shape; their parameters are the operand and the results. Raises Unsupported."""
    source, kinds = call.args[0].ty, list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
    require_fixed(source, *kinds)
    shape, axis = [int(dim) for dim in source.shape], int(call.attrs.axis) % len(source.shape)
    length, stride = shape[axis], math.prod(shape[axis + 1 :])
    count = int(kinds[0].shape[axis])
    given = tirx.decl_buffer(shape, str(source.dtype), "x")
    outs = [tirx.decl_buffer([int(dim) for dim in kind.shape], str(kind.dtype), "out") for kind in kinds]
    if elements(outs[0]) == 0:
        return Plan((given, *outs), ())
    topk = call.op.name == "relax.topk"
    indices = {"relax.sort": [False], "relax.argsort": [True]}.get(call.op.name) or {"both": [False, True], "values": [False]}.get(
        str(call.attrs.ret_type), [True]
    )

    def address(row: str, place: str, size: int) -> str:
        return f"{row} / {stride} * {size * stride} + {row} % {stride} + {place} * {stride}" if stride > 1 else f"{row} * {size} + {place}"

    def read(signature: Signature, row: str, place: str) -> str:
        return f"{signature.name(given)}[{address(row, place, length)}]"

    def store(signature: Signature, row: str, place: str, entry: str) -> list[str]:
        values = [f"{entry}.place()" if index else read(signature, row, f"{entry}.place()") for index in indices]
        return [f"{signature.name(out)}[{address(row, place, count)}] = {value};" for out, value in zip(outs, values, strict=True)]

    descending = bool(call.attrs.largest if topk else call.attrs.descending)
    keys = Keys(math.prod(shape) // length, length, str(source.dtype), read, descending)
    return Plan((given, *outs), tuple(kernels(keys, count, tuple(outs), store)))


def kernels(keys: Keys, count: int, written: tuple[Any, ...], store: Store) -> list[Kernel]:
    """Kernels that sort the rows and store the first `count` entries of each. written: the tensors that `store` writes."""
    ctype(keys.dtype)
    made: list[Kernel] = []
    read, total, keep = _keys(keys), keys.length, min(count, TILE)
    while True:
        if total <= TILE:
            return [*made, _tiles(keys, read, total, count, written, store)]
        tiles = -(-total // TILE)
        entries = keys.buffer(tiles * keep)
        made.append(_tiles(keys, read, total, keep, (entries,), _to(keys, entries)))
        read, total = _from(keys, entries), tiles * keep
        if 2 * keep > TILE:
            return [*made, *_merges(keys, entries, keep, count, written, store)]


def entries_of(keys: Keys) -> tuple[list[Kernel], Any]:
    """Kernels that sort whole rows, and the buffer that then holds their entries."""
    sorted_ = keys.buffer(keys.length)
    return kernels(keys, keys.length, (sorted_,), _to(keys, sorted_)), sorted_


def pointer(keys: Keys, signature: Signature, buffer: Any) -> str:
    """A buffer of entries in C."""
    return f"(({'' if buffer in signature.written else 'const '}{keys.entry}*){signature.name(buffer)})"


def _keys(keys: Keys) -> Callable[[Signature, str, str], str]:
    def read(signature: Signature, row: str, place: str) -> str:
        return f"{keys.entry}::of({'~' if keys.descending else ''}tc::sort_key({keys.read(signature, row, place)}), {place})"

    return read


def _from(keys: Keys, buffer: Any) -> Callable[[Signature, str, str], str]:
    return lambda signature, row, place: f"{pointer(keys, signature, buffer)}[{row} * {int(buffer.shape[1])} + {place}]"


def _to(keys: Keys, buffer: Any) -> Store:
    def store(signature: Signature, row: str, place: str, entry: str) -> list[str]:
        return [f"{pointer(keys, signature, buffer)}[{row} * {int(buffer.shape[1])} + {place}] = {entry};"]

    return store


def _tiles(keys: Keys, read: Callable[[Signature, str, str], str], total: int, keep: int, written: tuple[Any, ...], store: Store) -> Kernel:
    """Sorts every tile of rows of `total` entries, and stores the first `keep` of each behind those of the tile before."""
    size = min(TILE, max(2, 1 << (total - 1).bit_length()))
    rows = min(max(1, LEAST // size), 1 << (keys.rows - 1).bit_length())
    threads, tiles = max(32, min(512, rows * size // 8)), -(-total // size)
    signature = Signature(written)
    if tiles == 1:
        place, row, inside = "k", f"blockIdx.x * {rows} + r", f"row < {keys.rows}" if keys.rows % rows else "true"
        target = "k"
    else:
        row, inside = f"blockIdx.x / {tiles}", "true"
        place, target = f"blockIdx.x % {tiles} * {size} + k", f"blockIdx.x % {tiles} * {keep} + k"
    within = " && ".join(text for text in (inside, f"place < {total}" if tiles * size != total else "true") if text != "true") or "true"
    lines = [
        f"tc::sort_tile<{keys.entry}, {size}, {rows}, {threads}>({keep}, [&](int r, int k) -> {keys.entry} {{",
        f"  const int row = {row}, place = {place};",
        f"  return {within} ? {read(signature, 'row', 'place')} : {keys.entry}::last();",
        f"}}, [&](int r, int k, {keys.entry} entry) {{",
        f"  const int row = {row}, place = {target};",
        *([f"  if (!({inside})) return;"] if inside != "true" else []),
        *(f"  {line}" for line in store(signature, "row", "place", "entry")),
        "});",
    ]
    return signature.kernel(
        lines,
        grid=(-(-keys.rows // rows) * tiles, 1, 1),
        threads=threads,
        shared_bytes=rows * size * 17 // 16 * (16 if keys.dtype in _WIDE else 8) + 16,
        kind="sort",
        workload=f"sort {keys.rows} x {total}, {keep} of {size}",
        schedule=f"{rows} x {size} a block",
    )


def _merges(keys: Keys, entries: Any, length: int, count: int, written: tuple[Any, ...], store: Store) -> list[Kernel]:
    """Merges sorted runs of `length` two by two down to one, and stores its first `count` entries."""
    made, total = [], int(entries.shape[1])
    while total > length:
        pairs, keep = -(-total // (2 * length)), min(count, 2 * length)
        rest = min(count, total - (pairs - 1) * 2 * length)
        target, last, size = keys.buffer((pairs - 1) * keep + rest), pairs == 1, keys.rows * total
        signature = Signature(written if last else (target,))
        lines = [
            "const int at = blockIdx.x * 256 + threadIdx.x;",
            f"if (at >= {size}) return;",
            f"const int row = at / {total}, from = at % {total};",
            f"const {keys.entry}* const entries = {pointer(keys, signature, entries)} + (size_t)row * {total};",
            f"const int to = tc::merged(entries, from, {length}, {total});",
            f"if (to >= {keep}) return;",
            f"const int place = from / {2 * length} * {keep} + to;",
            *(store if last else _to(keys, target))(signature, "row", "place", "entries[from]"),
        ]
        workload = f"merge {keys.rows} x {total} in runs of {length}"
        made.append(signature.kernel(lines, grid=(-(-size // 256), 1, 1), threads=256, shared_bytes=0, kind="merge", workload=workload))
        entries, total, length = target, int(target.shape[1]), keep
    return made
