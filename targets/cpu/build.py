"""From scheduled kernels to machine code: weights lifted out of the module, the host program compiled, the emitted code kept readable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...compiler.control import DRIVER_PREFIX
from ...compiler.dialect.opaque import NAME as HIDE_SHAPE
from ...compiler.dialect.opaque import reveal_shapes
from ...compiler.tvm import PIPELINE_MAP, Constant, link_executable, mutator, relax, relax_functions, tirx, tvm
from ..base import Target
from .lower import code_generation, tvm_target
from .math_lowering import TIR_PIPELINE
from .shape_checks import bound_storage, name_checks

#: names of the functions that Relax's code generator makes of the program's own functions
_HOST_PREFIX = "__vmtir__"
#: sorts before them
_DECLARATIONS = "__declarations"


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
        return link_executable(builder, code, _machine_code(functions, target))


def _machine_code(functions: Any, target: Target) -> Any:
    """Compile kernels with all of LLVM's optimisations, and the host functions, which only call them one after the other, with none.

    Optimising the call sequence gains nothing, and takes LLVM time that grows with the square of its length: a minute for 600 kernels.
    """
    code = tvm_target(target)
    lower, finish, _ = PIPELINE_MAP[TIR_PIPELINE]()
    lowered = finish()(lower(tvm.tirx.transform.BindTarget(code.with_host(code))(functions)))
    generate = tvm.get_global_func("target.build.llvm")
    kernels, host = {}, {}
    for variable, func in lowered.functions_items():
        (host if variable.name_hint.startswith(_HOST_PREFIX) else kernels)[variable] = func
    if not kernels or not host:
        return generate(lowered, code)
    host[tvm.ir.GlobalVar(_DECLARATIONS)] = _declarations(list(kernels.values()))
    library = generate(tvm.IRModule(host, attrs=lowered.attrs), tvm_target(target, optimize=False))
    # in this order: TVM asks the module that comes last whether all of them are a system library, and unoptimised ones say yes
    library.import_module(generate(tvm.IRModule(kernels, attrs=lowered.attrs), code))
    return library


def _declarations(kernels: list[Any]) -> Any:
    """A function that is never called, generated before all others of the host's module, so that they find the kernels of the other module declared."""
    first = kernels[0]
    calls = [tirx.Evaluate(tirx.call_extern("int32", kernel.attrs["global_symbol"], *first.params)) for kernel in kernels]
    return first.with_body(tirx.SeqStmt([*calls, tirx.Return(tirx.const(0, "int32"))])).with_attr("global_symbol", _DECLARATIONS)


def _kernel_text(module: Any) -> str:
    """All kernels as TVMScript, in a fixed order."""
    parts = []
    for variable, func in sorted(module.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(func, tirx.PrimFunc):
            parts.append(f"# {variable.name_hint}\n{func.script(show_meta=False)}\n")
    return "\n".join(parts)
