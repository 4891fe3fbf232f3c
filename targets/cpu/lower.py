"""Lowering on the CPU: every fused PrimFunc gets a kernel, weights get packed, the module becomes an executable."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import CostModel
from ...compiler.tvm import BufferType, mutator, relax, relax_functions, structural_map, tirx, tvm
from ...passes.fusion import NODES, SOURCES
from ..base import Target
from ..common.fused import Unfusable, analyze, static
from .candidates import offers
from .sparse_sites import constant_arguments, split_sites
from .sparse_weights import Constants
from .template import Kernel, KernelTemplate, machine

#: ends the name of a kernel that takes packed constants
PACKED = "_packed"


def templates() -> list[KernelTemplate]:
    """All kernel templates; the one with the lowest predicted latency gets the workload. A new one is one line here."""
    from .attention import Attention
    from .attention_amx import AttentionAmx
    from .attention_blocks import AttentionBlocks
    from .attention_codes import AttentionCodes
    from .attention_few import AttentionFew
    from .conv_amx import ConvAmx
    from .conv_amx_rows import ConvAmxRows
    from .conv_depthwise import ConvDepthwise
    from .conv_direct import ConvDirect
    from .conv_pointwise import ConvPointwise
    from .conv_rest import ConvRest
    from .conv_winograd import ConvWinograd
    from .gemm import Gemm
    from .gemm_amx import GemmAmx
    from .gemm_rest import GemmRest
    from .gemm_strassen import GemmStrassen
    from .grouped import GroupedGemm
    from .sparse_blocks import GemmBlocks
    from .sparse_columns import GemmColumns
    from .weight_only import WeightOnly
    from .weight_only_int8 import WeightOnlyInt8

    return [
        Gemm(),
        *(family(terms) for terms in (1, 2, 3) for family in (GemmAmx, ConvAmx, ConvAmxRows)),
        GemmRest(),
        GemmStrassen(),
        WeightOnly(),
        WeightOnlyInt8(),
        GroupedGemm(),
        GemmBlocks(),
        GemmColumns(),
        ConvDepthwise(),
        ConvPointwise(),
        ConvWinograd(),
        ConvDirect(),
        ConvRest(),
        Attention(),
        AttentionAmx(),
        AttentionBlocks(),
        AttentionFew(),
        AttentionCodes(),
    ]


@dataclass
class Choice:
    """What was chosen for one PrimFunc, for the report. nodes: names of the source nodes it computes, over all calls."""

    kernel: str
    template: str
    workload: str
    schedule: str
    predicted_us: float | None
    candidates: int = 0
    cost_model: str = ""
    reason: str = ""
    calls: int = 0
    nodes: tuple[str, ...] = ()


@dataclass
class Lowering:
    """State of one lowering: choices by kernel name."""

    target: Target
    cost_model: CostModel
    choices: dict[str, Choice] = field(default_factory=dict)


def tvm_target(target: Target, *, optimize: bool = True) -> Any:
    """TVM's description of the machine that code is generated for, and whether LLVM optimises."""
    options: dict[str, Any] = {
        "kind": "llvm",
        "mcpu": target.mcpu,
        "mtriple": "x86_64-unknown-linux-gnu",
        "vector-width": target.vector_bits,
        "num-cores": target.cores,
    }
    if target.disabled:
        options["mattr"] = [f"-{feature}" for feature in target.disabled]
    if not optimize:
        options["opt-level"] = 0
    return tvm.target.Target(options)


def code_generation() -> Any:
    """The context in which kernels become machine code.

    TVM's storage rewrite would compute a temporary in place of its operand, which a last vector that overlaps the one before it reads again.
    """
    return tvm.transform.PassContext(opt_level=3, config={"tirx.disable_storage_rewrite": True})


def schedule_kernels(module: Any, target: Target, cost_model: CostModel) -> tuple[Any, list[Choice]]:
    """Give every PrimFunc its kernel and pack the constants that kernels want in another layout."""
    from .generic import schedule as generic

    lowering = Lowering(target, cost_model)
    known = templates()
    module = split_sites(module)
    constants = constant_arguments(module)
    kernels: dict[str, Kernel] = {}
    functions = [(variable, func) for variable, func in module.functions_items() if isinstance(func, tirx.PrimFunc)]
    for variable, func in sorted(functions, key=lambda item: item[0].name_hint):
        name, func = variable.name_hint, simplify_shapes(func)
        kernel = _from_template(func, name, known, constants.get(name, Constants()), lowering)
        if kernel is None:
            scheduled = generic(func, target)
            lowering.choices[name].schedule = scheduled.rule
            kernel = Kernel(scheduled.func)
        names = {key: [str(each) for each in (func.attrs or {}).get(key, ())] for key in (NODES, SOURCES)}
        lowering.choices[name].nodes = tuple(names[NODES])
        kernels[name] = replace(kernel, func=kernel.func.with_attrs(names))
    return _Replace(module, kernels, lowering.choices).apply(), list(lowering.choices.values())


def simplify_shapes(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with the dims of its buffers simplified: those of a deep network with symbolic sizes are sums that grew by a few terms in every layer."""
    simplify = tvm.sym.Analyzer().simplify
    return _map_dims(func, lambda dim: simplify(dim))


def own_dims(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with a variable of its own for every dim of a parameter that is an expression of symbols, read from the tensor that comes in.

    For templates, which compare dims and count them: (w - 1) // 8 + 1 in every address would take TVM's analyzers seconds per kernel.
    """
    named: dict[str, Any] = {}
    for param in func.params:
        for dim in getattr(param, "shape", ()):
            if not isinstance(dim, (tirx.Var, tirx.IntImm)):
                named.setdefault(str(dim), tirx.Var(f"dim{len(named)}", "int64"))
    return _map_dims(func, lambda dim: named.get(str(dim), dim)) if named else func


def _map_dims(func: tirx.PrimFunc, change: Callable[[Any], Any]) -> tirx.PrimFunc:
    def rewrite(kind: Any) -> Any:
        shape = [change(dim) for dim in kind.shape]
        if all(new.same_as(old) for new, old in zip(shape, kind.shape, strict=True)):
            return kind
        assert not kind.strides, "a fused kernel's buffers are compact"
        return tirx.decl_buffer(shape, str(kind.dtype), scope=kind.storage_scope, layout=kind.layout).ty

    return structural_map(func, (BufferType, rewrite))


def _from_template(func: Any, name: str, known: list[KernelTemplate], constants: frozenset[int], lowering: Lowering) -> Kernel | None:
    try:
        if any(static(dim) == 0 for param in func.params if hasattr(param, "shape") for dim in param.shape):
            raise Unfusable("an operand without elements")
        fused = analyze(own_dims(func))
    except Unfusable as reason:
        lowering.choices[name] = Choice(name, "generic", "", "", None, reason=str(reason))
        return None
    offered = offers(fused, constants, known, lowering.target)
    if not offered.candidates:
        lowering.choices[name] = Choice(name, "generic", "", "", None, reason="; ".join(offered.reasons))
        return None
    best, predicted_us = lowering.cost_model.choose(offered.candidates, machine(lowering.target))
    lowering.choices[name] = Choice(
        name, best.template, str(best.workload), str(best.schedule), round(predicted_us, 2), len(offered.candidates), lowering.cost_model.name
    )
    return best.kernel


@mutator
class _Replace(relax.PyExprMutator):
    """Swap in the kernels; a kernel with packed parameters gets a new variable, as the old one carries the old signature."""

    def __init__(self, module: Any, kernels: dict[str, Kernel], choices: dict[str, Choice]):
        super().__init__(module)
        self.module, self.kernels, self.choices = module, kernels, choices
        self.fresh: dict[str, Any] = {}
        self.packed: dict[tuple[Any, str], Any] = {}

    def apply(self) -> Any:
        for variable, func in self.module.functions_items():
            kernel = self.kernels.get(variable.name_hint)
            if isinstance(func, tirx.PrimFunc) and kernel is not None and not kernel.packings:
                self.builder_.update_func(variable, kernel.func)
        for name, kernel in sorted(self.kernels.items()):
            if kernel.packings:
                self.fresh[name] = self.builder_.add_func(kernel.func, f"{name}{PACKED}")
        for variable, function in relax_functions(self.module):
            self.builder_.update_func(variable, self.visit_expr(function))
        return relax.transform.DeadCodeElimination()(self.builder_.get())

    def visit_call_(self, call: Any) -> Any:
        if getattr(call.op, "name", "") != "relax.call_tir":
            return super().visit_call_(call)
        name = call.args[0].name_hint
        self.choices[name].calls += 1
        if name not in self.fresh:
            return super().visit_call_(call)
        args = [self.visit_expr(arg) for arg in call.args[1].fields]
        for packing in self.kernels[name].packings:
            constant = args[packing.param]
            key = (constant, packing.key)
            if key not in self.packed:
                packed = packing.pack(constant.value.numpy())
                arrays = packed if isinstance(packed, tuple) else (packed,)
                self.packed[key] = [relax.const(np.ascontiguousarray(array)) for array in arrays]
            args[packing.param] = self.packed[key]
        args = list(itertools.chain.from_iterable(arg if isinstance(arg, list) else [arg] for arg in args))
        rest = [self.visit_expr(arg) for arg in call.args[2:]]
        return relax.Call(call.op, [self.fresh[name], relax.Tuple(args), *rest], call.attrs, call.ty_args)
