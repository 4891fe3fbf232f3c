"""Number formats: codes come back within half a step, packing is lossless, sizes are what is stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from tcompile.passes.quantization.formats import COLUMNS, Affine, GroupedInt, Int8
from tcompile.passes.quantization.observe import Statistics, chosen_range

FLOATS = st.floats(-1e4, 1e4, width=32)
MATRICES = hn.arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(1, 9)), elements=FLOATS)
#: half a step, and what float32 rounding adds to values of up to 255 steps
HALF = 0.5 + 2e-4
RNG = np.random.default_rng(0)


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_affine_is_within_half_a_step_and_keeps_zero(x: np.ndarray) -> None:
    affine = Affine.of_range(x.min(), x.max())
    # the zero is a code, so one end of the range may lose up to half a step more
    assert np.abs(affine.decode(affine.encode(x)) - x).max() <= affine.scale * (HALF + 0.5)
    inside = np.clip(x, -affine.zero * affine.scale, (255 - affine.zero) * affine.scale)
    assert np.abs(affine.decode(affine.encode(inside)) - inside).max() <= affine.scale * HALF
    assert affine.decode(affine.encode(np.zeros(1, np.float32)))[0] == 0


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from([None, 0, 1]))
def test_int8_is_within_half_a_step(w: np.ndarray, axis: int | None) -> None:
    encoded = Int8(axis).encode(w)
    assert encoded.codes.dtype == np.int8 and encoded.codes.min() >= -127
    assert (np.abs(encoded.decode() - w) <= encoded.scale * HALF).all()
    kind = Int8(axis)
    np.testing.assert_array_equal(kind.unpack(kind.pack(encoded.codes), w.shape), encoded.codes)


@settings(max_examples=150, deadline=None)
@given(MATRICES, st.integers(1, 8), st.sampled_from([1, 2, 4, 8, 32, 33]), st.booleans())
def test_grouped_int(w: np.ndarray, bits: int, group: int, symmetric: bool) -> None:
    kind = GroupedInt(bits, group, symmetric)
    encoded = kind.encode(w)
    assert encoded.codes.max() < 1 << bits
    step = np.repeat(encoded.scale, group, axis=1).reshape(-1, w.shape[1])[: len(w)]
    # a symmetric code range ends at -(2^(bits-1) - 1) .. 2^(bits-1) - 1 of the largest magnitude; an asymmetric one may be shifted by half a step; one bit is a sign
    if not kind.signs:
        assert (np.abs(kind.decode(encoded, len(w)) - w) <= step * (HALF if symmetric else HALF + 0.5)).all()
    packed = kind.pack(encoded.codes)
    np.testing.assert_array_equal(kind.unpack(packed, len(w)), encoded.codes.reshape(-1, w.shape[1]))
    assert packed.nbytes + encoded.scale.nbytes + (0 if symmetric else encoded.zero.size) == kind.size_bytes(*w.shape)


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_searched_scales_are_never_worse(w: np.ndarray, bits: int, symmetric: bool) -> None:
    kind = GroupedInt(bits, 8, symmetric)
    plain, best = (kind.decode(encoded, len(w)).astype(np.float64) for encoded in (kind.encode(w), kind.encode_best(w)))
    scale = float(np.abs(w).max()) or 1.0
    assert (np.square((best - w) / scale).sum() <= np.square((plain - w) / scale).sum() * (1 + 1e-5) + 1e-12).all()


def test_searched_scales_are_the_same_in_blocks_of_columns() -> None:
    w = RNG.standard_normal((40, COLUMNS + 3)).astype(np.float32)
    kind = GroupedInt(4, 16)
    whole, last = kind.encode_best(w), kind.encode_best(w[:, COLUMNS:])
    np.testing.assert_array_equal(whole.codes[..., COLUMNS:], last.codes)
    norm = np.linalg.norm(kind.decode(kind.encode(w), 40) - w)
    assert np.linalg.norm(kind.decode(whole, 40) - w) < 0.95 * norm


def test_one_bit_is_a_sign_times_the_mean_magnitude_of_the_weights_that_there_are() -> None:
    w = np.array([[1.0], [-3.0], [-2.0], [0.5], [4.0]], np.float32)
    kind = GroupedInt(1, 4)
    np.testing.assert_array_equal(kind.decode(kind.encode_best(w), 5), np.array([[1.625], [-1.625], [-1.625], [1.625], [4.0]], np.float32))


def test_codes_of_three_bits_are_a_string() -> None:
    packed = GroupedInt(3, 2).pack(np.array([[1], [2], [7], [5]], np.uint8))
    np.testing.assert_array_equal(packed, [[0b11010001], [0b1011]])


def test_four_bits_hold_the_even_k_low() -> None:
    packed = GroupedInt(4, 2).pack(np.array([[1], [2], [15], [0]], np.uint8))
    np.testing.assert_array_equal(packed, [[0x21], [0x0F]])


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 9}, {"group": 0}])
def test_impossible_formats_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="bits must be 1..8"):
        GroupedInt(**options)


@pytest.mark.parametrize("values", [0.0, 1e-44, -3e-39])
def test_tiny_ranges_have_a_usable_scale(values: float) -> None:
    x = np.full((3, 2), values, np.float32)
    for decoded in (Int8(1).encode(x).decode(), GroupedInt(4, 2).decode(GroupedInt(4, 2).encode(x), 3)):
        assert np.isfinite(decoded).all()
    assert np.isfinite(Affine.of_range(values, values).decode(np.arange(256))).all()


def test_observers_differ_where_there_are_outliers() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4000, 4)).astype(np.float32)
    values[7, 2] = 100
    seen = [Statistics.of(values, 1 << 18, rng)]
    ranges = {kind: chosen_range(kind, seen, 99.9) for kind in ("minmax", "percentile", "mse")}
    error = {kind: float(np.mean((found.decode(found.encode(values)) - values) ** 2)) for kind, found in ranges.items()}
    assert ranges["minmax"].decode(np.array([255]))[0] == pytest.approx(100, rel=0.01)
    assert ranges["percentile"].decode(np.array([255]))[0] < 5
    assert error["mse"] <= min(error.values()) * 1.02 and error["mse"] < error["minmax"]
