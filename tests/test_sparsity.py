"""Patterns of zeros and the pass `sparsify`: what goes, what stays, and what the compiled model computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tcompile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper
from onnx_models import small
from tcompile import UsageError
from tcompile.compiler.api import import_model
from tcompile.compiler.cli.main import main
from tcompile.compiler.tvm import is_constant, relax
from tcompile.passes.base import PassContext, PassReport
from tcompile.passes.canonicalize import Canonicalize
from tcompile.passes.sparsity.allocation import LEVELS, Layer, allocate, predicted_us
from tcompile.passes.sparsity.patterns import Blocks, NofM, Unstructured, parse
from tcompile.passes.sparsity.sparsify import Sparsify
from tcompile.targets.base import Target

RNG = np.random.default_rng(3)
CPU = Target.parse("cpu")
MATRICES = arrays.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.floats(0, 100, width=32))


@settings(suppress_health_check=[HealthCheck.too_slow])  # matrices are slow to make where others use the processor
@given(MATRICES, st.floats(0, 0.99), st.sampled_from(["unstructured", "block4x16", "block3x5", "block1x1", "block8x1"]), st.booleans())
def test_a_mask_has_its_level_and_keeps_the_best(scores, level, name, per_output):
    pattern = parse(f"{name}:{level}")
    keep = pattern.mask(scores, level, per_output=per_output)
    assert keep.shape == scores.shape and keep.dtype == bool
    assert pattern.check(np.where(keep, np.float32(1), np.float32(0))) or (per_output and isinstance(pattern, Unstructured))
    if isinstance(pattern, Unstructured):
        groups = [(scores[:, n], keep[:, n]) for n in range(scores.shape[1])] if per_output else [(scores.reshape(-1), keep.reshape(-1))]
        for values, kept in groups:
            assert kept.sum() == len(values) - round(level * len(values))
            assert kept.all() or not kept.any() or values[kept].min() >= values[~kept].max()
    else:
        assert isinstance(pattern, Blocks)
        r, c = pattern.r, pattern.c
        blocks = [keep[i : i + r, j : j + c] for i in range(0, len(keep), r) for j in range(0, keep.shape[1], c)]
        assert all(block.all() or not block.any() for block in blocks)
        assert sum(block.all() for block in blocks) == len(blocks) - round(level * len(blocks))


@given(MATRICES, st.integers(1, 6), st.integers(1, 6))
def test_n_of_m_keeps_the_largest_of_every_run(scores, n, m):
    assume(n <= m)
    pattern = parse(f"{n}:{m}")
    keep = pattern.mask(scores, pattern.level)
    for column in range(scores.shape[1]):
        for start in range(0, len(scores), m):
            values, kept = scores[start : start + m, column], keep[start : start + m, column]
            assert kept.sum() == min(n, len(values))
            assert kept.all() or values[kept].min() >= values[~kept].max()
    assert pattern.check(scores * keep)
    assert n == m or len(scores) < m or not pattern.check(np.ones_like(scores))


@given(MATRICES, st.sampled_from(["0.5", "block4x16:0.5", "3:4"]))
def test_level_zero_keeps_everything(scores, text):
    assert parse(text).mask(scores, 0.0).all()


def test_parse():
    assert parse("0.9") == parse(0.9) == parse("unstructured:0.9") == Unstructured(0.9)
    assert parse("block:0.8") == parse("block4x16:0.8") == Blocks(0.8, 4, 16)
    assert parse("2:4") == NofM(0.5, 2, 4)
    assert parse("none").level == 0
    assert [str(parse(text)) for text in ("0.9", "2:4", "block:0.8")] == ["unstructured:0.9", "2:4", "block4x16:0.8"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1", "below 1"),
        ("1.0", "below 1"),
        ("-0.1", "at least 0"),
        ("nan", "at least 0"),
        ("block:1.2", "below 1"),
        ("block0x4:0.5", "at least one row"),
        ("5:4", "at most M"),
        ("0:4", "at least 1"),
        ("blocky", "expected 0.9"),
        ("block4x:0.5", "expected 0.9"),
        ("", "expected 0.9"),
    ],
)
def test_bad_patterns(text, reason):
    with pytest.raises(UsageError, match=reason):
        Sparsify(text)


def onnx_of(sizes=(32, 48, 64, 10), rows=8, seed=0):
    """A chain of products with bias, ReLU between: nodes fc0, fc1, ...; and its constants."""
    rng = np.random.default_rng(seed)
    nodes, constants, value = [], {}, "x"
    for index, (k, n) in enumerate(zip(sizes, sizes[1:], strict=False)):
        scale = np.float32(1 / np.sqrt(k))
        constants |= {f"w{index}": rng.standard_normal((k, n), dtype=np.float32) * scale, f"b{index}": rng.standard_normal(n, dtype=np.float32)}
        nodes += [
            helper.make_node("MatMul", [value, f"w{index}"], [f"m{index}"], name=f"fc{index}"),
            helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"], name=f"bias{index}"),
        ]
        value = f"a{index}"
        if index < len(sizes) - 2:
            nodes.append(helper.make_node("Relu", [value], [f"r{index}"], name=f"relu{index}"))
            value = f"r{index}"
    return small(nodes, {"x": [rows, sizes[0]]}, [value], constants), constants


def run(program, step):
    context = PassContext(CPU, report=PassReport(step.name))
    return step.run(program, context), context.report


def program_of(model):
    return run(import_model(model), Canonicalize())[0]


def weights_of(program):
    found = []

    def visit(expr):
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.matmul" and is_constant(expr.args[1]):
            found.append(expr.args[1].value.numpy())

    relax.analysis.post_order_visit(program.main, visit)
    return found


def test_before_and_after():
    """The graph is the same text but for the constants' values: two of three weights lost their weakest blocks, the classifier none."""
    model, constants = onnx_of()
    before = program_of(model)
    after, report = run(before, Sparsify("block:0.5"))
    assert before.module.script(show_meta=False) == after.module.script(show_meta=False)
    relax.analysis.well_formed(after.module)  # raises
    weights = weights_of(after)
    for index, weight in enumerate(weights):
        source = constants[f"w{index}"]
        keep = Blocks(0.5).mask(np.abs(source), 0.5) if index < 2 else np.ones_like(source, bool)
        np.testing.assert_array_equal(weight, source * keep)
    assert report.matches == {"layers": 2, "classifiers_left": 1}
    rows = report.tables["sparse layers"]
    assert [row["layer"] for row in rows] == ["fc0", "fc1"]
    assert rows[0]["zeros"] == pytest.approx(0.5, abs=0.05)
    lost = np.linalg.norm(constants["w0"] - weights[0]) / np.linalg.norm(constants["w0"])
    assert rows[0]["norm_lost"] == pytest.approx(lost, abs=1e-3)


def test_level_zero_is_the_identity():
    program = program_of(onnx_of()[0])
    for text in ("0", "none", "block:0", 0.0):
        assert run(program, Sparsify(text))[0] is program


def test_skip_and_last():
    model, constants = onnx_of()
    after, report = run(program_of(model), Sparsify("0.9", skip=("fc1",), last=True))
    zero = [float(np.mean(weight == 0)) for weight in weights_of(after)]
    assert zero == pytest.approx([0.9, 0.0, 0.9], abs=0.01) and report.matches == {"layers": 2}
    assert np.array_equal(weights_of(after)[1], constants["w1"])
    with pytest.raises(UsageError, match="fc0, fc1, fc2"):
        run(program_of(model), Sparsify("0.9", skip=("nothing",)))


@pytest.mark.parametrize("pattern", ["unstructured:0.7", "block4x16:0.5", "2:4"])
def test_numbers_on_and_off(pattern):
    """The compiled model computes with exactly the weights that are left."""
    model, constants = onnx_of()
    sparse = tcompile.compile(model, sparsity=pattern)
    left = [
        constants[f"w{index}"] * (parse(pattern).mask(np.abs(constants[f"w{index}"]), parse(pattern).level) if index < 2 else 1) for index in range(3)
    ]
    x = RNG.standard_normal((8, 32)).astype("float32")

    def reference(weights):
        y = x.astype("float64")
        for index, weight in enumerate(weights):
            y = y @ weight + constants[f"b{index}"]
            y = np.maximum(y, 0) if index < 2 else y
        return y

    np.testing.assert_allclose(sparse(x), reference(left), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tcompile.compile(model)(x), reference([constants[f"w{index}"] for index in range(3)]), rtol=1e-4, atol=1e-5)
    assert np.abs(sparse(x) - tcompile.compile(model)(x)).max() > 1e-2


def test_wanda_weighs_by_the_inputs():
    """Against the method in numpy: |w| times the norm of its input channel, compared within each output."""
    model, constants = onnx_of()
    data = [{"x": (RNG.standard_normal((8, 32)) * np.geomspace(0.01, 10, 32)).astype("float32")} for _ in range(3)]
    compiled = tcompile.compile(model, sparsity=Sparsify("0.5", "wanda"), calibration=data)
    x = np.concatenate([feeds["x"] for feeds in data])
    expected, y = [], x
    for index in range(2):
        scores = np.abs(constants[f"w{index}"]) * np.sqrt(np.mean(y.astype("float64") ** 2, axis=0))[:, None]
        expected.append(constants[f"w{index}"] * Unstructured(0.5).mask(scores.astype("float32"), 0.5, per_output=True))
        y = np.maximum(y @ constants[f"w{index}"] + constants[f"b{index}"], 0)
    want = data[0]["x"].astype("float64")
    for index, weight in enumerate([*expected, constants["w2"]]):
        want = want @ weight + constants[f"b{index}"]
        want = np.maximum(want, 0) if index < 2 else want
    np.testing.assert_allclose(compiled(data[0]["x"]), want, rtol=1e-4, atol=1e-4)
    magnitude = tcompile.compile(model, sparsity="0.5", calibration=data)

    def loss(model):
        return next(entry for entry in model.report()["passes"] if entry["name"] == "sparsify")["loss"]["relative"]

    assert loss(compiled) < loss(magnitude)


def test_zeros_stay_zeros_in_integers():
    """Sparse, then quantized: the products run in the sparse integer kernel, and quantization loses no more than it does without zeros."""
    model, _ = onnx_of((64, 128, 128, 16), rows=64)
    data = [{"x": RNG.standard_normal((64, 64)).astype("float32")} for _ in range(2)]
    target = "cpu:haswell"  # dense kernels with VNNI or AMX may be the faster ones
    sparse = tcompile.compile(model, target=target, sparsity="block:0.8")
    both = tcompile.compile(model, target=target, sparsity="block:0.8", quantize="int8", calibration=data)
    x = data[0]["x"]
    assert np.linalg.norm(both(x) - sparse(x)) < 0.03 * np.linalg.norm(sparse(x))
    used = [kernel["workload"] for kernel in both.report()["kernels"] if kernel["template"] == "gemm_blocks"]
    assert len(used) == 2 and all("u8s8" in workload for workload in used)
    # without an instruction for int8, codes are packed as 16 bit
    assert both.report()["weights_bytes"] < 0.6 * sparse.report()["weights_bytes"]


def test_wanda_needs_data():
    model, _ = onnx_of()
    with pytest.raises(UsageError, match="--calibration"):
        tcompile.compile(model, sparsity=Sparsify("0.5", "wanda"))


def test_latency_spends_the_time_where_it_matters():
    """The same predicted time as the uniform level, and less saliency lost; emptier where many rows make weights dear."""
    sharp, flat = np.linspace(1, 0, len(LEVELS)) ** 4, np.linspace(1, 0, len(LEVELS))
    layers = [Layer(128, 512, 512, tuple(1 - sharp)), Layer(128, 512, 512, tuple(1 - flat)), Layer(1024, 512, 512, tuple(1 - flat))]
    pattern = Blocks(0.7)
    levels = allocate(layers, pattern, CPU, None)
    uniform = sum(predicted_us(layer, pattern, 0.7, CPU) for layer in layers)
    assert sum(predicted_us(layer, pattern, level, CPU) for layer, level in zip(layers, levels, strict=True)) <= uniform * 1.001

    def lost(chosen):
        return sum(float(np.interp(level, LEVELS, layer.lost)) for layer, level in zip(layers, chosen, strict=True))

    assert lost(levels) < lost([0.7] * 3)
    assert levels[2] > 0.7 > levels[0]
    with pytest.raises(UsageError, match="no levels meet"):
        allocate(layers, pattern, CPU, 1.0)


def test_latency_allocation_in_a_model():
    model, _ = onnx_of((64, 256, 256, 64), rows=256)
    _, report = run(program_of(model), Sparsify("block:0.6", allocation="latency"))
    rows = report.tables["sparse layers"]
    assert (
        sum(row["sparse_us"] for row in rows) <= sum(predicted_us(Layer(256, *size), Blocks(0.6), 0.6, CPU) for size in ((64, 256), (256, 256))) * 1.1
    )
    with pytest.raises(UsageError, match="no levels meet"):
        run(program_of(model), Sparsify("block:0.6", allocation="latency", latency_us=0.001))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(criterion="taylor"), "unknown criterion"),
        (dict(allocation="random"), "unknown allocation"),
        (dict(pattern="2:4", allocation="latency"), "fixes the level"),
        (dict(latency_us=10.0), "for allocation"),
        (dict(allocation="latency", latency_us=-1.0), "positive"),
    ],
)
def test_bad_options(options, reason):
    with pytest.raises(UsageError, match=reason):
        Sparsify(**options)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.sampled_from(["0.5", "block4x16:0.7", "1:3", "block2x3:0.4"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_chain(sizes, text, last, seed):
    """Random chains: a well-formed module, the pattern in every weight that is named in the table, nothing else touched."""
    model, constants = onnx_of(tuple(sizes), 3, seed)
    after, report = run(program_of(model), Sparsify(text, last=last))
    relax.analysis.well_formed(after.module)  # raises
    touched = {row["layer"] for row in report.tables.get("sparse layers", [])}
    assert touched == {f"fc{index}" for index in range(len(sizes) - (1 if last else 2))}
    for index, weight in enumerate(weights_of(after)):
        assert parse(text).check(weight) if f"fc{index}" in touched else np.array_equal(weight, constants[f"w{index}"])
        assert np.array_equal(weight[weight != 0], constants[f"w{index}"][weight != 0])


def test_the_command(tmp_path, capsys):
    """The flag reaches the pass, and what it does not take ends with exit code 2 and what would be right."""
    path, out = tmp_path / "chain.onnx", tmp_path / "chain.tcm"
    onnx.save(onnx_of((64, 128, 10), 128)[0], path)
    assert main([str(path), "--sparsity", "unstructured:0.95", "-o", str(out)]) == 0
    step = next(entry for entry in tcompile.load(out).report()["passes"] if entry["name"] == "sparsify")
    assert step["tables"]["sparse layers"][0]["zeros"] == pytest.approx(0.95, abs=0.01)
    for text in ("1.0", "-0.5", "block:2", "3:2", "squares"):
        capsys.readouterr()
        assert main([str(path), "--sparsity", text, "-o", str(out)]) == 2
        assert "sparsity" in capsys.readouterr().err
