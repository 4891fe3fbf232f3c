"""What flows along the edges of the graph while it is walked: Relax tensors, host values, sequences of both, and absent optionals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...element_types import numpy_dtype
from ...tvm import Constant, relax


class Refusal(Exception):
    """A converter cannot take the node; the text is the reason shown to the user."""


class RangeLearned(Exception):
    """The model only works while the dim `symbol` is at most `limit` (a table of positions has that many rows): the walk starts anew with this known."""

    def __init__(self, symbol: str, limit: int):
        super().__init__(f"dim '{symbol}' can be at most {limit}")
        self.symbol, self.limit = symbol, limit


@dataclass(eq=False)
class Host:
    """A tensor whose elements are known at import: an initializer, a constant, or the result of arithmetic on shapes.

    array: a numpy array; of dtype `object` when an element is symbolic (elements are then int, float, Dim or Ratio). dtype: the ONNX tensor's dtype, in
    TVM's spelling. The Relax constant is made at most once, so users of one initializer share one constant object.
    """

    array: np.ndarray
    dtype: str
    name: str = ""
    constant: Constant | None = None
    #: the same as another type, made at most once: float32 of a narrow type, or the carrier of a storage type
    wide: Host | None = None

    @property
    def symbolic(self) -> bool:
        return self.array.dtype == object

    def to_constant(self) -> Constant:
        """The Relax constant; `array` must not be symbolic."""
        if self.constant is None:
            self.constant = relax.const(np.ascontiguousarray(self.array).reshape(self.array.shape), self.dtype)
        return self.constant


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of an element type without arithmetic, `dtype` as ml_dtypes names it. carrier: the bound variable that holds it (`element_types.CARRIERS`)."""

    carrier: relax.Expr
    dtype: str


@dataclass(frozen=True, eq=False)
class Sequence:
    """An ONNX sequence whose length is known at import."""

    items: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Absent:
    """An ONNX optional without an element; one with an element is that element."""


@dataclass(frozen=True, eq=False)
class Poison:
    """The output of a node that was refused: what consumes it is skipped, so that all refusals are collected in one walk."""


Value = relax.Expr | Host | Stored | Sequence | Absent | Poison


def concrete(array: np.ndarray, dtype: str) -> Host:
    """A host value from an array without symbols, cast to `dtype`."""
    return Host(np.asarray(array).astype(numpy_dtype(dtype)), dtype)


def host(array: np.ndarray, dtype: str) -> Host:
    """A host value from an object array: it becomes concrete as soon as no element is symbolic."""
    if all(isinstance(item, (int, float, bool, np.generic)) for item in array.flat):
        return concrete(array, dtype)
    return Host(array, dtype)
