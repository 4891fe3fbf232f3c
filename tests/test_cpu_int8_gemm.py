"""Integer GEMM: bit-exact against numpy over awkward sizes and epilogues, and the instructions it compiles to."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import only_kernel
from machines import runnable, widest
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.gemm_schedules import GemmSchedule
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE

SCALE, ZERO = np.float32(0.013), 3.0


def fused(lead, m, k, n, epilogue="none"):
    """x u8 [*lead, m, k] @ w s8 [k, n] with one of the epilogues of `reference`, as Relax fuses it; m may be a symbol's name."""
    builder = relax.BlockBuilder()
    rows = tirx.Var(m, "int64") if isinstance(m, str) else m
    x, w = relax.Var("x", relax.TensorType((*lead, rows, k), "uint8")), relax.Var("w", relax.TensorType((k, n), "int8"))
    params = [x, w]

    def parameter(name, shape, dtype):
        params.append(relax.Var(name, relax.TensorType(shape, dtype)))
        return params[-1]

    with builder.function("main"):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, w, out_dtype="int32"))
            shape = y.ty.shape
            if epilogue != "none":
                y = builder.emit(relax.op.add(y, parameter("b", (n,), "int32")))
                y = builder.emit(relax.op.multiply(relax.op.astype(y, "float32"), parameter("s", (n,), "float32")))
            if epilogue == "residual":
                y = builder.emit(relax.op.add(y, parameter("r", shape, "float32")))
            if epilogue in ("requantize", "residual8"):
                if epilogue == "residual8":
                    r = relax.op.subtract(relax.op.astype(parameter("r", shape, "uint8"), "float32"), relax.const(7.0, "float32"))
                    y = builder.emit(relax.op.add(y, relax.op.multiply(r, relax.const(0.5, "float32"))))
                y = builder.emit(relax.op.nn.relu(y))
                y = builder.emit(relax.op.round(relax.op.divide(y, relax.const(SCALE, "float32"))))
                y = builder.emit(relax.op.clip(relax.op.add(y, relax.const(ZERO, "float32")), 0, 255))
                y = builder.emit(relax.op.astype(y, "uint8"))
            y = builder.emit_output(y)
        builder.emit_func_output(y, params=params)
    return only_kernel(builder.get())


def reference(epilogue, x, w, *rest):
    """The same in numpy: int32, then float32 one rounding per operation."""
    y = x.astype(np.int32) @ w.astype(np.int32)
    if epilogue == "none":
        return y
    bias, scale, *residual = rest
    y = (y + bias).astype(np.float32) * scale
    if epilogue == "residual":
        return y + residual[0]
    if epilogue == "dequantize":
        return y
    if residual:
        y = y + (residual[0].astype(np.float32) - np.float32(7)) * np.float32(0.5)
    y = np.rint(np.maximum(y, 0) / SCALE)
    return np.clip(y + np.float32(ZERO), 0, 255).astype(np.uint8)


def operands(func, sizes, seed=0):
    """Operands over their full ranges; scales that put about half of the sums inside of u8."""
    rng = np.random.default_rng(seed)
    found = []
    for param in func.params[:-1]:
        shape = [sizes if isinstance(dim, tirx.Var) else int(dim) for dim in param.shape]
        kind = str(param.ty.dtype)
        low, high = {"uint8": (0, 256), "int8": (-128, 128), "int32": (-10000, 10000)}.get(kind, (0, 0))
        if kind == "float32":
            found.append(rng.uniform(1e-6, 1e-4, shape).astype(kind) if len(shape) == 1 else rng.standard_normal(shape).astype(kind))
        else:
            found.append(rng.integers(low, high, shape).astype(kind))
    return found


def compiled(kernel, target):
    return tvm.compile(kernel.func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)


def check(func, epilogue, schedule, target, m=0, template=None):
    template = template or Gemm()
    workload = template.workload(func, frozenset([1]))
    kernel = template.build(func, workload, schedule or template.space(workload, target)[0], target)
    arrays = operands(func, m)
    want = reference(epilogue, *arrays)
    (packing,) = kernel.packings
    packed = packing.pack(arrays[1])
    assert packed.shape == packing.shape
    out = tvm.runtime.tensor(np.zeros(want.shape, want.dtype))
    compiled(kernel, target)["f"](*(tvm.runtime.tensor(array) for array in (arrays[0], packed, *arrays[2:])), out)
    if epilogue in ("none", "requantize", "residual8"):
        np.testing.assert_array_equal(out.numpy(), want)
    else:
        np.testing.assert_allclose(out.numpy(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("lead", "m", "k", "n"), [((), 13, 17, 31), ((), 1, 3, 1), ((2, 3), 7, 64, 100), ((), 129, 33, 50), ((), 1, 1, 1), ((), 5, 130, 257)]
)
@pytest.mark.parametrize("pick", [0, 0.5, 1])
@pytest.mark.parametrize("target", runnable())
def test_awkward_sizes(lead, m, k, n, pick, target):
    func = fused(lead, m, k, n)
    space = Gemm().space(Gemm().workload(func, frozenset([1])), target)
    check(func, "none", space[int(pick * (len(space) - 1))], target)


@pytest.mark.sweep
@pytest.mark.parametrize("epilogue", ["dequantize", "residual", "requantize", "residual8"])
@pytest.mark.parametrize(("m", "k", "n"), [(7, 30, 50), ("rows", 18, 33)])
@pytest.mark.parametrize("target", runnable())
def test_epilogues(epilogue, m, k, n, target):
    func = fused((2,) if m == 7 else (), m, k, n, epilogue)
    check(func, epilogue, GemmSchedule(4, 2, target.lanes(), 0), target, 11)


def test_extremes_do_not_saturate():
    """255 * -128 in every product: pairs of them leave 16 bit."""
    for param in runnable():
        target = param.values[0]
        if target is None:
            continue
        func = fused((), 2, 64, 40)
        kernel = Gemm().build(func, Gemm().workload(func, frozenset([1])), GemmSchedule(2, 2, target.lanes(), 0), target)
        x, w = np.full((2, 64), 255, np.uint8), np.full((64, 40), -128, np.int8)
        out = tvm.runtime.tensor(np.zeros((2, 40), np.int32))
        compiled(kernel, target)["f"](tvm.runtime.tensor(x), tvm.runtime.tensor(kernel.packings[0].pack(w)), out)
        assert (out.numpy() == 64 * 255 * -128).all()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.integers(0, 10**6))
def test_any_size(m, k, n, pick):
    target = widest() or Target.parse("cpu:haswell")
    func = fused((), m, k, n)
    space = Gemm().space(Gemm().workload(func, frozenset([1])), target)
    check(func, "none", space[pick % len(space)], target)


@pytest.mark.parametrize(
    ("machine", "schedule", "instruction", "register"),
    [
        ("haswell", (4, 2, 8), "vpmaddwd", "ymm"),
        ("alderlake", (4, 3, 8), "vpdpbusd", "ymm"),
        ("skylake-avx512", (8, 3, 16), "vpmaddwd", "zmm"),
        ("cascadelake", (8, 3, 16), "vpdpbusd", "zmm"),
    ],
)
def test_inner_loop_without_spills(machine, schedule, instruction, register):
    target = Target.parse(f"cpu:{machine}")
    func = fused((), 128, 256, 384, "requantize")
    kernel = Gemm().build(func, Gemm().workload(func, frozenset([1])), GemmSchedule(*schedule, 0), target)
    assembly = compiled(kernel, target).mod.inspect_source("asm")
    hot = max(re.split(r"\n\.LBB", assembly), key=lambda block: block.count(instruction))
    hot = re.split(r"\n\tj", hot)[0]
    assert len(re.findall(rf"{instruction}.*%{register}", hot)) >= schedule[0] * schedule[1]
    assert "(%rsp)" not in hot
    # the epilogue converts and rounds whole vectors
    assert re.search(rf"vcvtdq2ps.*%{register}", assembly)
    assert re.search(rf"vroundps.*%{register}|vrndscaleps.*%{register}", assembly)
    assert "vcvttss2si" not in assembly
