"""The generic scheduler: a GPU kernel for every loop nest that no template takes.

A nest without reductions gets a thread per point. One with reductions gets a thread per row where many rows lie side by side in memory (pooling, depthwise convolution), a block
for 32 of them where they are few and long (means over pixels), and otherwise a warp or a block per row (softmax, normalisations, sums over the last axis), whose threads walk the row once per reduction and keep nothing in memory: what a
later walk needs of an earlier one is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...compiler.tvm import tirx
from ..common.fused import loads, variables_of
from ..common.nests import Axis, Flat, Nest, Step, group
from ..common.refine import coefficients, drop_units, merge, split_divisions
from ..common.stages import Unreadable, inline, read_stages
from .kernel import MAX_ELEMENTS, Kernel, Plan, Signature, Unsupported, copies_of, ctype, summed
from .printer import Printer, check_indices
from .sizes import FIXED, Known, blocks, shown, simplified, times

#: threads per block of kernels whose threads do not work together
THREADS = 256
#: longest row for one warp; longer ones get a block
WARP_ROW = 1024
#: fewer rows than this keep too few threads busy when each has one
MANY_ROWS = 4096
#: longest row of one thread that is unrolled
UNROLLED = 64
#: of rows side by side a block takes as many as a warp has lanes, which read neighbours; so many warps share their length
SIDE_WARPS = 8
_COMBINE = {
    "Add": "a + b", "Mul": "a * b", "Max": "tc::max(a, b)", "Min": "tc::min(a, b)", "And": "a && b", "Or": "a || b", "Greater": "a > b ? a : b",
}  # fmt: skip


def schedule(func: tirx.PrimFunc, reason: str = "", rounded: str = "", known: Known = FIXED) -> Plan:
    """Kernels of any function that reads as stages; raises Unsupported with what does not.

    reason: why no template took it, for the report. rounded: a type in which the last parameter, the only result, is written, too, as one more parameter.
    known: what is known of its open sizes.
    """
    params = tuple(param for param in func.params if hasattr(param, "shape"))
    try:
        outputs, flat = set(params), Flat()
        stages = [replace(stage, value=check_indices(stage.value)) for stage in inline(read_stages(func), outputs)]
        filled = (_without_empty_loops(nest) for nest in group(stages, outputs, flat))
        nests = [merge(split_divisions(drop_units(nest))) for nest in filled if nest is not None]
    except Unreadable as problem:
        raise Unsupported(str(problem)) from problem
    own = {planned: source for source, planned in flat.buffers.items()}
    copies = copies_of(params[-1], rounded)
    kernels = [_Emitter(nest, own, dict(zip(params[-1:], copies, strict=False)), known).kernel() for nest in nests]
    return Plan((*params, *copies), tuple(replace(kernel, reason=reason) for kernel in kernels))


def _without_empty_loops(nest: Nest) -> Nest | None:
    """A nest whose reductions are over nothing, as the numbers that they start from; None where nothing is left to do."""
    if any(_is_empty(axis) for axis in nest.axes if not axis.inner):
        return None
    if not any(_is_empty(axis) for axis in nest.axes):
        return nest
    folds = (replace(step, value=step.init, combine="", wide=False) if step.combine else step for step in nest.steps)
    steps = tuple(step for step in folds if not step.wide)
    return Nest(tuple(axis for axis in nest.axes if not axis.inner), steps) if steps else None


def _is_empty(axis: Axis) -> bool:
    extent = _extent(axis)
    return isinstance(extent, int) and extent == 0


def _extent(axis: Axis) -> Any:
    return simplified(axis.extent)


class _Emitter:
    """Prints one nest. copies: tensor -> another one that takes the same numbers."""

    def __init__(self, nest: Nest, own: dict[Any, Any], copies: dict[Any, Any], known: Known):
        self.nest, self.copies = nest, copies
        self.rows = [axis for axis in nest.axes if not axis.inner]
        self.inner = [axis for axis in nest.axes if axis.inner]
        self.points, self.length = (times([_extent(axis) for axis in axes]) for axes in (self.rows, self.inner))
        #: how many rows there are, and how long they are, for the choice of a schedule
        self.many, self.long = known.typical(self.points), known.typical(self.length)
        if any(isinstance(size, int) and size > MAX_ELEMENTS for size in (self.points, self.length)):
            raise Unsupported(f"{self.points} rows of {self.length} elements")
        written = tuple(own[step.target] for step in nest.steps if step.address is not None)
        self.signature = Signature((*written, *(copies[buffer] for buffer in written if buffer in copies)))
        self.size = self.signature.size
        self.own = own
        ranges = {axis.var: _extent(axis) for axis in nest.axes}
        self.names = {axis.var: f"{'k' if axis.inner else 'i'}{position}" for position, axis in enumerate(nest.axes)}
        self.print = Printer(lambda buffer, indices: f"{self.signature.name(own[buffer])}[{indices[0]}]", self.names, ranges, self.size)
        self.lines: list[str] = []

    def kernel(self) -> Kernel:
        reduces = bool(self.inner) or any(step.combine for step in self.nest.steps)
        width, self.side = self._width() if reduces else (1, False)
        threads = max(width, THREADS if width == 1 or self.side else 128)
        per_block = threads // width
        self._head(width, per_block)
        if reduces:
            self._passes(width)
        else:
            for step in self.nest.steps:
                self._define(step)
                self._store(step, "")
        self.signature.indexed = self.print.indexed
        kind = "map" if not reduces else "rows side by side" if self.side else {1: "rows by thread", 32: "rows by warp"}.get(width, "rows by block")
        shared = 8 * threads if self.side else 8 * (width // 32) if width > 32 else 0
        size = shown(self.points) if not reduces else f"{shown(self.points)} x {shown(self.length)}"
        grid = (blocks(self.points, per_block), 1, 1)
        return self.signature.kernel(
            self.lines, grid=grid, threads=threads, shared_bytes=shared, kind=kind, workload=f"{kind} {size}", schedule=f"{width} threads a row"
        )

    def _width(self) -> tuple[int, bool]:
        """Threads per row, and whether they are of several warps, with rows side by side in a warp."""
        along = self._read_along(self.inner)
        if self.long < 16 or (self.many >= MANY_ROWS and not along):
            return 1, False
        if not along and self.many >= 32 and self._read_along(self.rows[-1:]):
            return SIDE_WARPS, True
        return (32 if self.long <= WARP_ROW else 256), False

    def _read_along(self, axes: Sequence[Axis]) -> bool:
        """Some operand of a reduction is read with stride 1 along one of the axes."""
        for step in self.nest.steps:
            for load in loads(step.value) if step.wide else ():
                strides = coefficients(load.indices[0], [axis.var for axis in axes])
                if strides is not None and any(isinstance(stride, tirx.IntImm) and int(stride) == 1 for stride in strides):
                    return True
        return False

    def _head(self, width: int, per_block: int) -> None:
        """Find the row, or the point, of this thread."""
        if width == 1:
            self.lines.append(f"const int row = blockIdx.x * {per_block} + threadIdx.x;")
            if not isinstance(self.points, int) or self.points % per_block:
                self.lines.append(f"if (row >= {self.size(self.points)}) return;")
            self._decode("row", self.rows)
            return
        place, lane = (f"% {per_block}", f"/ {per_block}") if self.side else (f"/ {width}", f"% {width}")
        self.lines.append(f"const int place = blockIdx.x * {per_block} + threadIdx.x {place}, lane = threadIdx.x {lane};")
        self.lines.append(f"const bool live = place < {self.size(self.points)};")
        self.lines.append("const int row = live ? place : 0;  // all threads take part in the folds")
        self._decode("row", self.rows)

    def _decode(self, position: str, axes: Sequence[Axis], indent: str = "") -> None:
        """Split a linear position into the axes, the last one fastest."""
        first = True
        for number, axis in enumerate(axes):
            extent, stride = _extent(axis), times([_extent(other) for other in axes[number + 1 :]])
            value = position if stride == 1 else f"{position} / {self.size(stride)}"
            value = value if first else f"{value} % {self.size(extent)}"
            first = first and extent == 1
            self.lines.append(f"{indent}const int {self.names[axis.var]} = {value};")

    def _define(self, step: Step, indent: str = "") -> None:
        """`const T name = value;` under the step's own name."""
        name = f"v{len(self.names)}" if step.ref not in self.names else self.names[step.ref]
        self.lines.append(f"{indent}const {ctype(step.dtype)} {name} = {self.print(step.value)};")
        self.names[step.ref] = name

    def _store(self, step: Step, indent: str, condition: str = "") -> None:
        if step.address is not None:
            target, address = self.own[step.target], self.print.index(step.address)
            for buffer in (target, self.copies.get(target)):
                if buffer is not None:
                    self.lines.append(f"{indent}{condition}{self.signature.name(buffer)}[{address}] = {self.names[step.ref]};")

    def _passes(self, width: int) -> None:
        """One walk over the row per reduction, then one for what is stored point by point."""
        points: list[Step] = []  # steps of single points so far, to be computed again in every walk that reads them
        stored: list[Step] = []
        for step in self.nest.steps:
            if step.combine:
                self._fold(step, points, width)
            elif step.wide and self.inner:
                points.append(step)
                stored += [step] if step.address is not None else []
                continue
            else:
                self._define(step)
            self._store(step, "", "if (live && lane == 0) " if width > 1 else "")
        if stored:
            self._walk(width)
            for step in self._needed(points, stored):
                self._define(step, "  ")
                self._store(step, "  ", "if (live) " if width > 1 else "")
            self.lines.append("}")

    def _walk(self, width: int) -> None:
        start, stride = ("lane", width) if width > 1 else ("0", 1)
        if (
            width == 1 and isinstance(self.length, int) and self.length <= UNROLLED
        ):  # taps of a window: their places are computed at compile time, and their loads wait together
            self.lines.append("#pragma unroll")
        self.lines.append(f"for (int k = {start}; k < {self.size(self.length)}; k += {stride}) {{")
        self._decode("k", self.inner, "  ")

    def _fold(self, step: Step, points: list[Step], width: int) -> None:
        kind, name = summed(step.dtype), f"v{len(self.names)}"
        self.names[step.ref] = name
        self.lines.append(f"{kind} {name} = {self.print(step.init)};")
        self._walk(width)
        for needed in self._needed(points, [step])[:-1]:
            self._define(needed, "  ")
        combine = _COMBINE[step.combine]
        self.lines.append(f"  const {kind} a = {name}, b = {self.print(step.value)};")
        self.lines.append(f"  {name} = {combine};")
        self.lines.append("}")
        if width > 1:
            fold = "fold_across" if self.side else "fold"
            self.lines.append(f"{name} = tc::{fold}<{width}>({name}, []({kind} a, {kind} b) -> {kind} {{ return {combine}; }});")

    def _needed(self, points: list[Step], wanted: list[Step]) -> list[Step]:
        """The point steps that `wanted` are computed from, and those themselves, in order."""
        chosen: dict[Any, Step] = {}

        def visit(step: Step) -> None:
            if step.ref in chosen:
                return
            used = variables_of(step.value)
            for other in points:
                if other.ref in used:
                    visit(other)
            chosen[step.ref] = step

        for step in wanted:
            visit(step)
        return list(chosen.values())
