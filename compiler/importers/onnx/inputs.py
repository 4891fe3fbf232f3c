"""The graph's inputs: which dims are fixed, which stay symbolic and within which range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from ...element_types import CARRIERS
from ...errors import Blocker, UnsupportedModel, UsageError
from ...program import DimRange, TensorSpec
from ...shapes import ShapeSpec
from ...tvm import relax
from ..naming import ImpossibleTensor, check_size
from .load import element_name
from .node import identifier
from .symbolic import Dim, DimArithmetic
from .values import Refusal

#: dim_param texts that exporters write for "unknown": two of them are not the same dim
_PLACEHOLDERS = frozenset({"", "?", "None", "none", "-1"})


@dataclass
class GraphInputs:
    """The inputs as Relax variables, in graph order, with their specs and the ranges of the symbolic dims."""

    variables: dict[str, relax.Var] = field(default_factory=dict)
    specs: list[TensorSpec] = field(default_factory=list)
    ranges: dict[str, DimRange] = field(default_factory=dict)


def declare_inputs(graph: onnx.GraphProto, shapes: Mapping[str, ShapeSpec], dims: DimArithmetic, limits: Mapping[str, int]) -> GraphInputs:
    """limits: symbol -> largest size the model works with. Raises UsageError where `shapes` contradicts the model or itself, UnsupportedModel for inputs that are not tensors of a known rank."""
    for kind, tensors in (("graph input", graph.input), ("initializer", graph.initializer)):
        if twice := [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]:
            raise UnsupportedModel([Blocker(name, kind, "it is defined already") for name in twice])
    initialized = {tensor.name for tensor in graph.initializer}
    infos = [info for info in graph.input if info.name not in initialized]
    unknown = [name for name in shapes if name not in {info.name for info in infos}]
    if unknown:
        raise UsageError(f"a shape is given for '{unknown[0]}', which is not an input; inputs: {', '.join(info.name for info in infos) or 'none'}")
    result, symbols, blockers = GraphInputs(), _Symbols(dims, limits), []
    for info in infos:
        try:
            model_dims, dtype = _tensor_type(info, shapes.get(info.name))
            check_size(model_dims, CARRIERS.get(dtype, dtype))
        except (Refusal, ImpossibleTensor) as refusal:
            blockers.append(Blocker(info.name, "graph input", str(refusal)))
            continue
        symbols.pin(info.name, model_dims, shapes.get(info.name))
        result.specs.append(TensorSpec(info.name, tuple(model_dims), dtype))
    if blockers:
        raise UnsupportedModel(blockers)
    taken: set[str] = set()
    for position, spec in enumerate(result.specs):
        shape = [symbols.dim(dim) if isinstance(dim, str) else dim for dim in spec.shape]
        result.specs[position] = TensorSpec(
            spec.name, tuple(dim if isinstance(dim, int) else dim.name for dim in shape), spec.dtype, CARRIERS.get(spec.dtype)
        )
        name = identifier(spec.name)
        while name in taken:
            name += "_"
        taken.add(name)
        result.variables[spec.name] = relax.Var(name, relax.TensorType(shape, CARRIERS.get(spec.dtype, spec.dtype)))
    result.ranges = symbols.ranges
    return result


def _tensor_type(info: onnx.ValueInfoProto, spec: ShapeSpec | None) -> tuple[list[int | str], str]:
    """The model's dims, a str for each dynamic one (unnamed ones get a name of their own), and the dtype."""
    if info.type.WhichOneof("value") != "tensor_type":
        raise Refusal(f"inputs of kind {info.type.WhichOneof('value') or 'unknown'} are not supported, only tensors")
    tensor = info.type.tensor_type
    if not tensor.HasField("shape") and spec is None:
        raise Refusal(f"its rank is not declared; give its shape (--shape {info.name}=...)")
    if not tensor.HasField("shape"):
        assert spec is not None
        return [f"{info.name}_dim{axis}" for axis in range(len(spec))], element_name(tensor.elem_type)
    dims: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        named = dim.dim_param not in _PLACEHOLDERS
        dims.append(
            dim.dim_value
            if dim.dim_value > 0 or dim.HasField("dim_value") and dim.dim_value == 0
            else dim.dim_param
            if named
            else f"{info.name}_dim{axis}"
        )
    return dims, element_name(tensor.elem_type)


class _Symbols:
    """The symbolic dims by the name the model gives them; equal names are one dim."""

    def __init__(self, dims: DimArithmetic, limits: Mapping[str, int]):
        self.arithmetic, self.limits = dims, limits
        self.requested: dict[str, tuple[int | DimRange, str]] = {}
        self.declared: dict[str, Dim] = {}
        self.ranges: dict[str, DimRange] = {}

    def pin(self, name: str, model_dims: list[int | str], spec: ShapeSpec | None) -> None:
        if spec is None:
            return
        if len(spec) != len(model_dims):
            raise UsageError(
                f"shape of input '{name}': {len(spec)} dims are given, the model has {len(model_dims)} ({', '.join(map(str, model_dims))})"
            )
        for axis, (have, want) in enumerate(zip(model_dims, spec, strict=True)):
            if isinstance(have, int):
                if want != have:
                    raise UsageError(f"shape of input '{name}': dim {axis} is fixed to {have} by the model, {want} is given")
                continue
            earlier, where = self.requested.setdefault(have, (want, name))
            if earlier != want:
                raise UsageError(
                    f"dim '{have}' is {earlier} by the shape of input '{where}' and {want} by that of '{name}'; the model needs them equal"
                )

    def dim(self, name: str) -> Dim:
        if name not in self.declared:
            request = self.requested.get(name, (DimRange(), ""))[0]
            if isinstance(request, int):
                self.declared[name] = request
            else:
                symbol = identifier(name)
                while symbol in self.ranges:
                    symbol += "_"
                self.ranges[symbol] = self._limited(name, symbol, request)
                self.declared[name] = self.arithmetic.declare(symbol, self.ranges[symbol])
        return self.declared[name]

    def _limited(self, name: str, symbol: str, request: DimRange) -> DimRange:
        limit = self.limits.get(symbol)
        if limit is None:
            return request
        if max(request.min, request.opt or 0, request.max or 0) > limit:
            raise UsageError(f"dim '{name}' is given as {request}, but the model works only up to {limit}")
        return DimRange(request.min, request.opt, limit if request.max is None else request.max)
