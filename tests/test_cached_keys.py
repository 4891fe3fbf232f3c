"""Attention over a cache and the keys of its own tokens: what is rewritten, what is not, and that results stay the same."""

from __future__ import annotations

import numpy as np
import pytest
import tcompile
import torch

HEADS, KV, D = 6, 2, 32


class Decoding(torch.nn.Module):
    """A token or a few behind the caches of two layers, `keys` [2, B, KV, P, D]. mask: none, "constant", an input of numbers ("added") or of truth values ("seen"). whole: returns the keys in one piece,
    too; last: those of its own tokens, cut from it."""

    def __init__(self, mask: str = "none", returned: str = "none", seen: torch.Tensor | None = None):
        super().__init__()
        self.mask, self.returned = mask, returned
        self.register_buffer("constant", seen)

    def forward(self, q, keys, values, own_k, own_v, mask=None):
        k, v = torch.cat([keys[1], own_k], 2), torch.cat([values[1], own_v], 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, self.constant if self.mask == "constant" else mask, enable_gqa=True)
        return out if self.returned == "none" else (out, k if self.returned == "whole" else k[:, :, -q.shape[2] :])


def inputs(batch=1, queries=1, cache=521, mask="none", heads=HEADS, kv=KV, depth=D):
    generator = torch.Generator().manual_seed(cache)
    own = (batch, kv, queries, depth)
    shapes = [(batch, heads, queries, depth), *[(2, batch, kv, cache, depth)] * 2, own, own]
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    if mask == "added":
        given.append(torch.randn(batch, 1, queries, cache + queries, generator=generator))
        given[-1][0, ..., :cache] = -torch.inf  # a sequence that sees its own tokens alone
    elif mask == "seen":
        given.append(torch.rand(batch, 1, queries, cache + queries, generator=generator) > 0.4)
        given[-1][0, ..., cache:] = False
        given[-1][-1] = False  # one that sees nothing
    return tuple(given)


def compiled(module, given, **options):
    model = tcompile.compile(module.eval(), example_inputs=given, **options)
    (step,) = [step for step in model.report()["passes"] if step["name"] == "cached-keys"]
    return model, step


def check(model, module, given):
    want = module(*given)
    have = model(*given)
    pairs = zip(have, want, strict=True) if isinstance(want, tuple) else [(have, want)]
    for one, other in pairs:
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "batch", "queries"), [("none", 1, 1), ("none", 3, 2), ("added", 2, 1), ("added", 2, 7), ("seen", 3, 1), ("seen", 3, 5)]
)
def test_the_cache_is_read_in_place(mask, batch, queries):
    given, module = inputs(batch, queries, mask=mask), Decoding(mask)
    model, step = compiled(module, given)
    assert step["matches"] == {"attention": 1}
    assert [kernel["template"].startswith("attention") for kernel in model.report()["kernels"]].count(True) == 2
    assert model.report()["memory"]["workspace_bytes"] < given[1].nbytes / 2  # no copy of a layer's keys
    check(model, module, given)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 7, "kv": 1, "depth": 20, "cache": 1021},
        {"heads": 3, "kv": 3, "depth": 1, "cache": 16001},
        {"heads": 5, "kv": 5, "depth": 80, "cache": 127, "queries": 8},
    ],
)
def test_awkward_sizes(sizes):
    given, module = inputs(**sizes), Decoding()
    model, step = compiled(module, given)
    assert step["matches"] == {"attention": 1}, step["notes"]
    check(model, module, given)


def test_constant_masks_are_cut():
    """What hides nothing in the cache is no mask there."""
    given, causal = inputs(queries=3), torch.ones(3, 521 + 3, dtype=torch.bool).tril(521)
    random = torch.rand(3, 521 + 3, generator=torch.Generator().manual_seed(1)) > 0.5
    for seen, masked in ((causal, 0), (torch.cat([causal[:, :521], random[:, 521:]], 1), 1), (random, 2)):  # the first one is a window
        module = Decoding("constant", seen=seen)
        model, step = compiled(module, given)
        assert step["matches"] == {"attention": 1}
        assert sum("mask" in kernel["workload"] for kernel in model.report()["kernels"]) == masked
        check(model, module, given)


def test_own_tokens_that_are_returned_are_no_part_of_a_copy():
    given, module = inputs(queries=2), Decoding(returned="last")
    model, step = compiled(module, given)
    assert step["matches"] == {"attention": 1}
    check(model, module, given)


@pytest.mark.parametrize(
    ("given", "returned", "reason"), [(inputs(), "whole", ""), (inputs(cache=40), "none", "too short"), (inputs(queries=9), "none", "")]
)
def test_what_is_left(given, returned, reason):
    """Keys that are wanted in one piece, a short cache, and more queries than decoding has."""
    module = Decoding(returned=returned)
    model, step = compiled(module, given)
    assert not step["matches"] and (not reason or reason in step["notes"][0])
    check(model, module, given)


class Together(torch.nn.Module):
    """Keys and values in one tensor [2, B, KV, P, D], so that their lengths are known to be the same."""

    def forward(self, q, cache, own_k, own_v):
        return Decoding()(q, cache[:1].expand(2, -1, -1, -1, -1), cache[1:].expand(2, -1, -1, -1, -1), own_k, own_v)


def test_a_cache_of_open_length():
    def given(length):
        q, keys, _, own_k, own_v = inputs(cache=length)
        return q, keys, own_k, own_v

    model, step = compiled(Together(), given(521), shapes={"cache": f"2x1x{KV}x1..521..1000x{D}"})
    assert step["matches"] == {"attention": 1}, step["notes"]
    for length in (1, 17, 1000):
        check(model, Together(), given(length))


def test_short_numbers_leave_a_cache_as_it_is():
    """Rounding keys that are read once takes longer than reading them."""
    given, module = inputs(), Decoding()
    model, _ = compiled(module, given, precision="bf16")
    assert not any("bf16" in kernel["workload"] for kernel in model.report()["kernels"])
    check(model, module, given)
