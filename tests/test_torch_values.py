"""NaN, infinities, ties, truth values and empty tensors through the torch route, held against eager."""

from __future__ import annotations

import math

import pytest
from tcompile.compiler.errors import UnsupportedModel

torch = pytest.importorskip("torch")
from torch.nn import functional as F
from torch_modules import agree

NAN, INF = math.nan, math.inf
ROWS = [[1, NAN, 3, 3, NAN], [5, 5, 1, 2, 2], [-1, -2, -2, -1, 0], [INF, -NAN, -0.0, 0.0, -INF]]


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_order(dtype):
    x = torch.tensor(ROWS).nan_to_num(7, 9, -9).to(dtype) if dtype in (torch.int64, torch.bool) else torch.tensor(ROWS, dtype=dtype)
    functions = [
        lambda x: x.sort(1),
        lambda x: x.sort(0, descending=True),
        lambda x: x.sort(dim=1, descending=True, stable=True),
        lambda x: x[1, 2].sort(),
        lambda x: x.max(1),
        lambda x: x.min(0, keepdim=True),
        lambda x: x[2, 1].max(0),
    ]
    if dtype != torch.bool:
        functions += [lambda x: x.topk(3, 1).values, lambda x: x.topk(2, 0, largest=False).values, lambda x: x[0, 0].topk(1)]
    agree(functions, x)


def test_what_is_not_finite():
    functions = [
        lambda x: torch.full((2, 5), -INF) + x[:2],
        lambda x: x / 0,
        lambda x: x / -0.0,
        lambda x: x == x,
        lambda x: torch.where(x * 2 != x * 2, 0, x),
        torch.isfinite,
        lambda x: x[0, 0].long() + torch.arange(2.1, -2.9, -1.0, dtype=torch.int64),
        torch.sign,
        lambda x: F.pad(x, (-1, 2, 1, -1), value=NAN),
        lambda x: F.pad(x, (1, -2), value=INF),
    ]
    agree(functions, torch.tensor(ROWS))


def test_truth_values():
    functions = [lambda x: F.pad(x, (1, 2), value=2), lambda x: F.pad(x, (1, -2)), torch.sign, torch.reciprocal]
    agree(functions, torch.tensor(ROWS) > 0)


def test_integer_powers_wrap_around():
    agree([lambda x, n=n: x**n for n in (0, 1, 2, 5, 13, 64)], torch.arange(-20, 21))
    with pytest.raises(UnsupportedModel, match="power of integers"):
        agree([lambda x: 2**x], torch.arange(3))


def test_variance_of_little():
    x = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])
    functions = [lambda x, c=correction: x.var(0, correction=c) for correction in (0, 1, 2, 3)]
    agree([*functions, lambda x: x.var(1, correction=0.5, keepdim=True) * 0 + 1, lambda x: x[0, 0].var(), lambda x: x[:0].var(0)], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_reductions_into_places_without_what_was_there(dtype):
    x = torch.arange(-7, 8).reshape(3, 5).to(dtype)
    ids = torch.tensor([[0, 0, 2, 4], [1, 1, 1, 3], [4, 4, 4, 4]])
    source = torch.tensor([[3, -4, 6, 9], [-1, -2, -9, 5], [2, 4, 8, 16]]).to(dtype)
    kinds = ("amax", "amin", "sum", "prod", "mean")
    agree([lambda x, ids, s, k=kind: x.scatter_reduce(1, ids, s, k, include_self=False) for kind in kinds], x, ids, source)
