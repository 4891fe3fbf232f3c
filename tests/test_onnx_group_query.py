"""ONNX Runtime's GroupQueryAttention against onnxruntime: caches that grow, caches of a fixed length, prompts, windows, rotary embedding, caps and sinks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tcompile
from onnx_microsoft import build, check, floats
from tcompile.compiler.api import import_model
from tcompile.compiler.dialect.attention import attrs_of
from test_attention_pass import calls

SIZES = {"num_heads": 4, "kv_num_heads": 2}


def step(queries: int, cache: int, seen: list[int], total: int, extra: dict[int, np.ndarray] | None = None) -> list[np.ndarray | None]:
    """Inputs of a step. seen: tokens of each sample after it; total: the most of them that the node is told; extra: further inputs by index."""
    batch = len(seen)
    inputs: list[np.ndarray | None] = [floats(batch, queries, 64), floats(batch, queries, 32, seed=1), floats(batch, queries, 32, seed=2)]
    inputs += [floats(batch, 2, cache, 16, seed=3), floats(batch, 2, cache, 16, seed=4)] if cache else [None, None]
    inputs += [np.array(seen, np.int32) - 1, np.array(total, np.int32)]
    for index, array in sorted((extra or {}).items()):
        inputs += [None] * (index - len(inputs)) + [array]
    return inputs


STEPS = {
    "prompt": (5, 0, [5, 5], 5),
    "growing": (1, 6, [7, 7], 7),
    "ragged": (1, 6, [7, 4], 7),
    "fixed": (1, 9, [7, 4], 7),
    "prompt into a fixed cache": (4, 9, [4, 4], 4),
    "several tokens": (3, 5, [8], 8),
}


@pytest.mark.sweep
@pytest.mark.parametrize("kind", STEPS)
def test_caches(kind: str) -> None:
    inputs = step(*STEPS[kind])
    check("GroupQueryAttention", inputs, "y k v", **SIZES)
    if kind in ("prompt", "ragged", "several tokens"):
        check("GroupQueryAttention", inputs, "y k v", constant=(6,), local_window_size=3, scale=0.4, **SIZES)


@pytest.mark.parametrize(("window", "before"), [(-1, -1), (3, 2)])
def test_a_prompt_is_a_window_without_a_mask(window: int, before: int) -> None:
    """As many keys as new tokens: the one of a query is its own."""
    model, _ = build("GroupQueryAttention", step(*STEPS["prompt"]), "y k v", constant=(6,), local_window_size=window, **SIZES)
    (call,) = calls(import_model(model), "tcompile.attention")
    assert attrs_of(call).window == (None if before < 0 else before, 0) and len(call.args) == 3


#: the others run beside every network
FEW = ("ragged", "growing", "prompt into a fixed cache")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.networks) for kind in STEPS])
def test_rotary_embedding(kind: str) -> None:
    tables = {7: floats(12, 8), 8: floats(12, 8, seed=5)}
    if kind != "growing":
        check("GroupQueryAttention", step(*STEPS[kind], tables), "y k v", do_rotary=1, rotary_interleaved=int(kind == "ragged"), **SIZES)
    queries, _, seen, _ = STEPS[kind]
    positions = np.random.default_rng(0).integers(0, 6, (len(seen), queries))  # of a prompt, onnxruntime takes the first alone
    check("GroupQueryAttention", step(*STEPS[kind], {**tables, 9: positions}), "y k v", do_rotary=1, **SIZES)


QUANTIZED = [(kind, bits) for kind in ("fixed", "growing", "several tokens", "prompt into a fixed cache") for bits in (8, 4)]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "bits"), [pytest.param(*case, marks=() if case in QUANTIZED[1:5:2] else pytest.mark.networks) for case in QUANTIZED]
)
def test_quantized_caches(kind: str, bits: int) -> None:
    """Codes that come out are those of onnxruntime; scales per tensor and per channel, as inputs and as constants."""
    inputs = step(*STEPS[kind])
    code = np.int8 if bits == 8 else np.uint8
    shape = [*inputs[3].shape[:3], 16 * bits // 8]
    inputs[3], inputs[4] = (np.random.default_rng(seed).integers(-100 if bits == 8 else 0, 100, shape).astype(code) for seed in (3, 4))
    form = "PER_TENSOR" if kind in ("fixed", "several tokens") else "PER_CHANNEL"
    scales = [(np.abs(floats(*([1] if form == "PER_TENSOR" else [1, 2, 1, 16]), seed=seed)) + 0.5) * (0.02 if bits == 8 else 0.3) for seed in (5, 6)]
    inputs += [None] * (12 - len(inputs)) + scales
    kinds = dict.fromkeys("kv", onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.UINT8)
    options = {"k_quant_type": form, "v_quant_type": form, "kv_cache_bit_width": bits, "kinds": kinds, **SIZES}
    check("GroupQueryAttention", inputs, "y k v", constant=(12, 13) if kind == "growing" else (), **options)


def test_part_of_a_head_is_turned() -> None:
    inputs = [floats(2, 5, 128), floats(2, 5, 64), floats(2, 5, 64, seed=2), None, None, np.array([4, 4], np.int32), np.array(5, np.int32)]
    check("GroupQueryAttention", [*inputs, floats(12, 8), floats(12, 8, seed=5)], "y k v", do_rotary=1, **SIZES)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["prompt", "ragged"])
def test_scores(kind: str) -> None:
    queries, _, _, total = STEPS[kind]
    bias, sink = {10: floats(1, 4, queries, total)}, {11: floats(4)}
    check("GroupQueryAttention", step(*STEPS[kind], bias), "y k v", constant=(6,), **SIZES)
    check("GroupQueryAttention", step(*STEPS[kind], bias | sink), "y k v", constant=(6,), softcap=1.5, **SIZES)
    check("GroupQueryAttention", step(*STEPS[kind]), "y k v", smooth_softmax=1, **SIZES)


def test_packed_operands_and_both_directions() -> None:
    inputs = step(*STEPS["prompt"])
    check("GroupQueryAttention", inputs, "y k v", causal=0, **SIZES)
    packed = [np.concatenate(inputs[:3], -1), None, None, *inputs[3:]]  # pyright: ignore[reportCallIssue, reportArgumentType]
    check("GroupQueryAttention", packed, "y k v", **SIZES)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_dynamic_dims(kind: str) -> None:
    dims = {index: ["b", "s", 64 if index == 0 else 32] for index in range(3)} | {index: ["b", 2, "p", 16] for index in (3, 4)} | {5: ["b"]}
    check("GroupQueryAttention", step(*STEPS[kind], {7: floats(12, 8), 8: floats(12, 8, seed=5)}), "y k v", dims=dims, do_rotary=1, **SIZES)


def test_heads_are_normalized_before_they_turn() -> None:
    """onnxruntime has it on GPUs only."""
    inputs, weights = step(*STEPS["prompt"]), [floats(16, seed=6), floats(16, seed=7)]
    q, k = (
        (x := array.reshape(2, 5, -1, 16)) / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
        for array, weight in zip(inputs[:2], weights, strict=True)  # pyright: ignore[reportOptionalMemberAccess]
    )
    plain, feeds = build("GroupQueryAttention", [q.reshape(2, 5, 64), k.reshape(2, 5, 32), *inputs[2:]], "y k v", **SIZES)
    want = tcompile.compile(plain)(**feeds)
    model, feeds = build("GroupQueryAttention", step(*STEPS["prompt"], {14: weights[0], 15: weights[1]}), "y k v", **SIZES)
    for a, b in zip(tcompile.compile(model)(**feeds), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seen", [[9, 7], [7, 12]])
def test_lengths_beyond_the_cache_are_errors(seen: list[int]) -> None:
    model, feeds = build("GroupQueryAttention", step(1, 6, seen, 7), "y k v", **SIZES)
    with pytest.raises(tcompile.TcompileError, match="y"):
        tcompile.compile(model)(**feeds)


def test_refusals() -> None:
    inputs = step(*STEPS["growing"])
    for options, extra, reason in (
        ({"k_quant_type": "PER_TENSOR"}, {}, "k_quant_type"),
        ({"sliding_window_cache": 1}, {}, "sliding_window_cache"),
        ({}, {16: np.array([1, 1], np.int32)}, "query_seqlens"),
        ({"kv_num_heads": 3}, {}, "cannot share"),
    ):
        model, _ = build("GroupQueryAttention", step(*STEPS["growing"], extra) if extra else inputs, "y k v", **(SIZES | options))
        with pytest.raises(tcompile.UnsupportedModel, match=reason):
            tcompile.compile(model)
