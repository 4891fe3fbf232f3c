"""A block builder that remembers which source node every binding came from, and refuses tensors that cannot exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..control import FUNCTION_PREFIX
from ..program import LARGEST_BYTES
from ..tvm import relax, tirx

#: of one tensor, as in numpy
MOST_DIMS = 64


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
        #: how many functions for drivers there are, and to how many nodes loops were unrolled
        self.functions = self.unrolled = 0
        self._added: list[Any] = []
        #: loop -> which dims of its carried tensors change from one iteration to the next: (tensor, axis)
        self.varying: dict[tuple[str, ...], set[tuple[int, int]]] = {}

    def add_driven(self, function: relax.Function) -> str:
        """Add a function for drivers. Returns its name."""
        name = f"{FUNCTION_PREFIX}{self.functions}"
        named: Any = function.with_attr("global_symbol", name)
        if self.functions < len(self._added):
            self.update_func(self._added[self.functions], named)
        else:
            self._added.append(self.add_func(named, name))
        self.functions += 1
        return name

    def abandon(self, first: int) -> None:
        """Forget the functions for drivers from number `first` on: nothing calls them."""
        self.functions = first

    def get(self) -> Any:
        """The module."""
        module = super().get()
        for variable in self._added[self.functions :]:
            del module[variable]
        return module

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
    """Raise ImpossibleTensor for more dims than `MOST_DIMS`, for a negative one, or where the static dims alone make more than `LARGEST_BYTES`."""
    if len(dims) > MOST_DIMS:
        raise ImpossibleTensor(f"a tensor has {len(dims)} dims; at most {MOST_DIMS} are supported")
    shape = f"[{', '.join(str(dim) for dim in dims)}]"
    size = max(1, int("".join(char for char in dtype if char.isdigit()) or "8") // 8)
    for dim in dims:
        if isinstance(dim, int) and dim < 0:
            raise ImpossibleTensor(f"a tensor of shape {shape} cannot exist")
        size *= dim if isinstance(dim, int) else 1
    if size > LARGEST_BYTES:
        raise ImpossibleTensor(f"a tensor of {dtype}{shape} has {size} bytes; at most {LARGEST_BYTES} are supported")


def _free(name: str) -> str:
    """The builder gives functions and variables their names from one pool, in which `main` and the names of functions for drivers have to stay free.

    No name ends in a digit: passes put numbers behind the names of what they replace, see `node_of`.
    """
    name = f"v{name}" if name == "main" or name.startswith(FUNCTION_PREFIX) else name
    return f"{name}_" if name[-1:].isdigit() else name
