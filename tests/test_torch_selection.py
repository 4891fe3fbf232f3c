"""Results as long as the data say, through the torch route: held against eager with other data than at the export, also none and all selected."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tcompile
from tcompile.compiler.errors import TcompileError, UnsupportedModel

torch = pytest.importorskip("torch")
from torch_modules import Call, CallOfX


def put(x):
    y = x.clone()
    y[x > 0] = x[x > 0] * 3
    y[0, y[0] < 0] += 7
    return y


def functions(x):
    """Everything at once: [3, 5] or as open."""
    return (
        torch.nonzero(x),
        torch.where(x > 1),
        x[x > 1],
        x[x[:, 0] > 0] @ x.T,
        x[:, x[0] > 0],
        x[x < 0].sum(),
        torch.masked_select(x, x[:1] > 0),
        torch.cat([x[x > 1], x[0]]).sort().values,
        put(x),
    )


INPUTS = [
    torch.tensor([[1.0, 0, 3, 3, 0], [5, 0, 1, 0, 2], [-1, math.nan, -2, -0.0, 0]]),
    torch.zeros(3, 5),
    -torch.ones(3, 5),
    torch.arange(1.0, 16).reshape(3, 5),
]


def check(model, x):
    want = torch.utils._pytree.tree_leaves(functions(x))
    for index, (have, right) in enumerate(zip(model(x), want, strict=True)):
        have = np.asarray(have)
        assert str(right.dtype) == f"torch.{have.dtype}", index
        np.testing.assert_allclose(have, right.numpy(), rtol=1e-6, err_msg=str(index))


def test_one_artifact_for_any_data_and_sizes():
    model = tcompile.compile(CallOfX(functions).eval(), shapes={"x": "2..4..16x2..6..16"})
    for x in (*INPUTS, torch.randn(7, 3, generator=torch.Generator().manual_seed(0))):
        check(model, x)


def test_a_number_of_elements_that_does_not_fit_raises():
    def function(x):
        y = x.clone()
        y[x > 0] = x[:, 0]
        return y, x[x < 0][:, None]

    with pytest.raises(UnsupportedModel, match="must be the same"):
        tcompile.compile(Call(lambda x: x[x > 0] + x[x < 0]).eval(), example_inputs=(INPUTS[0],))
    x = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
    model = tcompile.compile(Call(function).eval(), example_inputs=(x,))
    for have, right in zip(model(x), function(x), strict=True):
        np.testing.assert_allclose(np.asarray(have), right.numpy())
    with pytest.raises(TcompileError):
        model(torch.tensor([[1.0, -1.0], [2.0, 3.0]]))


def test_numbers_from_tensors_as_sizes():
    """Of tensors that are made, of slices (cut to what there is), and of broadcasts; a negative one raises."""

    def function(x, n):
        count = n.item()
        torch._check(count >= 0)
        mask = torch.arange(count)[None] < torch.tensor([[1], [3]])
        return torch.ones(count, 3), mask, x[:count] * 2, x[count:] @ x.T, x[:1].repeat(count, 2), x * count, x[0, 1].expand(count)

    x = INPUTS[3]
    model = tcompile.compile(Call(function).eval(), example_inputs=(x, torch.tensor(2)))
    for count in (2, 0, 1, 9):
        for have, right in zip(model(x, torch.tensor(count)), function(x, torch.tensor(count)), strict=True):
            np.testing.assert_allclose(np.asarray(have), right.numpy(), err_msg=str(count))
    with pytest.raises(TcompileError, match="size lies outside"):
        model(x, torch.tensor(-1))
