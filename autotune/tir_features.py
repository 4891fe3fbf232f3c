"""Features read from a kernel's TIR: what its loop nest executes, and what its hottest innermost loop looks like.

Counts are of executions: a statement's count is the product of the extents of the loops around it. A vector operation counts once, whatever its width. Extents known
only at run time are taken for `TYPICAL`, branches for taken as often as their condition says where that can be seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from ..compiler.tvm import T, TensorLoad, tirx, tvm

#: annotation of a loop whose body prefetches and then does a group of steps; here it counts as the one loop over all steps
PREFETCH = "prefetch"

#: what an extent known only at run time is taken for
TYPICAL = 64
#: share of executions that a branch takes whose condition says nothing: guards of the inner part come first, edges last
LIKELY = 0.9
#: bytes of a local buffer up to which it is registers
REGISTERS = 1024
LINE, SETS = 64, 64
_EXTREMA = frozenset((tirx.Max, tirx.Min))
_BINARY = frozenset((tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.FloorDiv, tirx.FloorMod)) | _EXTREMA
_PREFETCH_ID = T.llvm_lookup_intrinsic_id("llvm.prefetch")
_LEAVES = frozenset((tirx.Var, tirx.IntImm, tirx.FloatImm))


@dataclass
class TirFeatures:
    """Executed counts: multiply_adds (fused or dot-product instructions), arithmetic (other floating point), selects, transcendentals, integer (outside of
    indices), vector_loads, scalar_loads, vector_stores, scalar_stores, loop_steps, loop_entries, branches. statements: of the function as written, its unrolled size.
    depth: of the loops. parallel: extent of the parallel loops. parameter_bytes, workspace_bytes: of the buffers. registers: vectors in the largest set of
    accumulators.

    hot_*: of the innermost loop with most multiply-adds (the loop with most executions where there are none): share of all multiply-adds, its trip count, how often it
    is entered, per step its multiply-adds, vector loads, scalar loads and other statements; hot_vector_stride: bytes between the vectors of consecutive steps;
    hot_scalar_stride: bytes between consecutive steps' scalars; hot_row_stride: bytes between the scalars of one step; hot_set_rows: how many of
    them share one set of L1.
    """

    multiply_adds: float = 0.0
    arithmetic: float = 0.0
    selects: float = 0.0
    transcendentals: float = 0.0
    integer: float = 0.0
    vector_loads: float = 0.0
    scalar_loads: float = 0.0
    vector_stores: float = 0.0
    scalar_stores: float = 0.0
    loop_steps: float = 0.0
    loop_entries: float = 0.0
    branches: float = 0.0
    statements: float = 0.0
    depth: float = 0.0
    parallel: float = 1.0
    parameter_bytes: float = 0.0
    workspace_bytes: float = 0.0
    registers: float = 0.0
    hot_share: float = 0.0
    hot_trips: float = 0.0
    hot_entries: float = 0.0
    hot_multiply_adds: float = 0.0
    hot_vector_loads: float = 0.0
    hot_scalar_loads: float = 0.0
    hot_statements: float = 0.0
    hot_vector_stride: float = 0.0
    hot_scalar_stride: float = 0.0
    hot_row_stride: float = 0.0
    hot_set_rows: float = 0.0


NAMES: tuple[str, ...] = tuple(entry.name for entry in fields(TirFeatures))


def _is_ramp(indices: Any) -> bool:
    """True for an access of several lanes; that to a scalar has no index at all."""
    return len(indices) > 0 and isinstance(indices[-1], tirx.Ramp)


def tir_features(func: tirx.PrimFunc) -> TirFeatures:
    """Features of a scheduled kernel."""
    walk = _Walk()
    for param in func.params:
        if hasattr(param, "shape"):
            walk.found.parameter_bytes += _bytes(param)
    walk.statement(func.body, 1.0, 1, 0)
    walk.finish()
    return walk.found


@dataclass
class _Loop:
    """An innermost loop: the node, how often it is entered, its extent, and what one step executes."""

    node: Any
    entries: float
    trips: float
    counts: Counter[str] = field(default_factory=Counter)
    loads: list[tuple[Any, bool]] = field(default_factory=list)


class _Walk:
    def __init__(self) -> None:
        self.found = TirFeatures()
        self.counts: Counter[str] = Counter()
        self.bound: dict[Any, Any] = {}
        self.ranges: dict[Any, tuple[float, float]] = {}
        self.registers: dict[Any, float] = {}
        self.loops: list[_Loop] = []
        self.inner: list[_Loop] = []

    def statement(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        handler = self._HANDLERS.get(type(node).__name__)
        if handler is not None:
            handler(self, node, weight, lanes, depth)

    # -- statements ---------------------------------------------------------------------------------------------------------------------------------

    def _sequence(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        for child in node.seq:
            self.statement(child, weight, lanes, depth)

    def _for(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        extent = self._extent(node.extent)
        groups = 1.0
        if PREFETCH in node.annotations:
            self.ranges[node.loop_var] = (0.0, max(0.0, extent - 1.0))
            groups, node = extent, next(child for child in node.body.seq if isinstance(child, tirx.For))
            extent = self._extent(node.extent)
        if node.kind == tirx.ForKind.VECTORIZED:
            self.statement(node.body, weight, lanes * max(1, int(extent)), depth)
            return
        self.ranges[node.loop_var] = (0.0, max(0.0, extent - 1.0))
        extent *= groups
        found = self.found
        self.counts["loop_entries"] += weight
        self.counts["loop_steps"] += weight * extent
        found.depth = max(found.depth, depth + 1.0)
        if node.kind == tirx.ForKind.PARALLEL:
            found.parallel = max(found.parallel, extent)
        loop = _Loop(node, weight, extent)
        outer, self.inner = self.inner, [*self.inner, loop]
        before = len(self.loops)
        self.statement(node.body, weight * extent, lanes, depth + 1)
        self.inner = outer
        if len(self.loops) == before:
            self.loops.append(loop)

    def _branch(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        self.counts["branches"] += weight
        self._expression(node.condition, weight, lanes)
        share = self._likelihood(node.condition)
        self.statement(node.then_case, weight * share, lanes, depth)
        if node.else_case is not None:
            self.statement(node.else_case, weight * (1.0 - share), lanes, depth)

    def _bind(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        self.bound[node.var] = value = node.value
        self._count()
        self._expression(value, weight, lanes)

    def _store(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        self._count()
        self._expression(node.value, weight, lanes)
        if node.buffer in self.registers:
            return
        wide = lanes > 1 or _is_ramp(node.indices)
        self._add("vector_stores" if wide else "scalar_stores", weight)

    def _allocate(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        size = _bytes(node.buffer)
        if size <= REGISTERS * 2:
            self.registers[node.buffer] = size
        else:
            self.found.workspace_bytes = max(self.found.workspace_bytes, size)
        self.statement(getattr(node, "body", None), weight, lanes, depth)

    def _evaluate(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        if _is_prefetch(node.value):
            return
        self._count()
        self._expression(node.value, weight, lanes)

    def _nested(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        self.statement(node.body, weight, lanes, depth)

    def _realize(self, node: Any, weight: float, lanes: int, depth: int) -> None:
        self.statement(node.block.body, weight, lanes, depth)

    _HANDLERS: dict[str, Callable[..., None]] = {
        "SeqStmt": _sequence,
        "For": _for,
        "IfThenElse": _branch,
        "Bind": _bind,
        "BufferStore": _store,
        "AllocBuffer": _allocate,
        "Evaluate": _evaluate,
        "DeclBuffer": lambda self, node, *rest: self.statement(getattr(node, "body", None), *rest),
        "AttrStmt": _nested,
        "While": _nested,
        "SBlockRealize": _realize,
    }

    # -- expressions --------------------------------------------------------------------------------------------------------------------------------

    def _expression(self, expr: Any, weight: float, lanes: int) -> None:
        """Count what an expression executes; the arithmetic of indices is left out, most of it is folded into addresses."""
        kind = type(expr)
        if kind in _LEAVES:
            return
        if kind is TensorLoad:
            if expr.source not in self.registers:
                wide = lanes > 1 or _is_ramp(expr.indices)
                self._add("vector_loads" if wide else "scalar_loads", weight)
                if self.inner:
                    self.inner[-1].loads.append((expr, wide))
        elif kind is tvm.ir.Call:
            name = getattr(expr.op, "name", "")
            self._add("multiply_adds" if "llvm" in name else "selects" if name.endswith("if_then_else") else "transcendentals", weight)
            for arg in expr.args:
                self._expression(arg, weight, lanes)
        elif kind in _BINARY:
            real = str(expr.ty.dtype).startswith(("float", "bfloat"))
            self._add("integer" if not real else "selects" if kind in _EXTREMA else "arithmetic", weight)
            self._expression(expr.a, weight, lanes)
            self._expression(expr.b, weight, lanes)
        elif kind is tirx.Select:
            self._add("selects", weight)
            for part in (expr.condition, expr.true_value, expr.false_value):
                self._expression(part, weight, lanes)
        elif hasattr(expr, "value"):  # a cast or broadcast
            self._expression(expr.value, weight, lanes)

    def _add(self, kind: str, weight: float) -> None:
        self.counts[kind] += weight
        if self.inner:
            self.inner[-1].counts[kind] += 1

    def _count(self) -> None:
        self.counts["statements"] += 1.0
        if self.inner:
            self.inner[-1].counts["statements"] += 1

    def _likelihood(self, condition: Any) -> float:
        """How often a condition holds: `v < c` as the range of v says, otherwise LIKELY."""
        if isinstance(condition, tirx.LT) and isinstance(condition.a, tirx.Var) and isinstance(condition.b, tirx.IntImm):
            return min(1.0, float(condition.b.value) / max(1.0, self._range(condition.a)[1] + 1.0))
        return LIKELY

    def _extent(self, expr: Any) -> float:
        """Steps of a loop: `min(x + c, y) - x` is c at most."""
        if isinstance(expr, tirx.IntImm):
            return float(expr.value)
        if isinstance(expr, tirx.Sub):
            if isinstance(expr.a, tirx.Min):
                return min(self._extent(tirx.Sub(side, expr.b)) for side in (expr.a.a, expr.a.b))
            if isinstance(expr.a, tirx.Add) and expr.a.a.same_as(expr.b):
                return self._extent(expr.a.b)
        return max(1.0, self._range(expr)[1])

    def _range(self, expr: Any) -> tuple[float, float]:
        """Interval of an integer expression; what is known only at run time counts as TYPICAL."""
        kind = type(expr)
        if kind is tirx.IntImm:
            return float(expr.value), float(expr.value)
        if kind is tirx.Var:
            if expr not in self.ranges:
                bound = self.bound.get(expr)
                self.ranges[expr] = (0.0, float(TYPICAL)) if bound is None else self._range(bound)
            return self.ranges[expr]
        if kind not in _BINARY:
            return 0.0, float(TYPICAL)
        (low, high), (least, most) = self._range(expr.a), self._range(expr.b)
        if kind is tirx.Add:
            return low + least, high + most
        if kind is tirx.Sub:
            return low - most, high - least
        if kind is tirx.Mul:
            return low * least, high * most
        if kind is tirx.Min:
            return min(low, least), min(high, most)
        if kind is tirx.Max:
            return max(low, least), max(high, most)
        if kind is tirx.FloorMod:
            return 0.0, max(0.0, min(high, most - 1.0))
        return low // max(most, 1.0), high // max(least, 1.0)

    # -- the hottest loop ---------------------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Fill in what only the whole walk shows."""
        found = self.found
        for kind, count in self.counts.items():
            setattr(found, kind, float(count))
        if not self.loops:
            return
        found.registers = max((size for size in self.registers.values()), default=0.0) / 32.0

        def heat(loop: _Loop) -> tuple[float, float]:
            return loop.entries * loop.trips * loop.counts["multiply_adds"], loop.entries * loop.trips

        hot = max(self.loops, key=heat)
        found.hot_share = heat(hot)[0] / max(1.0, found.multiply_adds)
        found.hot_trips, found.hot_entries = hot.trips, hot.entries
        found.hot_multiply_adds = float(hot.counts["multiply_adds"])
        found.hot_vector_loads, found.hot_scalar_loads = float(hot.counts["vector_loads"]), float(hot.counts["scalar_loads"])
        found.hot_statements = float(hot.counts["statements"])
        step = hot.node.loop_var
        wide = [node for node, is_wide in hot.loads if is_wide]
        narrow = [node for node, is_wide in hot.loads if not is_wide]
        if wide:
            found.hot_vector_stride = float(max(abs(_address(node, step, 1) - _address(node, step, 0)) for node in wide))
        if narrow:
            found.hot_scalar_stride = float(max(abs(_address(node, step, 1) - _address(node, step, 0)) for node in narrow))
            addresses = sorted({_address(node, step, 0) for node in narrow})
            found.hot_row_stride = float(min((b - a for a, b in zip(addresses, addresses[1:], strict=False)), default=0))
            found.hot_set_rows = float(max(Counter(address // LINE % SETS for address in addresses).values()))


def _is_prefetch(call: Any) -> bool:
    """A request for a cache line, which computes nothing."""
    return getattr(getattr(call, "op", None), "name", "") == "tirx.call_llvm_intrin" and int(call.args[0]) == _PREFETCH_ID


def _number(extent: Any) -> float:
    return float(extent.value) if isinstance(extent, tirx.IntImm) else float(TYPICAL)


def _width(buffer: Any) -> int:
    dtype = tvm.DataType(str(buffer.ty.dtype))
    return max(1, dtype.bits // 8)


def _bytes(buffer: Any) -> float:
    size = float(_width(buffer))
    for dim in buffer.shape:
        size *= _number(dim)
    return size


def _address(load: Any, variable: Any, value: int) -> int:
    """Byte offset of a load with `variable` at `value` and every other variable at 0."""
    offset = 0
    for index, dim in zip(load.indices, load.source.shape, strict=True):
        offset = offset * int(_number(dim)) + _evaluate(index, variable, value)
    return offset * _width(load.source)


def _evaluate(expr: Any, variable: Any, value: int) -> int:
    if isinstance(expr, tirx.IntImm):
        return int(expr.value)
    if isinstance(expr, tirx.Var):
        return value if expr.same_as(variable) else 0
    if isinstance(expr, tirx.Ramp):
        return _evaluate(expr.base, variable, value)
    if isinstance(expr, (tirx.Add, tirx.Sub, tirx.Mul)):
        a, b = (_evaluate(side, variable, value) for side in (expr.a, expr.b))
        return a + b if isinstance(expr, tirx.Add) else a - b if isinstance(expr, tirx.Sub) else a * b
    return 0


def values(features: TirFeatures) -> Iterator[float]:
    """The features in the order of NAMES."""
    return (float(getattr(features, name)) for name in NAMES)
