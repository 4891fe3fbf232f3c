"""ONNX Runtime's fused operators against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import tcompile
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx_microsoft import build, check, floats, ints


@pytest.mark.parametrize("constant", [(), (1,)])
@pytest.mark.parametrize(("batched", "transposed"), [("", "A"), ("A", "B"), ("AB", "AB")])
def test_fused_matmul(batched: str, transposed: str, constant: tuple[int, ...]) -> None:
    a, b = floats(3, 5, 7), floats(3, 7, 2)
    sides = []
    for name, value in (("A", a), ("B", b)):
        value = value.swapaxes(1, 2) if name in transposed else value
        sides.append(np.ascontiguousarray(value.transpose(1, 0, 2) if name in batched else value))
    flags = {f"trans{name}": 1 for name in transposed} | {f"transBatch{name}": 1 for name in batched}
    check("FusedMatMul", sides, constant=constant, alpha=0.7, **flags)


def test_fused_gemm() -> None:
    operands = [floats(7, 5), floats(3, 7), floats(5, 1)]
    for activation in ({"activation": "Relu"}, {"activation": "LeakyRelu", "activation_alpha": 0.3}):
        check("FusedGemm", operands, constant=(1,), transA=1, transB=1, alpha=0.5, beta=1.5, **activation)


@pytest.mark.parametrize("last", [False, True])
def test_fused_convolution(last: bool) -> None:
    x, w, bias = floats(2, 4, 9, 7), floats(6, 2, 3, 2), floats(6)
    z = floats(2, 6, 5, 7)
    options = {"group": 2, "strides": [2, 1], "pads": [1, 0, 1, 1]}
    if last:
        for op, inputs in (("NhwcConv", [x, w, bias]), ("NhwcFusedConv", [x, w, bias, z])):
            activation = {"activation": "Relu"} if op == "NhwcFusedConv" else {}
            plain, feeds = build("FusedConv", inputs, constant=(1, 2), **options, **activation)
            turned, _ = build(op, [v if v.ndim < 4 or v is w else v.transpose(0, 2, 3, 1) for v in inputs], constant=(1, 2), **options, **activation)
            want = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
            have = tcompile.compile(turned)(**{name: np.ascontiguousarray(value.transpose(0, 2, 3, 1)) for name, value in feeds.items()})
            np.testing.assert_allclose(have.transpose(0, 3, 1, 2), want, rtol=1e-4, atol=1e-5)
        return
    for activation, parameters in (("Relu", {}), ("LeakyRelu", [0.2]), ("Clip", [-0.5, 0.7]), ("HardSigmoid", [0.3, 0.4]), ("Tanh", {})):
        extra = {"activation_params": parameters} if parameters else {}
        check("FusedConv", [x, w, bias], constant=(1, 2), activation=activation, **options, **extra)
    check("FusedConv", [x, w, bias, z], constant=(1, 2), activation="Relu", **options)
    check("FusedConv", [x, w, None, z], constant=(1,), **options)


def test_activations_of_sums() -> None:
    x, bias = floats(3, 5, 7), floats(7)
    check("FastGelu", [x, bias])
    check("FastGelu", [x])
    check("BiasGelu", [x, bias])
    check("Gelu", [x])
    check("QuickGelu", [x])
    check("QuickGelu", [x], alpha=1.3)


@pytest.mark.parametrize(("skip", "bias"), [((2, 5, 11), floats(11, seed=1)), ((1, 5, 11), None), ((5, 11), None)])
def test_skip_normalization(skip: tuple[int, ...], bias: np.ndarray | None) -> None:
    x, other, gamma, beta = floats(2, 5, 11), floats(*skip, seed=2), floats(11), floats(11, seed=3)
    check("SkipLayerNormalization", [x, other, gamma, beta, bias], "y - - sum", epsilon=1e-3)
    if skip[0] == 2:
        check("SkipSimplifiedLayerNormalization", [x, other, gamma, bias], "y - - sum", epsilon=1e-3, dims={0: ["b", "s", 11], 1: ["b", "s", 11]})
    else:
        check("SkipSimplifiedLayerNormalization", [x, other, gamma])


def test_simplified_normalization_of_the_standard_domain() -> None:
    check("SimplifiedLayerNormalization", [floats(2, 5, 11), floats(11)], "y r", domain="", epsilon=1e-3)
    check("SimplifiedLayerNormalization", [floats(2, 5, 3), floats(5, 3)], domain="", axis=1)


@pytest.mark.parametrize("full", [False, True])
def test_embeddings(full: bool) -> None:
    ids, segments, mask = ints(9, 2, 5), ints(2, 2, 5), (np.arange(5)[None] < np.array([[3], [5]])).astype(np.int32)
    tables = [floats(9, 8), floats(7, 8, seed=1), floats(2, 8, seed=2)]
    if full:
        inputs = [ids, segments, *tables, floats(8), floats(8, seed=4), mask, ints(7, 2, 5, seed=5)]
        check("EmbedLayerNormalization", inputs, "y index sum", constant=(2, 3, 4), kinds={"index": TensorProto.INT32})
    else:
        inputs = [ids, None, *tables[:2], None, floats(8), floats(8, seed=4)]
        check("EmbedLayerNormalization", inputs, "y index", constant=(2, 3), kinds={"index": TensorProto.INT32}, dims={0: ["b", "s"]})


@pytest.mark.sweep
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
def test_rotary_embedding(part: int, interleaved: int) -> None:
    tables = [floats(9, (part or 6) // 2), floats(9, (part or 6) // 2, seed=1)]
    options = {"interleaved": interleaved, "rotary_embedding_dim": part} | ({"num_heads": 3} if part else {})
    for positions in (np.array([4]), ints(9, 2, 5).astype(np.int64)):
        check("RotaryEmbedding", [floats(2, 5, 18), positions, *tables], **options)
    check("RotaryEmbedding", [floats(2, 3, 5, 6), ints(9, 2, 5).astype(np.int64), *tables], dims={0: ["b", 3, "s", 6], 1: ["b", "s"]}, **options)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_standard_rotary_embedding(interleaved: int) -> None:
    positions, tables = ints(9, 2, 5).astype(np.int64), [floats(9, 3), floats(9, 3, seed=1)]
    gathered = [table[positions] for table in tables]
    for x, options in ((floats(2, 5, 18), {"num_heads": 3}), (floats(2, 3, 5, 6), {})):
        for inputs in ([x, *tables, positions], [x, *gathered]):
            model, feeds = build("RotaryEmbedding", inputs, domain="", interleaved=interleaved, **options)
            model.opset_import[0].version, model.ir_version = 23, 10
            want = ReferenceEvaluator(model).run(None, feeds)[0]
            np.testing.assert_allclose(tcompile.compile(model)(**feeds), want, rtol=1e-5, atol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize(("bits", "zero_points"), [(bits, kind) for bits in (2, 4, 8) for kind in ("none", "packed", "floats")][:-1])
def test_matmul_nbits(bits: int, zero_points: str) -> None:
    k, n, block = 70, 7, 16
    blocks, random = -(-k // block), np.random.default_rng(bits)
    weight = random.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8)
    zeros = None
    if zero_points == "packed":
        zeros = random.integers(0, 256, n * -(-blocks * bits // 8)).astype(np.uint8)
    elif zero_points == "floats":
        zeros = random.uniform(0, 1 << bits, (n, blocks)).astype(np.float32)
    scales = random.uniform(0.01, 0.1, (n, blocks)).astype(np.float32)
    sizes = {"K": k, "N": n, "bits": bits, "block_size": block}
    for inputs in ([floats(3, 5, k), weight, scales, zeros], [floats(1, k), weight, scales, zeros, None, floats(n)]):
        check("MatMulNBits", inputs, constant=(1, 2, 3, 5), atol=1e-4, **sizes)


def test_matmul_nbits_with_blocks_of_its_choice() -> None:
    k, n, block = 32, 3, 16
    groups = np.random.default_rng(0).integers(0, 2, k).astype(np.int32)
    inputs = [floats(5, k), ints(256, n, 2, block // 2).astype(np.uint8), floats(n, 2), None, groups]
    model, feeds = build("MatMulNBits", inputs, constant=(1, 2, 4), K=k, N=n, bits=4, block_size=block)
    codes = np.stack([inputs[1] & 15, inputs[1] >> 4], -1).reshape(n, k).astype(np.float32)
    np.testing.assert_allclose(tcompile.compile(model)(**feeds), feeds["i0"] @ ((codes - 8) * inputs[2][:, groups]).T, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    for op, inputs, options, reason in (
        ("FusedMatMul", [floats(2, 3), floats(3, 2)], {"beta": 1.0}, "attribute 'beta' is not supported"),
        ("FusedConv", [floats(1, 1, 4, 4), floats(1, 1, 2, 2)], {"activation": "Mish"}, "activation 'Mish' is not supported"),
        ("SkipLayerNormalization", [floats(1, 2, 4), floats(1, 2, 4), floats(4)], {"outputs": "y mean"}, "which only training needs"),
        ("MatMulNBits", [floats(2, 16), ints(9, 2, 1, 8).astype(np.uint8), floats(2, 1)], {"K": 16, "N": 2, "block_size": 16}, "must be a constant"),
        ("RotaryEmbedding", [floats(1, 2, 4), np.array([0]), floats(3, 2), floats(3, 2)], {"scale": 2.0}, "scale"),
        ("Frobnicate", [floats(2)], {}, "operator is not supported"),
    ):
        with pytest.raises(tcompile.UnsupportedModel, match=reason):
            tcompile.compile(build(op, inputs, **options)[0])
