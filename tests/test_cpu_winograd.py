"""Winograd template: the transforms, numbers over awkward shapes, the rounding error of the points, and the code of the inner loop."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.tvm import tvm
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cpu.conv_winograd import ConvWinograd, WinogradSchedule, pack_winograd, tile_counts
from tcompile.targets.cpu.winograd import POINTS, from_points, transforms
from test_cpu_conv import AVX2, AVX512, WEIGHT, Case, compiled, fused_conv, inner_loops, reference, schedules

ONES = (1, 1, 1, 1)
CASES = [
    Case((1, 8, 8, 16), 16, (3, 3), pad=ONES),
    Case((1, 9, 11, 13), 19, (3, 3), pad=ONES),
    Case((2, 7, 7, 8), 40, (3, 3), pad=(0, 1, 2, 0)),
    Case((3, 1, 1, 9), 8, (3, 3), pad=ONES),
    Case((1, 5, 3, 33), 17, (3, 3)),
    Case((1, 3, 30, 8), 8, (3, 3), pad=(2, 2, 2, 2)),
    Case(("n", 6, 10, 24), 30, (3, 3), pad=ONES, sizes={"n": 3}),
]


@pytest.mark.parametrize("m", POINTS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_matrices_are_a_filter(m, seed):
    rng = np.random.default_rng(seed)
    d, g = rng.standard_normal(m + 2), rng.standard_normal(3)
    made = transforms(m)
    want = [d[i : i + 3] @ g for i in range(m)]
    np.testing.assert_allclose(made.output @ ((made.filter @ g) * (made.input @ d)), want, rtol=1e-12, atol=1e-12)


def test_packing_is_zero_filled():
    packed = pack_winograd(np.ones((3, 3, 2, 5), "float32"), 2, 4)
    assert packed.shape == (2, 16, 2, 4)
    assert (packed[1, :, :, 1:] == 0).all() and (packed[1, 0, :, 0] == 1).all()


@pytest.mark.sweep
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_against_torch(index):
    case, epilogue = CASES[index], ("relu", "residual", "hardswish", "none")[index % 4]
    rng = np.random.default_rng(index)
    fused, template = fused_conv(case, epilogue), ConvWinograd()
    workload = template.workload(fused, WEIGHT)
    x = rng.standard_normal(tuple(case.sizes.get(dim, dim) for dim in case.x)).astype("float32")
    w = rng.standard_normal((3, 3, case.x[3], case.co)).astype("float32")
    shape = reference(case, x, w, [], "none").shape
    sizes = ([] if epilogue == "none" else [(case.co,)]) + ([shape] if epilogue == "residual" else [])
    extra = [rng.standard_normal(size).astype("float32") for size in sizes]
    want = reference(case, x, w, extra, epilogue)
    shared = next(schedule for schedule in template.space(workload, AVX2) if schedule.shared)
    for schedule in [*schedules(template, workload, AVX2, 4, index), shared]:
        kernel, executable = compiled(fused, template, workload, schedule, AVX2)
        args = [x, kernel.packings[0].pack(w), *extra]
        assert args[1].shape == kernel.packings[0].shape
        tensors = [tvm.runtime.tensor(array) for array in (*args, np.full(shape, np.nan, "float32"))]
        executable["kernel"](*tensors)
        np.testing.assert_allclose(tensors[-1].numpy(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=str(schedule))


def _error(points, d, g):
    """Largest error of F(m x m, 3 x 3) in float32 over the tile's largest output; d: [Ci, m + 2, m + 2], g: [Ci, 3, 3]."""
    made = from_points(points)
    m = len(points) - 1
    at, bt = made.output.astype("float32"), made.input.astype("float32")
    u = np.einsum("ia,cab,jb->cij", made.filter, g.astype("float64"), made.filter).astype("float32")
    v = bt @ d @ bt.T
    y = at @ np.add.accumulate(u * v, axis=0)[-1] @ at.T
    want = sum(d[:, i : i + m, j : j + m].astype("float64") * g[:, i, j, None, None].astype("float64") for i in range(3) for j in range(3)).sum(0)
    return np.abs(y - want).max() / np.abs(want).max()


def test_the_points_keep_the_rounding_error_small():
    """Over 64 channels the chosen points of F(4, 3) err on average three times less than the customary ones, and under 2e-6 of the range."""
    rng = np.random.default_rng(0)
    tiles = [(rng.standard_normal((64, 6, 6)).astype("float32"), rng.standard_normal((64, 3, 3)).astype("float32")) for _ in range(50)]
    ours, customary = (np.mean([_error(points, d, g) for d, g in tiles]) for points in (POINTS[4], (0.0, 1.0, -1.0, 2.0, -2.0)))
    assert ours < customary / 2 and ours < 2e-6


@pytest.mark.parametrize(("target", "schedule", "register"), [
    (AVX2, WinogradSchedule(4, 2, 4, 3, 8, False), "ymm"),
    (AVX512, WinogradSchedule(4, 2, 14, 2, 16, False), "zmm"),
])  # fmt: skip
def test_inner_loop_has_no_spills(target, schedule, register):
    fused = fused_conv(Case((1, 28, 28, 64), 96, (3, 3), pad=ONES), "relu")
    workload = ConvWinograd().workload(fused, WEIGHT)
    _, executable = compiled(fused, ConvWinograd(), workload, schedule, target)
    # the transforms are loops of multiply-adds too, with more of other instructions
    loops = [body for body in inner_loops(executable.mod.inspect_source("asm"), 12) if sum("vfmadd" in line for line in body) > len(body) / 2]
    assert loops
    for body in loops:
        assert all(f"%{register}" in line for line in body if "vfmadd" in line)
        assert not [line for line in body if re.search(r"vmov[ua]ps\s+%[yz]mm\d+, ", line)], "an accumulator is stored inside the loop"


def test_the_space_covers_small_and_large_images():
    for size in (1, 4, 7, 56):
        workload = ConvWinograd().workload(fused_conv(Case((1, size, size, 64), 64, (3, 3), pad=ONES)), WEIGHT)
        space = list(ConvWinograd().space(workload, AVX512))
        assert len(set(space)) == len(space) >= 4
        assert all(schedule.strip <= tile_counts(workload, schedule.m)[0] for schedule in space)


@pytest.mark.parametrize("case", [
    Case((1, 8, 8, 16), 16, (3, 3), stride=(2, 2), pad=ONES),
    Case((1, 8, 8, 16), 16, (3, 3), dilation=(2, 2)),
    Case((1, 8, 8, 16), 16, (3, 3), groups=2),
    Case((1, 8, 8, 16), 16, (5, 5)),
    Case((1, "h", 8, 16), 16, (3, 3), sizes={"h": 9}),
    Case((1, 8, 8, 3), 16, (3, 3)),
], ids=str)  # fmt: skip
def test_what_it_refuses(case):
    with pytest.raises(Unfusable):
        ConvWinograd().workload(fused_conv(case), WEIGHT)
