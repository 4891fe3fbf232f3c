"""Slices of concatenations become slices of the part that they lie in; all others stay, and none changes a number."""

from __future__ import annotations

import numpy as np
import onnx_models
import pytest
import tcompile
from onnx import TensorProto, helper

small, canonicalized = onnx_models.small, onnx_models.canonicalized
SIZES = (3, 1, 4)
WHOLE = sum(SIZES)
#: (begin, end) of slices that lie in one part: inside, up to its end, all of it, counted from behind, and beyond the end
WITHIN = [(0, 2), (1, 3), (0, 3), (3, 4), (4, 8), (5, 7), (-1, 99), (-4, 8), (-8, -5), (-5, -4)]
#: across parts, empty, and of everything
OTHERS = [(2, 4), (0, 8), (3, 8), (-6, -1), (5, 5), (9, 12), (-99, 99)]


def model(cuts, axis=1, steps=None):
    names = [f"x{at}" for at in range(3)]
    nodes, weights = [helper.make_node("Concat", names, ["whole"], axis=axis)], {"axes": np.array([axis]), "steps": np.array([steps or 1])}
    for at, (begin, end) in enumerate(cuts):
        weights |= {f"b{at}": np.array([begin]), f"e{at}": np.array([end])}
        nodes.append(helper.make_node("Slice", ["whole", f"b{at}", f"e{at}", "axes", "steps"], [f"y{at}"]))
    shapes = {name: [5, size, 2] if axis == 1 else [size, 5, 2] for name, size in zip(names, SIZES, strict=True)}
    return small(nodes, shapes, [f"y{at}" for at in range(len(cuts))], weights)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("cuts", "steps", "rewritten"), [(WITHIN, 1, len(WITHIN)), (OTHERS, 1, 0), ([(4, 8), (0, 8)], 2, 0)])
def test_a_slice_reads_its_part(axis, cuts, steps, rewritten):
    compiled = tcompile.compile(model(cuts, axis, steps))
    assert canonicalized(compiled, "slice_of_concat") == rewritten
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal([5, size, 2] if axis == 1 else [size, 5, 2]).astype("float32") for size in SIZES]
    whole = np.concatenate(parts, axis)
    for have, (begin, end) in zip(compiled(*parts), cuts, strict=True):
        np.testing.assert_array_equal(have, whole[:, begin:end:steps] if axis == 1 else whole[begin:end:steps])


def test_parts_of_open_size():
    """The last row of what an open number of rows goes before."""
    nodes = [helper.make_node("Concat", ["x", "own"], ["whole"], axis=0), helper.make_node("Slice", ["whole", "b", "e", "a"], ["y"])]
    last = small(
        nodes, {"x": ["N", 3], "own": ([1, 3], TensorProto.FLOAT)}, ["y"], {"b": np.array([-1]), "e": np.array([2**31 - 1]), "a": np.array([0])}
    )
    compiled = tcompile.compile(last)
    assert canonicalized(compiled, "slice_of_concat") == 1
    x, own = np.ones((7, 3), "float32"), np.full((1, 3), 2, "float32")
    np.testing.assert_array_equal(compiled(x, own), own)
