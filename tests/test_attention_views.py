"""Attention that reads q, k and v where a larger tensor holds them: maps against numpy, and networks whose copies are gone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tcompile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import multiplying
from tcompile.compiler.tvm import relax
from tcompile.targets.cpu.attention_views import find_view

Step = tuple[Callable[[np.ndarray], np.ndarray], Callable[[Any], list[Any]]]


def permute(axes: Any) -> Step:
    return lambda array: array.transpose(axes), lambda x: [relax.op.permute_dims(x, axes)]


def cut(axis: int, start: int, stride: int, size: int) -> Step:
    place = (*[slice(None)] * axis, slice(start, None, stride))
    return lambda array: array[place], lambda x: [relax.op.strided_slice(x, [axis], [start], [size], [stride])]


def part(axis: int, count: int, place: int) -> Step:
    return lambda array: np.split(array, count, axis)[place], lambda x: [relax.op.split(x, count, axis), place]


def reshape(shape: tuple[int, ...]) -> Step:
    return lambda array: array.reshape(shape), lambda x: [relax.op.reshape(x, shape)]


def shapes(size: int) -> list[tuple[int, ...]]:
    """Some shapes of as many elements, of two to five dims."""
    heads = [head for head in itertools.product((1, 2, 3), repeat=3) if size % math.prod(head) == 0]
    return [(size, 1), (1, size, 1, 1), *((*head, *unit, size // math.prod(head)) for head in heads for unit in ((), (1,)))]


@st.composite
def chains(draw: Any) -> tuple[np.ndarray, list[Step]]:
    """A tensor of numbered elements, and slices, splits, transposes and reshapes that end in four dims."""
    first = array = np.arange(720.0, dtype=np.float32).reshape(draw(st.sampled_from([(2, 3, 120), (2, 3, 4, 30), (6, 4, 1, 30), (2, 12, 5, 2, 3)])))
    steps: list[Step] = []
    for kind in [*draw(st.lists(st.sampled_from(["permute", "cut", "part", "reshape"]), min_size=1, max_size=4)), "end"]:
        axis = draw(st.integers(0, array.ndim - 1))
        size = array.shape[axis]
        if kind == "permute":
            step = permute(draw(st.permutations(range(array.ndim))))
        elif kind == "cut":
            step = cut(axis, draw(st.integers(0, size - 1)), draw(st.integers(1, 2)), size)
        elif kind == "part":
            count = next((count for count in (3, 2) if size % count == 0), 0)
            step = part(axis, count, draw(st.integers(0, count - 1))) if count else permute(list(range(array.ndim)))
        elif kind == "reshape" or array.ndim != 4:
            step = reshape(draw(st.sampled_from([shape for shape in shapes(array.size) if kind == "reshape" or len(shape) == 4])))
        else:
            continue
        steps.append(step)
        array = step[0](array)
    return first, steps


@settings(max_examples=200, deadline=None)
@given(chains(), st.sampled_from(["BHSD", "BSHD"]))
def test_maps_find_every_element(chain, layout):
    array, steps = chain
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(array.shape, "float32"))
    held = {x: array}
    with builder.function("main", [x]):
        with builder.dataflow():
            for of_array, of_tensor in steps:
                call, *place = of_tensor(x)
                x = builder.emit(call)
                x = builder.emit(relax.TupleGetItem(x, place[0])) if place else x
                array = of_array(array)
                held[x] = array
            out = builder.emit_output(x)
        builder.emit_func_output(out)
    view = find_view({binding.var: binding.value for block in builder.get()["main"].body.blocks for binding in block.bindings}, x, layout)
    array = array if layout == "BHSD" else array.swapaxes(1, 2)
    assert [int(dim) for dim in view.dims] == list(array.shape)
    indices = np.indices(array.shape)
    place = tuple(row[0] + sum(factor * index for factor, index in zip(row[1:], indices, strict=True)) for row in view.rows)
    np.testing.assert_array_equal(np.broadcast_to(held[view.tensor][place], array.shape), array)


class Block(torch.nn.Module):
    """q, k and v from one linear layer, cut apart as ViT, GPT-2 and GPT-NeoX do; `tail` leaves out the first keys."""

    def __init__(self, kind: str, width: int = 48, heads: int = 3) -> None:
        super().__init__()
        self.kind, self.heads, self.qkv = kind, heads, torch.nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads, each = self.heads, width // self.heads
        mixed = self.qkv(x)
        if self.kind in ("vit", "tail"):
            q, k, v = mixed.reshape(batch, tokens, 3, heads, each).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.kind == "gpt2":
            q, k, v = (part.view(batch, tokens, heads, each).transpose(1, 2) for part in mixed.split(width, dim=2))
        else:
            q, k, v = mixed.view(batch, tokens, heads, 3 * each).transpose(1, 2).chunk(3, dim=-1)
        k, v = (k[:, :, 3:], v[:, :, 3:]) if self.kind == "tail" else (k, v)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "gpt2")
        return out.transpose(1, 2).reshape(batch, tokens, width)


@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "dynamic"), [("vit", True), ("gpt2", True), ("neox", True), ("neox", False), ("tail", False), ("tail", True)])
def test_parts_of_one_product_are_read_in_place(kind, dynamic):
    torch.manual_seed(0)
    module, x = Block(kind).eval(), torch.randn(2, 37, 48)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=16), 1: torch.export.Dim("tokens", min=5, max=512)}} if dynamic else None
    compiled = tcompile.compile(torch.export.export(module, (x,), dynamic_shapes=shapes))
    for sample in (x, torch.randn(1, 5, 48), torch.randn(3, 130, 48)) if dynamic else (x,):
        np.testing.assert_allclose(compiled(sample), module(sample).detach().numpy(), rtol=1e-5, atol=1e-6)
    kernels = {row["kernel"] for row in compiled.report()["kernels"]}
    # a run-time number of keys that is no dim of the product is not read in place
    assert len(kernels) == 2 or (kind, dynamic) == ("tail", True), kernels


@pytest.mark.parametrize("target", [multiplying("bfloat16")])
def test_parts_of_one_product_in_bfloat16(target):
    """The product's kernel stores bfloat16 once, for q, k and v."""
    torch.manual_seed(0)
    module, x = Block("vit").eval(), torch.randn(2, 37, 48)
    compiled = tcompile.compile(module, example_inputs=(x,), precision="bf16", target=target)
    want = module(x).detach().numpy()
    assert 0 < np.abs(compiled(x) - want).max() < 0.02 * np.abs(want).max()
    workloads = [row["workload"] for row in compiled.report()["kernels"] if row["workload"]]
    assert sorted(text.split()[:2] for text in workloads) == [["attention", "bf16"], ["gemm", "bf16"]]
    (step,) = [step for step in compiled.report()["passes"] if step["name"] == "precision"]
    assert step["matches"] == {"matmul": 1, "attention": 1}
