"""From scheduled kernels to machine code: weights lifted out of the module, the host program compiled, the emitted code kept readable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...compiler.control import DRIVER_PREFIX
from ...compiler.dialect.opaque import NAME as HIDE_SHAPE
from ...compiler.dialect.opaque import reveal_shapes
from ...compiler.tvm import Constant, link_executable, mutator, relax, relax_functions, tirx
from ..base import Target
from .lower import code_generation, tvm_target
from .machine_code import machine_code
from .shape_checks import bound_storage, name_checks


def lift_weights(module: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Replace every tensor constant by a field of one tuple parameter, appended after the inputs of `main` and of the functions that drivers call.

    Returns the module and the arrays in the order of the tuple; names say the kernel that reads the weight first.
    """
    lifter = _Lifter(module)
    return lifter.apply(), lifter.weights


@mutator
class _Lifter(relax.PyExprMutator):
    def __init__(self, module: Any):
        super().__init__(module)
        self.module = module
        self.weights: dict[str, np.ndarray] = {}
        self.position: dict[Any, int] = {}
        self.types: list[Any] = []
        self.parameter: Any = None
        self.fields: dict[int, Any] = {}

    def apply(self) -> Any:
        functions = relax_functions(self.module)
        for _, function in functions:
            self._collect(function)
        for variable, function in functions:
            self.parameter = relax.Var("weights", relax.TupleType(self.types))
            body = self.visit_expr(function.body)
            lifted = relax.Function([*function.params, self.parameter], body, function.ret_ty, function.is_pure, function.attrs)
            self.builder_.update_func(variable, lifted)
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        """Drivers hand the weights on."""
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") != "relax.call_pure_packed" or not str(call.args[0].global_symbol).startswith(DRIVER_PREFIX):
            return call
        return relax.Call(call.op, [*call.args, self.parameter], call.attrs, call.ty_args)

    def _collect(self, function: Any) -> None:
        def visit(expr: Any) -> None:
            name = getattr(expr.op, "name", "") if isinstance(expr, relax.Call) else ""
            if name == "relax.call_tir":
                reader, operands = expr.args[0].name_hint, expr.args[1].fields
            elif name == HIDE_SHAPE:  # the VM cannot drop a constant that another name was given to
                reader, operands = "hide_shape", expr.args
            else:
                return
            for arg in operands:
                if isinstance(arg, Constant) and isinstance(arg.ty, relax.TensorType) and arg not in self.position:
                    self.position[arg] = len(self.position)
                    self.weights[f"{self.position[arg]:04d}.{reader}"] = arg.value.numpy()
                    self.types.append(arg.ty)

        relax.analysis.post_order_visit(function, visit)

    def visit_generic_const_(self, constant: Any) -> Any:
        position = self.position.get(constant)
        if position is None:
            return constant
        return self.builder_.emit(relax.TupleGetItem(self.parameter, position))


def build(module: Any, target: Target, origins: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """Compile a memory-planned module. Returns the executable and the emitted code by file name. origins: see `Program`."""
    return executable(module, target, origins=origins), {"kernels.tir.py": _kernel_text(module)}


def executable(module: Any, target: Target, mode: str = "compiled", origins: Mapping[str, str] | None = None) -> Any:
    """The executable of a memory-planned module; in mode "bytecode" the VM interprets `main`, so that it can be watched call by call."""
    transform = relax.transform
    code, module = tvm_target(target), bound_storage(reveal_shapes(module), origins or {})
    with code, code_generation():
        for step in (
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(emit_err_ctx=False),
            transform.AttachGlobalSymbol(),
        ):
            module = step(module)
        module = name_checks(module, origins or {})
        builder = relax.ExecBuilder()
        functions = relax.vm_build._vmcodegen(builder, module, mode)
        return link_executable(builder, code, machine_code(functions, target))


def _kernel_text(module: Any) -> str:
    """All kernels as TVMScript, in a fixed order."""
    parts = []
    for variable, func in sorted(module.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(func, tirx.PrimFunc):
            parts.append(f"# {variable.name_hint}\n{func.script(show_meta=False)}\n")
    return "\n".join(parts)
