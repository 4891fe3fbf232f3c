"""Products of u8 x s8 by `vpmaddubsw`: used where the weights cannot saturate it, exact there up to the last weight that fits, and which instructions that gives."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import HASWELL
from tcompile.compiler.tvm import tvm
from tcompile.passes.quantization.integers import weight_codes
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.gemm_schedules import GemmSchedule
from tcompile.targets.cpu.short_sums import products_in_16_bits
from tcompile.targets.cpu.sparse_weights import Constants
from test_cpu_conv import reference, schedules, template_for
from test_cpu_int8_conv import CASES, fused_conv
from test_cpu_int8_gemm import compiled, fused

#: random numbers
RANDOM = np.random.default_rng(5)


def weights(fit: int, shape: tuple[int, ...]) -> np.ndarray:
    """Of which sums of `fit` products fit 16 bits, and not a unit more: the largest codes of one sign in every place."""
    sign = np.where(RANDOM.random(shape[-1]) < 0.5, -1, 1)
    return np.broadcast_to(128 // fit * sign, shape).clip(-128, 127).astype(np.int8)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 127), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_what_fits(k, n, top, seed):
    """Against the sums themselves, at the largest activation."""
    codes = np.random.default_rng(seed).integers(-top, top + 1, (k, n)).astype(np.int8)
    wide = np.pad(codes.astype(np.int64), ((0, -k % 8), (0, 0))).reshape(-1, 2, 2, 2, n) * 255

    def fits(axes):
        return all(np.abs(np.where(sign * wide > 0, wide, 0).sum(axis=axes)).max() < 2**15 for sign in (1, -1))

    assert products_in_16_bits([codes]) == (4 if fits((1, 3)) else 2 if fits(3) else 1)
    # wherever words begin, the largest weight alone has to do
    assert products_in_16_bits([codes], aligned=False) == (4 if top_of(codes) <= 32 else 2 if top_of(codes) <= 64 else 1)


def top_of(codes):
    return int(np.abs(codes.astype(int)).max())


@pytest.mark.parametrize("make", [RANDOM.standard_normal, RANDOM.random, lambda shape: RANDOM.standard_t(2, shape)])
@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (512, 64), (20, 16, 3, 3), (20, 3, 3, 3), (20, 30, 1, 1)])
def test_quantized_weights_fit(make, shape):
    """Whatever they are distributed like, at the cost of a bit at most in the mean, and of none that matters to a sum: rounding is to the nearest."""
    weight = make(shape).astype(np.float32)
    made, plain = weight_codes(weight, True), weight_codes(weight, False)
    folded = len(shape) == 4 and shape[1] % 8 and shape[2] > 1
    codes = made.codes if len(shape) == 2 else made.codes.transpose(2, 3, 1, 0)
    assert products_in_16_bits([codes], aligned=not folded) >= 2
    assert np.mean(made.scale / plain.scale) <= 2.01 and (made.scale >= plain.scale).all()
    assert np.abs(made.decode() - weight).max() <= made.scale.max() * 0.501


def test_bell_shaped_weights_add_four():
    assert products_in_16_bits([weight_codes(RANDOM.standard_normal((768, 64)).astype(np.float32), True).codes]) == 4
    assert products_in_16_bits([weight_codes(RANDOM.standard_normal((768, 64)).astype(np.float32), False).codes]) == 1


@pytest.mark.sweep
@pytest.mark.parametrize(("fit", "instruction"), [(1, "vpmaddwd"), (2, "vpmaddubsw"), (4, "vpmaddubsw")])
@pytest.mark.parametrize("k", [1, 5, 8, 12, 67])
def test_products_at_the_edge(fit, instruction, k):
    """All activations 255: one more would saturate."""
    target, m, n = HASWELL, 7, 37
    weight = weights(fit, (k, n))
    func, template = fused((), m, k, n), Gemm()
    workload = template.workload(func, Constants.of({1: [weight]}))
    for schedule in template.space(workload, target)[:: max(1, len(template.space(workload, target)) // 3)]:
        kernel = template.build(func, workload, schedule, target)
        library = compiled(kernel, target)
        assert instruction in library.mod.inspect_source("asm")
        x, out = np.full((m, k), 255, np.uint8), tvm.runtime.tensor(np.zeros((m, n), np.int32))
        x[1] = RANDOM.integers(0, 256, k)
        packed = kernel.packings[0].pack(weight)
        assert packed.shape == kernel.packings[0].shape
        library["f"](tvm.runtime.tensor(x), tvm.runtime.tensor(packed), out)
        np.testing.assert_array_equal(out.numpy(), x.astype(np.int32) @ weight.astype(np.int32))


@pytest.mark.sweep
@pytest.mark.parametrize("fit", [2, 4])
@pytest.mark.parametrize("index", [0, 1, 2, 5, 7, 9, 10, 11, 13])
def test_convolutions_at_the_edge(fit, index):
    case = CASES[index]
    func = fused_conv(case, requantize=False)
    template, _ = template_for(func)
    w = weights(fit, (*case.k, case.x[3] // case.groups, case.co))
    x = np.full(tuple(case.sizes.get(dim, dim) for dim in case.x), 255, np.uint8)
    x[:, 1:] = RANDOM.integers(0, 256, x[:, 1:].shape)
    workload = template.workload(func, Constants.of({1: [w]}))
    assert workload.kind == {2: "u8s8/pairs", 4: "u8s8/quads"}[fit]
    (schedule,) = schedules(template, workload, HASWELL, 1, index)
    kernel = template.build(func, workload, schedule, HASWELL)
    packed = kernel.packings[0].pack(w)
    assert packed.shape == kernel.packings[0].shape
    want = reference(case, x.astype(np.float64), w.astype(np.float64), [], "none").astype(np.int32)
    out = tvm.runtime.tensor(np.zeros(want.shape, np.int32))
    compiled(kernel, HASWELL)["f"](tvm.runtime.tensor(x), tvm.runtime.tensor(packed), out)
    np.testing.assert_array_equal(out.numpy(), want)


@pytest.mark.parametrize("name", ["pairs", "quads"])
def test_inner_loops_keep_their_sums_in_registers(name):
    target, func, template = HASWELL, fused((), 96, 256, 64), Gemm()
    workload = template.workload(func, Constants.of({1: [weights({"pairs": 2, "quads": 4}[name], (256, 64))]}))
    mr = max(schedule.mr for schedule in template.space(workload, target) if schedule.nv == 2)
    text = compiled(template.build(func, workload, GemmSchedule(mr, 2, 8, 0), target), target).mod.inspect_source("asm")
    loops = [part for part in re.findall(r"^\.LBB[^:]*:\n((?:\t.*\n)*?)\tj", text, re.M) if "vpmaddubsw" in part]
    assert loops and all("(%rsp)" not in part for part in loops)
