"""GEMM with blocks of K: numbers over awkward sizes, the instructions it compiles to, and where it is chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import runnable
from tcompile.compiler.tvm import tvm
from tcompile.targets.base import Target
from tcompile.targets.cpu.gemm import Gemm, GemmWorkload
from tcompile.targets.cpu.gemm_schedules import GemmSchedule, every, suited
from test_cpu_conv import inner_loops
from test_cpu_gemm import compiled, fused

INTEL = replace(Target.parse("cpu:sapphirerapids"), cores=1)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("lead", "m", "k", "n", "mc", "kc", "nc"),
    [
        ((), 13, 17, 31, 8, 16, 1),
        ((), 1, 33, 1, 0, 16, 2),
        ((2, 3), 7, 64, 100, 16, 16, 2),
        ((), 37, 113, 150, 12, 32, 4),
        ((), 24, 97, 95, 8, 48, 8),
        ((3,), 11, 391, 49, 0, 208, 1),
    ],
)
@pytest.mark.parametrize("tile", [(4, 3), (3, 2), (1, 1)])
@pytest.mark.parametrize("target", runnable())
def test_awkward_sizes(lead, m, k, n, mc, kc, nc, tile, target):
    template, func = Gemm(), fused(lead, m, k, n)
    kernel = template.build(func, template.workload(func, frozenset([1])), GemmSchedule(*tile, target.lanes(), mc, kc, nc), target)
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape).astype("float32") for shape in ((*lead, m, k), (k, n), (n,)))
    w /= np.sqrt(np.float32(k))
    out = tvm.runtime.tensor(np.full((*lead, m, n), np.nan, "float32"))
    compiled(kernel, target)["f"](tvm.runtime.tensor(x), tvm.runtime.tensor(kernel.packings[0].pack(w)), tvm.runtime.tensor(b), out)
    np.testing.assert_allclose(out.numpy(), np.maximum(x.astype("float64") @ w + b, 0), rtol=1e-5, atol=1e-5)


def test_inner_loop_is_fma_without_spills():
    func = fused((), 128, 3072, 768)
    kernel = Gemm().build(func, Gemm().workload(func, frozenset([1])), GemmSchedule(8, 3, 16, 0, 384, 4), INTEL)
    loops = inner_loops(compiled(kernel, INTEL).mod.inspect_source("asm"), 24)
    assert loops
    for body in loops:
        text = "\n".join(body)
        assert "zmm" in text and "(%rsp)" not in text and "prefetcht1" in text


@given(st.integers(1, 2000), st.integers(1, 5000), st.integers(1, 4000), st.sampled_from([1, 2, 8, 64]))
def test_every_schedule_covers_all_and_shares_work(m, k, n, cores):
    """Chunks and blocks are whole tiles and lines, none is larger than what it cuts, and cores get tasks where all rows at once would give them some."""
    workload, target = GemmWorkload(1, m, k, n, True, ""), replace(INTEL, cores=cores)
    found = suited(workload, target)
    assert found
    for schedule in found:
        assert 0 <= schedule.mc < m + schedule.mr and schedule.mc % schedule.mr == 0
        assert schedule.kc % 16 == 0 and schedule.kc < k and (schedule.kc or schedule.nc == 1)
        assert Gemm().features(workload, schedule, target).tasks >= 1
    if not any(schedule in every(workload, target) for schedule in found):
        tasks = [Gemm().features(workload, schedule, target).tasks for schedule in found]
        assert min(tasks) >= cores


@pytest.mark.parametrize(
    ("m", "k", "n", "chunk", "blocked"),
    [
        (128, 768, 3072, 0, False),  # a quarter of the cache
        (1024, 768, 3072, 96, False),
        (1024, 384, 1536, 96, False),
        (128, 3072, 768, 0, True),
        (1024, 3072, 768, 128, True),
        (1, 3072, 768, 0, False),
    ],
)
def test_chunks_suit_the_second_level_cache(m, k, n, chunk, blocked):
    tiles = [schedule for schedule in suited(GemmWorkload(1, m, k, n, True, ""), INTEL) if (schedule.mr, schedule.nv) == (min(8, m), 3)]
    assert [(schedule.mc, schedule.kc > 0) for schedule in tiles] == [(chunk, blocked)]


def test_other_machines_keep_the_choice_to_the_cost_model():
    workload = GemmWorkload(1, 1024, 3072, 768, True, "")
    for machine in ("haswell", "znver4"):
        target = Target.parse(f"cpu:{machine}")
        assert suited(workload, target) == every(workload, target)
    for other in (replace(workload, packed=False), replace(workload, m=None), replace(workload, kind="bf16")):
        assert suited(other, INTEL) == every(other, INTEL)
