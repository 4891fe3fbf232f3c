"""New constants in the place of old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax


def with_constants(program: Program, edits: Mapping[Any, Mapping[int, np.ndarray]]) -> Program:
    """The program with other constants among the arguments of some calls: variable of the call -> {argument: float32 array}.

    Calls that shared a constant share its equal replacements.
    """
    return _Replacer(program, edits).apply() if edits else program


@mutator
class _Replacer(relax.PyExprMutator):
    def __init__(self, program: Program, edits: Mapping[Any, Mapping[int, np.ndarray]]):
        super().__init__(program.module)
        self.program, self.edits = program, edits
        self.current: Mapping[int, np.ndarray] = {}
        self.made: dict[Any, list[tuple[np.ndarray, Any]]] = {}

    def apply(self) -> Program:
        return self.program.with_main(self.visit_expr(self.program.main))

    def visit_var_binding_(self, binding: Any) -> None:
        self.current = self.edits.get(binding.var, {})
        super().visit_var_binding_(binding)

    def visit_call_(self, call: Any) -> Any:
        edits, self.current = self.current, {}
        old = list(call.args)
        call = super().visit_call_(call)
        if not edits:
            return call
        args = [self._constant(old[index], edits[index]) if index in edits else arg for index, arg in enumerate(call.args)]
        return relax.Call(call.op, args, call.attrs)

    def _constant(self, old: Any, array: np.ndarray) -> Any:
        known = self.made.setdefault(old, [])
        constant = next((made for values, made in known if np.array_equal(values, array)), None)
        if constant is None:
            constant = relax.const(np.ascontiguousarray(array), "float32")
            known.append((array, constant))
        return constant
