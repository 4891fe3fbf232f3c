"""Integer convolutions: bit-exact over awkward shapes, with an epilogue that requantises, and what the generated code looks like."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernels import only_kernel
from machines import runnable
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Fused
from tcompile.targets.cpu.conv_depthwise import DepthwiseSchedule
from tcompile.targets.cpu.conv_direct import DirectSchedule
from tcompile.targets.cpu.gemm_schedules import GemmSchedule
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from test_cpu_conv import Case, reference, schedules, template_for

SCALE = np.float32(0.0021)

CASES = [
    Case((1, 9, 11, 8), 19, (3, 3), pad=(1, 1, 1, 1)),
    Case((2, 13, 8, 5), 32, (3, 3), stride=(2, 2), pad=(1, 1, 1, 1)),
    Case((1, 17, 23, 3), 24, (7, 7), stride=(2, 2), pad=(3, 3, 3, 3)),
    Case((1, 10, 9, 1), 6, (3, 3), pad=(1, 1, 1, 1)),
    Case((1, 20, 21, 6), 12, (3, 3), pad=(2, 2, 2, 2), dilation=(2, 2)),
    Case((1, 9, 9, 12), 24, (3, 3), pad=(1, 1, 1, 1), groups=4),
    Case((1, 9, 9, 6), 4, (3, 3), groups=2),
    Case((2, 31, 1, 6), 20, (5, 1), stride=(2, 3), pad=(1, 0, 3, 0), dilation=(2, 1)),
    Case((1, "h", "w", 7), 20, (3, 3), pad=(1, 1, 1, 1), sizes={"h": 7, "w": 31}),
    Case((1, "h", "w", 3), 20, (3, 3), stride=(2, 2), pad=(1, 1, 1, 1), sizes={"h": 8, "w": 30}),
    Case((1, "h", "w", 4), 16, (5, 5), stride=(2, 1), pad=(2, 2, 2, 2), dilation=(1, 2), groups=2, sizes={"h": 14, "w": 40}),
    # pointwise
    Case((2, 9, 11, 7), 19, (1, 1), stride=(2, 2)),
    Case((1, 1, 1, 31), 3, (1, 1)),
    Case(("n", "h", "w", 16), 40, (1, 1), sizes={"n": 2, "h": 9, "w": 6}),
    # depthwise
    Case((1, 9, 11, 24), 24, (3, 3), pad=(1, 1, 1, 1), groups=24),
    Case((2, 9, 11, 19), 19, (5, 5), stride=(2, 2), pad=(2, 2, 2, 2), groups=19),
    Case((1, 14, 14, 3), 3, (3, 3), pad=(1, 1, 1, 1), groups=3),
    Case((1, "h", "w", 20), 20, (5, 5), stride=(2, 1), pad=(2, 2, 2, 2), dilation=(1, 2), groups=20, sizes={"h": 9, "w": 13}),
]


def fused_conv(case: Case, requantize: bool = True, residual: tuple[int, ...] | None = None) -> Fused:
    """x u8 * w s8 -> int32, or relu((y + b) * s) rounded to u8, as Relax fuses it; residual: shape of codes that are added before the ReLU."""
    symbols = {dim: tirx.Var(dim, "int64") for dim in case.x if isinstance(dim, str)}
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([symbols.get(dim, dim) for dim in case.x], "uint8"))
    w = relax.Var("w", relax.TensorType((*case.k, case.x[3] // case.groups, case.co), "int8"))
    bias, scale = (relax.Var(name, relax.TensorType((case.co,), dtype)) for name, dtype in (("b", "int32"), ("s", "float32")))
    shortcut = relax.Var("r", relax.TensorType(residual, "uint8")) if residual else None
    with builder.function("main"):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, w, case.stride, case.pad, case.dilation, case.groups, "NHWC", "HWIO", "NHWC", "int32"))
            if requantize:
                y = builder.emit(relax.op.add(y, bias))
                y = relax.op.multiply(relax.op.astype(y, "float32"), scale)
                y = builder.emit(relax.op.nn.relu(relax.op.add(y, relax.op.astype(shortcut, "float32")) if residual else y))
                y = builder.emit(relax.op.astype(relax.op.clip(relax.op.round(y), 0, 255), "uint8"))
            y = builder.emit_output(y)
        builder.emit_func_output(y, params=[x, w, *([bias, scale] if requantize else []), *([shortcut] if residual else [])])
    return only_kernel(builder.get())


def assembly(fused: Fused, schedule: Any, target: Target) -> str:
    template, workload = template_for(fused)
    return compiled(template.build(fused, workload, schedule, target), target).mod.inspect_source("asm")


def compiled(kernel: Any, target: Target) -> Any:
    return tvm.compile(kernel.func.with_attr("global_symbol", "kernel"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)


@pytest.mark.parametrize("l2_bytes", [1 << 12, 1 << 20])
@pytest.mark.parametrize("target", runnable())
def test_a_residual_is_asked_for_where_it_is_far(target: Target, l2_bytes: int) -> None:
    """By every register tile, for its own rows, where the second-level cache holds neither output nor residual; the results are the same."""
    target, shape, case = replace(target, l2_bytes=l2_bytes), (1, 9, 11, 51), Case((1, 9, 11, 20), 51, (1, 1))
    fused, rng = fused_conv(case, residual=shape), np.random.default_rng(0)
    template, workload = template_for(fused)
    kernel = template.build(fused, workload, GemmSchedule(4, 2, target.lanes(), 0), target)
    library = compiled(kernel, target)
    assert ("prefetcht0" in library.mod.inspect_source("asm")) == (l2_bytes < 2 * 9 * 11 * 51)
    x, w = rng.integers(0, 256, case.x).astype(np.uint8), rng.integers(-128, 128, (1, 1, 20, 51)).astype(np.int8)
    bias, scale = rng.integers(-5000, 5000, 51).astype(np.int32), (rng.uniform(0.5, 2.0, 51) * SCALE).astype(np.float32)
    residual, out = rng.integers(0, 256, shape).astype(np.uint8), np.zeros(shape, np.uint8)
    sums = (reference(case, x.astype(np.float64), w.astype(np.float64), [], "none").astype(np.int32) + bias).astype(np.float32) * scale
    args = [tvm.runtime.tensor(array) for array in (x, kernel.packings[0].pack(w), bias, scale, residual, out)]
    library["kernel"](*args)
    # a multiply-add rounds once where numpy rounds twice, so that ties may go either way
    assert np.abs(args[-1].numpy().astype(int) - np.clip(np.rint(np.maximum(sums + residual, 0)), 0, 255)).max() <= 1


@pytest.mark.parametrize(("machine", "prefetched"), [("cascadelake", True), ("skylake-avx512", False), ("haswell", False)])
def test_panels_are_prefetched_where_vpdpbusd_reads_them(machine: str, prefetched: bool) -> None:
    target = Target.parse(f"cpu:{machine}")
    assert ("prefetcht1" in assembly(fused_conv(POINTWISE), GemmSchedule(4, 3, target.lanes(), 0), target)) == prefetched


@pytest.mark.sweep
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
@pytest.mark.parametrize("target", runnable())
def test_bit_exact(index: int, target: Target) -> None:
    check(index, target)


def check(index: int, target: Target, template: Any = None) -> None:
    case, requantize = CASES[index], index % 3 != 0
    rng = np.random.default_rng(index)
    fused = fused_conv(case, requantize)
    template, workload = template_for(fused) if template is None else (template, template.workload(fused, frozenset([1])))
    x = rng.integers(0, 256, tuple(case.sizes.get(dim, dim) for dim in case.x)).astype(np.uint8)
    w = rng.integers(-128, 128, (*case.k, case.x[3] // case.groups, case.co)).astype(np.int8)
    want = reference(case, x.astype(np.float64), w.astype(np.float64), [], "none").astype(np.int32)
    extra = []
    if requantize:
        extra = [rng.integers(-5000, 5000, case.co).astype(np.int32), (rng.uniform(0.5, 2.0, case.co) * SCALE).astype(np.float32)]
        want = np.clip(np.rint(np.maximum((want + extra[0]).astype(np.float32) * extra[1], 0)), 0, 255).astype(np.uint8)
    for schedule in schedules(template, workload, target, 1 if case.sizes else 2, index):
        kernel = template.build(fused, workload, schedule, target)
        args = [x, w, *extra]
        for packing in kernel.packings:
            args[packing.param] = packing.pack(args[packing.param])
            assert args[packing.param].shape == packing.shape
        tensors = [tvm.runtime.tensor(array) for array in (*args, np.zeros(want.shape, want.dtype))]
        compiled(kernel, target)["kernel"](*tensors)
        np.testing.assert_array_equal(tensors[-1].numpy(), want, err_msg=str(schedule))


VNNI = Target.parse("cpu:cascadelake")
LAYER = Case((1, 28, 28, 64), 96, (3, 3), pad=(1, 1, 1, 1))
STEM = Case((1, 56, 56, 3), 64, (7, 7), stride=(2, 2), pad=(3, 3, 3, 3))
POINTWISE = Case((1, 28, 28, 256), 96, (1, 1))
DEPTHWISE = Case((1, 28, 28, 64), 64, (3, 3), pad=(1, 1, 1, 1), groups=64)


@pytest.mark.parametrize(
    ("case", "schedule"),
    [
        (LAYER, DirectSchedule(14, 2, 16, 0)),
        (STEM, DirectSchedule(7, 2, 16, 0)),
        (POINTWISE, GemmSchedule(8, 3, 16, 0)),
        (DEPTHWISE, DepthwiseSchedule(7, 16, 0, False)),
    ],
)
def test_code_multiplies_by_vpdpbusd_without_spills(case: Case, schedule: Any) -> None:
    lines = assembly(fused_conv(case), schedule, VNNI).splitlines()
    products = [number for number, line in enumerate(lines) if "vpdpbusd" in line]
    assert products and all("%zmm" in lines[number] for number in products)
    assert not any(re.search(r"\tv\w*mul\w*d\t|vpmadd", line) for line in lines)
    # between the products of one straight run of code nothing is stored on the stack
    labels = [number for number, line in enumerate(lines) if re.match(r"\.?\w+:", line)]
    for number, following in zip(products, products[1:], strict=False):
        if not any(number < label < following for label in labels):
            between = lines[number:following]
            if len(between) < 20:
                assert not [line for line in between if re.search(r"\tvmov\w+\t%[yz]mm\d+, [-\d]*\(%rsp", line)]
