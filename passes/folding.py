"""Constant folding in numpy: compiling a kernel to run it once, as TVM's own folding does, costs seconds on large weights and minutes on some index arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..compiler.element_types import numpy_dtype
from ..compiler.tvm import Constant, mutator, relax, tvm

#: results larger than this stay in the program unless they are a mere rearrangement of one constant (elements)
LIMIT = 1 << 20

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
}


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
        value = self.lookup_binding(expr) if isinstance(expr, relax.Var) else expr
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
        first = self._constant(call.args[0]) if call.args else None
        if first is None or first.dtype.kind not in "fiub":
            return None
        if name == "relax.permute_dims":
            axes = call.attrs.axes
            return first.transpose([int(axis) for axis in axes] if axes is not None else None)
        if name in ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten"):
            return first.reshape(shape)
        if int(np.prod(shape)) > LIMIT:
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


def fold_constants(module: Any) -> tuple[Any, int]:
    """Fold the constant calls of `main`. Returns the module (the same object when nothing folded) and how many calls went."""
    folder = _Folder(module)
    return folder.apply(), folder.folded
