"""Pieces that all register-tiled kernels share: vector FMAs, accumulator tiles, flattened rows, loops over full and partial tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

from ...compiler.tvm import IRBuilder, T
from ..base import Target
from ..common.fused import Fused, is_identity, loads, product, same_dims, static, variables_of
from .dot import F32, Dot, splat, vector
from .llvm_text import defining
from .vectors import element_bits

#: attributes of every emitted kernel; storage rewrite off: it merges accumulators of different tiles and makes them spill
ATTRS = {"tirx.noalias": True, "tcompile.scheduled": True}

#: operations of the epilogue of one tile up to which it is unrolled. In a loop its sums go by memory, which TVM aligns to 16 bytes: loads of vectors that were just stored across two cache lines
#: wait for the stores, and a GELU behind 448 products took 24 to 70 cycles a vector by chance of the stack's address, 15 in registers (AMD Zen 4)
UNROLLED_EPILOGUE = 1200

#: products that are added up in one register before the sum joins the others: rounding errors grow with the square root of the number of terms
SUM_BLOCK = 384

#: multiply-adds below which a kernel runs on the calling thread: waking the others costs about as much
SERIAL_WORK = 100_000


def i64(value: Any) -> Any:
    return T.int64(value) if isinstance(value, int) else value


@contextmanager
def kernel(
    fused: Fused, replaced: dict[int, tuple[int, ...]], dot: Dot = F32, dtypes: dict[int, str] | None = None
) -> Iterator[tuple[IRBuilder, dict[Any, Any]]]:
    """Open a PrimFunc with the parameters of `fused`; `replaced` gives packed parameters their new shape, `dot` says what multiplies and
    so the element type of packed parameters, `dtypes` that of parameters packed otherwise.

    Yields the builder and a map from the fused function's buffers to the new ones.
    """
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr(dict(ATTRS))
        buffers = declare(fused.params, replaced, dict.fromkeys(replaced, dot.word) | (dtypes or {}))
        with defining(dot.llvm):
            yield builder, buffers


def declare(params: Sequence[Any], replaced: dict[int, tuple[int, ...]], dtypes: dict[int, str] | None = None) -> dict[Any, Any]:
    """Give the PrimFunc being built these parameters; a map from the old buffers to the new ones.

    Scalars stay the very variables they are: `call_tir` passes the symbols that no buffer binds by itself, and the buffers' shapes are written in them.
    """
    buffers = {}
    for position, param in enumerate(params):
        if hasattr(param, "shape"):
            dtype = (dtypes or {}).get(position, param.ty.dtype)
            buffers[param] = T.arg(param.name, T.buffer(replaced.get(position, tuple(param.shape)), dtype))
        else:
            T.arg(param.name, param)
    return buffers


@contextmanager
def tasks(count: Any, work: int | None) -> Iterator[Any]:
    """The outermost loop: parallel unless the whole kernel is too little work (multiply-adds, None: unknown) to share."""
    with T.serial(count) if work is not None and work < SERIAL_WORK else T.parallel(count) as task:
        yield task


def balanced(count: int, limit: int) -> list[tuple[int, int]]:
    """Cut `count` rows or pixels into tiles of at most `limit`, as equal as possible: (first, size) of each, larger ones first."""
    sizes = list(balanced_sizes(count, limit).elements())
    return list(zip(accumulate(sizes, initial=0), sizes, strict=False))


def runs(tiles: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """The tiles that `balanced` gives by size: (size, where the first one starts, how many, how many come before)."""
    sizes = [size for _, size in tiles]
    return [(size, tiles[sizes.index(size)][0], sizes.count(size), sizes.index(size)) for size in dict.fromkeys(sizes)]


def balanced_sizes(count: int, limit: int) -> Counter[int]:
    """How many tiles of each size `balanced` gives, without listing them."""
    tiles = -(-count // limit)
    size, extra = divmod(count, tiles)
    return Counter({size + 1: extra, size: tiles - extra}) if extra else Counter({size: tiles})


def chunk_sizes(count: int, chunk: int, limit: int) -> Counter[int]:
    """The same of chunks that are cut by themselves."""
    whole, rest = divmod(count, chunk)
    sizes = Counter({size: number * whole for size, number in balanced_sizes(chunk, limit).items()}) if whole else Counter()
    return sizes + balanced_sizes(rest, limit) if rest else sizes


def register_tiles(target: Target, vectors: Sequence[int], available: int | None, dot: Dot = F32) -> list[tuple[int, int]]:
    """Shapes (rows, column vectors) of accumulator tiles that stay in registers beside one row of weights, a broadcast and what `dot` takes.

    available: column vectors of the whole output, None when unknown. A single one is offered only where there are no two: it loads as much as it multiplies. With 32 registers and two
    multiply-adds in a cycle, two are offered only where there are no three: 13 x 2 loads 0.58 vectors a multiply-add and 8 x 3 loads 0.46, which takes 0.94 to 1.0 of the time where a core is
    idle, and 0.86 to 0.93 where something else runs on it (`vpdpbusd`: 0.91 to 0.93).
    """
    registers = target.vector_registers
    fewest = 3 if registers >= 32 and target.fma_per_cycle >= 2 else 2
    found = []
    for nv in vectors:
        if available is not None and nv > available or nv < fewest and (available is None or nv < available):
            continue
        # with one vector LLVM loads every broadcast ahead of its use, so half the registers are theirs
        most = min(registers - 4, registers - nv * dot.weight_registers - 1 - dot.scratch) // nv if nv > 1 else registers // 2
        found += [(mr, nv) for mr in range(1, min(most, 14) + 1)]
    return found


def flat_rows(fused: Fused, buffers: dict[Any, Any]) -> tuple[list[Any], dict[Any, Any]]:
    """Leading dims and buffers for an epilogue whose rows may be numbered through: (1, ..., 1, rows) and views of that shape.

    Where an operand is broadcast along some of the leading dims the row number has to be taken apart: the output's own dims and `buffers` come back. Otherwise
    no division is left, which with run-time dims would cost as much as the multiply-adds of a short row.
    """
    *lead, columns = fused.output.shape
    in_place = streamed(fused)
    if in_place is None:
        return lead, buffers
    flat = [T.int64(1)] * (len(lead) - 1) + [product(lead)]
    return flat, buffers | {buffer: T.decl_buffer((*flat, columns), buffer.ty.dtype, data=buffers[buffer].data) for buffer in in_place}


def streamed(fused: Fused) -> list[Any] | None:
    """The output, and what the epilogue reads of the same size, element by element; None where it reads something that is broadcast along some of the leading dims."""
    produced = {fused.accumulator, *(block.body.buffer for block in fused.epilogue)}
    found = {fused.output: None}
    for block in fused.epilogue:
        leading = {axis.var for axis in block.iter_vars[:-1]}
        for load in loads(block.body.value):
            if load.source in produced:
                continue
            if is_identity(block, load.indices) and same_dims(load.source.shape, fused.output.shape):
                found[load.source] = None
            elif any(leading & variables_of(index) for index in load.indices):
                return None
    return list(found)


def streams(fused: Fused, target: Target) -> list[Any]:
    """`streamed` where a residual is among it and all of it is more than the second-level cache holds: an epilogue waits for lines of rows that lie apart (`vpdpbusd`, 28 x 28 x 128 to 512, batch 8: 0.9 of the
    time when a tile asks for its own before its products)."""
    found = streamed(fused) or []
    size = static(product(fused.output.shape))
    return (
        found if len(found) > 1 and size is not None and sum(size * element_bits(str(each.ty.dtype)) // 8 for each in found) > target.l2_bytes else []
    )


def with_columns(panel: Any, columns: int, nr: int, body: Callable[[int], None]) -> None:
    """`body(columns)` of one of the panels of nr that `columns` are cut into, once for whole ones and once for a shorter last one, where there are both."""
    whole, rest = divmod(columns, nr)
    if not rest or not whole:
        body(rest or nr)
        return
    with T.If(panel < T.int64(whole)):
        with T.Then():
            body(nr)
        with T.Else():
            body(rest)


class Rows:
    """Flattened leading dims of the output: row number -> one index per dim, computed once per row and only when a dim is really needed."""

    def __init__(self, dims: Sequence[Any]):
        self.dims = list(dims)

    def indices(self, row: Any) -> list[Any]:
        """Indices of `row` along the leading dims (units get 0)."""
        wide = [position for position, dim in enumerate(self.dims) if static(dim) != 1]
        result: list[Any] = [T.int64(0)] * len(self.dims)
        if len(wide) == 1:
            result[wide[0]] = row
            return result
        for position in reversed(wide):
            if position == wide[0]:
                result[position] = row
            else:
                result[position] = T.bind(T.floormod(row, self.dims[position]))
                row = T.bind(T.floordiv(row, self.dims[position]))
        return result


class Sums(Protocol):
    """A tile of sums as `store_row` reads it: nv vectors of `lanes` in a row, element `lane(row, vector, lane)`."""

    @property
    def nv(self) -> int: ...

    @property
    def lanes(self) -> int: ...

    def lane(self, i: Any, v: int, lane: Any) -> Any: ...


class Accumulators:
    """mr x nv vector registers; one small buffer per column vector keeps them in registers (one big buffer does not).

    dot: how they multiply and so what they hold, float32 or int32. The scope has to be "global": under 1 KB TVM puts that on the stack, where LLVM makes
    registers of it, but a "local" buffer it asks from its workspace pool at every tile, and LLVM then keeps it in memory or spills.
    """

    def __init__(self, mr: int, nv: int, lanes: int, dot: Dot = F32):
        self.mr, self.nv, self.lanes, self.dot = mr, nv, lanes, dot
        self.buffers = [T.alloc_buffer((mr * lanes,), dot.accumulator) for _ in range(nv)]

    def fill(self, value: Callable[[int, int], Any] | None = None) -> None:
        """Set every register to `value(row, column vector)`, zero by default."""
        for v in range(self.nv):
            for i in range(self.mr):
                start = splat(self.dot.zero(), self.lanes) if value is None else value(i, v)
                self.store(i, v, start)

    def load(self, i: int, v: int) -> Any:
        """The vector in register (i, v)."""
        return self.buffers[v][vector(T.int64(i * self.lanes), self.lanes)]

    def store(self, i: int, v: int, value: Any) -> None:
        T.buffer_store(self.buffers[v], value, [vector(T.int64(i * self.lanes), self.lanes)])

    def multiply(self, rows: Sequence[int], a: Callable[[int], Any], b: Sequence[Any]) -> None:
        """acc[i, v] += a(i) * b[v] for the given rows; a(i) is a word, broadcast once per row, b[v] a vector of words."""
        for i in rows:
            value = self.dot.broadcast(a(i), self.lanes)
            for v in range(self.nv):
                self.fma(i, v, value, b[v])

    def fma(self, i: int, v: int, a: Any, b: Any) -> None:
        """acc[i, v] += a * b."""
        self.store(i, v, self.dot.multiply_add(self.load(i, v), a, b, self.lanes))

    def drain(self, other: Accumulators) -> None:
        """Add the registers of `other` to these and set those to zero."""
        self.fill(lambda i, v: self.load(i, v) + other.load(i, v))
        other.fill()

    def lane(self, i: Any, v: int, lane: Any) -> Any:
        return self.buffers[v][i * T.int64(self.lanes) + lane]


def store_tile(
    fused: Fused,
    buffers: dict[Any, Any],
    acc: Accumulators,
    lead: Callable[[Any], Sequence[Any]],
    column: Callable[[int], Any],
    columns: int,
    limit: Any = None,
    inside: Callable[[Any], Any] | None = None,
) -> None:
    """Run the epilogue on a tile and store it.

    lead(i): indices of row i of the tile in the output's leading dims. column(v): first output column of vector v. columns: how many columns of the tile
    are real (static); the last vector is stored element by element when it is partial. limit: run-time number of output columns, checked per element.
    inside(i): whether row i of the tile exists at all (None: it does).

    A very long epilogue runs as a loop over the rows, on copies of the accumulators: unrolled for all of them it is thousands of instructions, which LLVM takes seconds to compile.
    """
    if acc.mr * acc.nv * fused.epilogue_cost <= UNROLLED_EPILOGUE:
        for i in range(acc.mr):
            with when(None if inside is None else inside(T.int64(i))):
                store_row(fused, buffers, acc, T.int64(i), lead(T.int64(i)), column, columns, limit)
        return
    spilled = Accumulators(acc.mr, acc.nv, acc.lanes, acc.dot)
    spilled.fill(acc.load)
    with T.serial(T.int64(acc.mr)) as row, when(None if inside is None else inside(row)):
        store_row(fused, buffers, spilled, row, lead(row), column, columns, limit)


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """What is emitted inside happens where the condition holds, always if it is None."""
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


def store_row(
    fused: Fused, buffers: dict[Any, Any], acc: Sums, i: Any, lead: Sequence[Any], column: Callable[[int], Any], columns: int, limit: Any = None
) -> None:
    """Run the epilogue on row i of a tile and store it; see `store_tile`."""

    def load(buffer: Any, indices: Sequence[Any]) -> Any:
        return buffers[buffer][tuple(indices)]

    def one(v: int, lane: Any) -> None:
        index = [*lead, column(v) + lane]
        T.buffer_store(buffers[fused.output], fused.emit_epilogue(acc.lane(i, v, lane), index, load), index)

    for v in range(acc.nv):
        width = min(acc.lanes, columns - v * acc.lanes)
        if limit is not None:
            with T.serial(T.int64(acc.lanes)) as lane, T.If(column(v) + lane < limit), T.Then():
                one(v, lane)
        elif width == acc.lanes and width > 1:
            with T.vectorized(T.int64(width)) as lane:
                one(v, lane)
        elif width > 0:
            with T.serial(T.int64(width)) as lane:
                one(v, lane)
