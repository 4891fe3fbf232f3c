"""Few-bit weights by int8 activations on CPUs: against the numpy reference of the operator over awkward sizes and every width, the instructions used, and rows of int8 with their scales."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tcompile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import runnable
from tcompile.compiler.dialect.weight_only import reference
from tcompile.compiler.tvm import tvm
from tcompile.passes.quantization.formats import GroupedInt, Int8
from tcompile.passes.quantization.quantize import Quantize
from tcompile.targets.base import Target
from tcompile.targets.common.words import planes
from tcompile.targets.cpu.weight_only_int8 import CHUNK, WeightOnlyInt8, in_planes, words_of
from test_cpu_weight_only import WEIGHTS, compiled, fused

CASES = [
    (1, 128, 64, GroupedInt(4, 32)),
    (3, 1, 5, GroupedInt(8, 2, symmetric=False)),
    (33, 97, 41, GroupedInt(3, 22)),
    ("rows", 131, 33, GroupedInt(6, 64, symmetric=False)),
    (5, 70, 20, GroupedInt(1, 32)),
]


def check(m, k, n, made, target):
    """Sums of a group are exact: results differ from the reference by roundings of float32 of each group alone."""
    rng = np.random.default_rng(k)
    groups = made.groups(k)
    codes = rng.integers(0, 1 << made.bits, (groups * made.group, n), dtype=np.uint8)
    arrays = [made.pack(codes), rng.standard_normal((groups, n)).astype(np.float32)]
    arrays += [] if made.symmetric else [rng.integers(0, 1 << made.bits, (groups, n), dtype=np.uint8)]
    bias = rng.standard_normal(n).astype(np.float32)
    template, func = WeightOnlyInt8(), fused(m, k, n, made, "int8")
    workload = template.workload(func, WEIGHTS)
    space = list(template.space(workload, target))
    for schedule in space[:: max(1, len(space) - 1)]:
        kernel = template.build(func, workload, schedule, target)
        args = list(arrays)
        for packing in kernel.packings:
            args[packing.param - 1] = packing.pack(arrays[packing.param - 1])
            assert args[packing.param - 1].shape == packing.shape
        executable = compiled(kernel, target)
        for rows in [m] if isinstance(m, int) else [1, 6, 9, 33]:
            x = rng.integers(-128, 128, (rows, k), dtype=np.int8)
            want = np.maximum(reference(x, *arrays, bits=made.bits, group=made.group) + bias, 0)
            most = reference(np.abs(x.astype(np.int32)), arrays[0], np.abs(arrays[1]), *arrays[2:], bits=made.bits, group=made.group)
            out = tvm.runtime.tensor(np.full((rows, n), np.nan, np.float32))
            executable["f"](*(tvm.runtime.tensor(array) for array in (x, *args, bias)), out)
            assert (np.abs(out.numpy() - want) <= 2.0**-22 * (groups + 2) * (np.abs(want) + np.abs(most) + 1e3)).all(), schedule


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", runnable())
def test_against_the_reference(case, target):
    check(*case, target)


@pytest.mark.networks
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", runnable())
def test_every_width(bits, symmetric, target):
    for m, k, n, group in ((1, 67, 33, 32), (33, 129, 20, 48), (9, 37, 17, 2)):
        check(m, k, n, GroupedInt(bits, group, symmetric), target)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_planes_hold_the_codes(bits, groups, k, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (groups, k, 3), dtype=np.uint8)
    words = in_planes(codes, bits).reshape(groups, words_of(k, bits), 3)
    assert words.shape[1] * 32 >= k * bits and (k % CHUNK or words.shape[1] * 32 == k * bits)
    octets = words.view(np.uint8).reshape(groups, -1, 3, 4).transpose(0, 1, 3, 2)
    found, row = np.zeros_like(codes), 0
    for start in range(0, k, CHUNK):
        quads = -(-min(CHUNK, k - start) // 4)
        for width, low in planes(bits):
            for at in range(min(CHUNK, k - start)):
                word, field = divmod(at // 4, 8 // width)
                found[:, start + at] |= (octets[:, row + word, at % 4] >> width * field & (1 << width) - 1) << low
            row += -(-quads // (8 // width))
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(
    ("machine", "bits", "instruction", "nv"), [("cascadelake", 4, "vpdpbusd", 4), ("cascadelake", 3, "vpdpbusd", 4), ("haswell", 4, "vpmaddubsw", 2)]
)
def test_codes_are_multiplied_as_bytes(machine, bits, instruction, nv):
    target = Target.parse(f"cpu:{machine}")
    template, func = WeightOnlyInt8(), fused(1, 256, 256, GroupedInt(bits, 32), "int8")
    workload = template.workload(func, WEIGHTS)
    schedule = next(schedule for schedule in template.space(workload, target) if schedule.nv == nv)
    assembly = compiled(template.build(func, workload, schedule, target), target).mod.inspect_source("asm")
    hot = max(re.split(r"\n\.LBB", assembly), key=lambda block: block.count(instruction))
    # eight words of four k of every vector, and the sums of x; a conversion a group and vector
    assert hot.count(instruction) == 8 * (nv + 1) and hot.count("vcvtdq2ps") == nv
    # totals may wait in memory for the end of a group
    assert len(re.findall(r"\tvmov\w+\t%[yz]mm\d+, [-\d]*\(%rsp", hot)) <= nv


@pytest.mark.sweep
@pytest.mark.parametrize(("quantize", "loss"), [("w8a8", 0.02), (Quantize("w4a8", group=8), 0.15), ("w4fp8", 0.25)])
def test_a_model_by_rows_in_few_bits(quantize, loss):
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(20, 37), torch.nn.ReLU(), torch.nn.Linear(37, 24), torch.nn.GELU(), torch.nn.Linear(24, 7)).eval()
    x = torch.randn(5, 20)
    x[1] *= 1e4  # rows have scales of their own
    model = tcompile.compile(net, example_inputs=(x,), quantize=quantize)
    ours, exact = model(x.numpy()), net(x).detach().numpy()
    assert (0 < np.linalg.norm(ours - exact, axis=1)).all()
    assert (np.linalg.norm(ours - exact, axis=1) < loss * np.linalg.norm(exact, axis=1)).all()
    if quantize != "w4fp8":
        assert [row["template"] for row in model.report()["kernels"]].count("weight_only int8") == 3
    x[2, 3], x[3, 4] = np.nan, np.inf
    finite = np.isfinite(model(x.numpy()))
    assert (finite == np.array([True, True, False, False, True])[:, None]).all()


def test_rows_of_int8_are_the_format():
    """One layer in numpy, as the formats say."""
    torch.manual_seed(1)
    net, x = torch.nn.Linear(33, 6, bias=False).eval(), torch.randn(4, 33)
    x[2] = 0
    ours = tcompile.compile(net, example_inputs=(x,), quantize="w5a8")(x.numpy())
    made = GroupedInt(8, 32)  # it makes an output
    encoded = made.encode_best(net.weight.detach().numpy().T.copy())
    codes = Int8(axis=0).encode(x.numpy())
    want = codes.codes.astype(np.float64) @ made.decode(encoded, 33).astype(np.float64) * codes.scale
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)
