"""A block builder that remembers which source node every binding came from, and refuses tensors that cannot exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tvm import relax, tirx

#: bytes of the largest tensor that a program may hold
LARGEST_BYTES = 1 << 40


class ImpossibleTensor(ValueError):
    """A tensor with a negative dim, or too large for any machine."""


class NamingBuilder(relax.BlockBuilder):
    """node: name of the source node being translated. origins: name of a bound variable -> the node that was current when it was bound.

    Raises ImpossibleTensor when a value is bound that is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.node = ""
        self.origins: dict[str, str] = {}

    def emit(self, expr: Any, name_hint: str = "") -> Any:
        """Bind under `name_hint`, by default the node's name."""
        return self._record(super().emit(expr, _free(name_hint or self.node)))

    def match_cast(self, value: Any, ty: Any, name_hint: str = "") -> Any:
        return self._record(super().match_cast(value, ty, _free(name_hint or self.node)))

    def emit_output(self, output: Any, name_hint: str = "") -> Any:
        """An output that is a bound variable keeps its node."""
        result = super().emit_output(output, _free(name_hint))
        if isinstance(output, relax.Var) and output.name in self.origins:
            self.origins[result.name] = self.origins[output.name]
        return result

    def _exit_function_scope(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if exc_type is not None:
            self._end_block()  # TVM leaves the block of an abandoned function open, and complains of it on stderr
        super()._exit_function_scope(exc_type, exc_val, exc_tb)

    def _record(self, variable: Any) -> Any:
        shape = getattr(variable.ty, "shape", None)
        if isinstance(shape, relax.ShapeExpr):
            check_size([int(dim) if isinstance(dim, tirx.IntImm) else str(dim) for dim in shape.values], str(variable.ty.dtype))
        if self.node:
            self.origins[variable.name] = self.node
        return variable


def check_size(dims: Sequence[int | str], dtype: str) -> None:
    """Raise ImpossibleTensor for a negative dim, or where the static dims alone make more than `LARGEST_BYTES`."""
    shape = f"[{', '.join(str(dim) for dim in dims)}]"
    size = max(1, int("".join(char for char in dtype if char.isdigit()) or "8") // 8)
    for dim in dims:
        if isinstance(dim, int) and dim < 0:
            raise ImpossibleTensor(f"a tensor of shape {shape} cannot exist")
        size *= dim if isinstance(dim, int) else 1
    if size > LARGEST_BYTES:
        raise ImpossibleTensor(f"a tensor of {dtype}{shape} has {size} bytes; at most {LARGEST_BYTES} are supported")


def _free(name: str) -> str:
    """The builder gives functions and variables their names from one pool, in which `main` has to stay free."""
    return f"{name}_" if name == "main" else name
