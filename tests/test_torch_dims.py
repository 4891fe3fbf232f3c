"""Dims of inputs that are multiples of another one, through the torch route."""

from __future__ import annotations

import numpy as np
import pytest
import tcompile

torch = pytest.importorskip("torch")
from torch.export import Dim


class Groups(torch.nn.Module):
    """Sums of four rows, and where there is a second input, those plus its rows."""

    def forward(self, x, y=None):
        sums = x.reshape(-1, 4, x.shape[1]).sum(1)
        return sums if y is None else sums + y


def compiled(shapes, *dims):
    exported = torch.export.export(Groups(), tuple(torch.rand(shape) for shape in shapes), dynamic_shapes=dims)
    return tcompile.compile(exported)


def test_multiples():
    quarter, width = Dim("quarter", min=2, max=9), Dim("width", min=1, max=9)
    model = compiled([(12, 5)], {0: 4 * quarter, 1: width})
    for rows, columns in [(12, 5), (8, 1), (36, 9)]:
        x = torch.rand(rows, columns)
        np.testing.assert_allclose(model(x), Groups()(x), rtol=1e-6)
    with pytest.raises(tcompile.TcompileError, match=r"8\.\.12\.\.36"):
        model(torch.rand(40, 5))
    with pytest.raises(tcompile.TcompileError, match="'x'"):
        model(torch.rand(14, 5))
    assert model(torch.rand(16, 2)).shape == (4, 2)


def test_a_multiple_of_another_inputs_dim():
    quarter = Dim("quarter", min=2, max=9)
    model = compiled([(12, 5), (3, 5)], {0: 4 * quarter}, {0: quarter})
    for rows in (12, 36, 8):
        x, y = torch.rand(rows, 5), torch.rand(rows // 4, 5)
        np.testing.assert_allclose(model(x, y), Groups()(x, y), rtol=1e-6)
    with pytest.raises(tcompile.TcompileError, match="'x'"):
        model(torch.rand(12, 5), torch.rand(2, 5))


def test_a_multiple_and_some_more():
    class Pairs(torch.nn.Module):
        def forward(self, x):
            return x[1:].reshape(-1, 2).prod(1)

    half = Dim("half", min=2, max=9)
    model = tcompile.compile(torch.export.export(Pairs(), (torch.rand(7),), dynamic_shapes=({0: 2 * half + 1},)))
    for size in (7, 19, 5):
        x = torch.rand(size)
        np.testing.assert_allclose(model(x), Pairs()(x), rtol=1e-6)
    with pytest.raises(tcompile.TcompileError):
        model(torch.rand(8))


def test_as_many_positions_as_a_dim_says():
    class Sorted(torch.nn.Module):
        """Puts rows in order and back again, as routing to experts does, and counts twice at pairs of positions."""

        def forward(self, x):
            order = x[:, 0].argsort()
            back = torch.empty_like(order)
            back[order] = torch.arange(order.shape[0])
            return x[order].cumsum(0)[back], torch.zeros(9, 5).index_put((order % 4, order % 5), x[:, 1], accumulate=True)

    model = tcompile.compile(torch.export.export(Sorted(), (torch.rand(4, 5),), dynamic_shapes=({0: Dim("rows", min=2, max=9)},)))
    for rows in (2, 9, 6):
        x = torch.rand(rows, 5)
        for ours, eager in zip(model(x), Sorted()(x), strict=True):
            np.testing.assert_allclose(ours, eager, rtol=1e-5)


class Repeated(torch.nn.Module):
    """Heads of a cache and a token, each twice."""

    def forward(self, past, own):
        heads = torch.cat([past, own], 2)
        return heads[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, 4, -1, 8)


def test_claims_about_sizes_that_torch_leaves_open_are_decided_at_import():
    model = tcompile.compile(Repeated().eval(), example_inputs=(torch.rand(1, 2, 3, 8), torch.rand(1, 2, 1, 8)), shapes={"past": "1x2x1..50x8"})
    for length in (1, 7, 50):
        past, own = torch.rand(1, 2, length, 8), torch.rand(1, 2, 1, 8)
        np.testing.assert_array_equal(model(past, own), Repeated()(past, own))
    with pytest.raises(tcompile.UnsupportedModel, match="torch.export failed"):  # only multiples of four
        tcompile.compile(Groups().eval(), example_inputs=(torch.rand(12, 5),), shapes={"x": "4..36x5"})
