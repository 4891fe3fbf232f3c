"""Distances, embedding bags, convolutions and softmax in their rarer forms through the torch route, held against eager."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional as F
from torch_modules import agree


def check(functions, *operands):
    agree(functions, *operands, rtol=2e-5, atol=2e-6)


def numbers(*shape, dtype=torch.float32):
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_distances():
    orders = (0.0, 1.0, 1.5, 2.0, math.inf)
    check([lambda x, y, p=p: torch.cdist(x, y, p) for p in orders], numbers(2, 1, 5, 3), numbers(7, 3))
    check([lambda x, p=p: F.pdist(x, p) for p in orders] + [lambda x: F.pdist(x[:1]), lambda x: torch.cdist(x[:, :0], x[:2, :0])], numbers(6, 3))


@pytest.mark.sweep
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(mode):
    """Bags without ids at the start, in the middle and at the end, also where the end of the last one is given."""
    offsets, ends = torch.tensor([0, 0, 3, 3, 4, 9]), torch.tensor([0, 2, 2, 9])
    functions = [
        lambda w, ids, offsets, ends: F.embedding_bag(ids, w, offsets, mode=mode),
        lambda w, ids, offsets, ends: F.embedding_bag(ids, w, ends, mode=mode, include_last_offset=True, padding_idx=4),
        lambda w, ids, offsets, ends: F.embedding_bag(ids.reshape(3, 3), w, mode=mode),
    ]
    if mode == "sum":
        functions.append(lambda w, ids, offsets, ends: F.embedding_bag(ids, w, offsets, mode=mode, per_sample_weights=w[:3].reshape(-1)[:9]))
    check(functions, numbers(11, 5), torch.tensor([4, 0, 10, 4, 4, 1, 2, 2, 7]), offsets, ends)


def test_convolutions():
    functions = [
        lambda x, w, b: F.conv2d(x[0], w, b, stride=(2, 1), padding=(1, 0), dilation=(1, 3), groups=2),
        lambda x, w, b: F.conv1d(x[0, :, 0], w[:, :, 0], b, groups=2),
        lambda x, w, b: F.conv3d(x[None], w[:1, None, :1], b[:1]),
        lambda x, w, b: F.conv_transpose2d(x[:, :3, :, :5], w[:3], stride=(2, 3), padding=1, output_padding=(1, 2)),
        lambda x, w, b: F.conv_transpose2d(x[0, :3], w[:3], b[:2], stride=1, dilation=3, output_padding=2),
        lambda x, w, b: F.conv_transpose3d(x[None, :, :3], w[None, :1, :, :, :], stride=2),
        lambda x, w, b: F.conv2d(x.long(), w.long(), b.long(), padding=1, groups=2),
    ]
    check(functions, numbers(1, 4, 7, 8), numbers(6, 2, 3, 2), numbers(6))


def test_softmax_of_scalars_and_in_another_dtype():
    functions = [
        lambda x: x.softmax(0, dtype=torch.float64),
        lambda x: x.log_softmax(1, dtype=torch.float32),
        lambda x: x[0, 0].softmax(0, dtype=torch.float32),
        lambda x: x[0, 0].log_softmax(-1, dtype=torch.float32),
    ]
    check(functions, numbers(3, 5, dtype=torch.int64))


def test_tensors_without_elements():
    functions = [
        lambda x: x.repeat(2, 0, 3),
        lambda x: x[:0].repeat(3, 1),
        lambda x: x.gather(1, torch.zeros(0, 5, dtype=torch.int64)),
        lambda x: x[:, :0].reshape(0, 7) @ x[:, :0].reshape(7, 0),
        lambda x: x[:, :0].sort(1).values,
        lambda x: x[:, :0].sum(1),
        lambda x: torch.cat([x[:0], x]),
    ]
    check(functions, numbers(3, 5))


def test_places_on_a_grid_and_means_over_unequal_windows():
    functions = [
        lambda x, grid: F.grid_sample(x, grid, align_corners=False),
        lambda x, grid: F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=True),
        lambda x, grid: F.grid_sample(x, grid, mode="nearest", padding_mode="border", align_corners=False),
        lambda x, grid: F.adaptive_avg_pool2d(x[0], (3, 2)),
        lambda x, grid: F.adaptive_avg_pool1d(x[0, 0], 4),
    ]
    check(functions, numbers(2, 3, 7, 5), numbers(2, 4, 6, 2) / 7.3)
