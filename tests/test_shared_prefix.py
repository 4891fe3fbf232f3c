"""Attention over a prefix that sequences share: what is rewritten, what is not, and that results stay the same."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tcompile
import torch
from cuda_models import RUNNERS, emulation

P, T = 300, 20
OPEN = {"q": "8x1x32", "ks": f"4x{T}x32", "vs": f"4x{T}x32"}


class Shared(torch.nn.Module):
    """mask: none, "causal" (from the prefix on), "constant" (hides the second token behind the prefix), "added" (an input for what is behind it, joined to zeros), "whole" (an input)."""

    def __init__(self, mask="none"):
        super().__init__()
        self.mask = mask
        seen = torch.ones(1, 1, 1, P + T, dtype=torch.bool)
        seen[..., P + 1] = False
        self.register_buffer("seen", torch.ones(3, P + T, dtype=torch.bool).tril(P) if mask == "causal" else seen)

    def forward(self, q, kp, vp, ks, vs, mask=None):
        batch = q.shape[0]
        k, v = (torch.cat([x.expand(batch, -1, -1, -1), y], 2) for x, y in ((kp, ks), (vp, vs)))
        if self.mask in ("constant", "causal"):
            mask = self.seen
        if self.mask == "added":
            mask = torch.cat([torch.zeros(batch, 1, 1, P), mask], -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def inputs(batch=3, queries=1, prefix=P, mask=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 8, queries, 32), *[(1, 4, prefix, 32)] * 2, *[(batch, 4, T, 32)] * 2]
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    if mask is not None:
        given.append(torch.where(torch.rand(batch, 1, 1, mask, generator=generator) > 0.5, 0.0, -torch.inf))
        given[-1][0] = -torch.inf if mask == T else 0.0  # a sequence that sees nothing behind the prefix
    return tuple(given)


def compiled(module, given, target="cpu", **options):
    model = tcompile.compile(module.eval(), example_inputs=given, target=target, **options)
    (step,) = [step for step in model.report()["passes"] if step["name"] == "shared-prefix"]
    return model, step


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("mask", "given"),
    [
        pytest.param("none", inputs(), marks=pytest.mark.networks),
        ("constant", inputs(queries=3)),
        ("added", inputs(mask=T)),
        ("causal", inputs(queries=3)),
    ],
    ids=["none", "constant", "added", "causal"],
)
def test_the_prefix_is_read_once(mask, given):
    module = Shared(mask)
    model, step = compiled(module, given)
    assert step["matches"] == {"attention": 1}
    assert [kernel["template"].startswith("attention") for kernel in model.report()["kernels"]].count(True) == 2
    assert model.report()["memory"]["workspace_bytes"] < given[0].shape[0] * 4 * P * 32 * 4  # no copies of the prefix
    np.testing.assert_allclose(model(*given), module(*given).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("mask", "given", "reason"),
    [("whole", inputs(mask=P + T), "not known at compile time"), ("none", inputs(prefix=16), "too short"), ("none", inputs(batch=1), "")],
)
def test_what_is_left(mask, given, reason):
    module = Shared(mask)
    model, step = compiled(module, given)
    assert not step["matches"] and (not reason or reason in step["notes"][0])
    np.testing.assert_allclose(model(*given), module(*given).numpy(), rtol=1e-4, atol=1e-5)


def test_an_open_batch():
    """Worth it at the size that is to be expected; right at all others."""
    model = tcompile.compile(Shared().eval(), example_inputs=inputs(), shapes={name: f"1..8..16x{rest}" for name, rest in OPEN.items()})
    (step,) = [step for step in model.report()["passes"] if step["name"] == "shared-prefix"]
    assert step["matches"] == {"attention": 1}
    for batch in (1, 5):
        given = inputs(batch)
        np.testing.assert_allclose(model(*given), Shared()(*given).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
def test_on_a_gpu():
    given = inputs(mask=T)
    model, step = compiled(Shared("added"), given, "cuda:sm_80", emit_only=not RUNNERS)
    assert step["matches"] == {"attention": 1}
    assert [row["template"] for row in model.report()["kernels"]].count("attention") == 2
    outputs = emulation(model.artifact)(*(x.numpy() for x in given))
    np.testing.assert_allclose(outputs[0], Shared("added")(*given).numpy(), rtol=1e-4, atol=1e-5)
