"""16-bit storage on CUDA (`--precision bf16 | fp16`): operands of products lie in memory rounded. Run by the emulation against numpy in float64 on rounded operands."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from cuda_models import artifact_of, emulation, run, templates
from tcompile.compiler.dialect.attention import AttentionAttrs, attention, reference
from tcompile.compiler.element_types import numpy_dtype
from tcompile.compiler.tvm import relax
from tcompile.targets.cuda import gemm
from tcompile.targets.cuda.schedule import TileSchedule
from test_cuda_kernels import convolution, each_attention

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(11)
#: --precision -> type in memory, largest relative error of rounding to it
TYPES = {"bf16": ("bfloat16", 2.0**-8), "fp16": ("float16", 2.0**-11)}
#: relative error of fp32 sums over the sum of magnitudes
SUMS = 1e-6


@pytest.fixture(autouse=True)
def _seeded():
    global RANDOM
    RANDOM = np.random.default_rng(11)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def short(x, precision):
    return x.astype("float32").astype(numpy_dtype(TYPES[precision][0])).astype("float64")


def constant(array):
    return relax.const(array, array.dtype.name)


#: M, K, N: ones, primes, odd K (padded to words), tails of tiles and vectors, whole tiles
SIZES = [(1, 1, 1), (17, 7, 19), (31, 130, 33), (64, 128, 64), (130, 96, 36)]


@pytest.mark.parametrize("precision", TYPES)
def test_products_read_operands_that_lie_in_memory_rounded(precision):
    inputs = {f"x{number}": floats(m, k) for number, (m, k, _) in enumerate(SIZES)}
    weights = [floats(k, n) for _, k, n in SIZES]
    outputs, lowered = run(lambda emit, *x: [emit(op.matmul(a, constant(w))) for a, w in zip(x, weights, strict=True)], inputs, precision=precision)
    for out, x, w in zip(outputs, inputs.values(), weights, strict=True):
        a, b = short(x, precision), short(w, precision)
        assert out.dtype == np.float32 and (np.abs(out - a @ b) <= SUMS * (np.abs(a) @ np.abs(b))).all()
    assert set(templates(lowered)) == {"gemm", "map"}  # map: the inputs rounded, and zeros behind odd K
    assert all(row["workload"].endswith("x2") for row in lowered.report["kernels"] if row["template"] == "gemm")
    rows = sum((k + k % 2) * n for _, k, n in SIZES)
    assert sum(array.nbytes for array in lowered.weights.values()) == 2 * rows


def test_what_products_alone_read_is_stored_in_16_bits_and_what_others_read_in_both(precision="bf16"):
    """A block with a residual: the sum is kept in float32 and, for the next product, rounded by the same kernel; layer-norm and gelu store 16 bits alone."""
    x, w1, w2, w3 = floats(37, 48), floats(48, 50), floats(50, 48), floats(48, 9)

    def build(emit, x):
        normal = emit(op.nn.layer_norm(x, constant(np.ones(48, "float32")), constant(np.zeros(48, "float32")), axes=[-1], epsilon=1e-5))
        hidden = emit(op.nn.relu(emit(op.matmul(normal, constant(w1)))))
        total = emit(op.add(emit(op.matmul(hidden, constant(w2))), x))
        return [emit(op.matmul(total, constant(w3))), emit(op.nn.softmax(total))]

    (out, probabilities), lowered = run(build, {"x": x}, precision=precision)
    wide = x.astype("float64")
    normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    hidden = np.maximum(short(normal, precision) @ short(w1, precision), 0)
    total = short(hidden, precision) @ short(w2, precision) + x
    soft = np.exp(total - total.max(-1, keepdims=True))
    soft /= soft.sum(-1, keepdims=True)
    # a sum that differs in its last bit may round to the neighbour
    unit = TYPES[precision][1]
    assert np.abs(out - short(total, precision) @ short(w3, precision)).max() < 4 * unit * np.abs(out).max()
    assert np.abs(probabilities - soft).max() < 8 * unit
    kinds = templates(lowered)
    assert sorted(kinds) == ["gemm", "gemm", "gemm", "rows by warp", "rows by warp"], kinds
    text = lowered.sources["model.cu"]
    name = f"tc::{TYPES[precision][0]}"
    assert f"tc::To<float, {name}> out" in text and f"tc::To<{name}> out" in text and "tc::To<float> out" in text


def test_tiles_of_many_accumulators(monkeypatch):
    tiles = {141: TileSchedule(128, 64, 2, 2, 3), 66: TileSchedule(128, 128, 2, 4, 4)}
    monkeypatch.setattr(gemm, "best_tile", lambda shape, *_, **__: tiles[shape.n])
    x, weights = floats(137, 70), [floats(70, n) for n in tiles]
    outputs, lowered = run(lambda emit, x: [emit(op.matmul(x, constant(w))) for w in weights], {"x": x}, precision="bf16")
    for out, w in zip(outputs, weights, strict=True):
        a, b = short(x, "bf16"), short(w, "bf16")
        assert (np.abs(out - a @ b) <= SUMS * (np.abs(a) @ np.abs(b))).all()
    assert [row["schedule"] for row in lowered.report["kernels"]][1:] == [str(tile) for tile in tiles.values()]


def test_convolutions_read_16_bits(precision="fp16"):
    # N, H, W, Ci, Co, taps, stride, padding: three channels are padded to four; depthwise ones stay in float32
    images = [(2, 7, 9, 3, 10, 3, 2, 1), (1, 6, 5, 8, 12, 1, 1, 0), (1, 8, 8, 20, 7, 3, 1, 1)]
    inputs = {f"x{number}": floats(n, c, h, w) for number, (n, h, w, c, *_) in enumerate(images)}
    weights = [floats(co, c, taps, taps) for _, _, _, c, co, taps, _, _ in images]
    depthwise = floats(20, 1, 3, 3)

    def build(emit, *x):
        results = []
        for data, weight, (*_, stride, padding) in zip(x, weights, images, strict=True):
            results.append(emit(op.nn.relu(emit(op.nn.conv2d(data, constant(weight), stride, padding)))))
        return [*results, emit(op.nn.conv2d(x[-1], constant(depthwise), 1, 1, 1, 20))]

    outputs, lowered = run(build, inputs, precision=precision)
    for out, x, w, (*_, stride, padding) in zip(outputs, inputs.values(), weights, images, strict=False):
        image, taps = short(x, precision).transpose(0, 2, 3, 1), short(w, precision).transpose(2, 3, 1, 0)
        exact = np.maximum(convolution(image, taps, stride, padding, 1), 0).transpose(0, 3, 1, 2)
        assert np.abs(out - exact).max() <= SUMS * np.abs(exact).max()
    x = np.pad(inputs["x2"], ((0, 0), (0, 0), (1, 1), (1, 1)))
    deep = sum(x[:, :, i : i + 8, j : j + 8] * depthwise[:, 0, i, j, None, None] for i in range(3) for j in range(3))
    assert np.abs(outputs[-1] - deep).max() <= SUMS * np.abs(deep).max()
    assert sum(row["workload"].endswith("x2") for row in lowered.report["kernels"]) == len(images)


ATTENTIONS = [
    # batch, heads, kv heads, queries, keys, depth, width, mask, options
    (2, 4, 2, 65, 130, 64, 64, "float", {}),
    (1, 3, 1, 70, 70, 64, 48, None, {"causal": True}),
    (1, 2, 2, 5, 33, 24, 20, "bool", {}),
    (1, 2, 2, 40, 40, 80, 96, "bool", {"fill": -1e9, "causal": True}),
    (1, 2, 1, 33, 17, 16, 128, "float", {"layout": "BSHD", "scale": 0.5}),
    (1, 3, 1, 1, 700, 64, 64, None, {}),  # keys in parts
    (1, 1, 1, 9, 9, 6, 5, None, {}),  # values that fill no words: plain operators
]


@pytest.mark.parametrize("precision", TYPES)
def test_attention_reads_16_bits(precision):
    inputs, expected, cases = {}, [], ATTENTIONS if precision == "bf16" else ATTENTIONS[2:4]
    for number, (b, h, hk, s, t, d, e, mask, options) in enumerate(cases):
        given = {f"q{number}": floats(b, h, s, d), f"k{number}": floats(b, hk, t, d), f"v{number}": floats(b, hk, t, e)}
        extra = {}
        if mask == "float":
            extra[f"m{number}"] = floats(b, 1, 1, t)
        if mask == "bool":
            extra[f"m{number}"] = RANDOM.random((b, 1, s, t)) > 0.4
            extra[f"m{number}"][..., 0, :] = False  # a query that sees nothing
        layouts = AttentionAttrs(**options).layouts
        for name, layout in zip(list(given), layouts, strict=False):
            given[name] = given[name] if layout == "BHSD" else np.ascontiguousarray(given[name].transpose(0, 2, 1, 3))
        expected.append(reference(*(short(value, precision) for value in given.values()), *extra.values(), **options))
        inputs |= given | extra

    outputs, lowered = run(each_attention(cases), inputs, precision=precision)
    for out, exact in zip(outputs, expected, strict=True):
        assert np.abs(out - exact).max() / np.abs(exact).max() <= 2 * TYPES[precision][1]  # probabilities are rounded, too
    assert sum(name.startswith("attention") for name in templates(lowered)) == len(cases) - (precision == "bf16")


def test_attention_that_only_products_read_is_rounded_by_its_own_kernel():
    x, w = floats(1, 2, 20, 16), floats(32, 24)

    def build(emit, x):
        out = emit(attention(x, x, x, layout="BHSD,BHSD,BHSD,BSHD"))
        return [emit(op.matmul(emit(op.reshape(out, (1, 20, 32))), constant(w)))]

    (out,), lowered = run(build, {"x": x}, precision="bf16")
    values = reference(*[short(x, "bf16")] * 3, layout="BHSD,BHSD,BHSD,BSHD").reshape(20, 32)
    exact = short(values, "bf16") @ short(w, "bf16")
    assert np.abs(out[0] - exact).max() <= 2.0**-7 * np.abs(exact).max()
    assert templates(lowered) == ["map", "attention", "gemm"]


def test_numbers_of_two_bytes_in_every_kind_of_kernel():
    """A program on float16 and bfloat16 tensors: choices, extrema, functions, sums, scans, casts; computed as float."""
    x, y = floats(40, 33).astype("float16"), floats(40, 33).astype("float16")

    def build(emit, x, y):
        middle = emit(op.where(emit(op.greater(x, y)), emit(op.abs(x)), emit(op.exp(y))))
        rounded = emit(op.astype(emit(op.astype(emit(op.astype(x, "float32")), "bfloat16")), "float32"))
        return [
            emit(op.maximum(middle, emit(op.multiply(x, y)))),
            emit(op.max(x, axis=1)),
            emit(op.cumsum(x, axis=1)),
            emit(op.astype(emit(op.sum(x, axis=0)), "float32")),
            rounded,
            emit(op.nn.softmax(emit(op.astype(y, "float32")))),
        ]

    outputs, lowered = run(build, {"x": x, "y": y})
    a, b = x.astype("float64"), y.astype("float64")
    soft = np.exp(b - b.max(-1, keepdims=True))
    expected = [np.maximum(np.where(a > b, np.abs(a), np.exp(b)), a * b), a.max(1), a.cumsum(1), a.sum(0)]
    for out, exact in zip(outputs[:4], expected, strict=True):
        assert np.abs(out - exact).max() <= 2.0**-10 * np.abs(exact).max()
    np.testing.assert_array_equal(outputs[4], short(x.astype("float32"), "bf16"))
    assert np.abs(outputs[5] - soft / soft.sum(-1, keepdims=True)).max() < 1e-6
    assert {"map", "rows by thread", "scan"} & set(templates(lowered))


def test_models_in_float16_and_bfloat16_have_the_same_kernels():
    """Every node's result is rounded to the graph's type; products read it as it lies, and nothing is asked for by --precision."""
    w, v = floats(11, 12).astype("float16"), floats(12, 5).astype(numpy_dtype("bfloat16"))
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"]),
        onnx.helper.make_node("Sigmoid", ["a"], ["b"]),
        onnx.helper.make_node("Cast", ["b"], ["c"], to=onnx.TensorProto.BFLOAT16),
        onnx.helper.make_node("MatMul", ["c", "v"], ["d"]),
        onnx.helper.make_node("Mul", ["d", "z"], ["y"]),
    ]
    weights = [
        onnx.numpy_helper.from_array(w, "w"),
        onnx.helper.make_tensor("v", onnx.TensorProto.BFLOAT16, v.shape, v.view("uint16").tobytes(), raw=True),
    ]
    values = [("x", onnx.TensorProto.FLOAT16, [7, 11]), ("z", onnx.TensorProto.BFLOAT16, [7, 5]), ("y", onnx.TensorProto.BFLOAT16, [7, 5])]
    x, z, y = (onnx.helper.make_tensor_value_info(*value) for value in values)
    graph = onnx.helper.make_graph(nodes, "half", [x, z], [y], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    artifact = artifact_of(model)
    x, z = floats(7, 11).astype("float16"), floats(7, 5).astype(numpy_dtype("bfloat16"))
    (out,) = emulation(artifact)(x, z)
    a = short(x.astype("float32") @ w.astype("float32"), "fp16")
    c = short(short(1 / (1 + np.exp(-a)), "fp16"), "bf16")
    exact = short(c @ v.astype("float64"), "bf16") * z.astype("float64")
    assert out.dtype == numpy_dtype("bfloat16")
    assert np.abs(out.astype("float64") - exact).max() <= 2.0**-7 * np.abs(exact).max()
    assert [row["workload"].split()[-1] for row in artifact.report["kernels"] if row["template"] == "gemm"] == ["Fp16x2", "Bf16x2"]
    assert sum(array.nbytes for array in artifact.weights.values()) == 2 * (12 * 12 + 12 * 5)


@pytest.mark.parametrize("precision", TYPES)
def test_attention_reads_the_inputs_of_a_model_in_16_bits_as_they_lie(precision):
    """No kernel widens or copies them."""
    dtype, step = TYPES[precision]
    kind = getattr(onnx.TensorProto, dtype.upper())
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=1)
    sizes = {"q": (1, 2, 37, 32), "k": (1, 2, 70, 32), "v": (1, 2, 70, 32)}
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in sizes.items()]
    graph = onnx.helper.make_graph([node], "attention", values, [onnx.helper.make_tensor_value_info("y", kind, sizes["q"])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    artifact = artifact_of(model, precision=precision)
    feeds = [floats(*shape).astype(numpy_dtype(dtype)) for shape in sizes.values()]
    (out,) = emulation(artifact)(*feeds)
    exact = reference(*(x.astype("float64") for x in feeds), causal=True)
    assert np.abs(out.astype("float64") - exact).max() <= 4 * step * np.abs(exact).max()
    assert templates(artifact)[0].startswith("attention")
