"""The rivals of `int8.py` beside onnxruntime: oneDNN's integer primitives by themselves, through PyTorch, and OpenVINO, which makes such of a QDQ graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

BYTES, FLOATS = TensorProto.UINT8, TensorProto.FLOAT
#: of the inputs of every layer, and of the outputs of a convolution
ONE, STEP = np.float32(1), np.float32(0.01)


def qdq(weights: dict[str, np.ndarray], attrs: dict[str, Any]) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """(nodes, initializers) of u8 x s8 by weights `w` of `scale` per output, bias `b` in real numbers: a convolution with ReLU to u8 where w has four axes, else a product to float32."""
    w, scale, bias = weights["w"], weights["scale"], weights["b"]
    convolution, zeros = w.ndim == 4, np.zeros(scale.size, np.int8)
    found = {"w": w, "s": scale, "zw": zeros, "b": bias, "one": np.asarray(ONE), "zx": np.uint8(0), "step": np.asarray(STEP)}
    nodes = [
        helper.make_node("DequantizeLinear", ["x" if convolution else "codes", "one", "zx"], ["real"]),
        helper.make_node("DequantizeLinear", ["w", "s", "zw"], ["weight"], axis=0),
    ]
    if not convolution:
        # OpenVINO would transpose other weights in every call, and multiply in float32 where nothing is quantized: by a step of 1 it leaves that out
        rounding = [helper.make_node("Cast", ["x"], ["float"], to=FLOATS), helper.make_node("QuantizeLinear", ["float", "one", "zx"], ["codes"])]
        return [*rounding, *nodes, helper.make_node("Gemm", ["real", "weight", "b"], ["y"], transB=1)], found | {"w": np.ascontiguousarray(w.T)}
    nodes += [
        helper.make_node("Conv", ["real", "weight", "b"], ["p"], **attrs),
        helper.make_node("Relu", ["p"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "step", "zx"], ["y"]),
    ]
    return nodes, found


def onednn(place: Path, x: np.ndarray) -> Callable[[], np.ndarray]:
    """The layer that `int8.py prepare` wrote to a file, by oneDNN's primitive; x: uint8, convolutions NCHW, whose images oneDNN gets channels last."""
    import torch

    torch.set_num_threads(1)
    ops, data = torch.ops.onednn, {name: torch.from_numpy(array) for name, array in np.load(place).items()}
    codes, zeros = torch.from_numpy(x), torch.zeros(data["scale"].numel(), dtype=torch.int64)
    if data["w"].ndim == 2:
        packed = ops.qlinear_prepack(data["w"].T.contiguous(), list(x.shape))
        return lambda: ops.qlinear_pointwise(codes, 1.0, 0, packed, data["scale"], zeros, data["b"], 1.0, 0, torch.float32, "none", [], "").numpy()
    stride, padding, groups = (int(value) for value in data["window"])
    image, shape = codes.contiguous(memory_format=torch.channels_last), ([stride] * 2, [padding] * 2, [1, 1], groups)
    packed = ops.qconv_prepack(data["w"], data["scale"], 1.0, 0, *shape, list(x.shape))
    return lambda: ops.qconv2d_pointwise(
        image, 1.0, 0, packed, data["scale"], zeros, data["b"], *shape, float(STEP), 0, torch.uint8, "relu", [], ""
    ).numpy()


def graph(nodes: list[onnx.NodeProto], shape: tuple[int, ...], kinds: tuple[int, int], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one input x and one output y of these types (`TensorProto`)."""
    x, y = helper.make_tensor_value_info("x", kinds[0], shape), helper.make_tensor_value_info("y", kinds[1], None)
    made = helper.make_graph(nodes, "contest", [x], [y], [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9)
