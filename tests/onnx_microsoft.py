"""Models of one node of ONNX Runtime's own operators, and their comparison with onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import tcompile
from onnx import TensorProto, helper
from onnx_models import small

MICROSOFT = "com.microsoft"


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def ints(high: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(0, high, shape).astype(np.int32)


def build(
    op: str,
    inputs: list[np.ndarray | None],
    outputs: str = "y",
    constant: tuple[int, ...] = (),
    domain: str = MICROSOFT,
    dims: dict[int, list] | None = None,
    kinds: dict[str, int] | None = None,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node and its feeds. outputs: names, `-` for one left out. constant: inputs that are initializers. dims: dynamic ones of inputs."""
    names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
    results = ["" if name == "-" else name for name in outputs.split()]
    arrays = {name: np.asarray(array) for name, array in zip(names, inputs, strict=True) if array is not None}
    constants = {name: array for name, array in arrays.items() if int(name[1:]) in constant}
    feeds = {name: array for name, array in arrays.items() if name not in constants}
    infos = {
        name: ((dims or {}).get(int(name[1:]), list(array.shape)), helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in feeds.items()
    }
    wanted = [(name, (kinds or {}).get(name, TensorProto.FLOAT)) for name in results if name]
    model = small([helper.make_node(op, names, results, domain=domain, **attributes)], infos, wanted, constants)
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model, feeds


def check(op: str, inputs: list[np.ndarray | None], *args: Any, atol: float = 1e-5, **options: Any) -> None:
    model, feeds = build(op, inputs, *args, **options)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"]).run(None, feeds)
    found = tcompile.compile(model)(**feeds)
    for want, have in zip(expected, found if isinstance(found, tuple) else (found,), strict=True):
        assert np.asarray(have).shape == want.shape and have.dtype == want.dtype
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=atol)
