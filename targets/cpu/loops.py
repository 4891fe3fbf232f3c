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

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...compiler.tvm import T, TensorLoad, structural_map, tirx, tvm
from ..base import Target
from ..common.fused import cost, loads, static, variables_of
from ..common.nests import Axis, Nest, Step
from ..common.stages import COMBINERS, renamed
from .interleave import mixed_tile, planes
from .vectors import element_bits, extent_of, occurrences, power_below, strides, vector_axis, vectorizable

#: element operations below which a nest stays on the calling thread
SERIAL_WORK = 32768
#: iterations that the parallel loop should have
PARALLEL_EXTENT = 64
#: longest run of additions to one accumulator
BLOCK = 128
#: side of the tiles of a transposition, elements
TILE = 16


@dataclass
class Emitter:
    """Emits one nest inside an open IRBuilder function; `views` gives the emitted flat buffer of each planned one."""

    nest: Nest
    views: dict[Any, Any]
    target: Target
    axis: Axis | None = None
    lanes: int = 1
    vectorizable: bool = True
    known: dict[Any, Callable[[dict[Any, Any], Any], Any]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

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

    def _vectors(self, size: int, steps: Sequence[Step]) -> int:
        """Vectors per tile: enough independent work to hide latencies, no more than the axis has."""
        work = sum(cost(step.value) for step in steps)
        limit = max(1, self.target.vector_registers // 4)
        columns = not self.nest.is_map and self.axis is not None and not self.axis.inner
        if work <= 4:
            vectors = 2 * limit if columns else limit
        else:
            vectors = limit if columns else 1  # long polynomials overlap by themselves and need the registers
        return max(1, min(vectors, size // self.lanes))

    # -- loops -------------------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _loops(self, axes: Sequence[tuple[Any, Any]]) -> Iterator[dict[Any, Any]]:
        """Nested loops over (variable, extent): the first ones fused into a parallel loop when the nest is worth it. Yields the index of each variable."""
        work = math.prod(extent_of(axis) for axis in self.nest.axes) * max(1.0, sum(cost(step.value) for step in self.nest.steps) / 4)
        taken, size = 0, 1
        while taken < len(axes) and size < PARALLEL_EXTENT and work >= SERIAL_WORK:
            size *= static(axes[taken][1]) or PARALLEL_EXTENT
            taken += 1
        point: dict[Any, Any] = {}
        with ExitStack() as stack:
            if taken:
                total: Any = tirx.const(1, "int64")
                for _, extent in axes[:taken]:
                    total = total * extent
                rest = stack.enter_context(T.parallel(tvm.sym.Analyzer().simplify(total)))
                for position in reversed(range(1, taken)):
                    var, extent = axes[position]
                    if static(extent) is None:
                        extent = T.max(extent, T.int64(1))  # an analyzer that knows that it is 0 here would not divide
                    point[var] = T.bind(T.floormod(rest, extent))
                    rest = T.bind(T.floordiv(rest, extent))
                point[axes[0][0]] = rest
            for var, extent in axes[taken:]:
                point[var] = stack.enter_context(T.serial(extent))
            yield point

    def vector(self, base: Any, vectors: int, body: Callable[[Any, Any], None]) -> None:
        """body(position on the vector axis, slot in the tile) for `vectors` vectors from `base`."""
        for v in range(vectors):
            if self.lanes == 1:
                body(base + v, tirx.const(v, "int64"))
            else:
                with (T.vectorized if self.vectorizable else T.serial)(T.int64(self.lanes)) as lane:
                    body(base + (lane + v * self.lanes), lane + v * self.lanes)

    # -- values ------------------------------------------------------------------------------------------------------------------------------------

    def value(self, step: Step, point: dict[Any, Any], slot: Any) -> Any:
        """The value of a step at a point, bound to a name."""

        def name(var: Any) -> Any:
            return self.known[var](point, slot) if var in self.known else point.get(var, var)

        def read(load: Any) -> Any:
            value = self.views[load.source][load.indices[0]]
            return value != tirx.const(0, "int8") if self._widened(load.source) else value

        value = structural_map(renamed(step.value), [(TensorLoad, read), (tirx.Var, name), (tirx.Cast, _number)])
        # TVM's interval analysis of integer bindings stumbles over vectors of booleans, its legalization of bfloat16 over bound names
        return T.bind(value) if step.dtype.startswith("float") else value

    def share(self, steps: Sequence[Step], width: int) -> None:
        """Give a register to each value without a load that several later steps use: the simplifier would copy a mere binding into every use."""
        self.shared = {}
        uses = [var for step in self.nest.steps for var in occurrences(step.value)]
        for step in steps:
            if not step.combine and not loads(step.value) and sum(var.same_as(step.ref) for var in uses) > 1:
                self.shared[step.ref] = T.alloc_buffer((width,), step.dtype)

    def know(self, step: Step, value: Any, slot: Any) -> Any:
        """Let later steps of the same pass use a value."""
        if step.ref in self.shared:
            T.buffer_store(self.shared[step.ref], value, [slot])
            value = self.shared[step.ref][slot]
        self.known[step.ref] = _constant(value)
        return value

    def _store(self, step: Step, point: dict[Any, Any], value: Any) -> None:
        if step.address is not None:
            T.buffer_store(self.views[step.target], value.astype("int8") if self._widened(step.target) else value, [self.address(step, point)])

    def address(self, step: Step, point: dict[Any, Any]) -> Any:
        """Where the value of a step goes at a point."""
        return structural_map(step.address, (tirx.Var, lambda var: point.get(var, var)))

    def _widened(self, buffer: Any) -> bool:
        """Whether booleans are kept as int8."""
        return str(buffer.ty.dtype) == "bool" and str(self.views[buffer].ty.dtype) == "int8"

    def _accumulator(self, step: Step, size: int) -> Any:
        acc = T.alloc_buffer((size,), step.dtype)
        self._fill(acc, size, step.init)
        return acc

    def _fill(self, acc: Any, size: int, value: Any) -> None:
        with T.vectorized(T.int64(size)) if size > 1 else T.serial(T.int64(1)) as lane:
            T.buffer_store(acc, value, [lane])

    # -- passes ------------------------------------------------------------------------------------------------------------------------------------

    def _passes(self) -> list[list[Step]]:
        """Steps in the order of emission: a list of wide steps is one pass over the row, a row step stands alone."""
        found: list[list[Step]] = []
        for step in self.nest.steps:
            folded = {other.ref for other in found[-1] if other.combine} if found and found[-1][0].wide else set()
            if step.wide and found and found[-1][0].wide and not folded & variables_of(step.value):
                found[-1].append(step)
            else:
                found.append([step])
        return found

    def _kept(self, passes: list[list[Step]], width: Any) -> dict[Any, Any]:
        """Row buffers, by ref, of the wide values that a later pass reads."""
        kept = {}
        for position, steps in enumerate(passes):
            later = set().union(*(variables_of(step.value) for other in passes[position + 1 :] for step in other))
            for step in steps:
                if step.wide and not step.combine and step.ref in later:
                    size: Any = width
                    for axis in self.nest.axes:
                        if axis.inner and axis is not self.axis:
                            size = size * axis.extent
                    size = tvm.sym.Analyzer().simplify(size)
                    kept[step.ref] = T.alloc_buffer((size,), step.dtype)
        return kept

    def _place(self, point: dict[Any, Any], position: Any, width: Any) -> Any:
        """Index into a row buffer."""
        place: Any = tirx.const(0, "int64")
        for axis in self.nest.axes:
            if axis.inner and axis is not self.axis:
                place = place * axis.extent + point[axis.var]
        return place * width + position

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

    # -- vectors along an inner axis -----------------------------------------------------------------------------------------------------------------

    def _inner(self) -> None:
        assert self.axis is not None
        rows = [(axis.var, axis.extent) for axis in self.nest.axes if not axis.inner]
        passes = self._passes()
        with self._loops(rows) as point:
            kept = self._kept(passes, self.axis.extent)
            for steps in passes:
                if steps[0].wide:
                    self._inner_pass(steps, point, kept)
                    continue
                for step in steps:
                    value = self.value(step, point, None)
                    self.known[step.ref] = _constant(value)
                    self._store(step, point, value)

    def _inner_pass(self, steps: list[Step], rows: dict[Any, Any], kept: dict[Any, Any]) -> None:
        """One pass over a row."""
        assert self.axis is not None
        extent, size = self.axis.extent, static(self.axis.extent)
        vectors = self._vectors(size if size is not None else 1 << 30, steps)
        width = vectors * self.lanes
        folds = {step.ref: self._accumulator(step, width) for step in steps if step.combine}
        self.share(steps, width)
        inner = [axis for axis in self.nest.axes if axis.inner and axis is not self.axis]
        with ExitStack() as stack:
            point = rows | {axis.var: stack.enter_context(T.serial(axis.extent)) for axis in inner}

            def body(position: Any, slot: Any, fresh: Any = None) -> None:
                """One vector; lanes where `fresh` is false were folded before."""
                here = {**point, self.axis.var: position}  # type: ignore[union-attr]
                for step in steps:
                    value = self.value(step, here, slot)
                    if step.combine:
                        acc = folds[step.ref]
                        value = value if fresh is None else tirx.Select(fresh, value, tirx.Cast(step.dtype, step.init))
                        T.buffer_store(acc, COMBINERS[step.combine](acc[slot], value), [slot])
                        continue
                    value = self.know(step, value, slot)
                    self._store(step, here, value)
                    if step.ref in kept:
                        T.buffer_store(kept[step.ref], value, [self._place(here, position, extent)])

            self._sweep(extent, vectors, body)
        for step in steps:
            if step.combine:
                value = self._across(folds[step.ref], vectors, step)
                self.known[step.ref] = _constant(value)
                self._store(step, rows, value)
            elif step.ref in kept:
                self.known[step.ref] = lambda at, slot, buffer=kept[step.ref]: buffer[self._place(at, at[self.axis.var], extent)]

    def _sweep(self, extent: Any, vectors: int, body: Callable[..., None]) -> None:
        """Cover 0..extent: tiles of `vectors` vectors, then single vectors, then the tail."""
        size, width = static(extent), vectors * self.lanes
        simplify = tvm.sym.Analyzer().simplify
        whole = simplify(tvm.tirx.floordiv(extent, tirx.const(width, "int64")))
        single = simplify(tvm.tirx.floordiv(tvm.tirx.floormod(extent, tirx.const(width, "int64")), tirx.const(self.lanes, "int64")))
        rest = simplify(tvm.tirx.floormod(extent, tirx.const(self.lanes, "int64")))
        if static(whole) != 0:
            with T.serial(whole) as tile:
                self.vector(tile * width, vectors, body)
        if static(single) != 0 and vectors > 1:
            with T.serial(single) as tile:
                self.vector(whole * width + tile * self.lanes, 1, body)
        if size is None:
            with T.serial(rest) as tile:
                body(extent - rest + tile, tirx.const(0, "int64"))
        elif static(rest):
            first = size - self.lanes
            repeated = self.lanes - static(rest)  # type: ignore[operator]
            self.vector(tirx.const(first, "int64"), 1, lambda position, slot: body(position, slot, slot >= repeated))

    def _across(self, acc: Any, vectors: int, step: Step) -> Any:
        """Combine all lanes of the accumulators into one scalar."""
        combine = COMBINERS[step.combine]
        for v in range(1, vectors):
            with T.vectorized(T.int64(self.lanes)) if self.lanes > 1 else T.serial(T.int64(1)) as lane:
                T.buffer_store(acc, combine(acc[lane], acc[lane + v * self.lanes]), [lane])
        half = self.lanes // 2
        while half:
            with T.vectorized(T.int64(half)) if half > 1 else T.serial(T.int64(1)) as lane:
                T.buffer_store(acc, combine(acc[lane], acc[lane + half]), [lane])
            half //= 2
        return T.bind(acc[T.int64(0)])


def _multiple_of(extent: Any) -> int:
    """A number of which the extent surely is a multiple: the product of its constant factors."""
    if isinstance(extent, tirx.Mul):
        return _multiple_of(extent.a) * _multiple_of(extent.b)
    return static(extent) or 1


def _number(cast: Any) -> Any:
    """A boolean as a number, written as a choice: TVM's interval analysis looks into a cast, where it cannot hold a vector of booleans, but not into a condition."""
    if str(cast.value.ty.dtype) != "bool" or str(cast.ty.dtype) == "bool":
        return cast
    return tirx.Select(cast.value, tirx.const(1, cast.ty.dtype), tirx.const(0, cast.ty.dtype))


def _constant(value: Any) -> Callable[[dict[Any, Any], Any], Any]:
    return lambda point, slot: value
