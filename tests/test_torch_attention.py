"""scaled_dot_product_attention that torch.export leaves whole: one attention operator in the Program, and torch's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import tcompile
from tcompile.compiler.importers.torch import import_torch
from tcompile.compiler.tvm import relax

torch = pytest.importorskip("torch")

from torch_modules import Sdpa

CASES = {
    "causal": ("none", {"is_causal": True}),
    "bool": ("bool", {}),
    "float": ("float", {"scale": 0.2}),
    "gqa": ("none", {"enable_gqa": True, "is_causal": True}),
    "gqa_bool": ("bool", {"enable_gqa": True}),
}


def operands(kind, options, batch, queries, keys):
    """q, k, v and the mask of one call; six heads of q, two of k and v where they are shared. The first query of a boolean mask sees nothing."""
    generator = torch.Generator().manual_seed(0)
    heads = 2 if options.get("enable_gqa") else 6
    shapes = [(batch, 6, queries, 8), (batch, heads, keys, 8), (batch, heads, keys, 5)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    if kind == "float":
        return [*tensors, torch.randn(batch, 1, queries, keys, generator=generator)]
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys, generator=generator) > 0.4
        mask[:, :, 0] = False
        return [*tensors, mask]
    return tensors


def open_dims(tensors):
    batch, queries, keys = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "queries", "keys"))
    shapes = [{0: batch, 2: queries}, {0: batch, 2: keys}, {0: batch, 2: keys}, {0: batch, 2: queries, 3: keys}]
    return dict(zip(("q", "k", "v", "mask"), shapes[: len(tensors)], strict=False))


def operators(program):
    """Names of the operators of attention, whole or in parts, that the program calls."""
    names = []
    relax.analysis.post_order_visit(program.main, lambda e: names.append(str(e.op)) if isinstance(e, relax.Call) else None)
    return [name for name in names if "tcompile.attention" in name or name.endswith(("softmax", "matmul"))]


@pytest.mark.sweep
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_stays_one_operator_and_agrees(name, dynamic):
    kind, options = CASES[name]
    module, tensors = Sdpa(**options).eval(), operands(kind, options, 2, 5, 7)
    exported = torch.export.export(module, tuple(tensors), dynamic_shapes=open_dims(tensors) if dynamic else None)
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [torch.ops.aten.scaled_dot_product_attention.default]
    found = operators(import_torch(exported))
    assert len(found) == 1 and "tcompile.attention" in found[0]
    model = tcompile.compile(exported)
    for sizes in [(2, 5, 7), (1, 1, 23), (3, 37, 2)] if dynamic else [(2, 5, 7)]:
        tensors = operands(kind, options, *sizes)
        np.testing.assert_allclose(model(*tensors), module(*tensors), rtol=1e-4, atol=1e-5)
