"""Open sizes on the CUDA target: one artifact for a range of sizes, emulated at awkward ones; sizes that do not fit together raise; what stays unsupported is named."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import cuda_models
import numpy as np
import pytest
import tcompile
from cuda_models import compiled, emulation, program_of
from onnx import TensorProto, helper, numpy_helper
from onnx_models import mlp
from tcompile.compiler.api import import_model
from tcompile.compiler.compare import agree
from tcompile.compiler.cuda_runtime import GpuModel
from tcompile.compiler.dialect.attention import attention, reference
from tcompile.compiler.dialect.weight_only import reference as weight_only
from tcompile.compiler.dialect.weight_only import weight_only_matmul
from tcompile.compiler.program import DimRange
from tcompile.compiler.tvm import relax
from tcompile.models import text
from tcompile.models.zoo import ZOO
from tcompile.targets.cuda import gemm_hopper, sparse
from test_cuda_kernels import convolution
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _seeded():
    global RANDOM
    RANDOM = np.random.default_rng(5)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def close(ours, exact, tolerance=2e-6):
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max(initial=0) <= tolerance * max(1e-30, np.abs(exact).max(initial=0))


def exact_product(a, b):
    return a.astype("float64") @ b.astype("float64")


def test_products_with_open_rows_batches_columns_and_depth():
    """Each at sizes of 1, primes, tails and none at all; with an epilogue that reads other tensors; by constant weights the host chooses a tile by the rows, few of which take K in parts."""
    weight, long, codes = floats(96, 40), floats(1024, 64), RANDOM.integers(-128, 128, (32, 24), "int8")
    inputs = {
        "x": (("b", "m", 96), "float32"),
        "p": (("b", "m", "k"), "float32"),
        "q": (("b", "k", "n"), "float32"),
        "u": (("m", 32), "uint8"),
        "r": (("b", 1, 40), "float32"),
        "w": (("m", 1024), "float32"),
    }

    def build(emit, x, p, q, u, r, w):
        return [
            emit(op.add(emit(op.nn.relu(emit(op.matmul(x, relax.const(weight))))), r)),
            emit(op.nn.gelu(emit(op.matmul(p, q)))),
            emit(op.multiply(emit(op.astype(emit(op.matmul(u, relax.const(codes), out_dtype="int32")), "float32")), relax.const(np.float32(0.5)))),
            emit(op.matmul(w, relax.const(long))),
        ]

    lowered = compiled(program_of(build, inputs))
    assert {row["template"] for row in lowered.report["kernels"]} == {"gemm", "sums"}
    limits = sorted({int(number) for number in re.findall(r"if \(s\.n_m <= (\d+)\)", lowered.sources["model.cu"])})
    assert limits
    model = emulation(lowered)
    from scipy.special import erf

    for b, m, k, n in ((1, 1, 1, 1), (2, 17, 33, 5), (3, 64, 8, 66), (1, limits[0], 1, 2), (1, limits[0] + 1, 1, 2), (2, 3, 0, 7), (0, 5, 4, 4)):
        x, p, q, r = floats(b, m, 96), floats(b, m, k), floats(b, k, n), floats(b, 1, 40)
        u = RANDOM.integers(0, 256, (m, 32), "uint8")
        w = floats(m, 1024)
        dense, plain, whole, parts = model(x, p, q, u, r, w)
        close(dense, np.maximum(exact_product(x, weight), 0) + r)
        product = exact_product(p, q)
        close(plain, 0.5 * product * (1 + erf(product / np.sqrt(2))))
        np.testing.assert_array_equal(whole, (u.astype("int64") @ codes * 0.5).astype("float32"))
        close(parts, exact_product(w, long))
        assert model.error == 0


def hopper(rows):
    """A batch of matrices of 16-bit numbers by one weight; a convolution of images of which there are open many."""
    weight, kernel = ((0.1 * floats(*shape)).astype("float16") for shape in ((64, 72), (3, 3, 16, 24)))
    inputs = {"x": (("b", rows, 64), "float16"), "image": (("b", 5, 6, 16), "float16")}

    def build(emit, x, image):
        window = emit(op.nn.conv2d(image, relax.const(kernel), 1, 1, 1, 1, "NHWC", "HWIO", "NHWC", "float32"))
        return [emit(op.nn.relu(emit(op.matmul(x, relax.const(weight), out_dtype="float32")))), window]

    def exact(x, image):
        return np.maximum(exact_product(x, weight), 0), convolution(image, kernel, 1, 1, 1)

    return program_of(build, inputs), exact, lambda b, n: (floats(b, n, 64).astype("float16"), floats(b, 5, 6, 16).astype("float16"))


def pruned(rows):
    """Weights of the 2:4 pattern."""
    weight = 0.1 * floats(64, 40)
    weight.reshape(16, 4, 40)[:, 1:3] = 0
    program = program_of(lambda emit, x: [emit(op.matmul(x, relax.const(weight)))], {"x": (("b", rows, 64), "float32")})
    return program, lambda x: (exact_product(x, weight),), lambda b, n: (floats(b, n, 64),)


def in_few_bits(rows):
    """Weights of four bits."""
    k, n, group = 96, 40, 32
    codes, scales = RANDOM.integers(0, 256, (k // 2, n), "uint8"), np.abs(floats(k // group, n))
    program = program_of(
        lambda emit, x: [emit(weight_only_matmul(x, relax.const(codes), relax.const(scales), bits=4, group=group))],
        {"x": (("b", rows, k), "float32")},
    )
    return program, lambda x: (weight_only(x, codes, scales, bits=4, group=group),), lambda b, n: (floats(b, n, k),)


def by_bytes(rows):
    """Weights of three bits by int8."""
    k, n, group = 96, 40, 32
    codes, scales = RANDOM.integers(0, 256, (k * 3 // 8, n), "uint8"), np.abs(floats(k // group, n))
    program = program_of(
        lambda emit, x: [emit(weight_only_matmul(x, relax.const(codes), relax.const(scales), bits=3, group=group))],
        {"x": (("b", rows, k), "int8")},
    )
    return program, lambda x: (weight_only(x, codes, scales, bits=3, group=group),), lambda b, n: (RANDOM.integers(-128, 128, (b, n, k), "int8"),)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("case", "target", "kinds"),
    [
        (hopper, "cuda:sm_90a", {"gemm hopper", "conv2d hopper"}),
        pytest.param(pruned, "cuda:sm_80", {"gemm 2:4"}, marks=pytest.mark.networks),
        (in_few_bits, "cuda:sm_80", {"weight only"}),
        pytest.param(by_bytes, "cuda:sm_80", {"weight only"}, marks=pytest.mark.networks),
    ],
)
def test_rows_of_every_template_of_products_may_be_open(case, target, kinds, monkeypatch):
    for template in (gemm_hopper.HopperGemm, sparse.SparseGemm):
        monkeypatch.setattr(template, "_faster", lambda self, shape: True)
    program, exact, example = case("m")
    lowered = compiled(program, target, "bf16")
    assert {row["template"] for row in lowered.report["kernels"]} - {"map", "sums"} == kinds
    model = emulation(lowered)
    for b, m in ((1, 1), (2, 7), (1, 67), (3, 90)):
        given = example(b, m)
        for mine, want in zip(model(*given), exact(*given), strict=True):
            close(mine, want, 2e-2)


def test_attention_with_open_batch_queries_and_keys():
    """Masks that broadcast, grouped heads, both layouts; many keys behind few queries are taken in parts, as many as the call's sizes make useful."""
    inputs = {
        "q": (("b", 4, "s", 32), "float32"),
        "k": (("b", 2, "t", 32), "float32"),
        "v": (("b", 2, "t", 20), "float32"),
        "mask": (("b", 1, 1, "t"), "float32"),
        "seen": (("s", "t"), "bool"),
        "own": (("b", "s", 3, 24), "float32"),
    }

    def build(emit, q, k, v, mask, seen, own):
        return [
            emit(attention(q, k, v, mask)),
            emit(attention(q, k, v, seen)),
            emit(attention(own, own, own, causal=True, layout="BSHD")),
        ]

    lowered = compiled(program_of(build, inputs))
    assert {row["template"] for row in lowered.report["kernels"]} == {"attention", "sums"}
    model = emulation(lowered)
    for b, s, t in ((1, 1, 1), (2, 67, 5), (1, 65, 131), (1, 3, 700)):
        q, k, v, mask, own = floats(b, 4, s, 32), floats(b, 2, t, 32), floats(b, 2, t, 20), floats(b, 1, 1, t), floats(b, s, 3, 24)
        seen = RANDOM.random((s, t)) > 0.3
        for mine, given, options in zip(
            model(q, k, v, mask, seen, own),
            ((q, k, v, mask), (q, k, v, seen), (own, own, own)),
            ({}, {}, {"causal": True, "layout": "BSHD"}),
            strict=True,
        ):
            close(mine, reference(*given, **options))


def test_everything_else_with_open_sizes():
    inputs = {
        "x": (("b", "t", 33), "float32"),
        "more": (("b", "u", 33), "float32"),
        "at": (("u",), "int64"),
        "image": (("b", "h", "w", 8), "float32"),
    }
    kernel, depthwise = floats(3, 3, 8, 12), floats(3, 3, 1, 8)

    def build(emit, x, more, at, image):
        same = ("NHWC", "HWIO", "NHWC")
        return [
            emit(op.nn.softmax(x, axis=-1)),
            emit(op.nn.softmax(x, axis=1)),
            emit(op.mean(x, axis=[1])),
            emit(op.max(x, axis=[0, 2])),
            emit(op.permute_dims(x, [2, 0, 1])),
            emit(op.concat([x, more], axis=1)),
            emit(op.take(x, at, axis=1)),
            emit(op.cumsum(x, axis=1)),
            emit(op.nn.relu(emit(op.nn.conv2d(image, relax.const(kernel), 2, 1, 1, 1, *same)))),
            emit(op.nn.conv2d(image, relax.const(depthwise), 1, 1, 1, 8, *same)),
            emit(op.nn.conv2d(image, relax.const(kernel[:1, :1]), 1, 0, 1, 1, *same)),
            emit(op.mean(image, axis=[1, 2], keepdims=True)),
            emit(op.arange(x.ty.shape[1], x.ty.shape[1] + more.ty.shape[1])),
        ]

    lowered = compiled(program_of(build, inputs))
    assert [row["template"] for row in lowered.report["kernels"]].count("depthwise") == 1
    model = emulation(lowered)
    for b, t, u, h, w in ((1, 1, 1, 1, 1), (2, 7, 3, 5, 9), (3, 130, 11, 8, 4)):
        x, more, image, at = floats(b, t, 33), floats(b, u, 33), floats(b, h, w, 8), RANDOM.integers(-t, t, (u,), "int64")
        exact = x.astype("float64")
        wide = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))).astype("float64")
        expected = [
            *(np.exp(exact - exact.max(axis, keepdims=True)) for axis in (-1, 1)),
            exact.mean(1), exact.max((0, 2)), exact.transpose(2, 0, 1), np.concatenate([x, more], 1), x[:, at], exact.cumsum(1),
            np.maximum(convolution(image, kernel, 2, 1, 1), 0),
            sum(wide[:, i : i + h, j : j + w] * depthwise[i, j, 0] for i in range(3) for j in range(3)),
            convolution(image, kernel[:1, :1], 1, 0, 1), image.mean((1, 2), keepdims=True, dtype="float64"), np.arange(t, t + u),
        ]  # fmt: skip
        for position, axis in ((0, -1), (1, 1)):
            expected[position] /= expected[position].sum(axis, keepdims=True)
        for mine, want in zip(model(x, more, at, image), expected, strict=True):
            close(mine, want)
        assert model.error == 0
    model(x, more, np.full((u,), t), image)
    assert model.error > 0  # an index behind the end of this call's dim


def test_the_workspace_grows_with_the_sizes_and_tensors_share_it():
    lowered = compiled(import_model(mlp("n", layers=6)))
    model, sizes = emulation(lowered), {}
    plain = tcompile.compile(mlp("n", layers=6))
    for n in (1, 5, 300):
        x = floats(n, 4)
        close(model(x)[0], plain(x), 1e-4)
        if not cuda_models.RUNNERS:
            from tcompile.compiler.tvm_runtime import from_dlpack

            sizes[n] = model._sizes([from_dlpack(np.ascontiguousarray(x))])
    assert cuda_models.RUNNERS or (sizes[1][0] == sizes[5][0] < sizes[300][0] and sizes[300][1] == [(300, 3)])
    memory = lowered.report["memory"]
    assert memory["sizes"] == {"n": 4} and memory["workspace_bytes"] < memory["unshared_bytes"]


def test_the_runtime_asks_the_library_once_for_a_combination_of_sizes():
    asked = []

    def sizes(tensors):
        asked.append([tensor.shape for tensor in tensors])
        return 256 * len(asked), [(len(tensors[0]), 3)]

    model = SimpleNamespace(_sizes=sizes, _planned={})
    calls = [GpuModel._plan(model, [np.zeros((n, 4)), np.zeros(n)]) for n in (2, 3, 2, 2)]  # pyright: ignore[reportArgumentType]
    assert calls == [(256, [(2, 3)]), (512, [(3, 3)]), (256, [(2, 3)]), (256, [(2, 3)])] and len(asked) == 2


def test_sizes_that_do_not_fit_raise():
    inputs = {"x": (("n", 4), "float32"), "y": (("n", 4), "float32")}
    build = lambda emit, x, y: [emit(op.add(x, y))]  # noqa: E731
    model = emulation(compiled(program_of(build, inputs, {"n": DimRange(2, None, 9)})))
    x, y = floats(9, 4), floats(9, 4)
    np.testing.assert_array_equal(model(x, y)[0], x + y)
    with pytest.raises(Exception, match=r"dim 0|'n'"):
        model(floats(3, 4), floats(4, 4))
    with pytest.raises(Exception, match=r"2\.\.9|n in 2"):
        model(floats(1, 4), floats(1, 4))
    with pytest.raises(Exception, match=r"2\.\.9|n in 2"):
        model(floats(10, 4), floats(10, 4))


def model_of(nodes, inputs, outputs, constants=None):
    """An ONNX model; inputs: name -> shape of floats."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    stored = [numpy_helper.from_array(np.array(value), name) for name, value in (constants or {}).items()]
    results = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs]
    return helper.make_model(helper.make_graph(nodes, "graph", given, results, stored), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_what_the_import_takes_for_granted_is_checked_as_on_the_cpu():
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["folded"], name="fold"),
        helper.make_node("MatMul", ["y", "z"], ["product"], name="times"),
        helper.make_node("Add", ["product", "w"], ["sum"], name="plus"),
    ]
    model = model_of(nodes, {"x": ["n", 4], "y": ["m", "k"], "z": ["l", 4], "w": ["r", 4]}, ("folded", "sum"), {"s": [-1, 8]})
    plain, ours = tcompile.compile(model), emulation(compiled(import_model(model)))
    for sizes in ((6, 2, 3, 3, 2), (3, 2, 3, 3, 2), (6, 2, 3, 5, 2), (6, 2, 3, 3, 5)):
        n, m, k, rows, added = sizes
        given = [floats(n, 4), floats(m, k), floats(rows, 4), floats(added, 4)]
        if n % 2 == 0 and k == rows and m == added:
            for mine, want in zip(ours(*given), plain(*given), strict=True):
                close(mine, want)
            continue
        with pytest.raises(tcompile.TcompileError) as refused:
            plain(*given)
        with pytest.raises(Exception, match=re.escape(str(refused.value).rpartition("running: ")[2])):
            ours(*given)


def test_sizes_that_data_decide_are_refused_by_name():
    with pytest.raises(tcompile.UnsupportedModel, match="'where' a size that is computed from data"):
        tcompile.compile(model_of([helper.make_node("NonZero", ["x"], ["y"], name="where")], {"x": ["n", 4]}, ["y"]), target="cuda", emit_only=True)
    affine = model_of([helper.make_node("AffineGrid", ["x", "size"], ["grid"], name="affine")], {"x": [2, 2, 3]}, ("grid",))
    affine.graph.input.append(helper.make_tensor_value_info("size", TensorProto.INT64, [4]))
    affine.opset_import[0].version = 20
    with pytest.raises(tcompile.UnsupportedModel, match="a size that is computed from data"):
        compiled(import_model(affine))


def agrees(name, runs, **options):
    """One artifact of a network at several sizes against onnxruntime; returns what was lowered."""
    onnxruntime = pytest.importorskip("onnxruntime")
    entry = ZOO[name]
    code = compiled(import_model(str(entry.onnx_path())), **options)
    model, session = emulation(code), onnxruntime.InferenceSession(str(entry.onnx_path()))
    for sizes in runs:
        feeds = entry.example_inputs(**sizes)
        ours = model(*(feeds[spec.name] for spec in code.inputs))
        for mine, want in zip(ours, session.run([spec.name for spec in code.outputs], feeds), strict=True):
            assert agree(mine, np.asarray(want)).ok, sizes
    return code


@pytest.mark.networks
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("minilm", [{"batch": 1, "seq": 1}, {"batch": 2, "seq": 7}, {"batch": 3, "seq": 65}]),
        ("bert-base", [{"batch": 1, "seq": 1}, {"batch": 2, "seq": 17}]),
        ("vit-s16", [{"batch": 1}, {"batch": 2}]),
        ("resnet50", [{"batch": 1}, {"batch": 2}]),
        ("smollm2", [{"batch": 1, "seq": 1}, {"batch": 2, "seq": 11}]),
    ],
)
def test_networks_with_open_sizes_agree_with_onnxruntime(name, runs):
    code = agrees(name, runs)
    assert code.report["memory"]["workspace_bytes"] < code.report["memory"]["unshared_bytes"] / 3
    if name == "minilm":
        kinds = [row["template"] for row in code.report["kernels"] for _ in range(row["calls"])]
        assert kinds.count("attention") == 6 and kinds.count("gemm") >= 36


@pytest.mark.networks
@pytest.mark.parametrize("name", ["llama", "smollm2"])
def test_one_artifact_decodes_behind_caches_of_every_length(name):
    """Positions, the mask and the place of the new token are sizes that kernels take."""
    torch = pytest.importorskip("torch")
    decoder = getattr(text, name)()
    step, sizes = text.decode_step(decoder), decoder.model.config
    layers, heads, width = sizes.num_hidden_layers, sizes.num_key_value_heads, sizes.hidden_size // sizes.num_attention_heads
    cache = f"{layers}x1x{heads}x1..7..200x{width}"
    code = compiled(import_model(step, example_inputs=token_and_cache(layers, heads, 7, width), shapes={"keys": cache, "values": cache}))
    model = emulation(code)
    for length in (1, 2, 33, 131, 200) if name == "llama" else (1, 68):
        feeds = token_and_cache(layers, heads, length, width)
        with torch.no_grad():
            wanted = step(*map(torch.from_numpy, feeds))
        for mine, want in zip(model(*feeds), wanted, strict=True):
            close(mine, want.numpy(), 5e-6 if name == "llama" else 5e-5)  # thirty layers of another order of sums
    with pytest.raises(Exception, match=r"1\.\.200"):
        model(*token_and_cache(layers, heads, 201, width))


def token_and_cache(layers, heads, length, width):
    """A token, and keys and values of those before it."""
    shape = layers, 1, heads, length, width
    return RANDOM.integers(0, 256, (1, 1)), 0.3 * floats(*shape), 0.3 * floats(*shape)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_machine_code_of_open_sizes(arch, tmp_path):
    """Every product is on tensor cores, nothing spills, and positions are found without divisions."""
    code = compiled(import_model(str(ZOO["minilm"].onnx_path())), f"cuda:{arch}", emit_only=False)
    rows = {f"k_{row['kernel']}": row for row in code.report["kernels"]}
    for part in dump(code.library, tmp_path, "-sass").split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        row = rows[name.strip()]
        assert ("HMMA.1688.F32.TF32" in text) == (row["template"] in ("gemm", "attention")), row
        assert not re.search(r"\b(LDL|STL)\b", text), row
        assert "I2F.U32.RP" not in text and "MUFU.RCP" not in text or row["template"] != "map", row
