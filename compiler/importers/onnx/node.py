"""Node: what a converter sees of one ONNX node: attributes, inputs as tensors or host values, and the builder that binds its results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ...dialect.opaque import hide_shape
from ...element_types import CARRIERS, numpy_dtype
from ...tvm import relax, tirx
from .definitions import defaults_of, standard
from .symbolic import Dim, DimArithmetic, Ratio
from .values import Absent, Host, RangeLearned, Refusal, Sequence, Stored, Value

if TYPE_CHECKING:
    from .subgraph import Subgraph

#: sizes that one input may hold, where they are computed at run time: expressions over more symbols than that overflow the stack
MOST_SIZES = 64


class Node:
    """One node during the walk.

    op, domain, opset: what it is. label: its name in messages. inputs: one Value per input, None where an optional one is left out.
    dims: the arithmetic on sizes. Methods raise Refusal when the node asks for what a converter cannot give.
    """

    def __init__(
        self,
        proto: onnx.NodeProto,
        opset: int,
        inputs: list[Value | None],
        builder: relax.BlockBuilder,
        dims: DimArithmetic,
        subgraph: Callable[[onnx.GraphProto], Subgraph],
    ):
        self.proto = proto
        self.op, self.domain, self.opset = proto.op_type, standard(proto.domain), opset
        self.inputs = inputs
        self.builder, self.dims, self.subgraph = builder, dims, subgraph
        self.label = node_label(proto)
        self.hint = identifier(next((name for name in proto.output if name), self.op))
        #: the graph's type of what the converter sees as float32 (`precision`); None where it sees the graph's own types
        self.narrow: str | None = None
        self._attributes = {attribute.name: attribute for attribute in proto.attribute}
        self._defaults = defaults_of(self.op, opset, self.domain)

    # attributes

    def attr(self, name: str, default: Any = None) -> Any:
        """The attribute's value; the schema's default, else `default`, where it is left out. Byte strings come as text."""
        attribute = self._attributes.get(name)
        if attribute is None:
            attribute = self._defaults.get(name)
            if attribute is None or attribute.type == onnx.AttributeProto.UNDEFINED:
                return default
        value = onnx.helper.get_attribute_value(attribute)
        return (
            value.decode()
            if isinstance(value, bytes)
            else list(value)
            if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS)
            else value
        )

    def axis(self, value: int, rank: int) -> int:
        """An axis in 0..rank-1 from one that may count from the end."""
        if not -rank <= value < max(rank, 1):
            raise Refusal(f"axis {value} is outside of a tensor of rank {rank}")
        return int(value) % rank if rank else 0

    # inputs

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        if not self.has(index):
            raise Refusal(f"required input {index} is missing")
        value = self.inputs[index]
        assert value is not None
        return value

    def maybe_host(self, index: int) -> Host | None:
        """The input when its elements are known at import (they may be symbolic)."""
        value = self.inputs[index] if self.has(index) else None
        return value if isinstance(value, Host) else None

    def host(self, index: int) -> Host:
        value = self.value(index)
        if not isinstance(value, Host):
            raise Refusal(
                f"input {index} ('{self.proto.input[index]}') is computed from data at run time; it must follow from constants and input shapes"
            )
        return value

    def at_run_time(self, index: int) -> bool:
        """The input's elements are only known while the model runs."""
        return self.has(index) and not isinstance(self.value(index), (Host, Sequence, Absent))

    def runtime_sizes(self, tensor: relax.Expr) -> list[Dim]:
        """The elements of an integer tensor of static size as symbolic dims; the compiled model checks that they are sizes (0..LARGEST_DIM)."""
        count = self.static([self.dims.product(self.shape(tensor))], "the number of sizes that are computed at run time")[0]
        if count > MOST_SIZES:
            raise Refusal(f"{count} sizes are computed at run time; at most {MOST_SIZES} are supported")
        wide = tensor if self.dtype(tensor) == "int64" else self.emit(relax.op.astype(tensor, "int64"))
        sizes = self.emit(relax.op.tensor_to_shape(self.reshape(wide, [count])))
        symbols: list[Dim] = [self.dims.fresh(self.hint) for _ in range(count)]
        self.builder.match_cast(sizes, relax.ShapeType(symbols), name_hint=self.hint)
        return symbols

    def constant(self, index: int) -> np.ndarray:
        """The elements of an input that must not depend on input shapes either."""
        value = self.host(index)
        if value.symbolic:
            raise Refusal(f"input {index} ('{self.proto.input[index]}') depends on a dynamic dim; pin that dim with a fixed shape")
        return value.array

    def sizes(self, index: int) -> list[Dim]:
        """The elements of an integer input as Dims, flattened; those of an input computed at run time must be sizes there (`runtime_sizes`)."""
        if self.at_run_time(index):
            return list(self.runtime_sizes(self.tensor(index)))
        items = self.host(index).array.reshape(-1).tolist()
        if any(isinstance(item, (float, Ratio)) for item in items):
            raise Refusal(f"input {index} ('{self.proto.input[index]}') must be of an integer type")
        return [int(item) if isinstance(item, (int, bool)) else item for item in items]

    def ints(self, index: int) -> list[int]:
        return [int(item) for item in self.constant(index).reshape(-1)]

    def axes(self, index: int, rank: int) -> list[int] | None:
        """Axes given as attribute `axes` (older opsets) or as the input `index`, made non-negative; None when left out."""
        listed = self.ints(index) if self.has(index) else self.attr("axes")
        return None if listed is None else [self.axis(axis, rank) for axis in listed]

    def tensor(self, index: int) -> relax.Expr:
        return self.to_tensor(self.value(index))

    def tensors(self) -> list[relax.Expr]:
        return [self.to_tensor(value) for value in self.inputs if value is not None]

    def to_tensor(self, value: Value) -> relax.Expr:
        """Any value as a Relax expression: a host value becomes a constant, or is computed from the sizes at run time."""
        if isinstance(value, (Host, Stored)) and value.dtype in CARRIERS:
            raise Refusal(f"it does not take elements of type {value.dtype}")
        if isinstance(value, Host):
            return self._materialize(value) if value.symbolic else value.to_constant()
        if isinstance(value, Sequence):
            raise Refusal("a sequence cannot be used as a tensor")
        if isinstance(value, Absent):
            raise Refusal("an optional without an element cannot be used as a tensor")
        assert isinstance(value, relax.Expr)
        return value

    def _materialize(self, value: Host) -> relax.Expr:
        flat = value.array.reshape(-1).tolist()
        parts = [(item.numerator, item.denominator) if isinstance(item, Ratio) else (item, 1) for item in flat]
        if any(isinstance(item, float) for pair in parts for item in pair):
            raise Refusal("fractions and sizes are mixed in one tensor")
        result = self._sizes_tensor([numerator for numerator, _ in parts])
        result = result if value.dtype == "int64" else self.emit(relax.op.astype(result, value.dtype))
        if any(isinstance(item, Ratio) for item in flat):
            divisor = self.emit(relax.op.astype(self._sizes_tensor([denominator for _, denominator in parts]), value.dtype))
            result = self.emit(relax.op.divide(result, divisor))
        return result if value.array.ndim == 1 else self.emit(relax.op.reshape(result, value.array.shape))

    def _sizes_tensor(self, sizes: list[Dim]) -> relax.Expr:
        return self.emit(relax.op.shape_to_tensor(relax.ShapeExpr(sizes)))

    # types

    def shape(self, value: relax.Expr) -> list[Dim]:
        """The dims of a tensor; the value must have been bound (`emit`) or be a constant."""
        shape = value.ty.shape
        if not isinstance(shape, relax.ShapeExpr):
            raise Refusal("the shape of an operand is not known at import")
        return self.dims.shape(shape.values)

    def static(self, dims: Iterable[Dim], what: str) -> list[int]:
        result = list(dims)
        if not all(isinstance(dim, int) for dim in result):
            raise Refusal(f"{what} must be static, but is {result}")
        return result  # pyright: ignore[reportReturnType]

    def rank(self, value: relax.Expr) -> int:
        return len(self.shape(value))

    def dtype(self, value: relax.Expr) -> str:
        return str(value.ty.dtype)

    # results

    def emit(self, expression: relax.Expr) -> relax.Expr:
        """Bind an intermediate result under the node's name."""
        return self.builder.emit(expression, name_hint=self.hint)

    def scalar(self, value: float | bool, dtype: str) -> relax.Expr:
        return relax.const(np.asarray(value).astype(numpy_dtype(dtype)), dtype)

    def nonzero(self, value: relax.Expr) -> relax.Expr:
        """Whether each element differs from zero, as NaN does, which generated code finds neither equal nor unequal to anything."""
        differs = self.emit(relax.op.not_equal(value, self.scalar(0, self.dtype(value))))
        return self.emit(relax.op.logical_or(differs, self.emit(relax.op.isnan(value)))) if "float" in self.dtype(value) else differs

    def array(self, values: np.ndarray, dtype: str) -> relax.Expr:
        return relax.const(np.array(values, numpy_dtype(dtype), order="C"), dtype)

    def reshape(self, value: relax.Expr, dims: Iterable[Dim]) -> relax.Expr:
        """Reshape, unless the shape is that already. A constant is reshaped at import."""
        dims = self.dims.shape(dims)
        current = self.shape(value)
        if len(dims) == len(current) and all(self.dims.equal(a, b) for a, b in zip(dims, current, strict=True)):
            return value
        return self.emit(relax.op.reshape(value, dims))

    def per_channel(self, index: int, rank: int) -> relax.Expr:
        """A `[C]` input as `[C, 1, ...]`, to meet axis 1 of a tensor of `rank`; constants are reshaped at import."""
        host, trailing = self.maybe_host(index), (1,) * (rank - 2)
        if host is not None and not host.symbolic:
            return self.array(host.array.reshape(-1, *trailing), host.dtype)
        return self.emit(relax.op.reshape(self.tensor(index), [*self.shape(self.tensor(index)), *trailing]))

    def align(self, *values: relax.Expr, trailing: int = 0) -> list[relax.Expr]:
        """The operands with dims that Relax can see to broadcast, but for the last `trailing` ones.

        Two dynamic dims that meet and cannot be proven equal must be equal at run time: a checked cast says so (neither may be 1 then).
        """
        whole = [self.shape(value) for value in values]
        shapes = [shape[: max(len(shape) - trailing, 0)] for shape in whole]
        rank = max(len(shape) for shape in shapes)
        target: list[Dim] = []
        for position in range(rank):
            meeting = [shape[len(shape) - rank + position] for shape in shapes if len(shape) - rank + position >= 0]
            fixed = sorted({dim for dim in meeting if isinstance(dim, int) and dim != 1})
            if len(fixed) > 1:
                raise Refusal(f"shapes {shapes} do not broadcast")
            symbolic = [dim for dim in meeting if not isinstance(dim, int)]
            target.append(fixed[0] if fixed else symbolic[0] if symbolic else 1)
        return [
            self._cast_dims(value, dims, [*target[rank - len(shape) :], *dims[len(shape) :]])
            for value, shape, dims in zip(values, shapes, whole, strict=True)
        ]

    def _cast_dims(self, value: relax.Expr, shape: list[Dim], target: list[Dim]) -> relax.Expr:
        wanted = [have if isinstance(have, int) or self.dims.equal(have, want) else want for have, want in zip(shape, target, strict=True)]
        return value if all(a is b for a, b in zip(wanted, shape, strict=True)) else self.cast_shape(value, wanted)

    def cast_shape(self, value: relax.Expr, shape: list[Dim]) -> relax.Expr:
        """Assert a shape at run time and carry it in the type from here on. Raises RangeLearned where a bound on a dim says the same at import."""
        for have, want in zip(self.shape(value), shape, strict=True):
            self._learn_limit(have, want)
            self._learn_limit(want, have)
        if any(not isinstance(want, int) and not self.dims.equal(have, want) for have, want in zip(self.shape(value), shape, strict=True)):
            value = self.emit(hide_shape(value))
        return self.builder.match_cast(value, relax.TensorType(shape, value.ty.dtype), name_hint=self.hint)

    def _learn_limit(self, clipped: Dim, dim: Dim) -> None:
        """`min(n, limit)` can only equal `n` while n <= limit. Of sizes that are computed at run time there is nothing to learn: they have no range."""
        if isinstance(clipped, tirx.Min) and isinstance(dim, tirx.Var) and not any(dim.same_as(symbol) for symbol in self.dims.made):
            for symbol, limit in ((clipped.a, clipped.b), (clipped.b, clipped.a)):
                if symbol.same_as(dim) and isinstance(limit, tirx.IntImm):
                    raise RangeLearned(dim.name, int(limit))

    def with_dim(self, value: relax.Expr, axis: int, dim: Dim) -> relax.Expr:
        """`value` with `dim` at an axis, checked at run time where it is not sure."""
        shape = self.shape(value)
        if self.dims.equal(shape[axis], dim):
            return value
        if isinstance(shape[axis], int) and isinstance(dim, int):
            raise Refusal(f"dim {axis} is {shape[axis]}, expected {dim}")
        return self.cast_shape(value, [*shape[:axis], dim, *shape[axis + 1 :]])


def node_label(proto: onnx.NodeProto) -> str:
    return proto.name or next((name for name in proto.output if name), "")


def identifier(name: str) -> str:
    """A Relax identifier that reads like `name`."""
    text = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    return f"v{text}" if text[0].isdigit() else text
