"""Sparse integer GEMM: bit-exact against numpy over awkward sizes, epilogues and patterns of zeros, and the instructions it compiles to."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import runnable, widest
from tcompile.compiler.tvm import tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cpu.dot import MADD, VNNI
from tcompile.targets.cpu.sparse_blocks import BlockSchedule, GemmBlocks
from tcompile.targets.cpu.sparse_columns import ColumnSchedule, GemmColumns
from tcompile.targets.cpu.sparse_weights import Constants, compress
from test_cpu_int8_gemm import compiled, fused, operands, reference
from test_cpu_sparse import schedules

SIZES = [((), 1, 24, 40), ((2, 3), 7, 64, 100), ((), 129, 8, 50)]


def holes(w, keep, r, c, rng):
    """[k, n] codes of which whole blocks of r x c are zero, a share `keep` left."""
    k, n = w.shape
    mask = np.kron(rng.random((-(-k // r), -(-n // c))) < keep, np.ones((r, c)))[:k, :n]
    return (w * mask).astype("int8")


def check(template, func, epilogue, target, m, keep, r, c, pick, seed=0):
    arrays = operands(func, m, seed)
    arrays[1] = holes(arrays[1], keep, r, c, np.random.default_rng(seed))
    workload = template.workload(func, Constants.of({1: [arrays[1]]}))
    if isinstance(template, GemmColumns) and not target.features & {"avx512vnni"}:
        with pytest.raises(Unfusable, match="two codes"):
            template.space(workload, target)
        return
    space = schedules(template, workload, target)
    kernel = template.build(func, workload, space[int(pick * (len(space) - 1))], target)
    want = reference(epilogue, *arrays)
    stream = kernel.packings[0].pack(arrays[1])
    out = tvm.runtime.tensor(np.zeros(want.shape, want.dtype))
    compiled(kernel, target)["f"](*(tvm.runtime.tensor(array) for array in (arrays[0], *stream, *arrays[2:])), out)
    if want.dtype == np.float32:
        np.testing.assert_allclose(out.numpy(), want, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(out.numpy(), want)


@pytest.mark.sweep
@pytest.mark.parametrize(("lead", "m", "k", "n"), SIZES)
@pytest.mark.parametrize("template", [GemmBlocks(), GemmColumns()], ids=lambda template: template.name)
@pytest.mark.parametrize("target", runnable())
def test_awkward_sizes(lead, m, k, n, template, target):
    func = fused(lead, m, k, n)
    for pick, keep, r, c in ((0, 0.3, 1, 1), (0.5, 0.0, 1, 1), (1, 0.2, 4, 16)):
        check(template, func, "none", target, m, keep, r, c, pick)


@pytest.mark.sweep
@pytest.mark.parametrize(("epilogue", "m"), [("dequantize", 7), ("residual", "rows"), ("requantize", "rows"), ("residual8", 7)])
@pytest.mark.parametrize("template", [GemmBlocks(), GemmColumns()], ids=lambda template: template.name)
@pytest.mark.parametrize("target", runnable())
def test_epilogues(epilogue, m, template, target):
    check(template, fused((2,) if m == 7 else (), m, 32, 50, epilogue), epilogue, target, 11, 0.3, 4, 16, 0.5)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 70), st.floats(0, 0.5), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_any_size(m, quads, n, keep, pick, blocks, seed):
    if quads * n < 64:
        n += 64
    target = widest() or Target.parse("cpu:haswell")
    template = GemmBlocks() if blocks else GemmColumns()
    check(template, fused((), m, 4 * quads, n), "none", target, m, keep, 4, 1, pick, seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.sampled_from([4, 8]), st.sampled_from([1, 8, 16]), st.floats(0, 1), st.sampled_from([VNNI, MADD]))
def test_streams_hold_the_codes(quads, n, r, c, keep, dot):
    """Words of codes, in the order that the instruction adds them up."""
    rng = np.random.default_rng(quads * 100 + n)
    w = holes(rng.integers(-128, 128, (4 * quads, n)).astype("int8"), keep, 4, 1, rng)
    stream = compress(w, r, c, dot)
    codes = stream.values.view(np.int8 if dot is VNNI else np.int16).reshape(len(stream.values), r // dot.group, c, dot.group)
    back = np.zeros((-(-4 * quads // r) * r, -(-n // c) * c), "int8")
    for panel in range(len(stream.pointers) - 1):
        for at in range(stream.pointers[panel], stream.pointers[panel + 1]):
            start = stream.indices[at]
            back[start : start + r, panel * c : (panel + 1) * c] = codes[at].transpose(0, 2, 1).reshape(r, c)
    assert np.array_equal(back[: 4 * quads, :n], w)


def test_words_that_would_not_be_whole_are_refused():
    w = holes(np.ones((30, 40), "int8"), 0.2, 1, 1, np.random.default_rng(0))
    with pytest.raises(Unfusable, match="multiple of 4"):
        GemmBlocks().workload(fused((), 5, 30, 40), Constants.of({1: [w]}))


@pytest.mark.parametrize(
    ("template", "schedule"), [(GemmBlocks(), BlockSchedule(4, 16, 1, 16, 0)), (GemmColumns(), ColumnSchedule(8, 16))], ids=["blocks", "columns"]
)
def test_inner_loop_without_spills(template, schedule):
    target = Target.parse("cpu:cascadelake")
    func = fused((), 128, 256, 384, "requantize")
    w = holes(operands(func, 0)[1], 0.2, 4, 16, np.random.default_rng(0))
    kernel = template.build(func, template.workload(func, Constants.of({1: [w]})), schedule, target)
    assembly = compiled(kernel, target).mod.inspect_source("asm")
    hot = max(re.split(r"\n\.LBB", assembly), key=lambda block: block.count("vpdpbusd"))
    hot = re.split(r"\n\tj", hot)[0]
    assert len(re.findall(r"vpdpbusd.*%zmm", hot)) >= 8
    assert not re.search(r"\(%rsp\), %zmm|%zmm\d+, \d*\(%rsp\)", hot)
