"""Convolution templates: numbers against torch over awkward shapes and epilogues, and what the generated code looks like."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from machines import runnable
from tcompile.autotune.cost_model import AnalyticModel
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common import legalize, ops_conv  # noqa: F401  (registers its legalizer)
from tcompile.targets.common.fused import Fused, Unfusable, analyze
from tcompile.targets.cpu.conv_depthwise import ConvDepthwise, DepthwiseSchedule
from tcompile.targets.cpu.conv_direct import ConvDirect, DirectSchedule
from tcompile.targets.cpu.conv_pointwise import ConvPointwise
from tcompile.targets.cpu.conv_winograd import ConvWinograd, WinogradSchedule
from tcompile.targets.cpu.gemm_schedules import GemmSchedule
from tcompile.targets.cpu.template import KernelTemplate, machine

AVX2, AVX512 = Target.parse("cpu:haswell"), Target.parse("cpu:skylake-avx512")
TEMPLATES: tuple[KernelTemplate, ...] = (ConvDepthwise(), ConvPointwise(), ConvDirect())
WEIGHT = frozenset([1])


@dataclass(frozen=True)
class Case:
    """x [n, h, w, ci] * w [kh, kw, ci / groups, co]; a str dim is symbolic and `sizes` gives its value at run time."""

    x: tuple[Any, Any, Any, int]
    co: int
    k: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.x}-{self.co}-k{self.k}-s{self.stride}-p{self.pad}-d{self.dilation}-g{self.groups}-{list(self.sizes.values())}"


CASES = [
    Case((1, 9, 11, 7), 19, (3, 3), pad=(1, 1, 1, 1)),
    Case((2, 13, 8, 5), 32, (3, 3), stride=(2, 2), pad=(1, 1, 1, 1)),
    Case((1, 17, 23, 3), 24, (7, 7), stride=(2, 2), pad=(3, 3, 3, 3)),
    Case((1, 5, 5, 16), 16, (5, 5), pad=(2, 2, 2, 2)),
    Case((1, 20, 21, 8), 12, (3, 3), pad=(2, 2, 2, 2), dilation=(2, 2)),
    Case((1, 12, 10, 8), 12, (2, 3), stride=(1, 2), pad=(0, 1, 1, 0)),
    Case((1, 9, 9, 12), 24, (3, 3), pad=(1, 1, 1, 1), groups=4),
    Case((3, 1, 1, 4), 1, (3, 3), pad=(1, 1, 1, 1)),
    Case((1, 30, 1, 4), 9, (3, 1), pad=(1, 0, 1, 0)),
    Case((2, 31, 1, 6), 20, (5, 1), stride=(2, 3), pad=(1, 0, 3, 0), dilation=(2, 1)),
    Case((1, "h", 1, 6), 20, (5, 1), pad=(2, 0, 2, 0), groups=2, sizes={"h": 40}),
    Case((1, 4, 3, 2), 5, (1, 3), pad=(0, 5, 0, 4)),
    Case(("n", 9, 10, 7), 20, (3, 3), pad=(1, 1, 1, 1), sizes={"n": 3}),
    Case((1, "h", "w", 7), 20, (3, 3), pad=(1, 1, 1, 1), sizes={"h": 7, "w": 31}),
    Case((1, "h", "w", 7), 20, (3, 3), stride=(2, 2), pad=(1, 1, 1, 1), sizes={"h": 8, "w": 3}),
    Case((1, "h", "w", 4), 16, (5, 5), stride=(2, 1), pad=(2, 2, 2, 2), dilation=(1, 2), groups=2, sizes={"h": 14, "w": 40}),
    Case((1, 6, "w", 4), 16, (3, 3), stride=(2, 1), sizes={"w": 40}),
    # pointwise
    Case((2, 9, 11, 7), 19, (1, 1)),
    Case((2, 9, 11, 7), 19, (1, 1), stride=(2, 2)),
    Case((1, 1, 1, 31), 3, (1, 1)),
    Case((1, "h", "w", 16), 40, (1, 1), stride=(2, 1), sizes={"h": 9, "w": 6}),
    Case(("n", "h", "w", 16), 40, (1, 1), sizes={"n": 2, "h": 9, "w": 6}),
    Case((1, 4, 6, 8), 8, (1, 1), pad=(1, 1, 1, 1)),
    # depthwise
    Case((1, 9, 11, 24), 24, (3, 3), pad=(1, 1, 1, 1), groups=24),
    Case((2, 9, 11, 19), 19, (5, 5), stride=(2, 2), pad=(2, 2, 2, 2), groups=19),
    Case((1, 14, 14, 3), 3, (3, 3), pad=(1, 1, 1, 1), groups=3),
    Case((1, "h", "w", 20), 20, (3, 3), pad=(1, 1, 1, 1), groups=20, sizes={"h": 9, "w": 26}),
    Case((1, "h", "w", 20), 20, (5, 5), stride=(2, 1), pad=(2, 2, 2, 2), dilation=(1, 2), groups=20, sizes={"h": 9, "w": 13}),
    Case((1, 8, 8, 6), 12, (3, 3), pad=(1, 1, 1, 1), groups=6),
]


def fused_conv(case: Case, epilogue: str = "none") -> Fused:
    """The fused PrimFunc of a convolution and an epilogue: none, relu (with bias), hardswish (with bias) or residual (bias, sum, relu)."""
    symbols = {dim: tirx.Var(dim, "int64") for dim in case.x if isinstance(dim, str)}
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([symbols.get(dim, dim) for dim in case.x], "float32"))
    w = relax.Var("w", relax.TensorType((*case.k, case.x[3] // case.groups, case.co), "float32"))
    bias = relax.Var("b", relax.TensorType((case.co,), "float32"))
    params = [x, w]
    with builder.function("main"):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, w, case.stride, case.pad, case.dilation, case.groups, "NHWC", "HWIO", "NHWC"))
            if epilogue != "none":
                params.append(bias)
                conv, y = y, builder.emit(relax.op.add(y, bias))
            if epilogue == "hardswish":
                three, six = relax.const(3.0, "float32"), relax.const(6.0, "float32")
                y = builder.emit(relax.op.multiply(y, relax.op.divide(relax.op.clip(relax.op.add(y, three), 0, 6), six)))
            if epilogue == "residual":
                params.append(relax.Var("r", relax.TensorType(conv.ty.shape, "float32")))
                y = builder.emit(relax.op.add(y, params[-1]))
            if epilogue in ("relu", "residual"):
                y = builder.emit(relax.op.nn.relu(y))
            y = builder.emit_output(y)
        builder.emit_func_output(y, params=params)
    transform = relax.transform
    module = legalize.legalize(builder.get())
    for step in (transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR(), transform.DeadCodeElimination()):
        module = step(module)
    functions = [func for _, func in module.functions_items() if isinstance(func, tirx.PrimFunc)]
    assert len(functions) == 1, "the epilogue was not fused"
    return analyze(functions[0])


def template_for(fused: Fused) -> tuple[KernelTemplate, Any]:
    for template in TEMPLATES:
        try:
            return template, template.workload(fused, WEIGHT)
        except Unfusable:
            continue
    raise AssertionError("no template")


def schedules(template: KernelTemplate, workload: Any, target: Target, count: int, seed: int) -> list[Any]:
    """The cost model's choice and some at random."""
    space = list(template.space(workload, target))
    predicted = [AnalyticModel().latency_us(template.features(workload, schedule, target), machine(target)) for schedule in space]
    chosen = [space[int(np.argmin(predicted))]]
    return chosen + [space[i] for i in np.random.default_rng(seed).integers(0, len(space), count - 1)]


def compiled(fused: Fused, template: KernelTemplate, workload: Any, schedule: Any, target: Target) -> tuple[Any, Any]:
    kernel = template.build(fused, workload, schedule, target)
    executable = tvm.compile(kernel.func.with_attr("global_symbol", "kernel"), target=tvm.target.Target({"kind": "llvm", "mcpu": target.mcpu}))
    return kernel, executable


def reference(case: Case, x: np.ndarray, w: np.ndarray, extra: list[np.ndarray], epilogue: str) -> np.ndarray:
    top, left, bottom, right = case.pad
    image = torch.nn.functional.pad(torch.from_numpy(x).permute(0, 3, 1, 2).double(), (left, right, top, bottom))
    weight = torch.from_numpy(w).permute(3, 2, 0, 1).double()
    y = torch.nn.functional.conv2d(image, weight, stride=case.stride, dilation=case.dilation, groups=case.groups).permute(0, 2, 3, 1).numpy()
    for array in extra:
        y = y + array
    if epilogue == "hardswish":
        return y * np.clip(y + 3, 0, 6) / 6
    return np.maximum(y, 0) if epilogue in ("relu", "residual") else y


@pytest.mark.sweep
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
@pytest.mark.parametrize("target", runnable())
def test_against_torch(index: int, target: Target) -> None:
    case, epilogue = CASES[index], ("relu", "residual", "hardswish", "none")[index % 4]
    rng = np.random.default_rng(index)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape).astype("float32")

    fused = fused_conv(case, epilogue)
    template, workload = template_for(fused)
    x = draw(tuple(case.sizes.get(dim, dim) for dim in case.x))
    w = draw((*case.k, case.x[3] // case.groups, case.co))
    shape = reference(case, x, w, [], "none").shape
    extra = ([] if epilogue == "none" else [draw((case.co,))]) + ([draw(shape)] if epilogue == "residual" else [])
    want = reference(case, x, w, extra, epilogue)
    for schedule in schedules(template, workload, target, 3, index):
        kernel, executable = compiled(fused, template, workload, schedule, target)
        args = [x, w, *extra]
        for packing in kernel.packings:
            args[packing.param] = packing.pack(args[packing.param])
            assert args[packing.param].shape == packing.shape
        tensors = [tvm.runtime.tensor(array) for array in (*args, np.full(shape, np.nan, "float32"))]
        executable["kernel"](*tensors)
        np.testing.assert_allclose(tensors[-1].numpy(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=str(schedule))


@pytest.mark.parametrize("target", runnable())
def test_padding_is_never_read(target: Target) -> None:
    """A NaN or infinite weight on a tap that only meets padding must not reach the output."""
    case = Case((1, 1, 1, 4), 8, (3, 3), pad=(1, 1, 1, 1))
    fused = fused_conv(case)
    template, workload = template_for(fused)
    w = np.full((3, 3, 4, 8), np.nan, "float32")
    w[1, 1] = 1.0
    for schedule in schedules(template, workload, target, 2, 0):
        kernel, executable = compiled(fused, template, workload, schedule, target)
        y = tvm.runtime.tensor(np.zeros((1, 1, 1, 8), "float32"))
        executable["kernel"](tvm.runtime.tensor(np.ones((1, 1, 1, 4), "float32")), tvm.runtime.tensor(kernel.packings[0].pack(w)), y)
        assert (y.numpy() == 4.0).all()


def test_run_time_weights_are_refused() -> None:
    fused = fused_conv(CASES[0])
    for template in TEMPLATES:
        with pytest.raises(Unfusable):
            template.workload(fused, frozenset())


def inner_loops(assembly: str, least: int) -> list[list[str]]:
    """The innermost loops with at least `least` fused multiply-adds, as lists of instructions."""
    lines = assembly.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\.LBB\w+):", line))}
    found = []
    for number, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.LBB\w+)", line)
        if jump and labels.get(jump[1], number) < number:
            body = lines[labels[jump[1]] + 1 : number]
            if not any(text.startswith(".LBB") for text in body) and sum("vfmadd" in text for text in body) >= least:
                found.append(body)
    return found


LAYER = Case((1, 28, 28, 64), 96, (3, 3), pad=(1, 1, 1, 1))
POINTWISE = Case((1, 28, 28, 64), 96, (1, 1))
DEPTHWISE = Case((1, 28, 28, 64), 64, (3, 3), pad=(1, 1, 1, 1), groups=64)


@pytest.mark.parametrize(
    ("case", "template", "schedule", "prefetched"),
    [
        (Case((1, 7, 7, 512), 96, (1, 1)), ConvDirect(), DirectSchedule(4, 3, 8, 0), True),
        (Case((1, 7, 7, 512), 96, (1, 1)), ConvDirect(), DirectSchedule(4, 3, 8, 1), True),
        (Case((1, 1, 4, 512), 96, (1, 1)), ConvDirect(), DirectSchedule(4, 3, 8, 0), False),  # one tile alone waits for its own weights
        (LAYER, ConvDirect(), DirectSchedule(4, 3, 8, 0), False),
        (Case((1, 14, 14, 64), 96, (3, 3), pad=(1, 1, 1, 1)), ConvWinograd(), WinogradSchedule(4, 4, 4, 3, 8, True), True),
    ],
)
def test_the_next_weights_are_prefetched_where_tiles_share_them(case: Case, template: Any, schedule: Any, prefetched: bool) -> None:
    fused = fused_conv(case, "relu")
    _, executable = compiled(fused, template, template.workload(fused, frozenset({1})), schedule, AVX2)
    assert ("prefetcht1" in executable.mod.inspect_source("asm")) == prefetched


@pytest.mark.parametrize(
    ("case", "target", "schedule", "register"),
    [
        (LAYER, AVX2, DirectSchedule(4, 3, 8, 0), "ymm"),
        (LAYER, AVX2, DirectSchedule(6, 2, 8, 8), "ymm"),
        (LAYER, AVX512, DirectSchedule(14, 2, 16, 0), "zmm"),
        (POINTWISE, AVX2, GemmSchedule(4, 3, 8, 0), "ymm"),
        (POINTWISE, AVX512, GemmSchedule(8, 3, 16, 0), "zmm"),
    ],
)
def test_inner_loop_has_no_spills(case: Case, target: Target, schedule: Any, register: str) -> None:
    """The accumulators stay in registers: nothing in a multiply-add loop is stored, nor loaded from the stack as a vector."""
    fused = fused_conv(case, "relu")
    template, workload = template_for(fused)
    _, executable = compiled(fused, template, workload, schedule, target)
    loops = inner_loops(executable.mod.inspect_source("asm"), 9)
    assert loops
    for body in loops:
        fmas = [line for line in body if "vfmadd" in line]
        assert all(f"%{register}" in line for line in fmas)
        assert not [line for line in body if re.search(r"vmov[ua]ps\s+%[yz]mm\d+, ", line)], "an accumulator is stored inside the loop"
        assert not [line for line in body if re.search(r"v\w+\s+[-\d]*\(%rsp", line)], "a vector is reloaded from the stack inside the loop"


@pytest.mark.parametrize(
    ("target", "schedule", "register"), [(AVX2, DepthwiseSchedule(7, 8, 0, False), "ymm"), (AVX512, DepthwiseSchedule(7, 16, 0, False), "zmm")]
)
def test_depthwise_code_has_no_spills(target: Target, schedule: DepthwiseSchedule, register: str) -> None:
    """LLVM unrolls the tap rows, so there is no inner loop to look at: the whole kernel hardly touches the stack."""
    fused = fused_conv(DEPTHWISE, "relu")
    template, workload = template_for(fused)
    _, executable = compiled(fused, template, workload, schedule, target)
    lines = executable.mod.inspect_source("asm").splitlines()
    fmas = [line for line in lines if "vfmadd" in line]
    assert fmas and all(f"%{register}" in line for line in fmas)
    assert len([line for line in lines if re.search(r"\tv\w+\s.*\(%rsp.*%[yz]mm|%[yz]mm.*\(%rsp", line)]) <= len(fmas) // 50


@pytest.mark.parametrize("target", [AVX2, AVX512])
def test_spaces_stay_within_the_registers(target: Target) -> None:
    for case in (LAYER, POINTWISE, DEPTHWISE, Case((1, 7, 7, 512), 512, (3, 3), pad=(1, 1, 1, 1))):
        fused = fused_conv(case)
        template, workload = template_for(fused)
        space = list(template.space(workload, target))
        assert 4 <= len(space) <= 400
        assert len(set(space)) == len(space)
