"""Constant folding in numpy: compiling a kernel to run it once, as TVM's own folding does, costs seconds on large weights and minutes on some index arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..compiler.element_types import numpy_dtype
from ..compiler.tvm import Constant, mutator, relax, tvm

#: results larger than this stay in the program unless they are a mere rearrangement of one constant (elements); truth values, which are masks of attention (queries x keys)
LIMIT, TRUTHS = 1 << 20, 1 << 24

_BINARY: dict[str, Callable[..., Any]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.equal": np.equal,
    "relax.not_equal": np.not_equal,
    "relax.less": np.less,
    "relax.less_equal": np.less_equal,
    "relax.greater": np.greater,
    "relax.greater_equal": np.greater_equal,
    "relax.logical_and": np.logical_and,
    "relax.logical_or": np.logical_or,
    "relax.logical_not": np.logical_not,
    "relax.where": np.where,
    "relax.negative": np.negative,
    "relax.abs": np.abs,
    "relax.sqrt": np.sqrt,
    "relax.exp": np.exp,
    "relax.bitwise_and": np.bitwise_and,
    "relax.bitwise_or": np.bitwise_or,
    "relax.bitwise_xor": np.bitwise_xor,
    "relax.bitwise_not": np.bitwise_not,
    "relax.logical_xor": np.logical_xor,
}
#: what exporters make masks and positions of: integers and truth values alone are folded, so that no weight is copied
_INTEGERS = {"relax.concat", "relax.cumsum", "relax.gather_nd", "relax.strided_slice"}


@mutator
class _Folder(relax.PyExprMutator):
    def __init__(self, module: Any):
        super().__init__(module)
        self.module = module
        self.folded = 0

    def apply(self) -> Any:
        main = self.module.get_global_var("main")
        self.builder_.update_func(main, self.visit_expr(self.module["main"]))
        return self.builder_.get() if self.folded else self.module

    def _constant(self, expr: Any) -> np.ndarray | None:
        value = expr
        while isinstance(value, relax.Var):  # which may only rename another
            value = self.lookup_binding(value)
        return value.value.numpy() if isinstance(value, Constant) else None

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if not isinstance(call.op, tvm.ir.Op) or not isinstance(call.ty, relax.TensorType) or call.ty.shape is None:
            return call
        shape = [int(dim) if isinstance(dim, tvm.tirx.IntImm) else None for dim in call.ty.shape]
        if None in shape:
            return call
        result = self._evaluate(call, shape)
        if result is None or list(result.shape) != shape:
            return call
        self.folded += 1
        dtype = str(call.ty.dtype)
        return relax.const(np.asarray(result, numpy_dtype(dtype), order="C"), dtype)  # without its dtype int64 becomes int32, float64 float32

    def _evaluate(self, call: Any, shape: list[Any]) -> np.ndarray | None:
        name = call.op.name
        if name in _INTEGERS:
            return self._integers(call, name) if int(np.prod(shape)) <= LIMIT and str(call.ty.dtype) in ("int32", "int64", "bool") else None
        first = self._constant(call.args[0]) if call.args else None
        if first is None or first.dtype.kind not in "fiub":
            return None
        if name == "relax.permute_dims":
            axes = call.attrs.axes
            return first.transpose([int(axis) for axis in axes] if axes is not None else None)
        if name in ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten"):
            return first.reshape(shape)
        if int(np.prod(shape)) > (TRUTHS if str(call.ty.dtype) == "bool" else LIMIT):
            return None
        if name == "relax.astype":
            return first
        if name == "relax.broadcast_to":
            return np.broadcast_to(first, shape)
        function = _BINARY.get(name)
        operands = [self._constant(arg) for arg in call.args]
        if function is None or any(operand is None for operand in operands):
            return None
        with np.errstate(all="ignore"):
            return function(*operands)

    def _integers(self, call: Any, name: str) -> np.ndarray | None:
        """Of the operators in `_INTEGERS`."""
        given = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else [arg for arg in call.args if isinstance(arg.ty, relax.TensorType)]
        operands = [array for arg in given if (array := self._constant(arg)) is not None]
        if len(operands) < len(given) or not operands:
            return None
        if name == "relax.concat":
            return np.concatenate(operands, int(call.attrs.axis or 0))
        if name == "relax.cumsum":
            axis = call.attrs.axis
            return None if call.attrs.exclusive else np.cumsum(operands[0], None if axis is None else int(axis))
        if name == "relax.gather_nd":
            data, places = operands
            if int(call.attrs.batch_dims) or (places < 0).any() or (places >= np.array(data.shape[: places.shape[-1]])).any():
                return None
            return data[tuple(np.moveaxis(places, -1, 0))]
        numbers = [[int(each) if isinstance(each, tvm.tirx.IntImm) else None for each in arg.fields] for arg in call.args[1:]]
        if len(numbers) < 3 or any(None in part for part in numbers):
            return None
        axes, begins, ends, *strides = numbers
        cut = [slice(None)] * operands[0].ndim
        for axis, begin, end, stride in zip(axes, begins, ends, *(strides or [[1] * len(axes)]), strict=True):
            if stride < 1:  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
                return None
            cut[axis] = slice(begin, end, stride)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return operands[0][tuple(cut)]


def fold_constants(module: Any) -> tuple[Any, int]:
    """Fold the constant calls of `main`. Returns the module (the same object when nothing folded) and how many calls went."""
    folder = _Folder(module)
    return folder.apply(), folder.folded
