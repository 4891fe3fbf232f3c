"""GEMM template: numbers over awkward sizes under several schedules, and the instructions it compiles to."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from machines import runnable
from scipy.special import erf
from tcompile.autotune.tir_features import tir_features
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import analyze
from tcompile.targets.common.ops_linear import matmul
from tcompile.targets.cpu import ops_gelu
from tcompile.targets.cpu.emit import register_tiles
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.gemm_schedules import GemmSchedule
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE


def fused(lead, m, k, n, batched=False, activation=relax.op.nn.relu):
    """activation(x @ w + b) as Relax fuses it."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((*lead, m, k), "float32"))
    w = relax.Var("w", relax.TensorType((*lead, k, n) if batched else (k, n), "float32"))
    b = relax.Var("b", relax.TensorType((n,), "float32"))
    with builder.function("main", [x, w, b]):
        with builder.dataflow():
            out = builder.emit_output(activation(relax.op.add(builder.emit_te(matmul, x, w), b)))
        builder.emit_func_output(out)
    module = builder.get()
    transform = relax.transform
    for step in (
        transform.LegalizeOps(ops_gelu.OWN),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ):
        module = step(module)
    (func,) = [func for _, func in module.functions_items() if isinstance(func, tirx.PrimFunc)]
    return analyze(func)


def compiled(kernel, target):
    return tvm.compile(kernel.func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("lead", "m", "k", "n", "batched"),
    [
        ((), 13, 17, 31, False),
        ((), 1, 5, 1, False),
        ((2, 3), 7, 64, 100, False),
        ((), 129, 33, 50, False),
        ((2, 3), 13, 8, 19, True),
        ((), 1, 1, 1, False),
    ],
)
@pytest.mark.parametrize("pick", [0, 0.5, 1])
@pytest.mark.parametrize("target", runnable())
def test_awkward_sizes(lead, m, k, n, batched, pick, target):
    template, func = Gemm(), fused(lead, m, k, n, batched)
    workload = template.workload(func, frozenset([1]))
    space = list(template.space(workload, target))
    kernel = template.build(func, workload, space[int(pick * (len(space) - 1))], target)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*lead, m, k)).astype("float32")
    w = rng.standard_normal((*lead, k, n) if batched else (k, n)).astype("float32")
    b = rng.standard_normal(n).astype("float32")
    packed = kernel.packings[0].pack(w) if kernel.packings else w
    out = tvm.runtime.tensor(np.full((*lead, m, n), np.nan, "float32"))
    compiled(kernel, target)["f"](tvm.runtime.tensor(x), tvm.runtime.tensor(packed), tvm.runtime.tensor(b), out)
    want = np.maximum(x.astype("float64") @ w + b, 0)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("machine", "schedule", "register"), [("haswell", (4, 3, 8), "ymm"), ("cascadelake", (8, 3, 16), "zmm")])
def test_inner_loop_is_fma_without_spills(machine, schedule, register):
    target = Target.parse(f"cpu:{machine}")
    func = fused((), 128, 256, 384)
    workload = Gemm().workload(func, frozenset([1]))
    kernel = Gemm().build(func, workload, GemmSchedule(*schedule, 0), target)
    assembly = compiled(kernel, target).mod.inspect_source("asm")
    blocks = re.split(r"\n\.LBB", assembly)
    hot = max(blocks, key=lambda block: len(re.findall(r"vfmadd\w+ps", block)))
    hot = re.split(r"\n\tj", hot)[0]  # up to the back edge: the epilogue follows
    assert len(re.findall(rf"vfmadd\w+ps.*%{register}", hot)) >= schedule[0] * schedule[1]
    assert "(%rsp)" not in hot


def test_a_long_epilogue_reads_its_sums_from_registers():
    """GELU of all 24 vectors of a tile one after the other, six permutations each: not by a loop over copies in memory."""
    target, func = Target.parse("cpu:cascadelake"), fused((), 128, 256, 384, activation=relax.op.nn.gelu)
    kernel = Gemm().build(func, Gemm().workload(func, frozenset([1])), GemmSchedule(8, 3, 16, 0), target)
    assembly = compiled(kernel, target).mod.inspect_source("asm")
    assert len(re.findall(r"\tvpermps\s", assembly)) == 6 * 24
    assert not re.findall(r"\tvaddps\s.*\(%rsp,%r", assembly)


@pytest.mark.parametrize("n", [31, 48, 50])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("target", runnable())
def test_gelu_in_whole_vectors_and_parts_of_one(target, activation, n):
    func = fused((), 13, 40, n, activation=getattr(relax.op.nn, activation))
    workload = Gemm().workload(func, frozenset([1]))
    kernel = Gemm().build(func, workload, next(iter(Gemm().space(workload, target))), target)
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape).astype("float32") for shape in ((13, 40), (40, n), (n,)))
    out = tvm.runtime.tensor(np.full((13, n), np.nan, "float32"))
    compiled(kernel, target)["f"](*map(tvm.runtime.tensor, (x, kernel.packings[0].pack(w), b)), out)
    t = x.astype("float64") @ w + b
    odd = erf(t / np.sqrt(2)) if activation == "gelu" else np.tanh(np.sqrt(2 / np.pi) * (t + 0.044715 * t**3))
    np.testing.assert_allclose(out.numpy(), t / 2 * (1 + odd), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("machine", "k", "rows", "prefetched"),
    [
        ("haswell", 256, 8, True),
        ("cascadelake", 257, 9, True),
        ("haswell", 256, 4, False),
        ("haswell", 8192, 8, False),
        ("cascadelake", 256, 4, True),
        ("cascadelake", 8192, 4, True),
    ],
)
def test_weights_are_prefetched(machine, k, rows, prefetched):
    """The next panel where tiles share one, but not where two panels are more than the second-level cache; and with AVX512 the same panel, some way ahead, for a tile by itself. The features of the learned model see
    one loop over k either way."""
    target = replace(Target.parse(f"cpu:{machine}"), l2_bytes=512 * 1024)
    func = fused((), rows, k, 48)
    workload = Gemm().workload(func, frozenset([1]))
    kernel = Gemm().build(func, workload, GemmSchedule(4, 3, 8, 0), target)
    assert ("prefetcht1" in compiled(kernel, target).mod.inspect_source("asm")) == prefetched
    found = tir_features(kernel.func)
    plain = tir_features(Gemm().build(func, workload, GemmSchedule(4, 3, 8, 0), replace(target, l2_bytes=0)).func)
    assert found.depth == plain.depth and found.loop_steps == plain.loop_steps


def test_tiles_load_little_where_loads_are_short():
    """Two column vectors are for outputs of no more, and for machines that load at least as often as they multiply."""
    assert {nv for _, nv in register_tiles(Target.parse("cpu:sapphirerapids"), (1, 2, 3, 4), 12)} == {3, 4}
    assert {nv for _, nv in register_tiles(Target.parse("cpu:sapphirerapids"), (1, 2, 3, 4), 2)} == {2}
    assert {nv for _, nv in register_tiles(Target.parse("cpu:znver4"), (1, 2, 3, 4), 12)} == {2, 3, 4}
    assert {nv for _, nv in register_tiles(Target.parse("cpu:haswell"), (1, 2, 3, 4), 12)} == {2, 3, 4}
