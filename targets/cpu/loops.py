"""Emission of a nest as vector code.

Along a row axis (element-wise code, reductions over outer axes, pooling): every lane is a row of its own,

    for rows (parallel): for tile of U vectors, the last one moved back to end at the edge:
        acc[U] = init
        for inner axes: acc = combine(acc, value)          # U registers
        out = row steps(acc)

along an inner axis (softmax, layer-norm, sums over the last axis): a row is folded in U vectors of partial results,

    for rows (parallel):
        for pass in passes:                                # values that a later pass needs stay in a row-sized buffer, in L1
            for vectors of the row: acc[U] = combine(acc[U], value)      # the last vector overlaps, its repeated lanes masked
            scalar = combine over lanes of acc; row steps(scalar)

No element is handled by scalar code where an axis is as long as a vector and its extent is static; a dynamic extent leaves a scalar tail.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ...compiler.tvm import T, tirx, tvm
from ..common.fused import loads, static
from ..common.nests import Axis, Nest, Step
from ..common.stages import COMBINERS
from .interleave import mixed_tile, planes
from .loops_inner import InnerLoops
from .vectors import element_bits, extent_of, power_below, strides, vector_axis, vectorizable

#: longest run of additions to one accumulator
BLOCK = 128
#: side of the tiles of a transposition, elements
TILE = 16


class Emitter(InnerLoops):
    """Emits one nest."""

    def emit(self) -> None:
        """Emit the nest and name the rule that was used."""
        self.axis = vector_axis(self.nest)
        if self.axis is None:
            self.nest = Nest((Axis(tirx.Var("one", "int64"), tirx.const(1, "int64")),), self.nest.steps)
            self.axis = self.nest.axes[0]
        dtypes = [step.dtype for step in self.nest.steps] + [str(load.ty.dtype) for step in self.nest.steps for load in loads(step.value)]
        self.lanes = max(1, self.target.vector_bits // max(element_bits(dtype) for dtype in dtypes))
        size = static(self.axis.extent)
        self.vectorizable = vectorizable(self.nest, self.axis)
        if self.axis.inner:
            self.lanes = self.lanes if size is None else min(self.lanes, power_below(size))
            self._inner()
        elif size is None and _multiple_of(self.axis.extent) >= self.lanes:
            self._rows(1)  # an axis with elements has a vector of them; where it can only be empty, an analyzer would divide by 0
        elif size is None:
            with T.If(self.axis.extent >= self.lanes):
                with T.Then():
                    self._rows(1)
                with T.Else():
                    self.lanes = 1
                    self._rows(1)
        else:
            self.lanes = min(self.lanes, power_below(size))
            self._rows(self._vectors(size, self.nest.steps))

    @property
    def rule(self) -> str:
        if self.nest.is_map:
            return "map"
        return "row reduction" if self.axis is not None and self.axis.inner else "column reduction"

    # -- vectors along a row axis --------------------------------------------------------------------------------------------------------------------

    def _rows(self, vectors: int) -> None:
        assert self.axis is not None
        width = vectors * self.lanes
        tile = tirx.Var("tile", "int64")
        rows = [(axis.var, axis.extent) for axis in self.nest.axes if not axis.inner and axis is not self.axis]
        short = planes(self.nest, self.axis) if self.lanes > 1 and self.vectorizable else None
        across = self._transposed() if short is None else None
        if short is not None:
            vectors, width = 1, self.lanes
            rows = [(var, extent) for var, extent in rows if not var.same_as(short.var)]
        last = tvm.sym.Analyzer().simplify(self.axis.extent - width)
        tiles = tvm.sym.Analyzer().simplify(tvm.tirx.floordiv(self.axis.extent + (width - 1), tirx.const(width, "int64")))
        if across is None:
            loops = [*rows, (tile, tiles)]
        else:
            block = tirx.Var("block", "int64")
            side = min(TILE, extent_of(across))
            blocks = tvm.sym.Analyzer().simplify(tvm.tirx.floordiv(across.extent + (side - 1), tirx.const(side, "int64")))
            loops = [*((var, extent) for var, extent in rows if not var.same_as(across.var)), (block, blocks), (tile, tiles)]
        even = static(self.axis.extent) is not None and static(self.axis.extent) % width == 0  # pyright: ignore[reportOptionalOperand]
        with self._loops(loops) as point:
            base = point[tile] * width
            base = T.bind(base if even else T.min(base, last))
            if short is not None:
                mixed_tile(self, point, base, short)
            elif across is None:
                self._row_tile(point, base, vectors)
            else:
                first = T.bind(T.min(point[block] * side, across.extent - side))
                with T.serial(T.int64(side)) as i:
                    self._row_tile({**point, across.var: first + i}, base, vectors)

    def _transposed(self) -> Axis | None:
        """A static row axis along which a load is contiguous while the vectors run along another: the nest is then tiled over both."""
        if not self.nest.is_map or self.axis is None:
            return None
        for axis in self.nest.axes:
            if axis is not self.axis and (static(axis.extent) or 0) >= 4 and static(self.axis.extent) is not None:
                for (along, _), (here, _) in zip(strides(self.nest, axis), strides(self.nest, self.axis), strict=True):
                    if along == 1 and here not in (0, 1):
                        return axis
        return None

    def _row_tile(self, rows: dict[Any, Any], base: Any, vectors: int) -> None:
        """All steps for one tile of rows that lie side by side."""
        assert self.axis is not None
        width = vectors * self.lanes
        passes = [list(self.nest.steps)] if self.nest.is_map else self._passes()
        kept = {} if self.nest.is_map else self._kept(passes, width)
        inner = [axis for axis in self.nest.axes if axis.inner]
        for steps in passes:
            folds = {step.ref: self._accumulator(step, width) for step in steps if step.combine}
            self.share(steps, width)
            with ExitStack() as stack:
                point, parts = dict(rows), folds
                if steps[0].wide and inner:
                    point |= {axis.var: stack.enter_context(T.serial(axis.extent)) for axis in inner[:-1]}
                    parts = self._blocks(inner[-1], steps, folds, width, point, stack)

                def body(position: Any, slot: Any) -> None:
                    here = {**point, self.axis.var: position}  # noqa: B023
                    for step in steps:  # noqa: B023
                        value = self.value(step, here, slot)
                        if step.combine:
                            acc = parts[step.ref]  # noqa: B023
                            T.buffer_store(acc, COMBINERS[step.combine](acc[slot], value), [slot])
                            continue
                        value = self.know(step, value, slot)
                        self._store(step, here, value)
                        if step.ref in kept:
                            T.buffer_store(kept[step.ref], value, [self._place(here, slot, width)])
                        elif not step.wide:
                            T.buffer_store(rowwise[step.ref], value, [slot])  # noqa: B023

                rowwise = {step.ref: T.alloc_buffer((width,), step.dtype) for step in steps if not step.wide}
                self.vector(base, vectors, body)
            for step in steps:
                if step.combine:
                    self._keep_fold(step, folds[step.ref], rows, base, vectors)
                elif step.ref in kept:
                    self.known[step.ref] = lambda at, slot, buffer=kept[step.ref]: buffer[self._place(at, slot, width)]
                elif not step.wide:
                    self.known[step.ref] = lambda at, slot, buffer=rowwise[step.ref]: buffer[slot]

    def _blocks(self, axis: Axis, steps: list[Step], folds: dict[Any, Any], width: int, point: dict[Any, Any], stack: ExitStack) -> dict[Any, Any]:
        """Open the innermost loop of a fold. Returns the accumulators by ref.

        A long sum of floats is taken block by block: added one by one to a single register, the mean of 25600 pixels would be off by 100 units in the last
        place, and would move every pixel that is scaled by it.
        """
        sums = [step for step in steps if step.combine == "Add" and step.dtype.startswith("float")]
        if not sums or (static(axis.extent) or 2 * BLOCK) < 2 * BLOCK:
            point[axis.var] = stack.enter_context(T.serial(axis.extent))
            return folds
        block = stack.enter_context(T.serial(tvm.sym.Analyzer().simplify(tirx.floordiv(axis.extent + (BLOCK - 1), tirx.const(BLOCK, "int64")))))
        parts = folds | {step.ref: T.alloc_buffer((width,), step.dtype) for step in sums}
        for step in sums:
            self._fill(parts[step.ref], width, tirx.const(0, step.dtype))

        def add(*_: Any) -> None:
            for step in sums:
                acc = folds[step.ref]
                for v in range(0, width, self.lanes):
                    with T.vectorized(T.int64(self.lanes)) if self.lanes > 1 else T.serial(T.int64(1)) as lane:
                        T.buffer_store(acc, acc[lane + v] + parts[step.ref][lane + v], [lane + v])

        stack.push(add)
        extent = static(axis.extent)
        length = BLOCK if extent is not None and extent % BLOCK == 0 else T.min(T.int64(BLOCK), axis.extent - block * BLOCK)
        point[axis.var] = block * BLOCK + stack.enter_context(T.serial(length))
        return parts

    def _keep_fold(self, step: Step, acc: Any, rows: dict[Any, Any], base: Any, vectors: int) -> None:
        """Store the folded values of a tile and let later steps read them from their accumulator."""
        self.known[step.ref] = lambda at, slot: acc[slot]
        if step.address is not None:
            assert self.axis is not None
            self.vector(base, vectors, lambda position, slot: self._store(step, {**rows, self.axis.var: position}, acc[slot]))


def _multiple_of(extent: Any) -> int:
    """A number of which the extent surely is a multiple: the product of its constant factors."""
    if isinstance(extent, tirx.Mul):
        return _multiple_of(extent.a) * _multiple_of(extent.b)
    return static(extent) or 1
