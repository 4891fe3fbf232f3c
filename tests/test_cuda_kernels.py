"""CUDA kernels without a GPU: the emitted source, run thread by thread on the CPU, against numpy in float64."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from cuda_models import compiled, emulation, program_of, run, templates
from tcompile.compiler.dialect.attention import AttentionAttrs, attention, reference
from tcompile.compiler.tvm import relax

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _seeded():
    global RANDOM
    RANDOM = np.random.default_rng(7)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def close(ours, exact, tolerance):
    scale = max(1e-30, np.abs(exact).max())
    assert np.abs(ours - exact).max() / scale <= tolerance


def each_attention(cases):
    """A graph of one attention for each case, whose last two entries are the mask, None without, and the options; inputs in the order of the cases."""

    def build(emit, *x):
        results, at = [], 0
        for *_, mask, options in cases:
            count = 3 + (mask is not None)
            results.append(emit(attention(*x[at : at + count], **options)))
            at += count
        return results

    return build


#: M, K, N: ones, primes, tails of tiles and of vectors, whole tiles
SIZES = [(1, 1, 1), (1, 129, 30), (17, 7, 19), (31, 33, 64), (64, 64, 64), (65, 48, 50), (130, 96, 36)]


@pytest.mark.sweep
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 3e-7), ("tf32", 1.2e-3), ("fp16", 1.2e-3), ("bf16", 1e-2)])
def test_gemm_of_awkward_sizes_by_precision(precision, tolerance):
    inputs, sizes = {}, SIZES if precision == "fp32" else SIZES[1:3]
    for number, (m, k, n) in enumerate(sizes):
        inputs |= {f"a{number}": floats(m, k), f"b{number}": floats(k, n)}

    def build(emit, *x):
        return [emit(op.matmul(a, b)) for a, b in zip(x[::2], x[1::2], strict=True)]

    outputs, lowered = run(build, inputs, precision=precision)
    values = list(inputs.values())
    errors = []
    for out, a, b in zip(outputs, values[::2], values[1::2], strict=True):
        exact = a.astype("float64") @ b.astype("float64")
        bound = np.abs(a).astype("float64") @ np.abs(b).astype("float64")
        errors.append((np.abs(out - exact) / bound).max())
    assert max(errors) <= tolerance
    assert (max(errors) > 1e-5) == (precision != "fp32")  # the policy asked for is the one that ran
    assert set(templates(lowered)) == {"gemm"}
    assert lowered.report["precision"]["name"] == precision


def test_few_rows_take_k_in_parts_that_are_added_up_in_order():
    """One row: K in parts with tails, an epilogue behind their sums, a convolution of one pixel; exact integers; the same bits every time."""
    x, w, bias, codes = floats(1, 2100), floats(2100, 36), floats(36), RANDOM.integers(0, 256, (3, 5000), "uint8")
    image, kernel = floats(1, 3, 3, 160), floats(3, 3, 160, 10)
    weight = RANDOM.integers(-128, 128, (5000, 8), "int8")
    inputs = {"x": x, "w": w, "bias": bias, "image": image, "kernel": kernel, "codes": codes}

    def build(emit, x, w, bias, image, kernel, codes):
        return [
            emit(op.nn.relu(emit(op.add(emit(op.matmul(x, w)), bias)))),
            emit(op.nn.conv2d(image, kernel, 1, 0, 1, 1, "NHWC", "HWIO", "NHWC")),
            emit(op.matmul(codes, relax.const(weight), out_dtype="int32")),
        ]

    lowered = compiled(program_of(build, inputs))
    model = emulation(lowered)
    row, pixel, whole = model(*inputs.values())
    close(row, np.maximum(x.astype("float64") @ w + bias, 0), 1e-6)
    close(pixel, convolution(image, kernel, 1, 0, 1), 1e-6)
    np.testing.assert_array_equal(whole, codes.astype("int64") @ weight.astype("int64"))
    assert templates(lowered) == ["gemm", "sums", "conv2d", "sums", "gemm", "sums"]
    assert all(np.array_equal(a, b) for a, b in zip((row, pixel, whole), model(*inputs.values()), strict=True))


def test_gemm_batches_broadcast_and_epilogues_run_on_the_accumulators():
    inputs = {
        "a": floats(2, 3, 20, 24),
        "b": floats(2, 3, 24, 28),
        "c": floats(3, 24, 28),
        "w": floats(24, 28),
        "bias": floats(28),
        "r": floats(2, 3, 20, 28),
    }

    def build(emit, a, b, c, w, bias, r):
        plain = emit(op.matmul(a, b))
        broadcast = emit(op.matmul(a, c))
        dense = emit(op.add(emit(op.nn.gelu(emit(op.add(emit(op.matmul(a, w)), bias)))), r))
        return [plain, broadcast, dense]

    (plain, broadcast, dense), lowered = run(build, inputs)
    a, b, c, w, bias, r = (value.astype("float64") for value in inputs.values())
    close(plain, a @ b, 1e-6)
    close(broadcast, a @ c, 1e-6)
    from scipy.special import erf

    x = a @ w + bias
    close(dense, 0.5 * x * (1 + erf(x / np.sqrt(2))) + r, 1e-6)
    assert templates(lowered) == ["gemm"] * 3


def test_nan_and_infinity_stay_in_their_rows():
    a = floats(16, 32)
    a[3, 5], a[4, 6] = np.nan, np.inf
    inputs = {"a": a, "b": np.abs(floats(32, 16)) + 1}
    (out,), _ = run(lambda emit, a, b: [emit(op.matmul(a, b))], inputs)
    assert np.isnan(out[3]).all() and not np.isfinite(out[4]).any() and np.isfinite(np.delete(out, [3, 4], 0)).all()


def convolution(x, w, stride, padding, dilation):
    """NHWC by HWIO in float64."""
    x = np.pad(x.astype("float64"), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kh, kw = w.shape[:2]
    span = [dilation * (size - 1) + 1 for size in (kh, kw)]
    height, width = ((size - extent) // stride + 1 for size, extent in zip(x.shape[1:3], span, strict=True))
    out = np.zeros((x.shape[0], height, width, w.shape[3]))
    for i in range(kh):
        for j in range(kw):
            rows, columns = slice(i * dilation, i * dilation + stride * height, stride), slice(j * dilation, j * dilation + stride * width, stride)
            out += x[:, rows, columns][:, :height, :width] @ w[i, j].astype("float64")
    return out


#: N, H, W, Ci, Co, k, stride, padding, dilation
CONVOLUTIONS = [
    (1, 9, 11, 3, 16, 7, 2, 3, 1),
    (2, 7, 5, 8, 12, 3, 1, 1, 1),
    (1, 8, 8, 16, 20, 1, 2, 0, 1),
    (1, 10, 9, 5, 7, 3, 1, 2, 2),
    (2, 6, 6, 32, 32, 1, 1, 0, 1),
]


def test_convolution_is_a_gemm_over_windows():
    inputs = {}
    for number, (n, h, w, ci, co, k, *_) in enumerate(CONVOLUTIONS):
        inputs |= {f"x{number}": floats(n, h, w, ci), f"w{number}": floats(k, k, ci, co)}

    def build(emit, *x):
        results = []
        for data, weight, (*_, stride, padding, dilation) in zip(x[::2], x[1::2], CONVOLUTIONS, strict=True):
            call = op.nn.conv2d(data, weight, stride, padding, dilation, 1, "NHWC", "HWIO", "NHWC")
            results.append(emit(op.nn.relu(emit(call))))
        return results

    outputs, lowered = run(build, inputs)
    values = list(inputs.values())
    for out, x, w, (*_, stride, padding, dilation) in zip(outputs, values[::2], values[1::2], CONVOLUTIONS, strict=True):
        close(out, np.maximum(convolution(x, w, stride, padding, dilation), 0), 1e-6)
    assert set(templates(lowered)) == {"conv2d"}


def test_integer_products_run_on_tensor_cores_exactly():
    """u8 x s8 over the whole range: matrices with tails of tiles and of words, batches of weights, convolutions; dequantized on the accumulators."""
    sizes = [(1, 4, 1), (17, 7, 19), (33, 129, 40), (70, 256, 66)]
    bytes_, weights = {}, {}
    for number, (m, k, n) in enumerate(sizes):
        bytes_[f"x{number}"], weights[f"x{number}"] = RANDOM.integers(0, 256, (m, k), "uint8"), RANDOM.integers(-128, 128, (k, n), "int8")
    bytes_["b"], weights["b"] = RANDOM.integers(0, 256, (3, 5, 12), "uint8"), RANDOM.integers(-128, 128, (3, 12, 9), "int8")
    images = [(2, 7, 9, 3, 10, 3, 2, 1), (1, 6, 5, 8, 12, 1, 1, 0), (1, 8, 8, 20, 7, 3, 1, 1)]
    for number, (batch, height, width, channels, features, taps, _, _) in enumerate(images):
        bytes_[f"c{number}"] = RANDOM.integers(0, 256, (batch, height, width, channels), "uint8")
        weights[f"c{number}"] = RANDOM.integers(-128, 128, (taps, taps, channels, features), "int8")

    def build(emit, *x):
        results = []
        for name, value in zip(bytes_, x, strict=True):
            weight = relax.const(weights[name], "int8")
            if name[0] == "c":
                *_, stride, padding = images[int(name[1:])]
                product = emit(op.nn.conv2d(value, weight, stride, padding, 1, 1, "NHWC", "HWIO", "NHWC", "int32"))
            else:
                product = emit(op.matmul(value, weight, out_dtype="int32"))
            scaled = emit(op.multiply(emit(op.astype(product, "float32")), relax.const(np.float32(0.5))))
            results += [scaled]
        return results

    outputs, lowered = run(build, bytes_)
    for (name, x), out in zip(bytes_.items(), outputs, strict=True):
        if name[0] == "c":
            *_, stride, padding = images[int(name[1:])]
            want = convolution(x, weights[name], stride, padding, 1)
        else:
            want = x.astype("int64") @ weights[name].astype("int64")
        np.testing.assert_array_equal(out, (want * 0.5).astype("float32"))
    assert set(templates(lowered)) == {"gemm", "conv2d", "map"}  # map: zeros behind K = 7, 129, and three channels
    assert sum(row["template"] in ("gemm", "conv2d") for row in lowered.report["kernels"]) == len(outputs)
    assert all("U8S8" in row["workload"] for row in lowered.report["kernels"] if row["template"] != "map")


ATTENTIONS = [
    # batch, heads, kv heads, queries, keys, depth, width, mask, options
    (1, 2, 2, 70, 70, 32, 32, None, {}),
    (2, 4, 2, 65, 130, 64, 64, "float", {}),
    (1, 3, 1, 100, 100, 64, 48, None, {"causal": True}),
    (1, 2, 2, 5, 33, 24, 20, "bool", {}),
    (1, 2, 2, 40, 40, 80, 96, "bool", {"fill": -1e9, "causal": True}),
    (1, 2, 1, 33, 17, 16, 16, "float", {"layout": "BSHD", "scale": 0.5}),
    (1, 1, 1, 3, 1, 7, 5, None, {}),
    (1, 4, 2, 20, 36, 32, 32, None, {"layout": "BSHD,BHSD,BSHD,BHSD"}),
]


def test_attention_with_masks_groups_and_layouts():
    inputs, expected = {}, []
    for number, (b, h, hk, s, t, d, e, mask, options) in enumerate(ATTENTIONS):
        given = {f"q{number}": floats(b, h, s, d), f"k{number}": floats(b, hk, t, d), f"v{number}": floats(b, hk, t, e)}
        if mask == "float":
            given[f"m{number}"] = floats(b, 1, 1, t)
        if mask == "bool":
            given[f"m{number}"] = RANDOM.random((b, 1, s, t)) > 0.4
            given[f"m{number}"][..., 0, :] = False  # a query that sees nothing
        layouts = AttentionAttrs(**options).layouts
        for name, layout in zip(list(given)[:3], layouts, strict=False):
            given[name] = given[name] if layout == "BHSD" else np.ascontiguousarray(given[name].transpose(0, 2, 1, 3))
        expected.append(reference(*given.values(), **options))
        inputs |= given

    outputs, lowered = run(each_attention(ATTENTIONS), inputs)
    for out, exact in zip(outputs, expected, strict=True):
        close(out, exact, 2e-6)
    assert set(templates(lowered)) == {"attention"}


def test_few_queries_take_keys_in_parts_that_are_joined_in_order():
    """One query behind a long cache, in both layouts, with grouped heads; masks that hide a whole part, and everything."""
    cases = [
        (1, 9, 3, 1, 1030, 64, 64, None, {}),
        (2, 4, 2, 3, 700, 32, 20, "bool", {"layout": "BSHD"}),
        (1, 2, 2, 2, 600, 96, 128, "float", {}),
        (1, 2, 1, 5, 530, 24, 7, "bool", {"safe": False}),
    ]
    inputs, expected = {}, []
    for number, (b, h, hk, s, t, d, e, mask, options) in enumerate(cases):
        swap = options.get("layout") == "BSHD"
        given = {f"q{number}": floats(b, h, s, d), f"k{number}": floats(b, hk, t, d), f"v{number}": floats(b, hk, t, e)}
        given = {name: np.ascontiguousarray(value.transpose(0, 2, 1, 3)) if swap else value for name, value in given.items()}
        if mask == "float":
            given[f"m{number}"] = np.where(np.arange(t) < 300, -np.inf, floats(1, 1, 1, t)).astype("float32")
        if mask == "bool":
            given[f"m{number}"] = (RANDOM.random((b, 1, s, t)) > 0.4) & (np.arange(t) > 200)
            given[f"m{number}"][..., 0, :] = False  # a query that sees nothing
        expected.append(reference(*given.values(), **options))
        inputs |= given

    outputs, lowered = run(each_attention(cases), inputs)
    for out, exact in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
        close(np.nan_to_num(out), np.nan_to_num(exact), 2e-6)
    assert templates(lowered) == ["attention", "sums"] * len(cases)


def test_attention_gives_the_logarithms_of_its_sums():
    """At once, in parts, causal, and of queries that see nothing."""
    cases = [(1, 4, 2, 3, 700, 32, 20, "bool", {"layout": "BSHD"}), (2, 2, 1, 70, 70, 16, 16, None, {"causal": True})]
    inputs, expected = {}, []
    for number, (b, h, hk, s, t, d, e, mask, options) in enumerate(cases):
        given = {f"q{number}": floats(b, s, h, d) if mask else floats(b, h, s, d), f"k{number}": floats(b, t, hk, d) if mask else floats(b, hk, t, d)}
        given[f"v{number}"] = floats(b, t, hk, e) if mask else floats(b, hk, t, e)
        if mask:
            given[f"m{number}"] = RANDOM.random((b, 1, s, t)) > 0.4
            given[f"m{number}"][..., 0, :] = False
        expected += reference(*given.values(), logsum=True, **options)
        inputs |= given

    def build(emit, *x):
        pairs = [emit(attention(*x[:4], logsum=True, **cases[0][-1])), emit(attention(*x[4:], logsum=True, **cases[1][-1]))]
        return [emit(relax.TupleGetItem(pair, index)) for pair in pairs for index in range(2)]

    outputs, lowered = run(build, inputs)
    for out, exact in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=3e-6)
    assert templates(lowered) == ["attention", "sums"] * 2


def test_attention_that_the_kernel_refuses_is_decomposed():
    q = floats(1, 1, 5, 144)
    (out,), lowered = run(lambda emit, q: [emit(attention(q, q, q))], {"q": q})
    close(out, reference(q, q, q), 2e-6)
    assert "attention" not in templates(lowered) and "gemm" in templates(lowered)


def test_everything_else_runs_on_the_gpu_too():
    """Element-wise code, movement, reductions along and across rows, softmax, normalisation, pooling, depthwise convolution, scans, gathers, single numbers, sums of nothing, truth values."""
    x, image = floats(3, 70, 33), floats(1, 8, 9, 20)
    depthwise, gamma, beta = floats(3, 3, 1, 20), floats(33), floats(33)
    long, index = floats(2, 3000), np.array([2, -1, 0, 69], "int64")
    pixels = floats(2, 7, 9, 37)
    inputs = {"x": x, "image": image, "depthwise": depthwise, "gamma": gamma, "beta": beta, "long": long, "index": index, "pixels": pixels}

    def build(emit, x, image, depthwise, gamma, beta, long, index, pixels):
        return [
            emit(op.nn.softmax(x, axis=-1)),
            emit(op.nn.softmax(x, axis=1)),
            emit(op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=1e-5)),
            emit(op.permute_dims(x, [2, 0, 1])),
            emit(op.sum(x, axis=[1])),
            emit(op.max(x, axis=[0, 2])),
            emit(op.nn.softmax(long, axis=-1)),
            emit(op.concat([x, emit(op.multiply(x, x))], axis=1)),
            emit(op.nn.max_pool2d(image, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC")),
            emit(op.nn.conv2d(image, depthwise, 1, 1, 1, 20, "NHWC", "HWIO", "NHWC")),
            emit(op.cumsum(x, axis=1)),
            emit(op.take(x, index, axis=1)),
            emit(op.argmax(x, axis=-1)),
            emit(op.sum(emit(op.multiply(x, x)))),
            emit(op.nn.relu(emit(op.mean(pixels, axis=[1, 2], keepdims=True)))),
            emit(op.sqrt(emit(op.add(emit(op.sum(x, axis=None)), relax.const(np.float32(1e4)))))),
            emit(op.sum(emit(op.strided_slice(x, [1], [0], [0])), axis=[1])),
            emit(op.where(emit(op.bitwise_not(emit(op.less(x, relax.const(np.float32(0)))))), x, relax.const(np.float32(2)))),
        ]

    outputs, lowered = run(build, inputs)
    softmax = [np.exp(value - value.max(axis, keepdims=True)) for value, axis in ((x, -1), (x, 1), (long, -1))]
    softmax = [value / value.sum(axis, keepdims=True) for value, axis in zip(softmax, (-1, 1, -1), strict=True)]
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    pooled = np.stack([padded[:, i : i + 8 : 2, j : j + 9 : 2][:, :4, :5] for i in range(3) for j in range(3)]).max(0)
    zeros = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    deep = sum(zeros[:, i : i + 8, j : j + 9] * depthwise[i, j, 0] for i in range(3) for j in range(3))
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta
    expected = [
        softmax[0],
        softmax[1],
        normal,
        x.transpose(2, 0, 1),
        x.astype("float64").sum(1),
        x.max((0, 2)),
        softmax[2],
        np.concatenate([x, x * x], 1),
    ]
    expected += [pooled, deep, x.astype("float64").cumsum(1), x[:, index], x.argmax(-1), (x.astype("float64") ** 2).sum()]
    expected += [np.maximum(pixels.astype("float64").mean((1, 2), keepdims=True), 0)]
    expected += [np.sqrt(x.astype("float64").sum() + 1e4), np.zeros((3, 33)), np.where(x < 0, 2, x)]
    for out, want in zip(outputs, expected, strict=True):
        close(out, want, 3e-6)
    kinds = set(templates(lowered))
    assert kinds - {"gemm"} == {"map", "depthwise", "rows by thread", "rows by warp", "rows by block", "rows side by side", "scan"}


def test_sine_and_cosine_of_any_size():
    x = np.concatenate([floats(500), floats(500) * 1e3, floats(500) * 1e9])
    (sine, cosine), _ = run(lambda emit, x: [emit(op.sin(x)), emit(op.cos(x))], {"x": x})
    assert np.abs(sine - np.sin(x.astype("float64"))).max() < 2e-7
    assert np.abs(cosine - np.cos(x.astype("float64"))).max() < 2e-7


def test_an_index_out_of_range_is_recorded_with_its_kernel():
    x, index = floats(5, 4), np.array([1, 7, -6], "int64")
    program = program_of(lambda emit, x, i: [emit(op.take(x, i, axis=0))], {"x": x, "i": index})
    lowered = compiled(program)
    model = emulation(lowered)
    (out,) = model(x, index)
    assert lowered.report["kernels"][model.error - 1]["kernel"] == "take"
    np.testing.assert_array_equal(out, x[[1, 0, 0]])


def test_outputs_may_be_inputs_weights_or_each_other():
    x = floats(4, 6)

    def build(emit, x):
        y = emit(op.add(x, x))
        return [x, y, y, emit(op.reshape(y, (6, 4))), relax.const(np.float32(3))]

    outputs, _ = run(build, {"x": x})
    for out, want in zip(outputs, [x, 2 * x, 2 * x, (2 * x).reshape(6, 4), np.float32(3)], strict=True):
        np.testing.assert_array_equal(out, want)
