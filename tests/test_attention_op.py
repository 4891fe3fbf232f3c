"""The attention operator: types, its decomposition against numpy, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kernels import UNOPTIMIZED, attention_module
from tcompile.compiler.dialect.attention import attention, attrs_of, reference
from tcompile.compiler.tvm import relax, tirx, tvm


def run(arrays, **attrs):
    executable = relax.build(attention_module([(array.shape, str(array.dtype)) for array in arrays], **attrs), UNOPTIMIZED)
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(array) for array in arrays))
    return tuple(part.numpy() for part in result) if attrs.get("received") or attrs.get("logsum") else (result.numpy(),)


def operands(layout, groups, mask):
    rng = np.random.default_rng(0)
    shapes = [(2, 6, 5, 8), (2, 6 // groups, 7, 8), (2, 6 // groups, 7, 3)]
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    layouts = layout.split(",") * (4 if "," not in layout else 1)
    arrays = [array if own == "BHSD" else np.ascontiguousarray(array.transpose(0, 2, 1, 3)) for array, own in zip(arrays, layouts, strict=False)]
    masks = {"none": [], "float": [rng.standard_normal((2, 1, 5, 7)).astype("float32")], "bool": [rng.random((5, 7)) > 0.7]}
    return arrays + masks[mask]


@pytest.mark.sweep
@pytest.mark.parametrize("mask", ["none", "float", "bool"])
@pytest.mark.parametrize(
    ("layout", "groups", "attrs"),
    [
        ("BHSD", 3, {"causal": True}),
        ("BSHD", 1, {"received": True}),
        ("BSHD", 3, {"received": True, "logsum": True}),
        ("BSHD", 3, {"causal": True, "received": True}),
        ("BHSD,BHSD,BSHD,BSHD", 1, {"scale": 0.3}),
        ("BHSD", 3, {"before": 1, "causal": True, "fill": -60.0}),
        ("BSHD", 1, {"before": 2, "after": 1}),
    ],
)
def test_decomposition_agrees_with_numpy(layout, groups, mask, attrs):
    arrays = operands(layout, groups, mask)
    want = reference(*arrays, layout=layout, **attrs)
    for ours, theirs in zip(run(arrays, layout=layout, **attrs), want if isinstance(want, tuple) else (want,), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "float", "bool"])
def test_reference_agrees_with_torch(mask):
    """Rows that a boolean mask hides wholly included (seed 0 has some)."""
    arrays = operands("BHSD", 3, mask)
    want = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(array) for array in arrays), enable_gqa=True).numpy()
    np.testing.assert_allclose(reference(*arrays), want, rtol=1e-5, atol=1e-5)


def test_unsafe_rows_are_nan():
    q, mask = np.ones((1, 1, 2, 4), "float32"), np.array([[True, True], [False, False]])
    assert np.isnan(reference(q, q, q, mask, safe=False)[0, 0, 1]).all()
    assert not np.isnan(reference(q, q, q, mask, safe=False, fill=-(2.0**99))).any()


def test_symbolic_type():
    batch, length = tirx.Var("b", "int64"), tirx.Var("t", "int64")
    module = attention_module(
        [((batch, 4, 1, 16), "float32"), ((batch, 2, length, 16), "float32"), ((batch, 2, length, 32), "float32")], received=True
    )
    out, received = module["main"].ret_ty.fields
    analyzer = tvm.sym.Analyzer()
    for ty, dims in ((out, [batch, 4, 1, 32]), (received, [batch, length])):
        assert all(analyzer.can_prove_equal(dim, want) for dim, want in zip(ty.shape, dims, strict=True))


def test_attrs_come_back():
    q = relax.Var("q", relax.TensorType((1, 2, 3, 16), "float32"))
    attrs = attrs_of(attention(q, q, q, causal=True, fill=-(2.0**99)))
    assert (attrs.scale, attrs.causal, attrs.fill, attrs.layout) == (0.25, True, -(2.0**99), "BHSD")
    assert attrs_of(attention(q, q, q)).fill == -math.inf
    assert attrs_of(attention(q, q, q, before=7, after=0)).window == (7, 0) == attrs_of(attention(q, q, q, before=7, after=3, causal=True)).window
    assert attrs_of(attention(q, q, q, after=0)).causal and attrs_of(attention(q, q, q)).window == (None, None)
    with pytest.raises(ValueError, match="a window of -2 before and 3 after"):
        attention(q, q, q, before=-2, after=3)


def test_windows_count_from_the_query():
    """A query sees itself, what is up to `before` before it, and what is up to `after` behind it; there may be nothing."""
    q, v = np.zeros((1, 1, 5, 4), "float32"), np.eye(3, dtype="float32")[None, None]
    want = [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 2, 1 / 2], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_allclose(reference(q, np.zeros((1, 1, 3, 4), "float32"), v, before=1, after=1)[0, 0], want)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(1, 4, 5, 8), (1, 4, 5, 9), (1, 4, 5, 9)], "depths of q and k"),
        ([(1, 4, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)], "4 heads of q cannot share 3"),
        ([(1, 4, 5, 8), (1, 4, 5, 8), (1, 4, 6, 8)], "lengths of k and v"),
        ([(4, 5, 8), (4, 5, 8), (4, 5, 8)], "four known dims"),
    ],
)
def test_wrong_operands(shapes, said):
    with pytest.raises(ValueError, match=said):
        attention_module([(shape, "float32") for shape in shapes], scale=1.0)
