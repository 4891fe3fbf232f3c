"""Mixtures of experts of ONNX Runtime against onnxruntime; what its CPU has not, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import tcompile
from onnx_microsoft import build, check, floats, ints

EXPERTS, HIDDEN, INNER = 5, 7, 6


def weights(width: int = INNER, bias: bool = False) -> list[np.ndarray | None]:
    """Of fc1 and fc2, with or without their biases."""
    biases = [floats(EXPERTS, width), floats(EXPERTS, HIDDEN)] if bias else [None, None]
    return [floats(EXPERTS, width, HIDDEN), biases[0], floats(EXPERTS, HIDDEN, INNER), biases[1]]


@pytest.mark.parametrize(
    ("options", "width", "bias"),
    [
        ({"activation_type": "gelu", "k": 3}, INNER, True),
        pytest.param({"activation_type": "silu", "k": 2, "normalize_routing_weights": 1}, INNER, False, marks=pytest.mark.networks),
        (
            {"activation_type": "swiglu", "k": 1, "swiglu_fusion": 1, "activation_alpha": 1.7, "activation_beta": 1.0, "swiglu_limit": 0.7},
            2 * INNER,
            True,
        ),
    ],
)
def test_like_onnxruntime(options, width, bias):
    check("MoE", [floats(2, 3, HIDDEN), floats(6, EXPERTS, seed=1), *weights(width, bias)], constant=(2, 3, 4, 5), **options)


@pytest.mark.parametrize("open_dims", [pytest.param(False, marks=pytest.mark.networks), True])
def test_a_gate_of_two_weights(open_dims):
    """silu(x w1) * (x w3), as Mixtral has it, which onnxruntime computes on GPUs alone; also with open dims."""
    x, router, (w1, _, w2, _), w3 = floats(2, 3, HIDDEN), floats(6, EXPERTS, seed=1), weights(), floats(EXPERTS, INNER, HIDDEN, seed=2)
    dims = {0: ["batch", "seq", HIDDEN], 1: ["rows", EXPERTS]} if open_dims else None
    options = {"activation_type": "silu", "k": 2, "normalize_routing_weights": 1}
    model, feeds = build("MoE", [x, router, w1, None, w2, None, w3], constant=(2, 4, 6), dims=dims, **options)
    gates = np.exp(router) / np.exp(router).sum(1, keepdims=True)
    want = np.zeros((6, HIDDEN))
    for row, token in enumerate(x.reshape(6, HIDDEN)):
        chosen = np.argsort(-gates[row])[:2]
        for expert in chosen:
            inner = w1[expert] @ token
            want[row] += gates[row, expert] / gates[row, chosen].sum() * (w2[expert] @ (inner / (1 + np.exp(-inner)) * (w3[expert] @ token)))
    np.testing.assert_allclose(tcompile.compile(model)(**feeds), want.reshape(x.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "block", "zeros"), [(4, 16, True), *(pytest.param(bits, 0, False, marks=pytest.mark.networks) for bits in (4, 8))])
def test_quantized_like_onnxruntime(bits, block, zeros):
    hidden, inner, random = 32, 48, np.random.default_rng(0)
    inputs = [floats(6, hidden), floats(6, EXPERTS, seed=1)]
    points: list[np.ndarray | None] = []
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        blocks = -(-k // block) if block else 1
        scales = random.uniform(0.01, 0.1, (EXPERTS, n, blocks) if block else (EXPERTS, n)).astype("float32")
        inputs += [ints(256, EXPERTS, n, k * bits // 8).astype("uint8"), scales, floats(EXPERTS, n)]
        points.append(ints(256, EXPERTS, n, -(-blocks * bits // 8)).astype("uint8") if zeros else None)
    options = {"activation_type": "swiglu", "swiglu_fusion": 1, "k": 2, "expert_weight_bits": bits, **({"block_size": block} if block else {})}
    check("QMoE", [*inputs, None, None, None, *points], constant=tuple(range(2, 13)), atol=1e-4, normalize_routing_weights=1, **options)


def test_a_router_of_other_tokens_raises():
    """Open dims that are found not to fit when the model is called."""
    x, router, (w1, _, w2, _) = floats(2, 3, HIDDEN), floats(6, EXPERTS), weights()
    model, _ = build("MoE", [x, router, w1, None, w2], constant=(2, 4), dims={0: ["batch", "seq", HIDDEN], 1: ["rows", EXPERTS]}, k=1)
    compiled = tcompile.compile(model)
    assert compiled(x, router).shape == x.shape
    for rows in (5, 7):
        with pytest.raises(tcompile.TcompileError):
            compiled(x, floats(rows, EXPERTS))


def test_refusals():
    for options, reason in (
        ({"activation_type": "relu2"}, "relu2"),
        ({"use_sparse_mixer": 1}, "use_sparse_mixer"),
        ({"activation_type": "swiglu"}, "swiglu"),
    ):
        with pytest.raises(tcompile.UnsupportedModel, match=reason):
            tcompile.compile(build("MoE", [floats(6, HIDDEN), floats(6, EXPERTS), *weights()], constant=(2, 4), k=2, **options)[0])
    for x, router, reason in ((floats(6, 9), floats(6, EXPERTS), "width 9"), (floats(6, HIDDEN), floats(6, 4), "dim 1 is 4")):
        with pytest.raises(tcompile.UnsupportedModel, match=reason):
            tcompile.compile(build("MoE", [x, router, *weights()], constant=(2, 4), k=2)[0])
