"""Loop nests over groups of stages, with flat addresses, and the rewrites that make their loops simple.

A nest runs its steps over `axes`. Axes marked inner are those that reductions of the nest fold; what remains are its rows. So an element-wise chain is a nest without
inner axes, a reduction with its epilogue a nest of one wide step and row steps, and a softmax or layer-norm a nest of several passes over a row.

Rewrites: axes of extent 1 go; an axis read through div and mod is split so that they vanish (reshape and transpose chains); a domain where an if-then-else changes sides
(concat, pad) is cut there; neighbours that every access walks contiguously become one axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...compiler.tvm import TensorLoad, structural_map, structural_walk, tirx, tvm
from .emit import product, static
from .stages import Stage, loads, same_dims, substitute

#: most nests that one domain is cut into
PIECES = 32


@dataclass(frozen=True)
class Axis:
    """One loop: variable, extent, and whether the nest's reductions fold it."""

    var: Any
    extent: Any
    inner: bool = False


@dataclass(frozen=True)
class Step:
    """ref = value, or ref = fold of value over the inner axes; stored at `address` of the flat buffer `target` where someone outside the nest reads it (else None).

    wide: computed for every point of the nest, otherwise once per row. `value` reads earlier steps by their `ref` and memory by one flat index.
    """

    ref: Any
    target: Any
    value: Any
    wide: bool
    address: Any = None
    combine: str = ""
    init: Any = None

    @property
    def dtype(self) -> str:
        return str(self.ref.ty.dtype)


@dataclass(frozen=True)
class Nest:
    axes: tuple[Axis, ...]
    steps: tuple[Step, ...]

    @property
    def is_map(self) -> bool:
        return not any(axis.inner for axis in self.axes) and not any(step.combine for step in self.steps)

    def addresses(self) -> list[Any]:
        """The flat index of every access to memory, stores included."""
        found = [step.address for step in self.steps if step.address is not None]
        return found + [load.indices[0] for step in self.steps for load in loads(step.value)]

    def rewrite(self, values: dict[Any, Any], axes: Sequence[Axis]) -> Nest:
        """The nest over other axes; `values` gives the old variables in terms of the new."""
        simplify = _simplifier(axes)
        steps = []
        for step in self.steps:
            address = None if step.address is None else simplify(substitute(step.address, values))
            steps.append(replace(step, value=_simplify(substitute(step.value, values), simplify), address=address))
        return Nest(tuple(axes), tuple(steps))


def _simplifier(axes: Sequence[Axis]) -> Callable[[Any], Any]:
    """Simplification of indices within the ranges of the axes."""
    analyzer = tvm.sym.Analyzer()
    dynamic = [axis for axis in axes if static(axis.extent) is None]
    for axis in axes:
        analyzer.bind(axis.var, tvm.ir.Range.from_min_extent(tirx.const(0, "int64"), axis.extent))

    def within(node: Any) -> bool:
        return any(node.a.same_as(axis.var) and analyzer.can_prove_equal(node.b, axis.extent) for axis in dynamic)

    def simplify(index: Any) -> Any:
        index = analyzer.simplify(index)
        if not dynamic:
            return index
        # v % n and v // n for v < n: the analyzer does not see through a symbolic n
        taken = [
            (tirx.FloorMod, lambda node: node.a if within(node) else node),
            (tirx.FloorDiv, lambda node: tirx.const(0, "int64") if within(node) else node),
        ]
        return analyzer.simplify(structural_map(index, taken))

    return simplify


def _simplify(value: Any, simplify: Callable[[Any], Any]) -> Any:
    """Simplify indices and drop the branches that cannot be taken; arithmetic on values stays as written."""

    def branch(call: Any) -> Any:
        if getattr(call.op, "name", "") != "prim.if_then_else":
            return call
        condition = simplify(call.args[0])
        known = static(condition)
        return call if known is None else call.args[1 if known else 2]

    return structural_map(
        value,
        [
            (TensorLoad, lambda load: tirx.BufferLoad(load.source, [simplify(index) for index in load.indices])),
            (tvm.ir.Call, branch),
        ],
    )


@dataclass
class Flat:
    """Flat buffers that stand for the function's buffers while it is planned."""

    buffers: dict[Any, Any] = field(default_factory=dict)

    def of(self, buffer: Any) -> Any:
        if buffer not in self.buffers:
            self.buffers[buffer] = tirx.decl_buffer((product(buffer.shape),), buffer.ty.dtype, buffer.name)
        return self.buffers[buffer]

    @staticmethod
    def address(buffer: Any, indices: Sequence[Any]) -> Any:
        address: Any = tirx.const(0, "int64")
        for index, dim in zip(indices, buffer.shape, strict=True):
            address = address * dim + index
        return address


@dataclass
class _Group:
    """A nest that grows: stages join while they run over the same points and read each other's results in place."""

    flat: Flat
    wide: list[tuple[Any, Any]] | None = None
    row: list[tuple[Any, Any]] | None = None
    inner: list[Any] = field(default_factory=list)
    members: list[tuple[Stage, bool, dict[Any, Any]]] = field(default_factory=list)

    def join(self, stage: Stage) -> bool:
        """Add the stage if it fits."""
        for wide in (True, False):
            names = (self._names_of_reduction(stage) if wide else None) if stage.reduced else self._names_of_map(stage, wide)
            if names is not None and self._reads_fit(stage, wide, names):
                if stage.reduced and self.row is None:
                    self.inner = [names[var] for var, _ in stage.reduced]
                    self.row = [(names[var], extent) for var, extent in stage.axes]
                self.members.append((stage, wide, names))
                return True
        return False

    def _names_of_map(self, stage: Stage, wide: bool) -> dict[Any, Any] | None:
        """The stage's variables in the group's terms."""
        if not self.members:
            self.wide = list(stage.axes) if wide else None
        domain = self.wide if wide else self.row
        if domain is None or not same_dims([extent for _, extent in domain], [extent for _, extent in stage.axes]):
            return None
        return {own: var for (own, _), (var, _) in zip(stage.axes, domain, strict=True)}

    def _names_of_reduction(self, stage: Stage) -> dict[Any, Any] | None:
        axes = stage.axes + stage.reduced
        if not self.members:
            # the wide domain is that of a buffer read point by point, in its order; a window reduction has none
            for load in loads(stage.value):
                order = self._match(load, axes, [(tirx.Var(f"a{i}", "int64"), dim) for i, dim in enumerate(load.source.shape)])
                if order is not None:
                    self.wide = [(tirx.Var(f"a{i}", "int64"), dim) for i, dim in enumerate(load.source.shape)]
                    return self._match(load, axes, self.wide)
            self.wide = None
            return {var: var for var, _ in axes}
        if self.wide is None:
            return None
        for load in loads(stage.value):
            if same_dims(load.source.shape, [extent for _, extent in self.wide]):
                names = self._match(load, axes, self.wide)
                if names is None or not self._same_rows(stage, names):
                    continue
                return names
        return None

    @staticmethod
    def _match(load: Any, axes: Sequence[tuple[Any, Any]], domain: list[tuple[Any, Any]]) -> dict[Any, Any] | None:
        """The names under which the load reads the domain in place: a bijection between the wide axes and the wide dims."""
        names: dict[Any, Any] = {}
        for index, (var, dim) in zip(load.indices, domain, strict=True):
            own = next((own for own, extent in axes if index.same_as(own) and static(extent) != 1), None)
            if own is None and static(dim) == 1:
                continue
            if own is None or own in names:
                return None
            names[own] = var
        for own, extent in axes:
            if own not in names:
                if static(extent) != 1:
                    return None
                names[own] = tirx.Var(own.name, "int64")
        return names

    def _same_rows(self, stage: Stage, names: dict[Any, Any]) -> bool:
        if self.row is None:
            return True
        wide_inner = [names[var] for var, extent in stage.reduced if static(extent) != 1]
        expected = [var for var in self.inner if not self._is_unit(var)]
        rows = same_dims([extent for _, extent in stage.axes], [extent for _, extent in self.row])
        return rows and set(wide_inner) == set(expected)

    def _is_unit(self, var: Any) -> bool:
        return any(other.same_as(var) and static(extent) == 1 for other, extent in self.wide or ())

    def _reads_fit(self, stage: Stage, wide: bool, names: dict[Any, Any]) -> bool:
        levels = {member.target: member_wide and not member.reduced for member, member_wide, _ in self.members}
        for load in loads(stage.value):
            if load.source not in levels:
                continue
            domain = self.wide if levels[load.source] else self.row
            if domain is None or (levels[load.source] and not wide):
                return False
            for index, (var, extent) in zip(load.indices, domain, strict=True):
                if static(extent) != 1 and not (isinstance(index, tirx.Var) and names.get(index, index).same_as(var)):
                    return False
        return True

    def finish(self, stored: set[Any]) -> Nest:
        """The nest; steps whose target is in `stored` write it to memory."""
        axes: dict[Any, Axis] = {}
        for var, extent in [*(self.wide or ()), *(self.row or ())]:
            axes.setdefault(var, Axis(var, extent, var in self.inner))
        refs: dict[Any, Any] = {}
        steps = []
        for stage, wide, names in self.members:
            for own, extent in stage.axes + stage.reduced:
                if names[own] not in axes:
                    axes[names[own]] = Axis(names[own], extent, names[own] in self.inner)

            def read(load: Any) -> Any:
                if load.source in refs:  # noqa: B023
                    return refs[load.source]  # noqa: B023
                return tirx.BufferLoad(self.flat.of(load.source), [self.flat.address(load.source, load.indices)])

            value = structural_map(substitute(stage.value, names), (TensorLoad, read))
            address = None
            if stage.target in stored:
                address = self.flat.address(stage.target, [substitute(index, names) for index in stage.indices])
            refs[stage.target] = tirx.Var(stage.target.name, stage.target.ty.dtype)
            target = self.flat.of(stage.target)
            steps.append(Step(refs[stage.target], target, value, wide, address, stage.combine, stage.init))
        return Nest(tuple(axes.values()), tuple(steps))


def plan(stages: Sequence[Stage], outputs: set[Any], flat: Flat) -> list[Nest]:
    """Group stages into nests and simplify their loops."""
    groups: list[_Group] = []
    for stage in stages:
        if not groups or not groups[-1].join(stage):
            groups.append(_Group(flat))
            assert groups[-1].join(stage)
    nests: list[Nest] = []
    for position, group in enumerate(groups):
        later = {load.source for other in groups[position + 1 :] for stage, _, _ in other.members for load in loads(stage.value)}
        nest = group.finish({stage.target for stage, _, _ in group.members if stage.target in outputs or stage.target in later})
        nests += refine(nest)
    return nests


def refine(nest: Nest) -> list[Nest]:
    """The nest as one or several whose accesses are as plain as can be."""
    nest = split_divisions(drop_units(nest))
    return [merge(drop_units(split_divisions(piece))) for piece in cut(nest)]


def drop_units(nest: Nest) -> Nest:
    """Axes of extent 1 become 0; also the first simplification of every address."""
    kept = [axis for axis in nest.axes if static(axis.extent) != 1]
    return nest.rewrite({axis.var: tirx.const(0, "int64") for axis in nest.axes if static(axis.extent) == 1}, kept)


def split_divisions(nest: Nest) -> Nest:
    """Split an axis v of which an access takes v // k or v % k, k a divisor of its extent."""
    for _ in range(4):
        found = _division(nest)
        if found is None:
            return nest
        axis, factor = found
        outer = Axis(tirx.Var(f"{axis.var.name}o", "int64"), tirx.const(static(axis.extent) // factor, "int64"), axis.inner)
        inner = Axis(tirx.Var(f"{axis.var.name}i", "int64"), tirx.const(factor, "int64"), axis.inner)
        axes = list(itertools.chain.from_iterable([outer, inner] if other is axis else [other] for other in nest.axes))
        nest = nest.rewrite({axis.var: outer.var * factor + inner.var}, axes)
    return nest


def _division(nest: Nest) -> tuple[Axis, int] | None:
    found: list[tuple[Axis, int]] = []

    def visit(node: Any) -> None:
        factor = static(node.b)
        for axis in nest.axes:
            extent = static(axis.extent)
            if node.a.same_as(axis.var) and extent and factor and 1 < factor < extent and extent % factor == 0:
                found.append((axis, factor))

    for expr in [step.value for step in nest.steps] + [step.address for step in nest.steps if step.address is not None]:
        structural_walk(expr, ((tirx.FloorDiv, tirx.FloorMod), visit))
    return found[0] if found else None


def cut(nest: Nest) -> list[Nest]:
    """Cut map nests where the condition of an if-then-else on one axis changes sides."""
    if not nest.is_map:
        return [nest]
    done, pending = [], [nest]
    while pending:
        piece = pending.pop(0)
        found = _cuts(piece)
        if found is None or len(done) + len(pending) + len(found[1]) + 1 > PIECES:
            done.append(piece)
            continue
        axis, points = found
        edges = [0, *points, static(axis.extent)]
        for low, high in itertools.pairwise(edges):
            part = Axis(tirx.Var(axis.var.name, "int64"), tirx.const(high - low, "int64"), axis.inner)
            axes = [part if other is axis else other for other in piece.axes]
            pending.append(drop_units(piece.rewrite({axis.var: part.var + low}, axes)))
    return done


def _cuts(nest: Nest) -> tuple[Axis, list[int]] | None:
    """The first axis that conditions compare with constants, and where."""
    for axis in nest.axes:
        extent = static(axis.extent)
        if extent is None:
            continue
        points: set[int] = set()

        def compare(node: Any) -> None:
            scale_offset = tvm.sym.detect_linear_equation(node.a - node.b, [axis.var])  # noqa: B023
            if len(scale_offset) != 2:
                return
            scale, offset = static(scale_offset[0]), static(scale_offset[1])
            if scale not in (1, -1) or offset is None:
                return
            zero = -offset * scale
            points.update(point for point in (zero, zero + 1) if 0 < point < extent)  # noqa: B023

        def visit(call: Any) -> None:
            if getattr(call.op, "name", "") == "prim.if_then_else":
                structural_walk(call.args[0], ((tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE), compare))  # noqa: B023

        for step in nest.steps:
            structural_walk(step.value, (tvm.ir.Call, visit))
        used = sorted(points)
        useful = [point for point in used if _decides(nest, axis, point)]
        if useful:
            return axis, useful
    return None


def _decides(nest: Nest, axis: Axis, point: int) -> bool:
    """Some condition has different values at point - 1 and point, so that a cut there helps."""
    changed = False

    def compare(node: Any) -> None:
        nonlocal changed
        sides = [tvm.sym.Analyzer().simplify(substitute(node, {axis.var: tirx.const(at, "int64")})) for at in (point - 1, point)]
        values = [static(side) for side in sides]
        changed = changed or (None not in values and values[0] != values[1])

    def visit(call: Any) -> None:
        if getattr(call.op, "name", "") == "prim.if_then_else":
            structural_walk(call.args[0], ((tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE), compare))

    for step in nest.steps:
        structural_walk(step.value, (tvm.ir.Call, visit))
    return changed


def coefficients(address: Any, variables: Sequence[Any]) -> list[Any] | None:
    """Stride of an address along each variable; None when it is not linear. What inner loads (gathers) add counts as constant."""
    address = structural_map(address, (TensorLoad, lambda load: tirx.Var("gathered", load.ty.dtype)))
    found = tvm.sym.detect_linear_equation(address, list(variables))
    return list(found)[:-1] if len(found) else None


def free_variables(expr: Any) -> set[Any]:
    """Variables an expression uses outside of the addresses it loads from."""
    found: set[Any] = set()
    structural_walk(structural_map(expr, (TensorLoad, lambda load: tirx.const(0, load.ty.dtype))), (tirx.Var, found.add))
    return found


def merge(nest: Nest) -> Nest:
    """Fuse neighbouring axes of one kind that every access walks as one."""
    pinned = set().union(*(free_variables(step.value) for step in nest.steps)) if nest.steps else set()
    position = 0
    while position + 1 < len(nest.axes):
        outer, inner = nest.axes[position], nest.axes[position + 1]
        if outer.inner != inner.inner or outer.var in pinned or inner.var in pinned or not _contiguous(nest, outer, inner):
            position += 1
            continue
        analyzer = tvm.sym.Analyzer()
        var = tirx.Var(inner.var.name, "int64")
        whole = Axis(var, analyzer.simplify(outer.extent * inner.extent), outer.inner)
        axes = [*nest.axes[:position], whole, *nest.axes[position + 2 :]]
        nest = nest.rewrite({outer.var: tvm.tirx.floordiv(var, inner.extent), inner.var: tvm.tirx.floormod(var, inner.extent)}, axes)
    return nest


def _contiguous(nest: Nest, outer: Axis, inner: Axis) -> bool:
    analyzer = tvm.sym.Analyzer()
    for address in nest.addresses():
        strides = coefficients(address, [outer.var, inner.var])
        if strides is None or not analyzer.can_prove_equal(strides[0], strides[1] * inner.extent):
            return False
    return True
