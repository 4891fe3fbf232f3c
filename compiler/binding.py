"""Binding a call's arguments to the inputs of a model: by position or name, checked, and as tensors that generated code may read."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .element_types import encode, numpy_dtype
from .errors import UsageError
from .program import DimRange, TensorSpec
from .tvm_runtime import from_dlpack
from .weights import ALIGNMENT, aligned


class Binder:
    """Turns the arguments of one call into TVM tensors.

    An argument that is contiguous and 64-byte aligned is passed without a copy; any other is copied first (generated code uses aligned loads).
    """

    def __init__(self, inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange]) -> None:
        self._inputs = tuple(inputs)
        self._names = tuple(spec.name for spec in inputs)
        self._dims = dict(dims)
        self._dtypes = tuple(numpy_dtype(spec.dtype) for spec in inputs)
        #: shapes known in full, compared in one step; None where a dim is symbolic
        self._static = tuple(spec.shape if all(isinstance(dim, int) for dim in spec.shape) else None for spec in inputs)

    def order(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Arguments in the model's order. Raises UsageError for a missing, unknown or doubly given input."""
        if len(args) > len(self._names):
            raise UsageError(f"the model takes {len(self._names)} inputs ({', '.join(self._names)}), got {len(args)}")
        values = dict(zip(self._names, args, strict=False))
        for name, value in named.items():
            if name not in self._names:
                raise UsageError(f"unknown input '{name}': the model's inputs are {', '.join(self._names)}")
            if name in values:
                raise UsageError(f"input '{name}' is given twice, by position and by name")
            values[name] = value
        if missing := [str(spec) for spec in self._inputs if spec.name not in values]:
            raise UsageError(f"missing input {'; '.join(missing)}")
        return tuple(values[name] for name in self._names)

    def bind(self, values: Sequence[Any]) -> list[Any]:
        """TVM tensors of `values` (numpy arrays or CPU torch tensors, in the model's order). Raises UsageError where one does not fit its spec."""
        tensors = []
        bound: dict[str, int] = {}
        for spec, static, dtype, value in zip(self._inputs, self._static, self._dtypes, values, strict=True):
            if type(value) is np.ndarray:
                matches = value.dtype == dtype
            else:
                value = _as_exchangeable(spec, value)
                matches = _dtype_name(value) == spec.dtype
            if not matches:
                raise UsageError(f"input '{spec.name}': expected dtype {spec.dtype}, got {_dtype_name(value)}; convert it first")
            if value.shape != static:
                self.check_shape(spec, tuple(value.shape), bound)
            tensors.append(_tensor(value if spec.carrier is None else _carried(value, spec)))
        return tensors

    def check_shape(self, spec: TensorSpec, shape: tuple[int, ...], bound: dict[str, int]) -> None:
        """Raise UsageError unless the shape fits the spec; bound: sizes of symbolic dims that this call has already, and gets here."""
        if len(shape) != len(spec.shape):
            raise UsageError(
                f"input '{spec.name}': expected shape [{_text(spec)}], got {list(shape)} ({len(shape)} dims instead of {len(spec.shape)})"
            )
        for axis, (expected, size) in enumerate(zip(spec.shape, shape, strict=True)):
            if isinstance(expected, int):
                if size != expected:
                    raise UsageError(
                        f"input '{spec.name}': expected shape [{_text(spec)}], got {list(shape)} (dim {axis} must be {expected}, not {size})"
                    )
                continue
            if bound.setdefault(expected, size) != size:
                raise UsageError(
                    f"input '{spec.name}': expected shape [{_text(spec)}], got {list(shape)} ('{expected}' is already {bound[expected]} in this call)"
                )
            bounds = self._dims.get(expected, DimRange())
            if size < bounds.min or (bounds.max is not None and size > bounds.max):
                raise UsageError(f"input '{spec.name}': expected shape [{_text(spec)}] with {expected} in {bounds}, got {list(shape)}")


def is_torch(value: object) -> bool:
    """True for a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_exchangeable(spec: TensorSpec, value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    if not is_torch(value):
        raise UsageError(f"input '{spec.name}': expected a numpy array or torch tensor of {spec}, got {type(value).__name__}")
    if value.device.type != "cpu":
        raise UsageError(f"input '{spec.name}': expected a tensor on the CPU, got one on {value.device}; call .cpu() first")
    return value.detach() if value.requires_grad else value


def _dtype_name(value: Any) -> str:
    return value.dtype.name if isinstance(value, np.ndarray) else str(value.dtype).removeprefix("torch.")


def without_elements(value: Any) -> Any:
    """A TVM tensor of an array without elements; its strides are those of generated code, where numpy and torch have others."""
    shape = tuple(value.shape)
    strides = [value.dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return from_dlpack(np.ndarray(shape, numpy_dtype(_dtype_name(value)), aligned(np.empty(ALIGNMENT, np.uint8)), 0, strides))


def _carried(value: Any, spec: TensorSpec) -> np.ndarray:
    """A tensor of a type that the program only stores, as the integers that hold it."""
    if not isinstance(value, np.ndarray):
        torch = sys.modules["torch"]
        plain = {1: torch.uint8, 2: torch.int16}.get(numpy_dtype(spec.dtype).itemsize)
        value = value.contiguous().view(plain).numpy().view(numpy_dtype(spec.dtype))
    return encode(value)


def _tensor(value: Any) -> Any:
    """`value` as a TVM tensor; copied only where it is not contiguous, aligned and writable (DLPack cannot export read-only numpy arrays)."""
    if 0 in value.shape:
        return without_elements(value)
    if isinstance(value, np.ndarray):
        if not (value.flags.c_contiguous and value.flags.writeable):
            return from_dlpack(aligned(value))
    elif not value.is_contiguous() or value.is_conj() or value.is_neg():
        return from_dlpack(aligned(value.resolve_conj().resolve_neg().numpy()))
    tensor = from_dlpack(value)
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return from_dlpack(aligned(value if isinstance(value, np.ndarray) else value.numpy()))


def _text(spec: TensorSpec) -> str:
    return ", ".join(str(dim) for dim in spec.shape)
