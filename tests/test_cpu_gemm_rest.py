"""Weights of 8 bits that `vpmaddubsw` would saturate with: their split into codes that fit and a rest, and products by both, bit-exact over awkward sizes and the largest codes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import only_kernel
from machines import HASWELL
from tcompile.autotune.cost_model import AnalyticModel
from tcompile.compiler.tvm import relax, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cpu.candidates import offers
from tcompile.targets.cpu.conv_rest import ConvRest
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.gemm_rest import GemmRest
from tcompile.targets.cpu.lower import templates
from tcompile.targets.cpu.short_sums import fitting, products_in_16_bits
from tcompile.targets.cpu.sparse_weights import Constants
from tcompile.targets.cpu.template import machine
from test_cpu_conv import Case, reference
from test_cpu_int8_conv import fused_conv
from test_cpu_int8_gemm import compiled, fused

RANDOM = np.random.default_rng(11)


def extreme(k, n):
    """Every code as large as it can be: 127 in one output, -127, -128 or both signs in turn in others; all pairs of one sign saturate."""
    rows = np.array([[127, 127], [-127, -127], [-128, -128], [127, -128], [-128, 127]])
    return np.stack([np.resize(rows[column % len(rows)], k) for column in range(n)], axis=1).astype(np.int8)


def bell(k, n):
    """What a QDQ graph brings: the largest of an output's codes is 127."""
    w = RANDOM.standard_normal((k, n))
    return np.rint(w / np.abs(w).max(axis=0) * 127).astype(np.int8)


def run(kernel, weight, x, shape, *more):
    out = tvm.runtime.tensor(np.zeros(shape, np.int32))
    library = compiled(kernel, HASWELL)
    library["f"](tvm.runtime.tensor(x), *(tvm.runtime.tensor(array) for array in (*kernel.packings[0].pack(weight), *more)), out)
    return out.numpy(), library


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 128), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_split(k, n, top, seed):
    codes = np.random.default_rng(seed).integers(-top, min(top, 127) + 1, (k, n)).astype(np.int8)
    fit, rest = fitting(codes)
    np.testing.assert_array_equal(fit.astype(int) + rest, codes)
    assert products_in_16_bits([fit]) >= 2 and products_in_16_bits([rest]) >= 2
    assert not (fit.astype(int) * codes < 0).any()
    # one code of a pair at most, and none of a pair that fits
    pairs = np.pad(codes.astype(int), ((0, k % 2), (0, 0))).reshape(-1, 2, n)
    saturated = (np.abs(pairs.sum(axis=1)) > 128) & (pairs[:, 0] * pairs[:, 1] >= 0) & (np.abs(pairs).sum(axis=1) > 128)
    lowered = np.pad(rest, ((0, k % 2), (0, 0))).reshape(-1, 2, n) != 0
    np.testing.assert_array_equal(lowered.sum(axis=1), saturated)


@pytest.mark.parametrize(
    ("m", "k", "n", "weights"), [(8, 32, 1, extreme), (71, 100, 37, extreme), (130, 36, 19, bell), (1, 7, 30, extreme), (5, 70, 37, bell)]
)
def test_bit_exact(m, k, n, weights):
    template, func, weight = GemmRest(), fused((), m, k, n), weights(k, n)
    if weights is bell:
        weight[0:2, 0] = 127
    workload = template.workload(func, Constants.of({1: [weight]}))
    space = template.space(workload, HASWELL)
    x = RANDOM.integers(0, 256, (m, k)).astype(np.uint8)
    x[:2] = 255
    out, library = run(template.build(func, workload, space[m % len(space)], HASWELL), weight, x, (m, n))
    np.testing.assert_array_equal(out, x.astype(np.int32) @ weight.astype(np.int32))
    assert "vpmaddubsw" in library.mod.inspect_source("asm")


@pytest.mark.parametrize("case", [Case((1, 9, 7, 36), 21, (1, 1)), Case((2, 9, 11, 32), 19, (1, 1), stride=(2, 3))], ids=str)
def test_pointwise(case):
    func, weight = fused_conv(case, requantize=False), extreme(case.x[3], case.co)[None, None]
    template = GemmRest()
    workload = template.workload(func, Constants.of({1: [weight]}))
    x = RANDOM.integers(0, 256, case.x).astype(np.uint8)
    x[:, 0] = 255
    want = reference(case, x.astype(np.float64), weight.astype(np.float64), [], "none").astype(np.int32)
    out, _ = run(template.build(func, workload, template.space(workload, HASWELL)[-1], HASWELL), weight, x, want.shape)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 13, 70, 12), 19, (3, 3), stride=(2, 2), pad=(1, 0, 1, 2)),
        Case((1, 12, 13, 4), 20, (3, 5), stride=(1, 3), pad=(2, 2, 2, 2), dilation=(2, 1)),
    ],
    ids=str,
)
def test_direct_convolution(case):
    weight = extreme(case.k[0] * case.k[1] * case.x[3], case.co).reshape(*case.k, case.x[3], case.co)
    func, template = fused_conv(case, requantize=False), ConvRest()
    workload = template.workload(func, Constants.of({1: [weight]}))
    x = RANDOM.integers(0, 256, case.x).astype(np.uint8)
    x[:, 0] = 255
    want = reference(case, x.astype(np.float64), weight.astype(np.float64), [], "none").astype(np.int32)
    space = template.space(workload, HASWELL)
    out, _ = run(template.build(func, workload, space[len(space) // 2], HASWELL), weight, x, want.shape)
    np.testing.assert_array_equal(out, want)


def test_operand_that_only_some_of_the_rows_have():
    """An epilogue that takes row numbers apart."""
    weight, builder = bell(64, 50), relax.BlockBuilder()
    operands = (("x", (3, 10, 64), "uint8"), ("w", weight.shape, "int8"), ("r", (10, 50), "int32"))
    x, w, r = (relax.Var(name, relax.TensorType(shape, dtype)) for name, shape, dtype in operands)
    with builder.function("main"):
        with builder.dataflow():
            y = builder.emit_output(relax.op.add(builder.emit(relax.op.matmul(x, w, out_dtype="int32")), r))
        builder.emit_func_output(y, params=[x, w, r])
    func, template = only_kernel(builder.get()), GemmRest()
    workload = template.workload(func, Constants.of({1: [weight]}))
    kernel = template.build(func, workload, template.space(workload, HASWELL)[4], HASWELL)
    codes, added = RANDOM.integers(0, 256, (3, 10, 64)).astype(np.uint8), RANDOM.integers(-99, 99, (10, 50)).astype(np.int32)
    out, _ = run(kernel, weight, codes, (3, 10, 50), added)
    np.testing.assert_array_equal(out, codes.astype(np.int32) @ weight.astype(np.int32) + added)


def chosen(weight, target, m=128):
    func = fused((), m, *weight.shape)
    found = offers(func, Constants.of({1: [weight]}), templates(), target).candidates
    return AnalyticModel().choose(found, machine(target))[0]


def test_predicted_time_decides():
    """Between pairs with a rest, and codes of 16 bits where too many pairs do not fit; VNNI needs neither."""
    assert chosen(bell(768, 768), HASWELL).template == "gemm_rest"
    assert chosen(extreme(768, 768), HASWELL).workload.kind == "u8s8/wide"
    assert chosen(bell(768, 768), HASWELL, m=1).template == "gemm_rest"
    assert chosen(bell(768, 768), Target.parse("cpu:cascadelake")).template == "gemm"
    with pytest.raises(Unfusable, match="fit 16 bits"):
        GemmRest().workload(fused((), 16, 64, 32), Constants.of({1: [np.full((64, 32), 64, np.int8)]}))


def test_inner_loops_keep_their_sums_in_registers():
    template, func, weight = GemmRest(), fused((), 128, 256, 64), bell(256, 64)
    workload = template.workload(func, Constants.of({1: [weight]}))
    schedule = max((s for s in template.space(workload, HASWELL) if s.nv == 2), key=lambda s: s.mr)
    text = compiled(template.build(func, workload, schedule, HASWELL), HASWELL).mod.inspect_source("asm")
    loops = [part for part in re.findall(r"^\.LBB[^:]*:\n((?:\t.*\n)*?)\tj", text, re.M) if "vpmaddubsw" in part]
    assert len(loops) >= 2 and all("(%rsp)" not in part for part in loops)


def test_wide_codes_are_read_as_they_are():
    """No code is widened in the loop that multiplies."""
    func, template = fused((), 96, 256, 64), Gemm()
    workload = template.workload(func, Constants.of({1: [extreme(256, 64)]}))
    schedule = max((s for s in template.space(workload, HASWELL) if s.nv == 2 and not s.mc), key=lambda s: s.mr)
    text = compiled(template.build(func, workload, schedule, HASWELL), HASWELL).mod.inspect_source("asm")
    loops = [part for part in re.findall(r"^\.LBB[^:]*:\n((?:\t.*\n)*?)\tj", text, re.M) if "vpmaddwd" in part]
    assert loops and all("vpmovzx" not in part and "(%rsp)" not in part for part in loops)
