"""Lowering for CUDA, top to bottom: legalization, fusion, kernels and memory, source, library."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...compiler.dialect import attention as dialect
from ...compiler.dialect import attention_quantized as quantized_dialect
from ...compiler.dialect.bitcast import NAME as BITCAST
from ...compiler.element_types import FLOAT8
from ...compiler.errors import UsageError
from ...compiler.progress import stage
from ...compiler.tvm import mutator, operator_attrs, relax
from ...passes.fusion import FuseEpilogues
from ...passes.products import analyze, operator
from ..common import legalize as definitions
from ..common.float8 import held
from . import attention, attention_codes, scatter, toolchain
from .host import sources
from .kernel import SHORT
from .lower import Launches, refuse_sizes_of_data, sequence
from .machines import EMIT_ONLY
from .sizes import shown
from .words import filled, narrowed, rounded_back

if TYPE_CHECKING:
    from ...compiler.lowered import Lowered
    from ...compiler.program import Program
    from ...compiler.steps import Steps
    from ...passes.base import PassContext
    from ..base import Target

#: number policies of products by the name of `--precision`: how fp32 operands reach the tensor cores, and what that means
PRECISIONS = {
    "fp32": ("Fp32", "3xTF32: operands split in two tf32 parts, three products; as accurate as fp32"),
    "tf32": ("Tf32", "operands of GEMM, convolution and attention rounded to tf32 (11 significant bits), fp32 sums"),
    "fp16": (
        "Fp16",
        "operands of GEMM, convolution and attention rounded to fp16 (11 significant bits, overflow above 65504) and stored so, fp32 sums",
    ),
    "bf16": ("Bf16", "operands of GEMM, convolution and attention rounded to bf16 (8 significant bits) and stored so, fp32 sums"),
}
DEFAULT_PRECISION = "fp32"


def lower(steps: Steps) -> Lowered:
    """From a graph of Relax operators to CUDA source and, unless `emit_only`, a library. Raises UnsupportedModel, UsageError or ToolchainError."""
    options = steps.options
    precision = options.precision or DEFAULT_PRECISION
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    if steps.target.name in EMIT_ONLY and not options.emit_only:
        raise UsageError(f"{steps.target.text}: there are sources for it, but no library; give --emit-only")
    nvcc = None if options.emit_only else toolchain.find_nvcc()
    policy, meaning = PRECISIONS[precision]
    steps.step("legalize", lambda p, _: p.with_module(_legalize(p, steps.target)))
    refuse_sizes_of_data(steps.program)
    steps.step("fuse_epilogues", FuseEpilogues().run)
    launches = Launches()

    def kernels(current: Program, context: PassContext) -> Program:
        nonlocal launches
        launches = sequence(current, steps.target, policy)
        for name, count in launches.calls.items():
            context.matched(**{(launches.kernels[name].kind if name else "copy").replace(" ", "_"): count})
        return current

    steps.step("kernels", kernels)
    with stage("emission"):
        texts = sources(launches, steps.program.inputs, steps.program.outputs, " ".join(toolchain.command(steps.target.name)))
    built = toolchain.Built(b"", ())
    with stage("nvcc") as building:
        if nvcc is not None:
            built = toolchain.build(texts, steps.target.name, nvcc)
    report = {
        "kernels": rows(launches),
        "precision": {"name": precision, "meaning": meaning},
        "memory": launches.memory(),
        "weights_bytes": sum(array.nbytes for array in launches.weights.values()),
        "code_generation": {"seconds": round(building.seconds, 3), "remarks": list(built.remarks)},
    }
    return steps.lowered(report=report, weights=launches.weights, sources=texts, library=built.library)


def rows(launches: Launches) -> list[dict[str, Any]]:
    """The report's table of kernels; `reason` says why a kernel is not one of the templates."""
    calls = launches.calls
    return [
        {
            "kernel": name,
            "template": kernel.kind,
            "workload": kernel.workload,
            "schedule": kernel.schedule,
            "calls": calls[name],
            "nodes": list(launches.nodes[name]),
            "grid": [size if isinstance(size, int) else shown(size) for size in kernel.grid],
            "threads": kernel.threads,
            "shared_bytes": kernel.shared_bytes,
            "reason": kernel.reason,
        }
        for name, kernel in launches.kernels.items()
    ]


def _legalize(program: Program, target: Target) -> Any:
    module = program.module if FLOAT8 in target.formats else held(program.module, "float16")
    module = relax.transform.CanonicalizeBindings()(relax.transform.DecomposeOpsForInference()(module))
    module = _Prepare(program.with_module(module)).apply()
    module = definitions.legalize(
        module, {"relax.astype": definitions.default_legalization, BITCAST: _bits}, keep=(dialect.NAME, quantized_dialect.NAME, *scatter.OPERATORS)
    )
    return relax.transform.DeadCodeElimination()(relax.transform.EliminateCommonSubexpr()(module))


def _bits(builder: Any, call: Any) -> Any:
    """Bits that are read as short floating-point numbers stay where they are."""
    return call if str(call.ty.dtype) in SHORT else definitions.default_legalization(builder, call)


@mutator
class _Prepare(relax.PyExprMutator):
    """Attention that the kernel does not take, by plain operators; one that is only read rounded, rounded by the kernel; products of short numbers in whole words."""

    def __init__(self, program: Program):
        super().__init__(program.module)
        self.graph = analyze(program)

    def apply(self) -> Any:
        program = self.graph.program
        self.builder_.update_func(program.module.get_global_var("main"), self.visit_expr(program.main))
        return self.builder_.get()

    def visit_var_binding_(self, binding: Any) -> None:
        """Attention whose one reader rounds it gives way to that reader."""
        if operator(binding.value) != dialect.NAME or self.graph.defining(self.graph.single_reader(binding.var), "relax.astype") is None:
            super().visit_var_binding_(binding)

    def visit_call_(self, call: Any) -> Any:
        made = self.graph.defining(call.args[0], dialect.NAME) if operator(call) == "relax.astype" else None
        if made is not None and self.graph.single_reader(call.args[0]) is not None:
            attrs = operator_attrs(**{**asdict(dialect.attrs_of(made)), "dtype": str(call.attrs.dtype)})
            call = self.builder_.normalize(relax.Call(made.op, list(made.args), attrs))
        call = super().visit_call_(call)
        if operator(call) == quantized_dialect.NAME and attention_codes.refusal(call):
            call = quantized_dialect.dequantize(self.builder_, call)
        if operator(call) == dialect.NAME and attention.refusal(call):
            return dialect.decompose(self.builder_, call)
        return filled(self.builder_, narrowed(self.builder_, rounded_back(self.builder_, call)))
