"""A PrimFunc as a list of stages: one value stored per point of a rectangular domain, or one reduction. What the generic scheduler reads and rewrites.

Fusion leaves a chain of blocks, each a perfect loop nest around one store. This module reads them as values, free of loops, and inlines the stages that only move data
(reshape, transpose, pad, slice, cast), so that the chain ends as few nests over the domains that really matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...compiler.tvm import TensorLoad, s_tir, structural_map, structural_walk, tirx, tvm
from .fused import cost, is_reduction, loads, same_dims, static

#: operations a stage may cost and still be computed again by every reader
CHEAP = 2
#: combiners of reductions, by the node that the block's update is
COMBINERS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Mul": lambda a, b: a * b,
    "Max": tirx.Max,
    "Min": tirx.Min,
    "And": tirx.And,
    "Or": tirx.Or,
    "Greater": lambda a, b: tirx.Select(a > b, a, b),
}


class Unreadable(Exception):
    """The function is not a chain of stages; it is scheduled as it stands."""


@dataclass(frozen=True)
class Stage:
    """target[indices] = value for every point of `axes`, or target[indices] = fold(combine, value over `reduced`) from `init`.

    axes, reduced: (variable, extent). `value` may read any buffer but the target.
    """

    target: Any
    indices: tuple[Any, ...]
    value: Any
    axes: tuple[tuple[Any, Any], ...]
    reduced: tuple[tuple[Any, Any], ...] = ()
    init: Any = None
    combine: str = ""

    @property
    def is_identity(self) -> bool:
        """The target is indexed by the spatial axes in their order."""
        return len(self.indices) == len(self.axes) and all(
            index.same_as(var) or static(extent) == 1 for index, (var, extent) in zip(self.indices, self.axes, strict=True)
        )


def read_stages(func: tirx.PrimFunc) -> list[Stage]:
    """The stages of a function in program order; raises Unreadable with the reason."""
    extents: dict[Any, Any] = {}
    realizes: list[Any] = []
    other: list[Any] = []
    structural_walk(
        func.body,
        [
            (tirx.For, lambda loop: extents.__setitem__(loop.loop_var, loop)),
            (s_tir.SBlockRealize, realizes.append),
            ((tirx.While, tirx.IfThenElse, tirx.AllocBuffer, tirx.AttrStmt, tirx.Bind, tirx.Evaluate), other.append),
        ],
    )
    if other:
        raise Unreadable(f"a {type(other[0]).__name__} statement")
    stages = []
    for realize in realizes:
        if realize.block.name_hint == "root" and not realize.block.iter_vars:
            continue
        stages.append(_read_block(realize, extents))
    if not stages:
        raise Unreadable("no block")
    targets = [stage.target for stage in stages]
    if len({target.__hash__() for target in targets}) != len(targets):
        raise Unreadable("a buffer written twice")
    return stages


def _read_block(realize: Any, loops: dict[Any, Any]) -> Stage:
    block = realize.block
    if not isinstance(block.body, tirx.BufferStore):
        raise Unreadable(f"block {block.name_hint} is not one store")
    if static(realize.predicate) != 1 or len(block.match_buffers):
        raise Unreadable(f"block {block.name_hint} has a predicate or matched buffers")
    spatial, reduced = [], []
    for axis, bound in zip(block.iter_vars, realize.iter_values, strict=True):
        loop = loops.get(bound) if isinstance(bound, tirx.Var) else None
        whole = loop is not None and static(loop.min) == 0 and tvm.sym.Analyzer().can_prove_equal(loop.extent, axis.dom.extent)
        if not whole and static(axis.dom.extent) != 1:
            raise Unreadable(f"block {block.name_hint} is not over whole loops")
        if str(axis.var.ty.dtype) != "int64":
            raise Unreadable("indices that are not int64")
        (reduced if int(axis.iter_type) == 2 else spatial).append((axis.var, axis.dom.extent))
    store = block.body
    stage = Stage(store.buffer, tuple(store.indices), store.value, tuple(spatial), tuple(reduced))
    if is_reduction(block):
        stage = _read_reduction(stage, block)
    if not stage.indices and all(static(extent) == 1 for _, extent in spatial):  # one number: TVM gives it a loop all the same
        stage = replace(stage, value=substitute(stage.value, {var: tirx.const(0, "int64") for var, _ in spatial}), axes=())
    if not stage.is_identity:
        raise Unreadable(f"block {block.name_hint} stores out of order")
    if any(load.source.same_as(stage.target) for load in loads(stage.value)):
        raise Unreadable(f"block {block.name_hint} reads what it writes")
    return stage


def _read_reduction(stage: Stage, block: Any) -> Stage:
    kind = type(stage.value).__name__
    if kind == "Select" and isinstance(stage.value.condition, tirx.GT):
        # the plain maximum, one instruction, for those who do not mind losing a NaN
        condition = stage.value.condition
        if condition.a.same_as(stage.value.true_value) or str(condition.a) == str(stage.value.true_value):
            stage, kind = replace(stage, value=tirx.Max(stage.value.true_value, stage.value.false_value)), "Greater"
    if block.init is None or not isinstance(block.init, tirx.BufferStore) or kind not in COMBINERS:
        raise Unreadable(f"block {block.name_hint} reduces by {kind}")
    for own, rest in ((stage.value.a, stage.value.b), (stage.value.b, stage.value.a)):
        if isinstance(own, TensorLoad) and own.source.same_as(stage.target):
            return replace(stage, value=rest, init=_identity(kind, block.init.value), combine=kind)
    raise Unreadable(f"block {block.name_hint} is no fold")


def _identity(kind: str, init: Any) -> Any:
    """TVM starts extrema at the largest finite number, which would win over rows of infinities."""
    if isinstance(init, tirx.FloatImm) and kind in ("Max", "Greater", "Min"):
        worst = tirx.max_value(init.ty.dtype) if kind == "Min" else tirx.min_value(init.ty.dtype)
        if init.value == worst.value:
            return tirx.FloatImm(init.ty.dtype, math.copysign(math.inf, worst.value))
    return init


def substitute(expr: Any, values: dict[Any, Any]) -> Any:
    """Replace variables in an expression."""
    return structural_map(expr, (tirx.Var, lambda var: values.get(var, var))) if values else expr


def reads_in_place(load: Any, stage: Stage) -> bool:
    """The load takes the element of its buffer that has the stage's own coordinates, so both can share one loop nest."""
    axes = stage.axes + stage.reduced
    if stage.reduced:
        taken = [index for index, dim in zip(load.indices, load.source.shape, strict=True) if static(dim) != 1]
        wide = [var for var, extent in axes if static(extent) != 1]
        return all(any(index.same_as(var) for var in wide) for index in taken) and len(set(taken)) == len(taken) == len(wide)
    return same_dims(load.source.shape, [extent for _, extent in axes]) and all(
        index.same_as(var) or static(extent) == 1 for index, (var, extent) in zip(load.indices, axes, strict=True)
    )


def inline(stages: list[Stage], outputs: set[Any]) -> list[Stage]:
    """Inline maps that some reader takes out of place, where computing them again is free or every element has one reader."""
    result: list[Stage] = []
    pending = list(stages)
    while pending:
        stage = pending.pop(0)
        readers = [(other, load) for other in pending for load in loads(other.value) if load.source.same_as(stage.target)]
        wanted = not stage.reduced and stage.target not in outputs and bool(readers)
        if wanted and not all(reads_in_place(load, other) for other, load in readers):
            once = len(readers) == 1 and _one_to_one(readers[0][0], stage)
            if once or cost(stage.value) <= CHEAP:
                pending = [_inline_into(other, stage) for other in pending]
                continue
        result.append(stage)
    return result


def _one_to_one(reader: Stage, stage: Stage) -> bool:
    """The reader visits at most as many points as the stage has."""
    points = [_size(reader.axes + reader.reduced), _size(stage.axes)]
    return None not in points and points[0] <= points[1]


def _size(axes: tuple[tuple[Any, Any], ...]) -> int | None:
    total = 1
    for _, extent in axes:
        if static(extent) is None:
            return None
        total *= static(extent)
    return total


def _inline_into(reader: Stage, stage: Stage) -> Stage:
    variables = [var for var, _ in stage.axes]

    def read(load: Any) -> Any:
        if not load.source.same_as(stage.target):
            return load
        return renamed(substitute(stage.value, dict(zip(variables, load.indices, strict=True))))

    value = structural_map(reader.value, (TensorLoad, read))
    return reader if value.same_as(reader.value) else replace(reader, value=value)


def renamed(expr: Any) -> Any:
    """The expression with `let` variables of its own, so that two copies never share one."""

    def rename(node: Any) -> Any:
        var = tirx.Var(node.var.name, node.var.ty.dtype)
        return tirx.Let(var, node.value, substitute(node.body, {node.var: var}))

    return structural_map(expr, (tirx.Let, rename))
