"""Small real networks through the whole compiler, beside onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import tcompile
from tcompile.models.zoo import ZOO

onnxruntime = pytest.importorskip("onnxruntime")


def agree(ours, reference):
    outputs = ours if isinstance(ours, tuple) else (ours,)
    for mine, want in zip(outputs, reference, strict=True):
        np.testing.assert_allclose(mine / np.abs(want).max(), want / np.abs(want).max(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ppocr-cls", "mobilenetv3-l"])
def test_agrees_with_onnxruntime(name):
    entry = ZOO[name]
    path, feeds = entry.onnx_path(), entry.example_inputs()
    model = tcompile.compile(str(path), shapes={key: tuple(value.shape) for key, value in feeds.items()})
    session = onnxruntime.InferenceSession(str(path))
    agree(model(**feeds), session.run(None, feeds))


@pytest.mark.parametrize(("name", "static"), [("magika", True), ("magika", False), ("ppocr-cls", False)])
@pytest.mark.xfail(strict=True, reason="known faults, docs/status.md item 0")
def test_known_faults(name, static):
    entry = ZOO[name]
    path, feeds = entry.onnx_path(), entry.example_inputs()
    model = tcompile.compile(str(path), shapes={key: tuple(value.shape) for key, value in feeds.items()} if static else None)
    agree(model(**feeds), onnxruntime.InferenceSession(str(path)).run(None, feeds))


def test_kernels_come_from_templates():
    entry = ZOO["ppocr-cls"]
    feeds = entry.example_inputs()
    report = tcompile.compile(str(entry.onnx_path()), shapes={key: tuple(value.shape) for key, value in feeds.items()}).report()
    (counts,) = [step["matches"] for step in report["passes"] if step["name"] == "kernels"]
    convolutions = {kind: count for kind, count in counts.items() if kind.startswith("conv_")}
    assert convolutions["conv_depthwise"] >= 9 and sum(convolutions.values()) >= 35, counts
