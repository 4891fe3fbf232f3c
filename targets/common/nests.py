"""Loop nests over groups of stages, with flat addresses.

A nest runs its steps over `axes`. Axes marked inner are those that reductions of the nest fold; what remains are its rows. So an element-wise chain is a nest without
inner axes, a reduction with its epilogue a nest of one wide step and row steps, and a softmax or layer-norm a nest of several passes over a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...compiler.tvm import TensorLoad, structural_map, tirx, tvm
from .fused import loads, product, same_dims, static
from .stages import Stage, substitute


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
    """Simplify indices, and numbers that are made of them, and drop the branches that cannot be taken; arithmetic on values stays as written."""

    def branch(call: Any) -> Any:
        if getattr(call.op, "name", "") != "prim.if_then_else":
            return call
        condition = simplify(call.args[0])
        known = static(condition)
        return call if known is None else call.args[1 if known else 2]

    def number(cast: Any) -> Any:
        return tirx.Cast(cast.ty.dtype, simplify(cast.value)) if str(cast.value.ty.dtype) == "int64" and not loads(cast.value) else cast

    return structural_map(
        value,
        [
            (tirx.Cast, number),
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
                if load.source in refs:
                    return refs[load.source]
                return tirx.BufferLoad(self.flat.of(load.source), [self.flat.address(load.source, load.indices)])

            value = structural_map(substitute(stage.value, names), (TensorLoad, read))
            address = None
            if stage.target in stored:
                address = self.flat.address(stage.target, [substitute(index, names) for index in stage.indices])
            refs[stage.target] = tirx.Var(stage.target.name, stage.target.ty.dtype)
            target = self.flat.of(stage.target)
            steps.append(Step(refs[stage.target], target, value, wide, address, stage.combine, stage.init))
        return Nest(tuple(axes.values()), tuple(steps))


def group(stages: Sequence[Stage], outputs: set[Any], flat: Flat) -> list[Nest]:
    """Group stages into nests, in program order."""
    groups: list[_Group] = []
    for stage in stages:
        if not groups or not groups[-1].join(stage):
            groups.append(_Group(flat))
            assert groups[-1].join(stage)
    nests: list[Nest] = []
    for position, members in enumerate(groups):
        later = {load.source for other in groups[position + 1 :] for stage, _, _ in other.members for load in loads(stage.value)}
        nests.append(members.finish({stage.target for stage, _, _ in members.members if stage.target in outputs or stage.target in later}))
    return nests
