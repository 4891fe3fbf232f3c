"""Which values of the graph a fused kernel computes.

Fusion moves kernel calls into functions of their own, merges equal functions and names everything anew. This module follows the values instead: a call before
fusion is known by its kernel and its arguments, so the same call is found again inside of the function that took it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..compiler.tvm import relax


def kernel_sources(before: Any, after: Any) -> dict[str, list[str]]:
    """Name of every function that `main` calls in the module `after` -> names of the variables of `before` that its calls compute, in the program's order.

    before: the module as it was when `after` was fused from it. Values that cannot be followed are left out.
    """
    sources: dict[Any, Any] = {}
    same: dict[Any, Any] = {}
    for binding in _bindings(before["main"]):
        key = _lookup(binding.value, same)
        same[binding.var] = sources.setdefault(key, binding.var) if isinstance(key, _Computed) else key
    found: dict[str, dict[str, None]] = {}
    known: dict[Any, Any] = dict(zip(after["main"].params, before["main"].params, strict=True))
    functions = {variable.name_hint: func for variable, func in after.functions_items()}
    for binding in _bindings(after["main"]):
        call = binding.value
        name = _callee(call)
        names = found.setdefault(name, {}) if name else {}
        if isinstance(functions.get(name), relax.Function):
            inside = {param: _lookup(arg, known) for param, arg in zip(functions[name].params, call.args, strict=True)}
            for inner in _bindings(functions[name]):
                inside[inner.var] = _follow(inner, inside, sources, names)
            known[binding.var] = _lookup(functions[name].body.body, inside)
        else:
            known[binding.var] = _follow(binding, known, sources, names)
    return {name: list(names) for name, names in found.items()}


def _bindings(function: Any) -> Iterator[Any]:
    for block in function.body.blocks:
        yield from block.bindings


def _follow(binding: Any, known: Mapping[Any, Any], sources: Mapping[Any, Any], names: dict[str, None]) -> Any:
    """The value before fusion that a binding stands for, None when there is none; its name goes into `names`."""
    key = _lookup(binding.value, known)
    if not isinstance(key, _Computed):
        return key
    source = sources.get(key)
    if source is not None:
        names[source.name] = None
    return source


def _callee(value: Any) -> str:
    """Name of the function that a call or a `call_tir` runs; "" for anything else."""
    if not isinstance(value, relax.Call):
        return ""
    callee = value.args[0] if getattr(value.op, "name", "") == "relax.call_tir" else value.op
    return callee.name_hint if isinstance(callee, relax.GlobalVar) else ""


@dataclass(frozen=True)
class _Computed:
    """A value by the operator that computes it and the operands."""

    operator: str
    operands: tuple[Any, ...]


def _lookup(expr: Any, known: Mapping[Any, Any]) -> Any:
    """An expression as it was before fusion: variables replaced, tuples as Python tuples, what is computed as `_Computed`, anything else itself."""
    if isinstance(expr, relax.Tuple):
        return tuple(_lookup(field, known) for field in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        value = _lookup(expr.tuple_value, known)
        return value[expr.index] if isinstance(value, tuple) else _Computed(f"field {expr.index}", (value,))
    if isinstance(expr, relax.Call):
        return _Computed(getattr(expr.op, "name", str(expr.op)), tuple(_lookup(arg, known) for arg in expr.args))
    if isinstance(expr, relax.Var):
        return known.get(expr, expr)
    return str(expr) if isinstance(expr, (relax.ShapeExpr, relax.GlobalVar)) else expr
