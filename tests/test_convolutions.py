"""Convolutions over one and three axes and transposed ones: numbers against PyTorch, and that they run as conv2d with what is behind them in their kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tcompile
import torch
from onnx import TensorProto, helper, numpy_helper
from tcompile.targets.base import Target
from torch import nn

#: this machine, also where it multiplies integers by pairs only
CPU = replace(Target.parse("cpu"), formats=Target.parse("cpu").formats | {"int8"})
SHAPES = {1: (2, 6, 9), 2: (2, 6, 7, 5), 3: (2, 6, 5, 6, 7)}


class Parallel(nn.Module):
    """Every layer on the input of its rank, with a ReLU behind it."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x1, x2, x3):
        inputs = {"1": x1, "2": x2, "3": x3}
        return tuple(torch.relu(layer(inputs[type(layer).__name__.split("d")[0][-1]])) for layer in self.layers)


def check(layers: list[nn.Module]) -> Any:
    torch.manual_seed(0)
    inputs, net = [torch.randn(shape) for shape in SHAPES.values()], Parallel(layers).eval()
    model = tcompile.compile(net, example_inputs=tuple(inputs))
    for layer, got, want in zip(layers, model(*(x.numpy() for x in inputs)), net(*inputs), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=str(layer))
    return model


def test_numbers() -> None:
    model = check(
        [
            nn.Conv1d(6, 8, 4, 3, 2, 2, groups=2),
            nn.ConvTranspose1d(6, 7, 5, 3, 1, 2),
            nn.ConvTranspose2d(6, 5, (4, 2), 2, (1, 0)),  # blocks of outputs at once
            nn.ConvTranspose2d(6, 6, 3, (1, 2), (3, 1), (0, 1), groups=6),  # more cut off than the kernel reaches
            nn.ConvTranspose2d(6, 4, (2, 3), (3, 2), 0, (2, 1), groups=2, dilation=(2, 1)),  # outputs that nothing reaches
            nn.Conv3d(6, 4, (3, 2, 3), (2, 1, 2), (1, 0, 1), (1, 2, 1)),
            nn.Conv3d(6, 6, 3, 1, 1, groups=3),
            nn.Conv3d(6, 5, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
            nn.MaxPool3d(3, 2, 1, ceil_mode=True),
        ]
    )
    matches = next(entry for entry in model.report()["passes"] if entry["name"] == "convolutions")["matches"]
    assert matches == {"conv1d": 1, "conv1d_transpose": 1, "conv2d_transpose": 3, "conv3d": 3, "max_pool3d": 1}
    assert not any("conv" in kernel["kernel"] and kernel["template"] == "generic" for kernel in model.report()["kernels"])


@pytest.mark.networks
@pytest.mark.parametrize("seed", range(8))
def test_any_numbers(seed: int) -> None:
    check(random_layers(np.random.default_rng(seed), 24))


def random_layers(rng: np.random.Generator, count: int) -> list[nn.Module]:
    def up_to(most: int, least: int = 1) -> int:
        return int(rng.integers(least, most + 1))

    found: list[nn.Module] = []
    while len(found) < count:
        groups = int(rng.choice([1, 1, 2, 6]))
        out, axes = groups * up_to(5), up_to(3)
        kernel, stride, dilation, padding = (tuple(up_to(most, least) for _ in range(axes)) for most, least in ((5, 1), (4, 1), (3, 1), (3, 0)))
        extra = tuple(up_to(max(sizes) - 1, 0) for sizes in zip(stride, dilation, strict=True))
        plain, transposed = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, None)}[axes]
        try:
            if transposed is not None and rng.random() < 0.7:
                layer = transposed(6, out, kernel, stride, padding, extra, groups, True, dilation)  # type: ignore[arg-type]
            else:
                layer = plain(6, out, kernel, stride, padding, dilation, groups)  # type: ignore[arg-type]
            if 0 not in layer(torch.zeros(SHAPES[axes])).shape:
                found.append(layer)
        except RuntimeError:  # a kernel larger than its input
            continue
    return found


class Chain(nn.Module):
    """Two convolutions over an axis with a residual sum, then the same in three and a transposed one in two, each with a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.norm = nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 8, 5, padding=2, groups=8), nn.BatchNorm1d(8)
        self.video, self.up = nn.Conv3d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 5, 4, 2, 1, bias=False)
        self.norm3, self.norm2 = nn.BatchNorm3d(8), nn.BatchNorm2d(5)
        for norm in (self.norm, self.norm2, self.norm3):
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        y = torch.relu(self.one(x))
        y = torch.nn.functional.silu(self.norm(self.two(y)) + y)
        z = torch.relu(self.norm3(self.video(y.reshape(2, 4, 2, 4, 10))))
        return torch.sigmoid(self.norm2(self.up(z.mean(2))))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("options", "kind", "tolerance"), [({}, "", 1e-5), ({"quantize": "int8"}, "u8s8", 0.03), ({"precision": "bf16"}, "bf16", 0.01)]
)
def test_what_is_behind_fuses_in_every_precision(options: dict[str, Any], kind: str, tolerance: float) -> None:
    net, x = Chain().eval(), torch.randn(2, 6, 40)
    if "quantize" in options:
        options |= {"calibration": [(x.numpy(),)]}
    model = tcompile.compile(net, CPU, example_inputs=(x,), **options)
    want = net(x).detach().numpy()
    assert np.linalg.norm(model(x.numpy()) - want) < tolerance * np.linalg.norm(want)
    kernels = [kernel for kernel in model.report()["kernels"] if kernel["template"] != "generic"]
    kind = "" if kind == "bf16" and "bfloat16" not in CPU.formats else kind  # convolutions stay in float32 where that is as fast
    assert kind or not any("bf16" in kernel["workload"] for kernel in kernels)
    depthwise = "" if kind == "bf16" else kind  # one product per lane gains nothing from words of two
    assert len(kernels) == 4 and all((depthwise if "groups 8" in kernel["workload"] else kind) in kernel["workload"] for kernel in kernels)
    functions = ("relu", "tir_sigmoid", "silu", "tir_exp")
    assert not any(name in kernel["kernel"] and "conv" not in kernel["kernel"] for kernel in model.report()["kernels"] for name in functions)


def test_codes_of_a_graph_that_is_quantized_already() -> None:
    """QuantizeLinear and DequantizeLinear around a Conv of one axis."""
    rng = np.random.default_rng(0)
    weight, scale = rng.integers(-127, 128, (8, 6, 3)).astype(np.int8), rng.uniform(0.01, 0.02, 8).astype(np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["f"], axis=0),
        helper.make_node("Conv", ["d", "f"], ["y"], pads=[1, 1]),
    ]
    constants = {"sx": np.float32(0.02), "zx": np.uint8(128), "w": weight, "sw": scale, "zw": np.zeros(8, np.int8)}
    specs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 11])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "codes", *specs, [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()])
    model = tcompile.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    x = rng.standard_normal((2, 6, 11)).astype(np.float32)
    rounded = (np.clip(np.rint(x / np.float32(0.02)) + 128, 0, 255) - 128).astype(np.float32) * np.float32(0.02)
    want = torch.nn.functional.conv1d(torch.from_numpy(rounded), torch.from_numpy(weight * scale[:, None, None]), padding=1).numpy()
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-3)
    assert any("u8s8" in kernel["workload"] for kernel in model.report()["kernels"])


def test_open_sizes() -> None:
    net = nn.Sequential(nn.Conv1d(6, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose1d(8, 5, 4, 2, 1)).eval()
    model = tcompile.compile(net, example_inputs=(torch.randn(2, 6, 12),), shapes={"input": "2x6x8..12..64"})
    for size in (8, 13, 64):
        x = torch.randn(2, 6, size)
        np.testing.assert_allclose(model(x.numpy()), net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
