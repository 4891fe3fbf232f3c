"""The networks trained here: they classify what they have not seen, are cached, and their ONNX files say what their modules say."""

from __future__ import annotations

import numpy as np
import pytest
from tcompile.models.datasets import mnist, mnist_grid
from tcompile.models.mnist import accuracy, fit, trained
from tcompile.models.zoo import ZOO

torch = pytest.importorskip("torch")


def test_split_is_fixed_and_disjoint():
    training, held_out = mnist()
    assert training.x.shape == (4000, 1, 28, 28) and held_out.x.shape == (1000, 1, 28, 28)
    assert np.bincount(np.concatenate([training.y, held_out.y])).tolist() == [500] * 10
    assert abs(training.x.mean()) < 0.05 and abs(training.x.std() - 1) < 0.05
    seen = {image.tobytes() for image in training.x}
    assert not any(image.tobytes() in seen for image in held_out.x)


def test_grid_is_the_mean_of_blocks():
    (images, _), (grid, _) = mnist(), mnist_grid()
    zeros_to_four = images.x[images.y < 5]
    assert grid.x.shape == (len(zeros_to_four), 16) and set(grid.y.tolist()) == {0, 1, 2, 3, 4}
    np.testing.assert_allclose(grid.x[3, 5], zeros_to_four[3, 0, 7:14, 7:14].mean(), rtol=1e-5)


@pytest.mark.parametrize(("name", "least"), [("mnist-vit", 0.96), ("mnist-cnn", 0.96), ("mnist-mlp", 0.91)])
def test_held_out_accuracy(name, least):
    onnxruntime = pytest.importorskip("onnxruntime")
    entry = ZOO[name]
    module = entry.torch_module()
    assert module is not None
    data = (mnist_grid() if name == "mnist-mlp" else mnist())[1]
    with torch.no_grad():
        logits = module(torch.from_numpy(data.x)).numpy()
    assert accuracy(logits, data.y) >= least
    session = onnxruntime.InferenceSession(entry.onnx_path())
    np.testing.assert_allclose(session.run(None, {entry.inputs[0].name: data.x[:9]})[0], logits[:9], rtol=1e-3, atol=1e-4)


def test_training_is_seeded_and_cached(tmp_path):
    data = mnist_grid()[0]
    calls = []

    def train(network):
        calls.append(1)
        return fit(network, data, epochs=1, rate=1e-3)

    def network():
        torch.manual_seed(0)
        return torch.nn.Linear(16, 5)

    first, again = (trained("line", network(), train, tmp_path) for _ in range(2))
    fresh = trained("line", network(), train, tmp_path / "other")
    assert len(calls) == 2 and not torch.equal(first.weight, network().weight)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.weight, fresh.weight)
