"""The last lowering of a CPU kernel: vector mathematics in place of calls, float extremes settled, elements named by small buffers.

Without it LLVM calls libm once per lane. Templates and schedulers keep the calls (`T.exp(x)` inlines and fuses well); the lowering pipeline `TIR_PIPELINE` replaces them
last of all: TVM's simplifier would fold the rounding constants away and copy bound values into every use. It also settles what float32 and float64 `max`/`min` do with
NaN: they keep it, as onnxruntime's Relu, Clip, Max and Min do, where LLVM's plain lowering (`a > b ? a : b`) drops it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...compiler.tvm import PIPELINE_MAP, T, structural_map, structural_walk, tirx, tvm
from .entry import short_entry
from .llvm_text import with_functions
from .math import MARK, Names, constant_of, select
from .math_functions import FUNCTIONS, NATIVE, NATIVE_LLVM
from .rounding import round_while_casting
from .stealing import steal_work

_HAS_FEATURE = tvm.get_global_func("target.target_has_feature")
_FMA = tvm.ir.Op.get("tirx.fma").get_attr("llvm.FLowerIntrinsic")


def _extremum(name: Callable[[Any], Any], node: Any) -> Any:
    """Float max and min that keep NaN: one select when an operand is a constant, a NaN test more when not."""
    if not str(node.ty.dtype).startswith("float"):
        return node
    above = isinstance(node, tirx.Max)

    def pick(first: Any, second: Any) -> Any:
        # NaN in either operand selects the second
        return select(first > second if above else first < second, first, second)

    if constant_of(node.a) is not None:
        return pick(node.a, name(node.b))
    if constant_of(node.b) is not None:
        return pick(node.b, name(node.a))
    a, b = name(node.a), name(node.b)
    return select(T.isnan(a), a, pick(a, b))


def _lowered(node: Any) -> Any:
    """What LowerIntrin makes of one call or sum: the target's instruction, or a fused multiply-add."""
    if isinstance(node, tirx.Add):
        for product, other in ((node.b, node.a), (node.a, node.b)):
            if isinstance(product, tirx.Mul) and str(node.ty.dtype).startswith("float"):
                return _FMA(tirx.call_intrin(node.ty.dtype, "tirx.fma", product.a, product.b, other))
        return node
    rule = node.op.get_attr("llvm.FLowerIntrinsic") if isinstance(node.op, tvm.ir.Op) else None
    return node if rule is None else rule(node)


def _expand(statement: Any) -> Any:
    """One store or binding with its marked calls expanded and its float extremes settled."""
    if not _to_expand(statement.value):
        return statement
    name = Names()

    def call(node: Any) -> Any:
        function = FUNCTIONS.get(_marked(node))
        return node if function is None else function(name, *node.args[1:])

    value = structural_map(statement.value, (tvm.ir.Call, _settle_guarded))
    value = structural_map(value, [(tvm.ir.Call, call), ((tirx.Max, tirx.Min), lambda node: _extremum(name, node))])
    if value.same_as(statement.value):
        return statement
    if isinstance(statement, tirx.Bind):
        last = tirx.Bind(statement.var, value)
    else:
        last = tirx.BufferStore(statement.buffer, value, list(statement.indices))
    return structural_map(tirx.SeqStmt([*name.statements, last]) if name.statements else last, ((tirx.Add, tvm.ir.Call), _lowered))


def _to_expand(value: Any) -> bool:
    """Whether there may be anything in it: most statements of a kernel have nothing, and one walk is cheaper than the three that rewrite."""
    found: list[bool] = []

    def visit(node: Any) -> None:
        if not isinstance(node, tvm.ir.Call) or _marked(node):
            found.append(True)

    structural_walk(value, ((tvm.ir.Call, tirx.Max, tirx.Min), visit))
    return bool(found)


def _settle_guarded(call: Any) -> Any:
    """Float extremes within the branches of an if-then-else, without names: those would be computed before the test."""
    if getattr(call.op, "name", "") != "prim.if_then_else":
        return call
    condition, *branches = call.args
    settled = [structural_map(branch, ((tirx.Max, tirx.Min), lambda node: _extremum(lambda value: value, node))) for branch in branches]
    changed = any(not new.same_as(old) for new, old in zip(settled, branches, strict=True))
    return T.if_then_else(condition, *settled) if changed else call


def _marked(call: Any) -> str:
    """The function that a call marked by `mark_math` stands for."""
    if getattr(call.op, "name", "") != "tirx.call_pure_extern" or not isinstance(call.args[0], tvm.ir.expr.StringImm):
        return ""
    return call.args[0].value.removeprefix(MARK)


def _flatten(sequence: Any) -> Any:
    """Sequences within a sequence dissolve: a binding holds until the end of the sequence it stands in."""
    if not any(isinstance(statement, tirx.SeqStmt) for statement in sequence.seq):
        return sequence
    flat: list[Any] = []
    for statement in sequence.seq:
        flat.extend(statement.seq if isinstance(statement, tirx.SeqStmt) else [statement])
    return tirx.SeqStmt(flat)


def mark_math(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Hide the float32 calls that `vector_math` expands from LowerIntrin, which would turn them into calls of libm.

    What an if-then-else guards stays: its expansion would be computed before the test.
    """
    guarded: set[Any] = set()
    target = func.attrs.get("target") if func.attrs else None
    native = {name: other for name, (feature, other) in NATIVE.items() if target is not None and _HAS_FEATURE(feature, target)}

    def guard(call: Any) -> None:
        if getattr(call.op, "name", "") == "prim.if_then_else":
            for branch in call.args[1:]:
                structural_walk(branch, (tvm.ir.Call, guarded.add))

    def mark(call: Any) -> Any:
        name = getattr(call.op, "name", "")
        if name not in FUNCTIONS or str(call.args[0].ty.dtype).split("x")[0] != "float32" or call in guarded:
            return call
        return tirx.call_pure_extern(call.ty.dtype, MARK + native.get(name, name), *call.args)

    structural_walk(func.body, (tvm.ir.Call, guard))
    body = structural_map(round_while_casting(func.body), (tvm.ir.Call, mark))
    return func if body.same_as(func.body) else func.with_body(body)


def vector_math(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Expand every marked call and every float max/min of a kernel that LowerIntrin has been over.

    It has to come that late: TVM's analyzers copy bound values into every use, and an expansion is a chain of bindings each used twice or more.
    """
    body = structural_map(func.body, [((tirx.Bind, tirx.BufferStore), _expand), (tirx.SeqStmt, _flatten)])
    body = _store_values(body)
    if _calls_native(func.body):
        body = with_functions(body, NATIVE_LLVM)
    return func if body.same_as(func.body) else func.with_body(body)


def _calls_native(body: Any) -> bool:
    names = {name for _, name in NATIVE.values()}
    found: list[Any] = []
    structural_walk(body, (tvm.ir.Call, lambda call: found.append(call) if _marked(call) in names else None))
    return bool(found)


def _store_values(body: Any) -> Any:
    """Bindings of elements become small buffers, see `Names`; those of addresses, counts and truth values stay, as the code generator reasons about them."""
    elements: dict[Any, Any] = {}

    def note(bind: Any) -> None:
        dtype = str(getattr(bind.var.ty, "dtype", "handle"))
        if dtype.startswith(("bool", "handle")) or bind.var in elements:
            return
        found = [dtype] if "x" in dtype or "float" in dtype else []
        if elements and not found:
            structural_walk(bind.value, (tirx.Var, lambda variable: found.append(dtype) if variable in elements else None))
        if found:
            name = Names()
            elements[bind.var] = name(bind.value), tirx.SeqStmt(name.statements)

    structural_walk(body, (tirx.Bind, note))
    if not elements:
        return body
    body = structural_map(body, [(tirx.Bind, lambda bind: elements[bind.var][1] if bind.var in elements else bind), (tirx.SeqStmt, _flatten)])
    return structural_map(body, (tirx.Var, lambda variable: elements[variable][0] if variable in elements else variable))


def _function_pass(rewrite: Callable[[Any], Any], name: str) -> Any:
    return tvm.tirx.transform.prim_func_pass(lambda func, module, context: rewrite(func), opt_level=0, name=name)


def _pipeline() -> tuple[Any, Any, Any]:
    lower, finish_host, finish_device = PIPELINE_MAP["s_tir"]()
    mark, expand = _function_pass(mark_math, "tcompile.MarkMath"), _function_pass(vector_math, "tcompile.VectorMath")
    share, enter = _function_pass(steal_work, "tcompile.StealWork"), _function_pass(short_entry, "tcompile.ShortEntry")
    # claims after lowering: TVM cuts buffers to what the variables of loops inside reach, and a claimed iteration is none, so that all threads would share one iteration's part
    return tvm.transform.Sequential([lower, share, enter, mark]), lambda: tvm.transform.Sequential([finish_host(), expand]), finish_device


#: name of the lowering pipeline with vector mathematics: `relax.build(..., tir_pipeline=TIR_PIPELINE)`
TIR_PIPELINE = "tcompile_cpu"
PIPELINE_MAP[TIR_PIPELINE] = _pipeline
