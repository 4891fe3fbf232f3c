"""Checks of sizes in a module whose memory is planned: they name the source's nodes, and no tensor has more elements than integers can count."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ...compiler.program import LARGEST_BYTES, LARGEST_DIM, node_of
from ...compiler.tvm import IRBuilder, T, relax, relax_functions, tirx, tvm
from ...passes.fusion import NODES
from ..common.node_names import printable
from ..common.stages import substitute

#: calls that TVM puts before a `match_cast`, for the value that is cast; their last argument is the text of the error
_CHECKS = frozenset({"vm.builtin.match_shape", "vm.builtin.check_tensor_info", "vm.builtin.check_shape_info"})
#: bytes that 64 bits can count, with room for sums on the way
_COUNTED = 2.0**62
_ALLOCATIONS = frozenset({"relax.builtin.alloc_tensor", "relax.memory.alloc_storage"})


def bound_storage(module: Any, origins: Mapping[str, str]) -> Any:
    """The module with a check before each allocation with a dim that could be negative (an image smaller than the kernel of a convolution), or whose size
    could overflow 64 bits, were its symbols as large as dims can be. origins: see `Program`.

    A reshape of what a cast has given its size is one, too: the cast compares products, which could be equal because they overflow.
    """
    builder = relax.BlockBuilder(module)
    for variable, function in relax_functions(module):
        checked: set[str] = set()
        cast: set[Any] = set()
        makers: dict[Any, str] = {}
        blocks = []
        for block in function.body.blocks:
            bindings: list[Any] = []
            for binding in block.bindings:
                if isinstance(binding, relax.MatchCast) or isinstance(binding.value, relax.Var) and binding.value in cast:
                    cast.add(binding.var)
                dims = _allocated(binding, cast)
                if dims is not None and str(dims) not in checked:
                    checked.add(str(dims))
                    symbols = list(dict.fromkeys(symbol for dim in dims for symbol in tirx.analysis.undefined_vars(dim)))
                    checks = []
                    if negative := [dim for dim in dims if _may_be_negative(dim)]:
                        makers = makers or _makers(module, function, origins)
                        checks.append((_not_negative(negative, symbols, makers.get(binding.var) or _made_by(symbols, origins)), "check_sizes"))
                    if _largest(dims) > _COUNTED:
                        checks.append((_bounded(dims, symbols, _made_by(symbols, origins)), "check_bytes"))
                    for kernel, name in checks:
                        unit = relax.TupleType([])
                        call = relax.Call(builder.add_func(kernel, name), symbols, ty_args=[unit])
                        bindings.append(relax.VarBinding(relax.Var("_", unit), call))
                bindings.append(binding)
            blocks.append(relax.BindingBlock(bindings))
        body = relax.SeqExpr(blocks, function.body.body)
        builder.update_func(variable, relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs))
    return builder.get()


def _allocated(binding: Any, cast: set[Any]) -> list[Any] | None:
    """The sizes of an allocation, or of a reshape of one of `cast`, that depend on symbols."""
    call = getattr(binding, "value", None)
    name = getattr(call.op, "name", "") if isinstance(call, relax.Call) else ""
    if name in _ALLOCATIONS:
        dims = list(call.args[0].values)
    elif name == "relax.reshape" and call.args[0] in cast:
        dims = list(call.args[1].values)
    else:
        return None
    return None if all(isinstance(dim, tirx.IntImm) for dim in dims) else dims


def _largest(dims: list[Any]) -> float:
    """An upper bound of the bytes, with every symbol at its largest."""
    total = 8.0
    for dim in dims:
        total *= _bound(dim)
    return total


def _bound(expr: Any) -> float:
    if isinstance(expr, tirx.IntImm):
        return abs(float(int(expr)))
    if isinstance(expr, tirx.Mul):
        return _bound(expr.a) * _bound(expr.b)
    if isinstance(expr, (tirx.Add, tirx.Sub)):
        return _bound(expr.a) + _bound(expr.b)
    if isinstance(expr, tirx.Min):
        return min(_bound(expr.a), _bound(expr.b))
    if isinstance(expr, tirx.Max):
        return max(_bound(expr.a), _bound(expr.b))
    if isinstance(expr, (tirx.FloorDiv, tirx.FloorMod)):
        return _bound(expr.a)
    return float(LARGEST_DIM)


def _float(expr: Any) -> Any:
    """The same in float64, which does not overflow."""
    for kind in (tirx.Mul, tirx.Add, tirx.Sub, tirx.Min, tirx.Max):
        if isinstance(expr, kind):
            return kind(_float(expr.a), _float(expr.b))
    if isinstance(expr, tirx.FloorDiv):
        return tirx.Div(_float(expr.a), _float(expr.b))
    return tirx.Cast("float64", expr)


def _may_be_negative(dim: Any) -> bool:
    """Whether some sizes of the symbols, from 0, make it negative, as far as can be proved."""
    if isinstance(dim, (tirx.IntImm, tirx.Var)):
        return False
    analyzer = tvm.sym.Analyzer()
    for symbol in tirx.analysis.undefined_vars(dim):
        analyzer.bind(symbol, tvm.ir.Range.from_min_extent(tirx.const(0, "int64"), tirx.const(LARGEST_DIM, "int64")))
    return not analyzer.can_prove(dim >= 0)


def _makers(module: Any, function: Any, origins: Mapping[str, str]) -> dict[Any, str]:
    """Tensor, or storage of one -> the source nodes of the kernel that takes it first, or of the value that it is; of a kernel without nodes, those of what it reads."""
    found: dict[Any, str] = {}
    storage: dict[Any, Any] = {}

    def name(tensor: Any, nodes: str) -> None:
        for var in (tensor, storage.get(tensor, tensor)):
            found.setdefault(var, nodes)

    for block in function.body.blocks:
        for binding in block.bindings:
            value = getattr(binding, "value", None)
            if isinstance(value, relax.Var):
                node = node_of(binding.var.name, origins)
                node = node if node != binding.var.name else found.get(value, "")
                for tensor in (value, binding.var) if node else ():
                    name(tensor, node)
            elif isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.memory.alloc_tensor":
                storage[binding.var] = value.args[0]
            elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
                nodes = ", ".join(str(node) for node in (module[value.op].attrs or {}).get(NODES, ()))
                nodes = nodes or next((found[arg] for arg in value.args if arg in found), "")
                for arg in value.args if nodes else ():
                    name(arg, nodes)
    return found


def _not_negative(dims: list[Any], symbols: list[Any], node: str) -> Any:
    """(symbols...): asserts that no dim is negative."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True, "tcompile.scheduled": True})
        fresh = {symbol: T.arg(f"n{at}", T.int64()) for at, symbol in enumerate(symbols)}
        least = functools.reduce(tirx.min, [substitute(dim, fresh) for dim in dims])
        with T.Assert(least >= T.int64(0), f"node '{printable(node)}': its result would have a negative size"):
            pass
    return builder.get()


def _bounded(dims: list[Any], symbols: list[Any], node: str) -> Any:
    """(symbols...): asserts that the product of the dims is at most LARGEST_BYTES."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True, "tcompile.scheduled": True})
        fresh = {symbol: T.arg(f"n{at}", T.int64()) for at, symbol in enumerate(symbols)}
        total = tirx.FloatImm("float64", 1.0)
        for dim in dims:
            total = total * _float(substitute(dim, fresh))
        with T.Assert(
            total <= tirx.FloatImm("float64", float(LARGEST_BYTES)), f"node '{printable(node)}': a tensor would have more than {LARGEST_BYTES} bytes"
        ):
            pass
    return builder.get()


def _made_by(symbols: list[Any], origins: Mapping[str, str]) -> str:
    """The node that computed one of the symbols; symbols of inputs are named themselves."""
    names = [symbol.name.rsplit("_s", 1)[0] for symbol in symbols]
    return next((node_of(name, origins) for name in names if node_of(name, origins) != name), symbols[0].name)


def name_checks(module: Any, origins: Mapping[str, str]) -> Any:
    """The module after `VMShapeLower`; the checks of every `match_cast` name the node that it came from. origins: see `Program`."""
    named = {variable: _named(function, origins) for variable, function in relax_functions(module)}
    return tvm.IRModule({**dict(module.functions_items()), **named}, attrs=module.attrs)


def _named(function: Any, origins: Mapping[str, str]) -> Any:
    blocks = []
    for block in function.body.blocks:
        bindings = list(block.bindings)
        for place, cast in enumerate(bindings):
            if isinstance(cast, relax.MatchCast):
                _name_before(bindings, place, node_of(cast.var.name, origins))
        blocks.append(relax.BindingBlock(bindings))
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _name_before(bindings: list[Any], place: int, node: str) -> None:
    value = bindings[place].value
    for before in reversed(range(place)):
        binding = bindings[before]
        if isinstance(binding, relax.MatchCast):
            return
        call = binding.value
        if isinstance(call, relax.Call) and str(getattr(call.op, "global_symbol", "")) in _CHECKS and call.args[0].same_as(value):
            text = tvm.ir.StringImm(f"node '{printable(node)}':")
            bindings[before] = relax.VarBinding(binding.var, relax.Call(call.op, [*call.args[:-1], text], call.attrs, call.ty_args))
