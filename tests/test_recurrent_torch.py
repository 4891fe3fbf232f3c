"""Recurrent layers of torch against eager torch, compiled for the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tcompile
from tcompile.compiler.importers.torch import import_torch
from torch import nn
from torch.nn.utils import parametrize


class Layer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, *states):
        return self.layer(x, *states)


class Half(nn.Module):
    """A parametrization: the weights are computed while the model runs."""

    def forward(self, x):
        return x / 2


def computed(layer: nn.Module) -> nn.Module:
    for name in [name for name, _ in layer.named_parameters()]:
        parametrize.register_parametrization(layer, name, Half())
    return layer


def flat(values) -> list[np.ndarray]:
    return [values.numpy()] if isinstance(values, torch.Tensor) else [array for value in values for array in flat(value)]


def agree(compiled, module, *inputs, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected = flat(module(*inputs))
    found = compiled(*flat(inputs))
    for ours, theirs in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, tolerance, tolerance)


CASES = {
    "lstm": lambda: (nn.LSTM(4, 7, 2, batch_first=True, bidirectional=True), (5, 3, 4), ()),
    "lstm-states": lambda: (nn.LSTM(4, 16, bias=False), (5, 1, 4), ((torch.randn(1, 1, 16), torch.randn(1, 1, 16)),)),
    "lstm-projection": lambda: (nn.LSTM(4, 7, proj_size=3), (2, 3, 4), ()),
    "lstm-computed": lambda: (computed(nn.LSTM(4, 7, bidirectional=True)), (5, 3, 4), ()),
    "gru": lambda: (nn.GRU(4, 33, bidirectional=True), (5, 3, 4), ()),
    "gru-states": lambda: (nn.GRU(4, 7, 2, batch_first=True), (3, 5, 4), (torch.randn(2, 3, 7),)),
    "gru-computed": lambda: (computed(nn.GRU(4, 7, bidirectional=True)), (5, 3, 4), ()),
    "gru-unbatched": lambda: (nn.GRU(4, 1), (5, 4), ()),
    "tanh": lambda: (nn.RNN(4, 7, 2), (1, 3, 4), ()),
    "relu": lambda: (nn.RNN(4, 7, bias=False, nonlinearity="relu", batch_first=True), (3, 5, 4), ()),
    "lstm-cell": lambda: (nn.LSTMCell(4, 7), (3, 4), ()),
    "gru-cell": lambda: (nn.GRUCell(4, 7), (3, 4), ()),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_layers_match_torch(name):
    torch.manual_seed(0)
    layer, shape, states = CASES[name]()
    module, x = Layer(layer).eval(), torch.randn(shape)
    agree(tcompile.compile(module, example_inputs=(x, *states)), module, x, *states)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 3e-3)])
def test_other_precisions(dtype, tolerance):
    module, x = Layer(nn.GRU(4, 7).to(dtype)).eval(), torch.randn(5, 3, 4, dtype=dtype)
    agree(tcompile.compile(module, example_inputs=(x,)), module, x, tolerance=tolerance)


def test_the_batch_may_be_dynamic():
    module = Layer(nn.LSTM(4, 7, batch_first=True)).eval()
    compiled = tcompile.compile(module, example_inputs=(torch.randn(3, 5, 4),), shapes={"x": "1..3..64x5x4"})
    for batch in (1, 2, 17):
        agree(compiled, module, torch.randn(batch, 5, 4))


def test_a_layer_is_one_operator_however_many_steps():
    program = import_torch(Layer(nn.LSTM(4, 7, 2)).eval(), example_inputs=(torch.randn(40, 1, 4),))
    assert str(program.module["main"]).count("tcompile.recurrent") == 2
