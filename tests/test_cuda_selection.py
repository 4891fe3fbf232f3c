"""CUDA kernels that sort and that write at computed places, run thread by thread on the CPU, against numpy and the CPU target."""

from __future__ import annotations

import shutil
from fractions import Fraction

import numpy as np
import pytest
from cuda_models import compiled, emulation, program_of, run, templates
from tcompile.compiler.dialect.tokens import match_reference, match_tokens, select_reference, select_tokens, take_tokens
from tcompile.compiler.tvm import relax

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(11)


def places(x, axis, descending=False):
    """Places along an axis in the order of the numbers, those of equal ones in order; NaN is the greatest, zeros are equal."""
    order = x.astype("float64") if x.dtype.kind in "fV" or x.dtype == bool else x.astype(object)
    rank = np.unique(order, return_inverse=True)[1].reshape(x.shape)  # NaN last
    return np.argsort(-rank if descending else rank, axis=axis, kind="stable")


def test_sorting_of_awkward_sizes_and_types():
    """One element and a prime, an axis in the middle, tiles and merges of them with tails, ties, NaN of both signs, zeros of both signs, the least and the greatest integers."""
    special = RANDOM.standard_normal((3, 37, 5)).astype("float32")
    special[RANDOM.random(special.shape) < 0.3] = np.nan
    special[0, ::3, 1], special[0, 1::3, 1], special[1, :4, 0] = 0.0, -0.0, -np.float32(np.nan)
    integers = RANDOM.integers(-3, 3, (2, 67), "int64")
    integers[0, 5], integers[1, 60] = np.iinfo("int64").max, np.iinfo("int64").min
    inputs = {
        "one": np.float32([[3]]),
        "special": special,
        "integers": integers,
        "bytes": RANDOM.integers(0, 256, (600, 3), "uint8"),
        "half": RANDOM.integers(-3, 3, (1, 16)).astype("float16"),
        "long": RANDOM.integers(0, 2000, (2, 9001), "int32"),
        "wide": RANDOM.integers(0, 300, (1, 4099)).astype("float64"),
    }

    def build(emit, *x):
        named = dict(zip(inputs, x, strict=True))
        sorts = [emit(op.argsort(x, axis=1, dtype="int64")) for x in named.values()]
        return [
            *sorts,
            emit(op.sort(named["special"], axis=1, descending=True)),
            emit(op.argsort(named["integers"], axis=-1, descending=True, dtype="int32")),
            emit(op.sort(named["long"], axis=1)),
        ]

    outputs, lowered = run(build, inputs)
    for (name, value), found in zip(inputs.items(), outputs, strict=False):
        np.testing.assert_array_equal(found, places(value, 1), err_msg=name)
    down = places(special, 1, descending=True)
    np.testing.assert_array_equal(outputs[-3], np.take_along_axis(special, down, 1))
    np.testing.assert_array_equal(outputs[-2], places(integers, 1, descending=True))
    np.testing.assert_array_equal(outputs[-1], np.sort(inputs["long"], axis=1))
    assert templates(lowered).count("merge") == 2 * 2 + 1  # three tiles take two merges, two take one


def test_top_k_of_awkward_sizes():
    """All of a row and one of it, an axis in front, few of many tiles (their best are sorted again, twice), and more than half of a tile."""
    inputs = {
        "experts": RANDOM.standard_normal((131, 7)).astype("float32"),
        "front": RANDOM.standard_normal((40, 3, 2)).astype("float32"),
        "vocabulary": RANDOM.integers(0, 50000, (1, 20011)).astype("float32"),
        "many": RANDOM.integers(0, 100, (1, 10007), "int64"),
    }
    cases = [
        ("experts", 2, 1, True),
        ("experts", 7, -1, False),
        ("front", 5, 0, True),
        ("vocabulary", 50, 1, True),
        ("vocabulary", 1700, 1, True),
        ("many", 3001, 1, False),
    ]

    def build(emit, *x):
        named = dict(zip(inputs, x, strict=True))
        results = []
        for name, k, axis, largest in cases:
            both = emit(op.topk(named[name], k, axis, "both", largest, "int64"))
            results += [emit(relax.TupleGetItem(both, 0)), emit(relax.TupleGetItem(both, 1))]
        return [*results, emit(op.topk(named["front"], 5, 0, "values", True))]

    outputs, lowered = run(build, inputs)
    for (name, k, axis, largest), values, indices in zip(cases, outputs[::2], outputs[1::2], strict=False):
        want = np.take(places(inputs[name], axis, largest), range(k), axis)
        np.testing.assert_array_equal(indices, want, err_msg=name)
        np.testing.assert_array_equal(values, np.take_along_axis(inputs[name], want, axis), err_msg=name)
    np.testing.assert_array_equal(outputs[-1], outputs[4])
    assert templates(lowered).count("sort") == 1 + 1 + 1 + 2 + 4 + 1 + 1


def test_tokens_are_chosen_matched_and_taken():
    """Token pruning's operators on scores with ties, and on tokens of which some are alike."""
    scores = np.round(RANDOM.random((2, 37), dtype=np.float32) * 9)
    metric = RANDOM.standard_normal((2, 37, 12)).astype("float32")
    metric[:, 6::4] = metric[:, 5::4]
    inputs = {"scores": scores, "metric": metric, "x": RANDOM.standard_normal((2, 37, 5)).astype("float32")}
    keep = Fraction(7, 10)

    def build(emit, scores, metric, x):
        kept = emit(select_tokens(scores, keep))
        both = emit(match_tokens(metric, keep))
        return [kept, emit(take_tokens(x, kept, 1)), emit(relax.TupleGetItem(both, 0)), emit(relax.TupleGetItem(both, 1))]

    (kept, taken, indices, destination), _ = run(build, inputs)
    np.testing.assert_array_equal(kept, select_reference(scores, keep))
    np.testing.assert_array_equal(taken, np.take_along_axis(inputs["x"], kept[..., None], 1))
    for found, want in zip((indices, destination), match_reference(metric, keep), strict=True):
        np.testing.assert_array_equal(found, want)


def scattered(data, indices, updates, axis, combine):
    """scatter_elements, or scatter_nd where there is no axis, one update after the other."""
    out = data.copy()
    for at in np.ndindex(indices.shape if axis is not None else indices.shape[:-1]):
        place = (*at[:axis], indices[at], *at[axis + 1 :]) if axis is not None else tuple(indices[at])
        out[place] = combine(out[place], updates[at])
    return out


COMBINE = {"update": lambda old, new: new, "add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}


def test_scattering_in_order():
    """Places hit many times, by a thread per line and by one per place (more updates than one thread takes); negative places, NaN, slices, an axis behind and one in front."""
    cases, inputs = [], {}
    shapes = [
        ((5, 7, 3), (4, 6, 3), 1),
        ((130,), (301,), 0),
        ((3, 9), (2, 100), 1),
        ((90, 3), (70, 3), 0),
        ((6, 5, 4), (8, 2), None),
        ((11, 3), (301, 1), None),
        ((4,), (66, 0), None),
    ]
    for number, ((shape, places, axis), (reduction, dtype)) in enumerate(
        [(shapes[i % len(shapes)], (reduction, "float32" if i % 3 else "int32")) for i, reduction in enumerate([*COMBINE] * 3)]
    ):
        sizes = (shape[axis],) if axis is not None else shape[: places[-1]]
        indices = (
            np.stack([RANDOM.integers(-size, size, places if axis is not None else places[:-1]) for size in sizes], -1)
            if sizes
            else np.zeros(places, "int64")
        )
        if axis is not None:
            indices = indices[..., 0].astype("int32" if number % 2 else "int64")
        updates = RANDOM.integers(-4, 5, places if axis is not None else (*places[:-1], *shape[places[-1] :])).astype(dtype) * np.dtype(dtype).type(
            1.25
        )
        updates = updates.astype(dtype)
        if dtype == "float32" and reduction in ("min", "max"):
            updates[RANDOM.random(updates.shape) < 0.05] = np.nan
        cases.append((axis, reduction))
        inputs |= {
            f"data{number}": RANDOM.standard_normal(shape).astype(dtype),
            f"indices{number}": np.ascontiguousarray(indices),
            f"updates{number}": updates,
        }

    def build(emit, *x):
        calls = zip(cases, x[::3], x[1::3], x[2::3], strict=True)
        return [
            emit(op.scatter_nd(data, indices, updates, how) if axis is None else op.scatter_elements(data, indices, updates, axis, how))
            for (axis, how), data, indices, updates in calls
        ]

    outputs, lowered = run(build, inputs)
    values = list(inputs.values())
    for number, ((axis, how), found) in enumerate(zip(cases, outputs, strict=True)):
        with np.errstate(over="ignore", invalid="ignore"):
            np.testing.assert_array_equal(found, scattered(*values[3 * number : 3 * number + 3], axis, COMBINE[how]), err_msg=f"{number} {how}")
    assert {"scatter", "sort", "map"} == set(templates(lowered))


def test_a_place_out_of_range_is_reported():
    inputs = {"data": np.zeros((3, 2), "float32"), "indices": np.array([[0], [3]]), "updates": np.ones((2, 2), "float32")}
    model = emulation(compiled(program_of(lambda emit, *x: [emit(op.scatter_nd(*x, "update"))], inputs)))
    model(*inputs.values())
    assert model.error
