"""What all loops over a nest have: the loops themselves, values of steps at a point, the passes over a row."""

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
from ..common.stages import renamed
from .vectors import extent_of, occurrences

#: element operations below which a nest stays on the calling thread
SERIAL_WORK = 32768
#: iterations that the parallel loop should have
PARALLEL_EXTENT = 64


@dataclass
class NestLoops:
    """State of one nest inside an open IRBuilder function; `views` gives the emitted flat buffer of each planned one."""

    nest: Nest
    views: dict[Any, Any]
    target: Target
    axis: Axis | None = None
    lanes: int = 1
    vectorizable: bool = True
    known: dict[Any, Callable[[dict[Any, Any], Any], Any]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

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
        self.known[step.ref] = constant(value)
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


def _number(cast: Any) -> Any:
    """A boolean as a number, written as a choice: TVM's interval analysis looks into a cast, where it cannot hold a vector of booleans, but not into a condition."""
    if str(cast.value.ty.dtype) != "bool" or str(cast.ty.dtype) == "bool":
        return cast
    return tirx.Select(cast.value, tirx.const(1, cast.ty.dtype), tirx.const(0, cast.ty.dtype))


def constant(value: Any) -> Callable[[dict[Any, Any], Any], Any]:
    return lambda point, slot: value
