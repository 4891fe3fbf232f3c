"""Denormal numbers among weights become zeros; those that a model is given or computes, and single numbers, stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file
from tcompile.passes.denormals import flushed

TINY = np.finfo(np.float32).tiny
#: the largest denormal number and the least one
DENORMAL = (np.nextafter(TINY, np.float32(0)), np.float32(1e-45))


@given(
    arrays.arrays(
        np.uint32,
        st.integers(2, 50),
        elements=st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 0x80000001, 0x7FFFFF, 0x807FFFFF, 0x800000, 0x7F800000, 0x80000000]),
    )
)
def test_zeros_for_denormals_alone(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    denormal = (np.abs(values) < TINY) & (values != 0)
    got = flushed(values)
    assert (got is not None) == denormal.any()
    if got is not None:
        np.testing.assert_array_equal(got[denormal], 0)
        np.testing.assert_array_equal(got[~denormal].view(np.uint32), bits[~denormal])


def steps(model: Any) -> dict[str, int]:
    return next(step["matches"] for step in model.report()["passes"] if step["name"] == "flush_denormals")


class Decayed(torch.nn.Module):
    """A convolution and a linear layer of which weights and biases have decayed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 5)
        with torch.no_grad():
            self.conv.weight[2], self.conv.bias[2] = float(DENORMAL[0]), -float(DENORMAL[0])
            self.linear.weight[:, 2], self.linear.bias[4] = float(DENORMAL[1]), float(DENORMAL[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}], ids=str)
def test_weights_and_biases(options: dict[str, Any], tmp_path: Any) -> None:
    layers, image = Decayed().eval(), torch.randn(1, 3, 9, 7)
    model = tcompile.compile(layers, example_inputs=(image,), **options)
    assert steps(model)["weights"] >= 2
    model.save(tmp_path / "decayed.tcm")
    for name, values in load_file(tmp_path / "decayed.tcm" / "weights.safetensors").items():
        if values.dtype == np.float32:
            assert not np.any((np.abs(values) < TINY) & (values != 0)), name
    with torch.no_grad():
        want = layers(image).numpy()
    np.testing.assert_allclose(model(image.numpy()), want, rtol=1e-4 if not options else 0.05, atol=1e-5 if not options else 0.02)


def test_single_numbers_and_what_is_computed_stay() -> None:
    """An epsilon keeps a logarithm finite, and denormal inputs come out as they went in."""

    class Logarithm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.log(torch.abs(self.linear(x)) + 1e-40), x * 0.5

    x = np.zeros((4, 6), np.float32)
    x[1:] = 1e-39
    model = tcompile.compile(Logarithm().eval(), example_inputs=(torch.from_numpy(x),))
    assert steps(model) == {}
    logarithm, half = model(x)
    np.testing.assert_allclose(logarithm[0], np.log(np.float32(1e-40)), rtol=1e-4)
    np.testing.assert_array_equal(half, x * np.float32(0.5))
