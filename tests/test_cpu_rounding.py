"""Codes of eight bits by the bits of a sum: equal to rounding and clipping, and no instruction rounds."""

from __future__ import annotations

import numpy as np
import pytest
from machines import HASWELL, each_machine  # noqa: F401  (a fixture)
from tcompile.compiler.tvm import IRBuilder, T, tirx, tvm
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE

TARGET = HASWELL
LIMITS = {"uint8": (0.0, 255.0), "int8": (-128.0, 127.0)}


def codes(x, dtype: str, zero: float = 0.0):
    low, high = LIMITS[dtype]
    rounded = T.bind(T.nearbyint(x))
    if zero:
        rounded = T.bind(rounded + T.float32(zero))
    return tirx.Cast(f"{dtype}x{TARGET.lanes()}" if "x" in str(x.ty.dtype) else dtype, T.max(T.min(rounded, T.float32(high)), T.float32(low)))


def build(dtype: str, count: int, expression=codes, **options):
    lanes = TARGET.lanes()
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        source, target = T.arg("x", T.buffer((count,), "float32")), T.arg("y", T.buffer((count,), dtype))
        with T.serial(T.int64(count // lanes)) as w, T.vectorized(T.int64(lanes)) as lane:
            T.buffer_store(target, expression(source[w * lanes + lane], dtype, **options), [w * lanes + lane])
    return tvm.build(tvm.IRModule({"main": builder.get()}), tvm_target(TARGET), TIR_PIPELINE)


def encoded(x: np.ndarray, dtype: str) -> np.ndarray:
    count = -(-x.size // TARGET.lanes()) * TARGET.lanes()
    result = tvm.runtime.empty((count,), dtype)
    build(dtype, count)["main"](tvm.runtime.tensor(np.resize(x, count)), result)
    return result.numpy()[: x.size]


@pytest.mark.usefixtures("each_machine")
@pytest.mark.parametrize("dtype", LIMITS)
def test_every_code_and_tie(dtype):
    """Every quarter from below the lowest to above the highest code, the floats next to them, and what no code is near."""
    quarters = np.arange(-300, 300, 0.25, dtype=np.float32)
    far = np.float32([2**22, 2**23 + 1, 2**31, -(2**31), 1e30, -1e30, np.inf, -np.inf, 1e-40, -0.0])
    x = np.concatenate([quarters, np.nextafter(quarters, np.float32(-np.inf)), np.nextafter(quarters, np.float32(np.inf)), far])
    want = np.clip(np.rint(x), *LIMITS[dtype]).astype(dtype)
    np.testing.assert_array_equal(encoded(x, dtype), want)
    # there is no code for NaN; its neighbours are not touched
    numbers = np.arange(x.size) % 7 > 0
    np.testing.assert_array_equal(encoded(np.where(numbers, x, np.float32(np.nan)), dtype)[numbers], want[numbers])


@pytest.mark.usefixtures("each_machine")
@pytest.mark.parametrize("dtype", LIMITS)
def test_no_instruction_rounds(dtype):
    code = build(dtype, 1024).inspect_source("asm")
    assert "vaddps" in code and "vround" not in code and "vrndscale" not in code and "vcvt" not in code.replace("vcvtph", "")


@pytest.mark.usefixtures("each_machine")
@pytest.mark.parametrize("other", ["zero point", "no bounds", "fractional bound", "infinite bound"])
def test_others_round_by_themselves(other):
    """A zero point behind rounding makes a difference for ties; without bounds of whole numbers a code is not the low byte of a sum."""

    def expression(x, dtype):
        if other == "zero point":
            return codes(x, dtype, zero=3.0)
        rounded = T.nearbyint(x)
        if other == "fractional bound":
            rounded = T.max(T.min(rounded, T.float32(254.5)), T.float32(0))
        if other == "infinite bound":
            rounded = T.max(T.min(rounded, T.float32(255)), T.float32(-np.inf))
        return tirx.Cast(dtype, rounded)

    code = build("uint8", 1024, expression).inspect_source("asm")
    assert "vround" in code or "vrndscale" in code
