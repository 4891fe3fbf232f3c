"""nn.Module -> ExportedProgram, with example inputs and dynamic dims in any of the forms that the API takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch.utils import _pytree as pytree

from ...errors import Blocker, UnsupportedModel, UsageError
from ...program import DimRange

#: example size of a dynamic dim that names none: not 0 or 1, which torch.export takes for constants
_EXAMPLE_SIZE = 4


def export_module(
    module: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    dynamic_shapes: Any,
    shapes: Mapping[str, Any] | None,
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """Export `module`; also gives the name of each dynamic dim by torch's symbol: {"s77": "batch"}."""
    if module.training:
        raise UsageError(f"{type(module).__name__} is in training mode: call .eval() on it first")
    arguments, keywords = _arguments(module, example_inputs, shapes)
    if shapes:
        if dynamic_shapes is not None:
            raise UsageError("give either shapes or dynamic_shapes, not both")
        names = list(inspect.signature(module.forward).parameters)
        dynamic_shapes = _dynamic_shapes(shapes, [*names[: len(arguments)], *keywords])

    def export(dims: Any, **options: bool) -> torch.export.ExportedProgram:
        with torch.no_grad():
            return torch.export.export(module, arguments, keywords, dynamic_shapes=dims, strict=False, **options)

    try:
        try:
            exported = export(dynamic_shapes)
        except torch._dynamo.exc.UserError:
            joined = dynamic_shapes
            if shapes:
                # the module wants some of the dims equal, as those of a mask and of the ids that it masks
                probe = {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in dynamic_shapes.items()}
                joined = _joined(export(probe), dynamic_shapes)
            try:
                exported = export(joined)
            except torch._dynamo.exc.UserError:
                # torch asks of some strides what it cannot prove, as where heads of a cache are repeated; left for the run, it can be looked at here
                exported = export(joined, prefer_deferred_runtime_asserts_over_guards=True)
                if not all(_holds(*claim) for claim in _claims(exported)):
                    raise
            dynamic_shapes = joined
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UnsupportedModel([Blocker("", type(module).__name__, f"torch.export failed: {_first_lines(error)}")]) from error
    return exported, _dim_names(exported, dynamic_shapes)


def _claims(exported: torch.export.ExportedProgram) -> Iterator[tuple[sympy.Basic, Mapping[sympy.Symbol, Any]]]:
    """What an exported program checks of its sizes while running, and the ranges of their symbols."""
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        checked = node.args[0].meta["val"] if isinstance(node.args[0], torch.fx.Node) else node.args[0]
        yield (checked.node.expr if isinstance(checked, torch.SymBool) else sympy.sympify(bool(checked))), exported.range_constraints


def _holds(expr: sympy.Basic, ranges: Mapping[sympy.Symbol, Any]) -> bool:
    """Whether a comparison of sizes is true for all of their ranges, as far as can be told: a polynomial without negative coefficients, from the least sizes on, is not negative."""
    from_least = {symbol: sympy.Dummy(nonnegative=True, integer=True) + ranges[symbol].lower for symbol in expr.free_symbols if symbol in ranges}

    def at_most(small: Any, large: Any) -> bool:
        difference = sympy.expand((large - small).subs(from_least))
        return all(term.as_coeff_Mul()[0] >= 0 for term in sympy.Add.make_args(difference)) and difference.is_polynomial(*difference.free_symbols)

    if isinstance(expr, sympy.Eq):
        for least, other in (expr.args, expr.args[::-1]):
            if other in least.args and type(least).__name__ == "Min":
                return all(at_most(other, each) for each in least.args)
    if isinstance(expr, sympy.LessThan):
        return at_most(expr.lhs, expr.rhs)
    if isinstance(expr, sympy.GreaterThan):
        return at_most(expr.rhs, expr.lhs)
    return expr == sympy.true


def _first_lines(error: Exception, limit: int = 600) -> str:
    text = str(error).strip()
    return text if len(text) <= limit else text[:limit] + " ..."


def _arguments(module: torch.nn.Module, examples: Any, shapes: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword examples. Dynamic axes of size 1 are widened to 2, since torch.export takes a size of 1 for a constant."""
    parameters = list(inspect.signature(module.forward).parameters)
    if examples is None and not shapes:
        raise UsageError(f"{type(module).__name__} needs example_inputs or shapes: torch.export runs the module on them")
    if isinstance(examples, Mapping):
        if unknown := [name for name in examples if name not in parameters]:
            raise UsageError(f"example_inputs has unknown names {unknown}: forward() takes {parameters}")
        given = {name: _tensor(value) for name, value in examples.items()}
        positional: tuple[Any, ...] = ()
    else:
        sequence = (examples,) if isinstance(examples, (torch.Tensor, np.ndarray)) else tuple(examples or ())
        positional, given = tuple(pytree.tree_map(_tensor, value) for value in sequence), {}
    taken = {*parameters[: len(positional)], *given}
    for name, shape in (shapes or {}).items():
        if name not in parameters:
            raise UsageError(f"shapes names '{name}': forward() takes {parameters}")
        if name not in taken:
            given[name] = torch.zeros([_example_size(dim) for dim in parse_shape(shape, name)])
    return positional, given


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def parse_shape(shape: Any, name: str) -> list[int | DimRange | str]:
    """Dims of one entry of `shapes`: "1..8..32x128" or a sequence of ints, dim names and DimRanges."""
    parts = shape.split("x") if isinstance(shape, str) else list(shape)
    dims: list[int | DimRange | str] = []
    for part in parts:
        if not isinstance(part, str) or part.isidentifier():
            dims.append(part)
            continue
        try:
            numbers = [int(text) if text else None for text in part.split("..")]
            if len(numbers) == 1:
                assert numbers[0] is not None
                dims.append(numbers[0])
            else:
                low, opt, high = numbers if len(numbers) == 3 else (numbers[0], None, numbers[1])
                dims.append(DimRange(1 if low is None else low, opt, high))
        except (ValueError, AssertionError):
            raise UsageError(f"shape of '{name}': '{part}' is not a number, a name or min..opt..max") from None
    return dims


def _example_size(dim: int | DimRange | str) -> int:
    if isinstance(dim, int):
        return dim
    if isinstance(dim, str):
        return _EXAMPLE_SIZE
    return dim.opt or max(dim.min, min(_EXAMPLE_SIZE, dim.max or _EXAMPLE_SIZE))


def _dynamic_shapes(shapes: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[int, Any]]:
    """The ranges and names in `shapes` as torch.export takes them; a name means the same size wherever it stands."""
    known: dict[str, Any] = {}
    result: dict[str, dict[int, Any]] = {name: {} for name in names}
    for name, shape in shapes.items():
        for axis, dim in enumerate(parse_shape(shape, name)):
            if isinstance(dim, str):
                result[name][axis] = known.setdefault(dim, torch.export.Dim(dim))
            elif isinstance(dim, DimRange):
                result[name][axis] = torch.export.Dim(f"{name}_{axis}", min=dim.min, max=dim.max)
    return result


def _dim_names(exported: torch.export.ExportedProgram, dynamic_shapes: Any) -> dict[str, str]:
    """The names of the Dims of `dynamic_shapes` by the symbols that torch gave them."""
    names: dict[str, str] = {}
    for _, _, dim, symbol in _symbols(exported, dynamic_shapes):
        if label := getattr(dim, "__name__", None):
            names.setdefault(symbol, label)
    return names


def _joined(probe: torch.export.ExportedProgram, dynamic_shapes: dict[str, dict[int, Any]]) -> dict[str, dict[int, Any]]:
    """`dynamic_shapes` with one Dim, the first, for all axes that `probe` found to be equal."""
    first: dict[str, Any] = {}
    joined = {name: dict(axes) for name, axes in dynamic_shapes.items()}
    for name, axis, dim, symbol in _symbols(probe, dynamic_shapes):
        joined[name][axis] = first.setdefault(symbol, dim)
    return joined


def _symbols(exported: torch.export.ExportedProgram, dynamic_shapes: Any) -> Iterator[tuple[str, int, Any, str]]:
    """(input, axis, Dim, torch's symbol) of every dynamic axis; both trees list the inputs in the order of forward()."""
    if not dynamic_shapes:
        return
    placeholders = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    leaves = pytree.tree_leaves(list(dynamic_shapes.values() if isinstance(dynamic_shapes, Mapping) else dynamic_shapes), is_leaf=_is_axes)
    for name, axes in zip(exported.graph_signature.user_inputs, leaves, strict=False):
        value = placeholders[name].meta["val"] if isinstance(name, str) and name in placeholders else None
        for axis, dim in axes.items() if isinstance(axes, Mapping) else enumerate(axes or ()):
            if isinstance(value, torch.Tensor) and isinstance(value.shape[axis], torch.SymInt):
                yield str(name), axis, dim, str(value.shape[axis].node.expr)


def _is_axes(value: Any) -> bool:
    """True for what describes one tensor: {axis: Dim}, or a list of Dims and None."""
    if value is None:
        return True
    if isinstance(value, Mapping):
        return all(isinstance(key, int) for key in value)
    return isinstance(value, (list, tuple)) and all(not isinstance(item, (Mapping, list, tuple)) for item in value)
