"""Pooling and resampling through the torch route, held against eager."""

from __future__ import annotations

import numpy as np
import pytest
import tcompile

torch = pytest.importorskip("torch")
from torch.nn import functional as F
from torch_modules import CallOfX


def check(function, shape, dtype=torch.float32, **options):
    x = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)  # equal elements: the first of them is the maximum's place
    module = CallOfX(lambda x: function(x, **options)).eval()
    want = module(x)
    found = tcompile.compile(module, example_inputs=(x,))(x)
    pairs = zip(found, want, strict=True) if isinstance(want, tuple) else [(found, want)]
    for have, right in pairs:
        assert str(right.dtype).endswith(str(have.dtype))
        np.testing.assert_allclose(np.asarray(have), right.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (1, {"kernel_size": 3, "padding": 1}),
        (2, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 1), "ceil_mode": True}),
        (2, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False}),
        (2, {"kernel_size": (2, 3), "padding": (0, 1), "divisor_override": 5}),
        (3, {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}),
    ],
)
def test_average_pool(axes, options):
    check(getattr(F, f"avg_pool{axes}d"), (2, 3, 7, 8, 5)[: axes + 2], **options)


def test_average_pool_without_a_batch():
    check(F.avg_pool2d, (3, 7, 8), kernel_size=3, ceil_mode=True)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=["float32", "int64"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (3, 7, 8)])
def test_maximum_and_its_place(shape, dtype):
    check(F.max_pool2d, shape, dtype, kernel_size=3, stride=2, padding=1, return_indices=True)


@pytest.mark.parametrize("size", [(5, 5), (8, 12), (3, 2), (1, 9)])
def test_nearest(size):
    check(F.interpolate, (2, 3, 4, 6), size=size, mode="nearest")


def test_a_factor_that_is_no_ratio_is_refused():
    with pytest.raises(tcompile.UnsupportedModel, match="factor"):
        check(F.interpolate, (1, 1, 7, 7), scale_factor=1.7, mode="nearest")


@pytest.mark.sweep
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(5, 5), (8, 12), (3, 2), (1, 9)])
def test_bilinear(size, corners):
    check(F.interpolate, (2, 3, 4, 6), size=size, mode="bilinear", align_corners=corners)


@pytest.mark.sweep
@pytest.mark.parametrize(("mode", "corners"), [("bilinear", False), ("bicubic", False), ("bicubic", True)])
@pytest.mark.parametrize("size", [(3, 2), (1, 17), (8, 6)])
def test_smoothed(size, mode, corners):
    check(F.interpolate, (2, 3, 7, 9), size=size, mode=mode, align_corners=corners, antialias=True)


def at_several_sizes(function):
    """One artifact for images of 2 channels and any size up to 64 x 64."""
    module, dims = CallOfX(function).eval(), {2: torch.export.Dim("height", min=1, max=64), 3: torch.export.Dim("width", min=1, max=64)}
    exported = torch.export.export(module, (torch.rand(1, 2, 9, 12),), dynamic_shapes=(dims,))
    model = tcompile.compile(exported)
    for height, width in [(9, 12), (1, 7), (31, 2)]:
        x = torch.rand((1, 2, height, width), generator=torch.Generator().manual_seed(1))
        np.testing.assert_allclose(np.asarray(model(x)), module(x).numpy(), rtol=1e-5, atol=1e-5)


def test_sizes_open():
    at_several_sizes(lambda x: F.interpolate(x, size=(x.shape[3] + 1, x.shape[2] * 2), mode="bilinear"))


def test_corners_of_open_sizes_are_refused():
    with pytest.raises(tcompile.UnsupportedModel, match="align_corners"):
        at_several_sizes(lambda x: F.interpolate(x, size=(x.shape[3], 7), mode="bilinear", align_corners=True))


def test_a_fraction_of_sizes_is_an_operand():
    at_several_sizes(lambda x: x * (4 / (x.shape[2] + 1)) + 2.5 * x.shape[3] / x.shape[2])


def test_a_fraction_of_sizes_elsewhere_is_named():
    with pytest.raises(tcompile.UnsupportedModel, match="known only at run time"):
        at_several_sizes(lambda x: F.leaky_relu(x, x.shape[2] / 7))


def test_a_view_of_the_same_memory_with_open_sizes():
    at_several_sizes(lambda x: x.mean((0, 1)).as_strided((x.shape[2], x.shape[3]), (x.shape[3], 1)))
