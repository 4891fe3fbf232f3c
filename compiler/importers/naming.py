"""A block builder that remembers which source node every binding came from."""

from __future__ import annotations

from typing import Any

from ..tvm import relax


class NamingBuilder(relax.BlockBuilder):
    """node: name of the source node being translated. origins: name of a bound variable -> the node that was current when it was bound."""

    def __init__(self) -> None:
        super().__init__()
        self.node = ""
        self.origins: dict[str, str] = {}

    def emit(self, expr: Any, name_hint: str = "") -> Any:
        """Bind under `name_hint`, by default the node's name."""
        return self._record(super().emit(expr, name_hint or self.node))

    def match_cast(self, value: Any, ty: Any, name_hint: str = "") -> Any:
        return self._record(super().match_cast(value, ty, name_hint or self.node))

    def emit_output(self, output: Any, name_hint: str = "") -> Any:
        """An output that is a bound variable keeps its node."""
        result = super().emit_output(output, name_hint)
        if isinstance(output, relax.Var) and output.name in self.origins:
            self.origins[result.name] = self.origins[output.name]
        return result

    def _record(self, variable: Any) -> Any:
        if self.node:
            self.origins[variable.name] = self.node
        return variable
