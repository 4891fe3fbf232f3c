"""ONNX Runtime's attention operators against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import tcompile
from onnx_microsoft import build, check, floats

HEADS = 3


def mask_of(kind: str, batch: int, queries: int, keys: int) -> np.ndarray | None:
    random = np.random.default_rng(keys)
    return {
        "none": None,
        "ends": np.array([keys - 2, keys], np.int32),
        "keys": (random.random((batch, keys)) > 0.4).astype(np.int32),
        "pairs": (random.random((batch, queries, keys)) > 0.4).astype(np.int32),
    }[kind]


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["none", "ends", "keys", "pairs"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "mask_filter_value": -1.0}, {"unidirectional": 1}], ids=str)
def test_multi_head(options: dict, kind: str) -> None:
    """Of queries to other keys; with causal order, to their own."""
    queries, keys = (5, 5) if "unidirectional" in options else (5, 7)
    q, k, v = floats(2, queries, HEADS * 8), floats(2, keys, HEADS * 8, seed=1), floats(2, keys, HEADS * (8 if queries == keys else 4), seed=2)
    bias, added = floats(q.shape[2] + k.shape[2] + v.shape[2]), floats(1, HEADS, queries, keys)
    check("MultiHeadAttention", [q, k, v, bias, mask_of(kind, 2, queries, keys), added], constant=(3,), num_heads=HEADS, **options)
    if kind == "keys":
        check("MultiHeadAttention", [q, k, v, None, mask_of(kind, 2, queries, keys)], num_heads=HEADS, **options)


@pytest.mark.parametrize("causal", [0, 1])
def test_multi_head_with_a_cache(causal: int) -> None:
    q, k, v = floats(2, 3, 24), floats(2, 3, 24, seed=1), floats(2, 3, 24, seed=2)
    past = [floats(2, HEADS, 4, 8), floats(2, HEADS, 4, 8, seed=4)]
    mask, added = mask_of("keys", 2, 3, 7), floats(2, 1, 3, 7)
    dims = {0: ["b", "s", 24], 1: ["b", "s", 24], 2: ["b", "s", 24], 6: ["b", 3, "p", 8], 7: ["b", 3, "p", 8]}
    check("MultiHeadAttention", [q, k, v, None, mask, added, *past], "y k v", num_heads=HEADS, unidirectional=causal)
    check("MultiHeadAttention", [q, k, v, None, None, None, *past], "y k v", dims=dims, num_heads=HEADS, unidirectional=causal)
    check("MultiHeadAttention", [q, k, v], "y k v", num_heads=HEADS, unidirectional=causal)


def test_operands_of_other_forms() -> None:
    """Packed ones, which onnxruntime has on GPUs only, against plain ones; keys that are projected already."""
    parts = [floats(2, 5, 24, seed=seed) for seed in range(3)]
    plain, feeds = build("MultiHeadAttention", parts, num_heads=HEADS)
    want = tcompile.compile(plain)(**feeds)
    split = [part.reshape(2, 5, HEADS, 8) for part in parts]
    for inputs in ([np.stack(split, 3)], [parts[0], np.stack(split[1:], 3)]):
        model, feeds = build("MultiHeadAttention", inputs, num_heads=HEADS)
        np.testing.assert_allclose(tcompile.compile(model)(**feeds), want, rtol=1e-5, atol=1e-6)
    check("MultiHeadAttention", [parts[0], floats(2, HEADS, 7, 8), floats(2, HEADS, 7, 8, seed=9)], num_heads=HEADS)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["none", "ends", "both", "keys", "pairs"])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_of_one_input(causal: int, kind: str) -> None:
    x, weights, bias = floats(2, 5, 13), floats(13, 72), floats(72)
    mask = np.array([4, 5, 1, 0], np.int32) if kind == "both" else mask_of(kind, 2, 5, 5)
    sizes = {}
    if causal:
        weights, bias, sizes = weights[:, :60].copy(), bias[:60], {"qkv_hidden_sizes": [24, 24, 12]}
    check("Attention", [x, weights, bias, mask], constant=(1, 2), num_heads=HEADS, unidirectional=causal, **sizes)


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_of_one_input_with_a_cache(causal: int) -> None:
    x, weights, bias, past = floats(2, 5, 13), floats(13, 72), floats(72), floats(2, 2, HEADS, 3, 8)
    dims = {0: ["b", "s", 13], 4: [2, "b", HEADS, "p", 8]}
    check("Attention", [x, weights, bias, None, past], "y present", constant=(1, 2), dims=dims, num_heads=HEADS, unidirectional=causal)
    inputs = [x, weights, bias, mask_of("keys", 2, 5, 8), past]
    check("Attention", inputs, "y present", constant=(1, 2), num_heads=HEADS, unidirectional=causal)


def test_a_bert_layer_becomes_one_attention() -> None:
    model, _ = build("Attention", [floats(2, 5, 24), floats(24, 72), floats(72), mask_of("keys", 2, 5, 5)], constant=(1, 2), num_heads=HEADS)
    assert any("attention" in str(kernel["workload"]) for kernel in tcompile.compile(model).report()["kernels"])


def test_refusals() -> None:
    x = floats(1, 2, 8)
    for op, inputs, options, reason in (
        ("MultiHeadAttention", [x, x, x], {"num_heads": 3}, "not divisible"),
        ("MultiHeadAttention", [x, x, x], {"num_heads": 2, "outputs": "y - - qk"}, "the output 'qk'"),
        ("Attention", [x, floats(8, 24), floats(24)], {"num_heads": 2, "do_rotary": 1}, "do_rotary"),
        ("Attention", [x, floats(8, 24), floats(24), np.ones((1, 1, 2, 2), np.int32)], {"num_heads": 2}, "a mask of rank 4"),
    ):
        with pytest.raises(tcompile.UnsupportedModel, match=reason):
            tcompile.compile(build(op, inputs, **options)[0])
