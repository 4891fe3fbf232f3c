"""Recurrent layers: all steps of an LSTM, GRU or RNN in one kernel, `tcompile.recurrent`.

    for (direction, mr rows of the batch) in parallel:
        for step:
            for block of `lanes` hidden units:                 # the last block is moved back to end with the state
                for k in H: acc[row][gate] += h[row, k] * weights[block, k, gate]
                for row: gates and the next state of the block from acc and x

The weights are packed as [D, blocks, H, G * lanes]: what one block needs of all gates is one stream, and the gates meet in registers. States are kept twice, the last
step's and the next one's, so that a block may be computed twice. A layer of few rows and a large state is parallel over the blocks within a step instead. A GRU that
resets the state before the product takes two rounds over the blocks in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...compiler.dialect.recurrent import NAME, OPTIONAL, RecurrentAttrs, attrs_of, operands_of
from ...compiler.tvm import Constant, IRBuilder, T, relax, te, tirx
from ..base import Target
from ..common.fused import static
from ..common.legalize import Legalizer
from .dot import fma, splat, vector
from .emit import ATTRS, balanced, tasks
from .recurrent_cells import CELLS, activation
from .vectors import power_below

#: Relax's pattern kind "opaque": nothing joins it
_OPAQUE = 8
#: multiply-adds in a step above which its blocks are shared among threads
_SHARED_STEP = 500_000
#: independent accumulators that hide the latency of a multiply-add
_CHAINS = 8
#: steps assumed where they are known at run time only
_GUESS = 32


def own(target: Target) -> dict[str, Legalizer]:
    """For `targets.common.legalize`: the kernel in place of the operator."""
    return {NAME: lambda builder, call: _legalize(builder, call, target)}


def _legalize(builder: Any, call: Any, target: Target) -> Any:
    attrs, operands = attrs_of(call), operands_of(call)
    dtype = str(operands["x"].ty.dtype)
    if dtype not in ("float32", "float64"):
        raise ValueError(f"{NAME}: no kernel for {dtype}")
    size = int(operands["weights"].ty.shape[1])
    lanes = power_below(min(target.lanes() // (2 if dtype == "float64" else 1), size))
    if isinstance(operands["weights"], Constant):
        packed = relax.const(pack(operands["weights"].value.numpy(), attrs.gates, lanes), dtype)
    else:
        packed = builder.emit(builder.call_te(_packed, operands["weights"], attrs.gates, lanes, primfunc_name_hint="pack_recurrent"))
    function = RecurrentKernel(attrs, {name: operand.ty for name, operand in operands.items()}, lanes, target).build()
    variable = builder.add_func(function, f"recurrent_{attrs.kind}")
    return relax.call_tir(variable, [operands["x"], packed, *list(operands.values())[2:]], list(call.ty.fields))


def _starts(size: int, lanes: int) -> list[int]:
    """First unit of each block."""
    return [min(block * lanes, size - lanes) for block in range(-(-size // lanes))]


def pack(weights: np.ndarray, gates: int, lanes: int) -> np.ndarray:
    """[D, H, G * H] -> [D, blocks, H, G * lanes]."""
    directions, size, _ = weights.shape
    units = np.array(_starts(size, lanes))[:, None] + np.arange(lanes)
    blocks = weights.reshape(directions, size, gates, size)[:, :, :, units]
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 2, 4)).reshape(directions, len(units), size, gates * lanes)


def _packed(weights: Any, gates: int, lanes: int) -> Any:
    """`pack` for weights that are computed."""
    directions, size, _ = (int(dim) for dim in weights.shape)

    def element(d: Any, block: Any, k: Any, column: Any) -> Any:
        gate, lane = tirx.floordiv(column, lanes), tirx.floormod(column, lanes)
        return weights[d, k, gate * size + tirx.min(block * lanes, size - lanes) + lane]

    return te.compute((directions, -(-size // lanes), size, gates * lanes), element, name="packed")


class RecurrentKernel:
    """The function of one call. attrs: of the call; types: tensor types of its operands by name; lanes: hidden units in a block."""

    def __init__(self, attrs: RecurrentAttrs, types: dict[str, Any], lanes: int, target: Target):
        self.attrs, self.types, self.lanes = attrs, types, lanes
        self.dtype = str(types["x"].dtype)
        self.size, self.gates, self.directions = int(types["weights"].shape[1]), attrs.gates, attrs.directions
        self.blocks = -(-self.size // lanes)
        sizes = [static(types["x"].shape[attrs.x_order.index(letter)]) for letter in "TB"]
        self.known_steps, self.known_batch = sizes
        self.steps = T.int64(sizes[0]) if sizes[0] is not None else tirx.Var("steps", "int64")
        self.batch = T.int64(sizes[1]) if sizes[1] is not None else tirx.Var("batch", "int64")
        self.rounds = CELLS[attrs.kind].rounds(attrs)
        self._plan(target)

    def _plan(self, target: Target) -> None:
        """Rows of a tile, and over what the kernel is parallel."""
        most = min(8, (target.vector_registers - self.gates - 1) // self.gates)
        self.rows = [most, 1] if most > 1 else [1]
        self.by_block = alone = False
        if self.known_batch is not None:
            threads = max(1, target.cores // self.directions)
            tiles = balanced(max(1, self.known_batch), max(1, min(most, -(-self.known_batch // threads))))
            self.rows = [size for _, size in tiles]
            step = self.known_batch * self.directions * self.gates * self.size**2
            alone = len(tiles) * self.directions == 1
            self.by_block = len(tiles) * self.directions < target.cores and step >= _SHARED_STEP and self.blocks > 1
        known = (self.known_batch or 1) * self.directions * self.gates * self.size**2
        #: multiply-adds, by which the tiles are shared among threads; none where there is but one tile
        self.work = 0 if alone else known * (self.known_steps if self.known_steps is not None else _GUESS)

    def build(self) -> Any:
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_attr({**ATTRS, "op_pattern": _OPAQUE})
            self._declare()
            with T.sblock("root"):
                self._begin()
                self._loops()
                self._end()
        return builder.get()

    # ---- buffers

    def _declare(self) -> None:
        attrs, types, size = self.attrs, self.types, self.size
        order = [self.steps, self.batch] if attrs.x_order == "TB" else [self.batch, self.steps]
        state = (self.directions, self.batch, size)

        def arg(name: str, shape: tuple[Any, ...], dtype: str = self.dtype) -> Any:
            return T.arg(name, T.buffer(shape, dtype))

        self.x = arg("x", (*order, self.directions * self.gates * size))
        self.weights = arg("weights", (self.directions, self.blocks, size, self.gates * self.lanes))
        self.first_hidden = arg("hidden", state)
        shapes = {"cell": state, "peepholes": (self.directions, 3, size), "bias": (self.directions, size), "lengths": (self.batch,)}
        self.optional = {name: arg(name, shapes[name], str(types[name].dtype)) for name in OPTIONAL if name in types}
        letters = {"T": self.steps, "D": self.directions, "B": self.batch, "H": size}
        self.y = arg("y", tuple(letters[letter] for letter in attrs.y_order))
        self.last = [arg("last_hidden", state)] + ([arg("last_cell", state)] if attrs.kind == "lstm" else [])

    def _begin(self) -> None:
        """The states before the first step."""
        first = [self.first_hidden] + ([self.optional["cell"]] if "cell" in self.optional else [])
        shape = (self.directions, self.batch, self.size)
        #: hidden and, in an LSTM, cell states: of the even and the odd steps
        self.states = [T.alloc_buffer((2, *shape), self.dtype) for _ in first]
        #: what the first of two rounds leaves to the second
        self.between = [T.alloc_buffer(shape, self.dtype) for _ in range(2)] if len(self.rounds) > 1 else []
        for state, source in zip(self.states, first, strict=True):
            self._each(lambda d, b, k, state=state, source=source: T.buffer_store(state, source[d, b, k], [T.int64(0), d, b, k]))

    def _end(self) -> None:
        slot = T.bind(T.floormod(self.steps, T.int64(2)))
        for state, target in zip(self.states, self.last, strict=True):
            self._each(lambda d, b, k, state=state, target=target: T.buffer_store(target, state[slot, d, b, k], [d, b, k]))

    def _each(self, body: Callable[[Any, Any, Any], None]) -> None:
        with T.serial(T.int64(self.directions)) as d, T.serial(self.batch) as b, T.serial(T.int64(self.size)) as k:
            body(d, b, k)

    # ---- loops

    def _loops(self) -> None:
        tiles = self._tiles()
        if not self.by_block:
            with tasks(T.int64(self.directions) * tiles, self.work) as task, self._tile(task, tiles) as tile, T.serial(self.steps) as step:
                for number in range(len(self.rounds)):
                    with T.serial(T.int64(self.blocks)) as block:
                        self._block(*tile, step, block, number)
            return
        with T.serial(self.steps) as step:
            for number in range(len(self.rounds)):
                with T.parallel(T.int64(self.directions) * tiles * T.int64(self.blocks)) as task:
                    block = T.bind(T.floormod(task, T.int64(self.blocks)))
                    with self._tile(T.bind(T.floordiv(task, T.int64(self.blocks))), tiles) as tile:
                        self._block(*tile, step, block, number)

    def _tiles(self) -> Any:
        """How many tiles the batch has: of `rows[0]` rows and, where the batch is known at run time only, single rows; of two neighbouring sizes where it is known."""
        if self.known_batch is not None:
            return T.int64(len(self.rows) if self.known_batch else 0)
        return T.floordiv(self.batch, T.int64(self.rows[0])) + T.floormod(self.batch, T.int64(self.rows[0])) if len(self.rows) > 1 else self.batch

    @contextmanager
    def _tile(self, task: Any, tiles: Any) -> Iterator[tuple[Any, Callable[[Callable[[Any, int], None]], None]]]:
        """(direction, a function that runs a body with the first row of the tile and its number of rows)."""
        d = T.bind(T.floordiv(task, tiles)) if self.directions > 1 else T.int64(0)
        tile = T.bind(task - d * tiles)
        most, least = self.rows[0], self.rows[-1]
        large = T.int64(self.rows.count(most)) if self.known_batch is not None else T.floordiv(self.batch, T.int64(most))

        def run(body: Callable[[Any, int], None]) -> None:
            if most == least:
                body(T.bind(tile * T.int64(most)), most)
                return
            with T.If(tile < large):
                with T.Then():
                    body(T.bind(tile * T.int64(most)), most)
                with T.Else():
                    body(T.bind(large * T.int64(most) + (tile - large) * T.int64(least)), least)

        yield d, run

    def _block(self, d: Any, run: Callable[[Callable[[Any, int], None]], None], step: Any, block: Any, number: int) -> None:
        run(lambda first, rows: self._cells(d, first, rows, step, block, number))

    # ---- one block of hidden units for some rows

    def _cells(self, d: Any, first: Any, rows: int, step: Any, block: Any, number: int) -> None:
        now = T.bind(T.floormod(step, T.int64(2)))
        unit = T.bind(T.min(block * T.int64(self.lanes), T.int64(self.size - self.lanes)))
        gates, from_state = self.rounds[number]
        source = (lambda b, k: self.states[0][now, d, b, k]) if from_state else (lambda b, k: self.between[1][d, b, k])
        sums = self._products(d, first, rows, block, gates, source)
        if rows == 1:
            self._row(d, first, step, now, unit, number, lambda gate: sums(T.int64(0), gate))
            return
        with T.serial(T.int64(rows)) as i:
            self._row(d, T.bind(first + i), step, now, unit, number, lambda gate: sums(i, gate))

    def _products(
        self, d: Any, first: Any, rows: int, block: Any, gates: tuple[int, ...], source: Callable[[Any, Any], Any]
    ) -> Callable[[Any, int], Any]:
        """Sums over k of state[row, k] * weights[k, gate]; a function (row, gate) -> vector."""
        lanes, count = self.lanes, len(gates)
        chains = max(1, min(-(-_CHAINS // (rows * count)), self.size))
        acc = [[T.alloc_buffer((rows * lanes,), self.dtype) for _ in gates] for _ in range(chains)]
        places = [vector(T.int64(i * lanes), lanes) for i in range(rows)]
        for registers in acc:
            for register in registers:
                for place in places:
                    T.buffer_store(register, self.constant(0.0), [place])

        def multiply(k: Any, registers: list[Any]) -> None:
            weights = [T.bind(self.weights[d, block, k, vector(T.int64(gate * lanes), lanes)]) for gate in gates]
            for i, place in enumerate(places):
                value = T.bind(splat(source(first + T.int64(i), k), lanes))
                for register, weight in zip(registers, weights, strict=True):
                    T.buffer_store(register, self._multiply_add(value, weight, register[place]), [place])

        with T.serial(T.int64(self.size // chains)) as k:
            for chain in range(chains):
                multiply(k * T.int64(chains) + T.int64(chain), acc[chain])
        for chain in range(self.size % chains):
            multiply(T.int64(self.size // chains * chains + chain), acc[chain])
        # where rows are a loop the registers have to be memory, which those of the loop above should never be
        sums = T.alloc_buffer((count * rows * lanes,), self.dtype)
        for at in range(count):
            for i, place in enumerate(places):
                value = acc[0][at][place]
                for registers in acc[1:]:
                    value = value + registers[at][place]
                T.buffer_store(sums, value, [vector(T.int64((at * rows + i) * lanes), lanes)])
        return lambda i, gate: sums[vector(T.int64(gates.index(gate) * rows * lanes) + i * T.int64(lanes), lanes)]

    def _multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return fma(a, b, c, self.lanes) if self.dtype == "float32" else a * b + c

    def _row(self, d: Any, b: Any, step: Any, now: Any, unit: Any, number: int, sums: Callable[[int], Any]) -> None:
        """The gates of one row and what becomes of its states."""
        length = T.bind(tirx.Cast("int64", self.optional["lengths"][b])) if "lengths" in self.optional else self.steps
        time = T.bind(self._time(d, step, length))
        place = vector(unit, self.lanes)
        cell = CELLS[self.attrs.kind](self, d, b, place, now, lambda gate: self._input(d, b, time, unit, gate), sums)

        def store(values: list[Any], result: Any) -> None:
            for state, value in zip(self.states, values, strict=True):
                T.buffer_store(state, value, [T.int64(1) - now, d, b, place])
            letters = {"T": time, "D": d, "B": b, "H": place}
            T.buffer_store(self.y, result, [letters[letter] for letter in self.attrs.y_order])

        def finish() -> None:
            values = cell.run(number)
            if values is not None:
                store(values, values[0])

        if "lengths" not in self.optional:
            finish()
            return
        with T.If(step < length):
            with T.Then():
                finish()
            with T.Else():
                store([state[now, d, b, place] for state in self.states], self.constant(0.0))

    def _time(self, d: Any, step: Any, length: Any) -> Any:
        """The step of x and y that a row is at; one behind its end keeps its place."""
        if self.attrs.direction == "forward":
            return step
        back = length - T.int64(1) - step
        if "lengths" in self.optional:
            back = tirx.Select(step < length, back, step)
        return back if self.attrs.direction == "reverse" else tirx.Select(d == T.int64(1), back, step)

    def _input(self, d: Any, b: Any, time: Any, unit: Any, gate: int) -> Any:
        column = vector(d * T.int64(self.gates * self.size) + T.int64(gate * self.size) + unit, self.lanes)
        return self.x[(time, b, column) if self.attrs.x_order == "TB" else (b, time, column)]

    # ---- for the cells

    def constant(self, value: float) -> Any:
        return splat(tirx.const(value, self.dtype), self.lanes)

    def name(self, value: Any) -> Any:
        """A vector that is computed once; not a binding, see `math.Names`."""
        buffer = T.alloc_buffer((self.lanes,), self.dtype)
        place = vector(T.int64(0), self.lanes)
        T.buffer_store(buffer, value, [place])
        return buffer[place]

    def activate(self, index: int, value: Any, clip: bool = True) -> Any:
        """The activation function `index` of the cell, its argument within the clip bound."""
        if clip and math.isfinite(self.attrs.clip):
            value = T.min(T.max(value, self.constant(-self.attrs.clip)), self.constant(self.attrs.clip))
        return self.name(activation(self.attrs.functions[index], self.name(value), self.constant))
