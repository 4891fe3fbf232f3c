"""Modules of one torch operator."""

from __future__ import annotations

import numpy as np
import tcompile
import torch


class Sdpa(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


class Call(torch.nn.Module):
    """One function of its operands, for which the exported program has no names."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *operands):
        return self.function(*operands)


class CallOfX(Call):
    """Of one operand whose name, x, shapes and dims can be given by."""

    def forward(self, x):
        return self.function(x)


class Calls(torch.nn.Module):
    """Several functions of the same operands, compiled at once."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, *operands):
        return [function(*operands) for function in self.functions]


def agree(functions, *operands, rtol=0.0, atol=0.0):
    """Every function's results are those of eager, and of their types."""
    module = Calls(functions).eval()
    want = torch.utils._pytree.tree_leaves(module(*operands))
    found = tcompile.compile(module, example_inputs=operands)(*operands)
    for index, (have, right) in enumerate(zip(found if isinstance(found, tuple) else (found,), want, strict=True)):
        have = np.asarray(have)
        assert str(right.dtype) == f"torch.{have.dtype}", index
        np.testing.assert_allclose(have, right.numpy(), rtol=rtol, atol=atol, err_msg=str(index))
