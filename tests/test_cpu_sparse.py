"""Sparse GEMM templates: numbers over awkward sizes and patterns of zeros, the instructions they compile to, and when they are chosen."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import tcompile
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import runnable
from onnx import helper
from onnx_models import small
from tcompile.compiler.tvm import tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cpu.sparse_blocks import BlockSchedule, GemmBlocks
from tcompile.targets.cpu.sparse_columns import ColumnSchedule, GemmColumns
from tcompile.targets.cpu.sparse_weights import Constants, compress, density_class
from test_cpu_gemm import compiled, fused

RNG = np.random.default_rng(7)


def weight(k, n, keep, r=1, c=1):
    """[k, n] with whole blocks of r x c zero, a share `keep` of them left."""
    mask = np.kron(RNG.random((-(-k // r), -(-n // c))) < keep, np.ones((r, c)))[:k, :n]
    return (RNG.standard_normal((k, n)) * mask).astype("float32")


def run(template, schedule, func, target, x, w, b):
    workload = template.workload(func, Constants.of({1: [w]}))
    kernel = template.build(func, workload, schedule, target)
    out = tvm.runtime.tensor(np.full((*x.shape[:-1], w.shape[1]), np.nan, "float32"))
    stream = kernel.packings[0].pack(w)
    compiled(kernel, target)["f"](*map(tvm.runtime.tensor, (x, *stream, b)), out)
    return out.numpy()


def schedules(template, workload, target):
    """Every schedule that computes the workload, those that only a weight with emptier blocks would make worth while included."""
    return template.legal(workload, target) if isinstance(template, GemmBlocks) else list(template.space(workload, target))


def holes(w):
    """The same weight with empty rows, empty columns, and full ones."""
    w = w.copy()
    w[::3], w[:, ::4] = 0, 0
    w[1], w[:, -1] = 1.5, -0.5
    return w


@pytest.mark.sweep
@pytest.mark.parametrize(("lead", "m", "k", "n"), [((), 13, 17, 31), ((), 1, 24, 40), ((2, 3), 7, 64, 100), ((), 129, 8, 50)])
@pytest.mark.parametrize("template", [GemmBlocks(), GemmColumns()], ids=lambda template: template.name)
@pytest.mark.parametrize("target", runnable())
def test_awkward_sizes(lead, m, k, n, template, target):
    func = fused(lead, m, k, n)
    x, b = RNG.standard_normal((*lead, m, k)).astype("float32"), RNG.standard_normal(n).astype("float32")
    for pick, w in ((0, weight(k, n, 0.3)), (0.5, weight(k, n, 0)), (1, holes(weight(k, n, 0.2, 4, 16)))):
        space = schedules(template, template.workload(func, Constants.of({1: [w]})), target)
        got = run(template, space[int(pick * (len(space) - 1))], func, target, x, w, b)
        np.testing.assert_allclose(got, np.maximum(x.astype("float64") @ w + b, 0), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 8, 16, 32]), st.floats(0, 1), st.integers(0, 1000))
def test_streams_hold_the_weight(k, n, r, c, keep, seed):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((k, n)) * (rng.random((k, n)) < keep)).astype("float32")
    stream = compress(w, r, c)
    back = np.zeros((-(-k // r) * r, -(-n // c) * c), "float32")
    for panel in range(len(stream.pointers) - 1):
        for at in range(stream.pointers[panel], stream.pointers[panel + 1]):
            start = stream.indices[at]
            back[start : start + r, panel * c : (panel + 1) * c] = stream.values[at].reshape(r, c)
    assert np.array_equal(back[:k, :n], w)
    assert (np.diff(stream.pointers) >= 0).all()
    assert stream.pointers[-1] <= max(np.count_nonzero(w), 0)


def hot_loop(kernel, target):
    """The block of assembly with most multiply-adds, up to its back edge."""
    assembly = compiled(kernel, target).mod.inspect_source("asm")
    block = max(re.split(r"\n\.LBB", assembly), key=lambda text: len(re.findall(r"vfmadd\w+ps", text)))
    return re.split(r"\n\tj", block)[0]


@pytest.mark.parametrize(("machine", "mr", "register"), [("haswell", 8, "ymm"), ("cascadelake", 14, "zmm")])
def test_blocks_multiply_in_registers(machine, mr, register):
    target = Target.parse(f"cpu:{machine}")
    func = fused((), 128, 256, 384)
    w = weight(256, 384, 0.2, 4, 16)
    template = GemmBlocks()
    kernel = template.build(func, template.workload(func, Constants.of({1: [w]})), BlockSchedule(4, mr, 1, target.lanes(), 0), target)
    hot = hot_loop(kernel, target)
    assert len(re.findall(rf"vfmadd\w+ps.*%{register}", hot)) >= 4 * (128 // -(-128 // mr))
    assert "(%rsp)" not in hot


@pytest.mark.parametrize(("machine", "vectors", "register"), [("haswell", 4, "ymm"), ("cascadelake", 8, "zmm")])
def test_columns_multiply_in_registers(machine, vectors, register):
    target = Target.parse(f"cpu:{machine}")
    func = fused((), 128, 256, 384)
    template = GemmColumns()
    workload = template.workload(func, Constants.of({1: [weight(256, 384, 0.1)]}))
    hot = hot_loop(template.build(func, workload, ColumnSchedule(vectors, target.lanes()), target), target)
    assert len(re.findall(rf"vfmadd\w+ps.*%{register}", hot)) >= vectors
    assert "(%rsp)" not in hot


def test_a_dense_weight_is_for_the_dense_kernel():
    func = fused((), 16, 32, 32)
    for constants in (Constants.of({1: [weight(32, 32, 1.0)]}), frozenset([1]), Constants.of({})):
        for template in (GemmBlocks(), GemmColumns()):
            with pytest.raises(Unfusable):
                template.workload(func, constants)
    scattered = GemmBlocks().workload(func, Constants.of({1: [weight(32, 32, 0.3)]}))
    with pytest.raises(Unfusable, match="leave no group"):
        GemmBlocks().space(scattered, Target.parse("cpu:haswell"))
    assert density_class(weight(32, 32, 1.0)) == 0
    assert density_class(weight(64, 64, 0.1)) > density_class(weight(64, 64, 0.5)) > 0


def network(weights):
    """x -> x @ w + b -> relu, once per weight."""
    nodes, constants, value = [], {}, "x"
    for index, w in enumerate(weights):
        constants |= {f"w{index}": w, f"b{index}": np.full(w.shape[1], 0.1, "float32")}
        nodes += [
            helper.make_node("MatMul", [value, f"w{index}"], [f"m{index}"]),
            helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"]),
            helper.make_node("Relu", [f"a{index}"], [f"r{index}"]),
        ]
        value = f"r{index}"
    return nodes, constants, value


def test_zeros_in_a_model_are_used(tmp_path):
    """A saved file, no flag: each call site gets the kernel that its zeros allow, sites of one shape included, and the artifact holds no zeros."""
    k = 256
    weights = [weight(k, k, 1.0), weight(k, k, 0.1), weight(k, k, 0.2, 4, 16), weight(k, k, 0.6)]
    nodes, constants, last = network(weights)
    onnx.save(small(nodes, {"x": [128, k]}, [last], constants), tmp_path / "sparse.onnx")
    compiled_model = tcompile.compile(tmp_path / "sparse.onnx")
    report = compiled_model.report()
    calls = {}
    for kernel in report["kernels"]:
        calls[kernel["template"]] = calls.get(kernel["template"], 0) + kernel["calls"]
    assert calls == {"gemm": 2, "gemm_columns": 1, "gemm_blocks": 1}
    padded = 288  # of the two dense ones, columns in whole panels of 48, the widest that fit badly
    assert report["weights_bytes"] < 4 * k * (2 * padded + (0.2 + 0.25) * k) + 8192
    x = RNG.standard_normal((128, k)).astype("float32")
    want = x.astype("float64")
    for w in weights:
        want = np.maximum(want @ w + 0.1, 0)
    np.testing.assert_allclose(compiled_model(x), want, rtol=1e-4, atol=1e-5 * want.max())


def test_rows_known_at_run_time_only():
    k = 64
    nodes, constants, last = network([weight(k, 80, 0.1), weight(80, k, 0.2, 8, 16)])
    compiled_model = tcompile.compile(small(nodes, {"x": ["rows", k]}, [last], constants))
    assert {kernel["template"] for kernel in compiled_model.report()["kernels"]} <= {"gemm_columns", "gemm_blocks"}
    for rows in (1, 5, 16, 33, 100):
        x = RNG.standard_normal((rows, k)).astype("float32")
        want = x.astype("float64")
        for index in range(2):
            want = np.maximum(want @ constants[f"w{index}"] + 0.1, 0)
        np.testing.assert_allclose(compiled_model(x), want, rtol=1e-4, atol=1e-5 * want.max())
