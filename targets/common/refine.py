"""Rewrites that make the loops of a nest simple.

Axes of extent 1 go; an axis read through div and mod is split so that they vanish (reshape and transpose chains); a domain where an if-then-else changes sides (concat, pad)
is cut there, and where that depends on the window of a reduction (pooling), so that all windows inside of the image are one piece without conditions; neighbours that every access walks
contiguously become one axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ...compiler.tvm import TensorLoad, structural_map, structural_walk, tirx, tvm
from .fused import static
from .nests import Axis, Nest
from .stages import substitute

#: most nests that one domain is cut into
PIECES = 32


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
        outer = Axis(tirx.Var(f"{axis.var.name}o", "int64"), tirx.const(static(axis.extent) // factor, "int64"), axis.inner)  # pyright: ignore[reportOptionalOperand]
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
    """Cut a nest where the condition of an if-then-else on one axis of its rows changes sides, for some or for all points of its reductions."""
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
    """The first axis of rows that conditions compare with constants, and where."""
    inner = {axis.var: extent for axis in nest.axes if axis.inner and (extent := static(axis.extent)) is not None}
    if len(inner) < sum(axis.inner for axis in nest.axes):
        return None
    for axis in nest.axes:
        extent = static(axis.extent)
        if extent is None or axis.inner:
            continue
        points: set[int] = set()

        def compare(node: Any) -> None:
            linear = tvm.sym.detect_linear_equation(node.a - node.b, [axis.var, *inner])  # noqa: B023
            values = [value for value in map(static, linear) if value is not None]
            if len(values) < len(inner) + 2 or not values[0]:
                return
            scale, *strides, offset = values
            reach = [stride * (size - 1) for stride, size in zip(strides, inner.values(), strict=True)]
            for end in {sum(min(each, 0) for each in reach), sum(max(each, 0) for each in reach)}:
                zero = -(offset + end) // scale  # where the difference passes 0
                points.update(point for point in (zero, zero + 1) if 0 < point < extent)  # noqa: B023

        def visit(call: Any) -> None:
            if getattr(call.op, "name", "") == "prim.if_then_else":
                structural_walk(call.args[0], ((tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE), compare))

        for step in nest.steps:
            structural_walk(step.value, (tvm.ir.Call, visit))
        used = sorted(points)
        useful = [point for point in used if _decides(nest, axis, point)]
        if useful:
            return axis, useful
    return None


def _decides(nest: Nest, axis: Axis, point: int) -> bool:
    """Some condition has different values at point - 1 and point, or one on one side only whatever a reduction is at, so that a cut there helps."""
    changed, analyzer = False, tvm.sym.Analyzer()
    for inner in nest.axes:
        if inner.inner:
            analyzer.bind(inner.var, tvm.ir.Range.from_min_extent(tirx.const(0, "int64"), inner.extent))

    def compare(node: Any) -> None:
        nonlocal changed
        values = [static(analyzer.simplify(substitute(node, {axis.var: tirx.const(at, "int64")}))) for at in (point - 1, point)]
        changed = changed or values[0] != values[1]

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
