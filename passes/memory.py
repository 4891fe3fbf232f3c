"""Memory planning: intermediate tensors of known size share one workspace by lifetime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..compiler.program import Program
from ..compiler.roofline import bytes_of
from ..compiler.tvm import relax, relax_functions, structural_map, tirx
from ..compiler.weights import ALIGNMENT
from ..compiler.workspace import Lifetime, Workspace, plan
from .base import Pass, PassContext
from .products import operator, variables

_STORAGE, _TENSOR, _UNPLANNED = "relax.memory.alloc_storage", "relax.memory.alloc_tensor", "relax.builtin.alloc_tensor"


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Turns kernel calls into destination-passing form and gives every intermediate tensor of known size a place in one workspace.

    TVM's planner says which tensors may be planned at all (none that a caller keeps); where they lie is decided here (`workspace.plan`). The table "memory" has one row
    for `main`: `Workspace.report` and how many tensors are allocated while running.
    """

    name: ClassVar[str] = "plan_memory"

    def run(self, program: Program, context: PassContext) -> Program:
        transform = relax.transform
        module = program.module
        for step in (
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
        ):
            module = step(module)
        module = module.clone()
        for variable, function in relax_functions(module):
            tensors = _tensors(function)
            found = plan({key: tensor.lifetime for key, tensor in enumerate(tensors)}, ALIGNMENT)
            if tensors:
                module.update_func(variable, _placed(function, tensors, found))
            if variable.name_hint == "main":
                dynamic = sum(operator(binding.value) == _UNPLANNED and not _known(binding.var) for binding in _bindings(function))
                context.matched(tensors=len(tensors))
                context.table("memory", [{**found.report(), "dynamic_tensors": dynamic}])
        return program.with_module(module)


def _known(var: Any) -> bool:
    """A tensor whose dims are all numbers."""
    return isinstance(var.ty.shape, relax.ShapeExpr) and all(isinstance(dim, tirx.IntImm) for dim in var.ty.shape)


@dataclass
class _Tensor:
    """An allocation, and the bindings from it to the last that reads it under any name."""

    var: Any
    first: int
    last: int = field(default=-1)

    @property
    def lifetime(self) -> Lifetime:
        return Lifetime(bytes_of(self.var.ty, {}), self.first, self.last)


def _bindings(function: Any) -> list[Any]:
    return [binding for block in function.body.blocks for binding in block.bindings]


def _tensors(function: Any) -> list[_Tensor]:
    """What TVM has planned, with lifetimes. Whatever is bound to the result of a call that reads a tensor may be that tensor by another name (a view)."""
    found: list[_Tensor] = []
    names: dict[Any, list[_Tensor]] = {}
    for place, binding in enumerate(_bindings(function)):
        value = binding.value
        if operator(value) == _TENSOR:
            if _known(binding.var):
                found.append(_Tensor(binding.var, place, place))
                names[binding.var] = found[-1:]
            continue
        read = [tensor for var in dict.fromkeys(variables(value)) for tensor in names.get(var, ())]
        for tensor in read:
            tensor.last = place
        if read and not (isinstance(binding.var.ty, relax.TupleType) and not len(binding.var.ty.fields)):
            names[binding.var] = read
    for var in variables(function.body.body):
        for tensor in names.get(var, ()):
            tensor.last = len(_bindings(function))
    return found


def _placed(function: Any, tensors: list[_Tensor], found: Workspace) -> Any:
    """The function with one storage at its beginning for all tensors. Those of one place and type are one object, made once per call."""
    memory, calls = relax.op.memory, {binding.var: binding.value for binding in _bindings(function)}
    scope = next(call.args[2] for call in calls.values() if operator(call) == _STORAGE)
    places = {tensor.var: found.offsets[key] for key, tensor in enumerate(tensors)}
    read = {var for binding in _bindings(function) if binding.var not in places for var in variables(binding.value)}
    dropped = {calls[var].args[0] for var in places} - read
    workspace = relax.Var("workspace", relax.AnyType())
    made: dict[tuple[int, str], Any] = {}
    same: dict[Any, Any] = {}
    first = [relax.VarBinding(workspace, memory.alloc_storage(relax.ShapeExpr([found.size_bytes]), 0, scope, "uint8"))]
    blocks = []
    for block in function.body.blocks:
        bindings = []
        for binding in block.bindings:
            var, value = binding.var, binding.value
            if var in places:
                offset = places[var]
                whole = made.setdefault((offset, str(var.ty)), var)
                if whole is not var:
                    same[var] = whole
                    continue
                value = memory.alloc_tensor(workspace, offset, *value.args[2:])
                if offset:
                    # kernels take tensors that begin where their memory does
                    part = relax.Var(f"{var.name}_part", var.ty)
                    bindings.append(relax.VarBinding(part, value))
                    value = memory.ensure_zero_offset(part)
                binding = relax.VarBinding(var, value)
            elif any(operand in same for operand in variables(value)):
                value = structural_map(value, (relax.Var, lambda operand: same.get(operand, operand)))
                binding = relax.MatchCast(var, value, binding.ty) if isinstance(binding, relax.MatchCast) else relax.VarBinding(var, value)
            if var not in dropped:
                bindings.append(binding)
        blocks.append(relax.BindingBlock([*first, *bindings]))
        first = []
    return relax.Function(function.params, relax.SeqExpr(blocks, function.body.body), function.ret_ty, function.is_pure, function.attrs)
