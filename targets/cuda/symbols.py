"""The symbols of a model: where open sizes come from, what is known of them, and what has to hold when the model is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...compiler.program import DimRange
from ...compiler.tvm import relax, tirx
from ..common.fused import variables_of
from .sizes import FIRST, FIXED, OTHER, Known, Unsupported, resolved, same, simplified, times


@dataclass(frozen=True)
class Check:
    """Two sizes that have to be equal when the model is called; what: for the error."""

    found: Any
    wanted: Any
    what: str


@dataclass
class Symbols:
    """sources: symbol -> (number of an input, axis), or the size that it stands for, in the order in which they can be computed. bounds: of those of inputs. checks: in their order.
    elements: of tensors, where they are open. dims: what the user has said of symbols, by name.
    """

    dims: Mapping[str, DimRange] = field(default_factory=dict)
    sources: dict[Any, Any] = field(default_factory=dict)
    bounds: dict[Any, DimRange] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    elements: list[Any] = field(default_factory=list)
    known: Known = FIXED

    def of_input(self, position: int, shape: Sequence[Any]) -> None:
        """Those in the shape of an input are read from it."""
        for axis, dim in enumerate(shape):
            if isinstance(dim, tirx.Var) and dim not in self.sources:
                self._define(dim, (position, axis), self.dims.get(dim.name, DimRange()), FIRST if axis == 0 else OTHER)
                self.bounds[dim] = self.known.ranges[dim]

    def _define(self, var: Any, source: Any, bounds: DimRange, typical: int) -> None:
        if any(other.name == var.name for other in self.sources):
            raise Unsupported(f"two sizes are called {var.name}")
        self.sources[var] = source
        self.known = self.known.with_symbol(var, bounds, typical)

    def cast(self, wanted: Sequence[Any], found: Sequence[Any], node: str) -> None:
        """A tensor of these dims is said to have those: their symbols are new ones, or have to be what they are already."""
        for axis, (dim, size) in enumerate(zip(wanted, found, strict=True)):
            if isinstance(dim, tirx.Var) and dim not in self.sources:
                size = self.resolved(size)
                self._define(dim, size, self.known.bound({dim: size}).ranges[dim], 1)
            else:
                self.equal(size, dim, f"node '{node}': dim {axis}")

    def unknown(self, sizes: Sequence[Any]) -> None:
        """Symbols that were refused: what follows is not refused for the same reason."""
        for dim in sizes:
            if isinstance(dim, tirx.Var) and dim not in self.sources:
                self._define(dim, 1, DimRange(), OTHER)

    def equal(self, found: Any, wanted: Any, what: str) -> None:
        """Two sizes have to be equal."""
        check = Check(simplified(found), simplified(wanted), what)
        if not same(check.found, check.wanted) and all(str(other) != str(check) for other in self.checks):
            self.checks.append(check)

    def resolved(self, size: Any, values: Mapping[Any, Any] | None = None) -> Any:
        """A size of a function, whose symbols have these values, in terms of the model's symbols; raises Unsupported when it is of others."""
        size = resolved(simplified(size), values or {})
        strange = [] if isinstance(size, int) else [var for var in variables_of(size) if var not in self.sources]
        if strange:
            raise Unsupported(f"the size {strange[0].name}, which is computed while running")
        return size

    def count(self, dims: Sequence[Any]) -> Any:
        """Elements of a tensor, which are to fit into 32 bits when the model is called; raises Unsupported as `resolved` does."""
        count = self.resolved(times(dims))
        if not isinstance(count, int):
            self.elements.append(count)
        return count


def dims_of(kind: Any) -> list[Any] | None:
    """The dims of a tensor's type; None where they are not known."""
    shape = getattr(kind, "shape", None)
    return list(shape.values) if isinstance(shape, relax.ShapeExpr) else None
