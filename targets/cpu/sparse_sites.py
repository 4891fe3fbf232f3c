"""Call sites and their constants: what a template may know of the values, and kernels of their own for call sites whose weights are emptier than others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import Constant, mutator, relax, relax_functions, tirx
from ...passes.fusion import NODES, SOURCES
from ..common.call_sites import call_sites, constant_positions
from ..common.fused import Unfusable, analyze
from .sparse_weights import Constants, density_class


def constant_arguments(module: Any) -> dict[str, Constants]:
    """Per PrimFunc: the argument positions that hold a constant at every call site, with the constants."""
    found = {}
    for name, sites in call_sites(module).items():
        found[name] = Constants.of(
            {
                position: [array.value.numpy() for array in _distinct(args[position] for args in sites)]
                for position in sorted(constant_positions(sites))
            }
        )
    return found


def _distinct(constants: Any) -> list[Any]:
    kept: list[Any] = []
    for constant in constants:
        if not any(constant.same_as(other) for other in kept):
            kept.append(constant)
    return kept


def split_sites(module: Any) -> Any:
    """The module with a copy of every matmul kernel for each class of density among the weights it is called with; the same object where one class is all."""
    functions = {variable.name_hint: func for variable, func in module.functions_items() if isinstance(func, tirx.PrimFunc)}
    mixed: dict[str, _Mixed] = {}
    for name, sites in call_sites(module).items():
        position = _weight_position(functions.get(name))
        if position is None or not all(isinstance(args[position], Constant) for args in sites):
            continue
        known = {constant: density_class(constant.value.numpy()) for constant in _distinct(args[position] for args in sites)}
        classes = [known[args[position]] for args in sites]
        if len(set(classes)) > 1:
            mixed[name] = _Mixed(functions[name], position, known, classes)
    return _Split(module, mixed).apply() if mixed else module


@dataclass(frozen=True)
class _Mixed:
    """A kernel whose call sites differ: position of the weight among the arguments, class of each weight, class of each call in the program's order."""

    func: Any
    position: int
    known: dict[Any, int]
    classes: list[int]

    def names(self, key: str, wanted: int) -> list[Any]:
        """The source nodes or variables of the calls of one class; of all calls where they cannot be told apart. key: `NODES` or `SOURCES`."""
        names = list((self.func.attrs or {}).get(key, ()))
        each, rest = divmod(len(names), len(self.classes))
        if rest:
            return names
        return [name for index, name in enumerate(names) if self.classes[index // each] == wanted]


@mutator
class _Split(relax.PyExprMutator):
    def __init__(self, module: Any, mixed: dict[str, _Mixed]):
        super().__init__(module)
        self.module, self.mixed = module, mixed
        self.copies: dict[tuple[str, int], Any] = {}

    def apply(self) -> Any:
        for name, kernel in self.mixed.items():
            for wanted in sorted(set(kernel.classes)):
                names = {key: kernel.names(key, wanted) for key in (NODES, SOURCES)}
                func = kernel.func.with_attrs({key: found for key, found in names.items() if found})
                self.copies[name, wanted] = self.builder_.add_func(func, f"{name}_sparse{wanted}" if wanted else f"{name}_dense")
        for variable, function in relax_functions(self.module):
            self.builder_.update_func(variable, self.visit_expr(function))
        return relax.transform.DeadCodeElimination()(self.builder_.get())

    def visit_call_(self, call: Any) -> Any:
        kernel = self.mixed.get(call.args[0].name_hint) if getattr(call.op, "name", "") == "relax.call_tir" else None
        if kernel is None:
            return super().visit_call_(call)
        copy = self.copies[call.args[0].name_hint, kernel.known[call.args[1].fields[kernel.position]]]
        args = relax.Tuple([self.visit_expr(arg) for arg in call.args[1].fields])
        return relax.Call(call.op, [copy, args, *(self.visit_expr(arg) for arg in call.args[2:])], call.attrs, call.ty_args)


def _weight_position(func: Any) -> int | None:
    if func is None:
        return None
    try:
        fused = analyze(func)
    except Unfusable:
        return None
    return fused.param_index(fused.inputs[1]) if fused.core["op"] == "matmul" else None
