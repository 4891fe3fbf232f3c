"""The standard Attention operator in all its forms, against onnx's reference."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tcompile
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_models import small
from tcompile.compiler.errors import UnsupportedModel

NAMES = ["q", "k", "v", "mask", "past_key", "past_value", "counts"]
KINDS = {"float32": TensorProto.FLOAT, "bool": TensorProto.BOOL, "int64": TensorProto.INT64}


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def attention(arrays: dict[str, np.ndarray], outputs: int, dims: dict[str, list] | None = None, **attributes: object) -> onnx.ModelProto:
    used = [name if name in arrays else "" for name in NAMES]
    while not used[-1]:
        used.pop()
    infos = {name: ((dims or {}).get(name, list(array.shape)), KINDS[str(array.dtype)]) for name, array in arrays.items()}
    results = ["y", "present_key", "present_value", "scores"][:outputs]
    model = small([helper.make_node("Attention", used, results, **attributes)], infos, results, opset=25)
    model.ir_version = 11
    return model


def check(arrays: dict[str, np.ndarray], outputs: int = 1, dims: dict[str, list] | None = None, **attributes: object) -> None:
    model = attention(arrays, outputs, dims, **attributes)
    expected = ReferenceEvaluator(model).run(None, arrays)
    found = tcompile.compile(model)(**arrays)
    for want, have in zip(expected, found if isinstance(found, tuple) else (found,), strict=True):
        assert np.asarray(have).shape == want.shape
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


def qkv(queries: int, keys: int, heads: int = 4, shared: int = 2) -> dict[str, np.ndarray]:
    return {"q": floats(2, heads, queries, 8), "k": floats(2, shared, keys, 8), "v": floats(2, shared, keys, 5)}


CASES = [
    {},
    {"is_causal": 1},
    {"scale": 0.3, "softcap": 2.0},
    {"left_window_size": 2},
    {"left_window_size": 1, "right_window_size": 2},
    {"left_window_size": 2, "is_causal": 1},
]


@pytest.mark.sweep
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("cache", ["none", "inside", "outside"])
def test_windows_and_caches(options: dict, cache: str) -> None:
    arrays = qkv(3, 7)
    if cache == "inside":
        arrays |= {"past_key": floats(2, 2, 3, 8), "past_value": floats(2, 2, 3, 5)}
    if cache == "outside":
        arrays["counts"] = np.array([2, 5])  # the first query of the first sample comes before all keys
    check(arrays, 3 if cache == "inside" else 1, **options)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("kind", ["float", "bool", "short"])
def test_scores_and_masks(kind: str, mode: int) -> None:
    arrays = qkv(5, 7)
    seen = np.random.default_rng(1).random((2, 1, 5, 7)) > 0.4
    seen[1, 0, 2] = False  # a query without any key
    arrays["mask"] = {"float": np.where(seen, floats(2, 1, 5, 7), -np.inf).astype(np.float32), "bool": seen, "short": seen[0, 0, :, :4]}[kind]
    check(arrays, softcap=3.0)
    check(arrays, is_causal=1)
    check({**arrays, "past_key": floats(2, 2, 0, 8), "past_value": floats(2, 2, 0, 5)}, 4, softcap=3.0, qk_matmul_output_mode=mode)


def test_heads_packed_into_the_last_dim() -> None:
    arrays = {"q": floats(2, 5, 4 * 8), "k": floats(2, 7, 2 * 8), "v": floats(2, 7, 2 * 3)}
    check(arrays, q_num_heads=4, kv_num_heads=2)
    check(arrays, q_num_heads=4, kv_num_heads=2, is_causal=1, softcap=1.5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_dynamic_lengths(softcap: float) -> None:
    arrays = {**qkv(3, 3), "past_key": floats(2, 2, 5, 8), "past_value": floats(2, 2, 5, 5)}
    dims = {"q": ["b", 4, "s", 8], "k": ["b", 2, "s", 8], "v": ["b", 2, "s", 5], "past_key": ["b", 2, "p", 8], "past_value": ["b", 2, "p", 5]}
    check(arrays, 3, dims, is_causal=1, softcap=softcap)


def test_refusals() -> None:
    with pytest.raises(UnsupportedModel, match="q_num_heads"):
        tcompile.compile(attention({"q": floats(1, 2, 8), "k": floats(1, 2, 8), "v": floats(1, 2, 8)}, 1))
    with pytest.raises(UnsupportedModel, match="cannot share"):
        tcompile.compile(attention(qkv(2, 3, 3, 2), 1))
