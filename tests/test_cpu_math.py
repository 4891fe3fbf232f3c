"""The polynomials of targets/cpu/math.py against float64 over the whole range of float32, and the code they become."""

from __future__ import annotations

import re

import numpy as np
import pytest
from machines import HASWELL, each_machine  # noqa: F401  (a fixture)
from scipy.special import erf, ndtr
from tcompile.compiler.tvm import IRBuilder, T, TensorLoad, structural_walk, tirx, tvm
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math import call_exp_nonpositive
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE, vector_math
from tcompile.targets.cpu.ops_gelu import GELU, GELU_TANH

TARGET = HASWELL
CALLS = re.compile(r"call\w*\s+\*?\w*(expf?|logf?|erff?|tanhf?|powf?|sinf?|cosf?|fmaxf?|fminf?)\b")


def build(expression, count: int, inputs: int = 1, dtype: str = "float32"):
    lanes = TARGET.lanes()
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        sources = [T.arg(f"x{i}", T.buffer((count,), dtype)) for i in range(inputs)]
        target = T.arg("y", T.buffer((count,), dtype))
        with T.serial(T.int64(count // lanes)) as w, T.vectorized(T.int64(lanes)) as lane:
            T.buffer_store(target, expression(*(source[w * lanes + lane] for source in sources)), [w * lanes + lane])
    return tvm.build(tvm.IRModule({"main": builder.get()}), tvm_target(TARGET), TIR_PIPELINE)


def evaluate(expression, *arrays: np.ndarray) -> np.ndarray:
    count = -(-arrays[0].size // TARGET.lanes()) * TARGET.lanes()
    padded = [tvm.runtime.tensor(np.resize(array, count)) for array in arrays]
    result = tvm.runtime.empty((count,), str(arrays[0].dtype))
    build(expression, count, len(arrays), str(arrays[0].dtype))["main"](*padded, result)
    return result.numpy()[: arrays[0].size]


def ulps(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance in units in the last place, denormals and infinities included; NaN must meet NaN."""
    assert np.array_equal(np.isnan(got), np.isnan(expected))

    def order(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return np.where(np.isnan(expected), 0, np.abs(order(got) - order(expected)))


def whole_range() -> np.ndarray:
    """Every 4001st float32 bit pattern, dense samples where the functions live, and the special values."""
    rng = np.random.default_rng(0)
    patterns = np.arange(0, 2**32, 4001, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-45, -1e-45, 88.72284, 88.7229, -103.97, -104.1])
    dense = [rng.uniform(-10, 10, 200_000), rng.uniform(-106, 92, 200_000), rng.uniform(0.9, 1.1, 50_000)]
    return np.concatenate([patterns, special, *(values.astype(np.float32) for values in dense)])


@pytest.mark.parametrize(
    ("function", "reference", "bound"),
    [
        (T.exp, np.exp, 2),
        (T.log, np.log, 1),
        (tirx.log2, np.log2, 2),
        (T.log1p, np.log1p, 1),
        (T.erf, erf, 6),
        (T.tanh, np.tanh, 5),
        (T.sin, np.sin, 2),
        (T.cos, np.cos, 2),
        (T.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 3),
    ],
    ids=["exp", "log", "log2", "log1p", "erf", "tanh", "sin", "cos", "sigmoid"],
)
def test_error_bound(function, reference, bound):
    x = whole_range()
    if function in (T.sin, T.cos):
        x = x[~(np.abs(x) >= 2.0**40) | np.isinf(x)]
    if function is T.sigmoid:
        assert np.all(np.abs(evaluate(function, np.float32([-88, -100, -np.inf]))) < 1e-37)
        x = x[~(x < -87)]
    with np.errstate(all="ignore"):
        expected = reference(x.astype(np.float64)).astype(np.float32)
    error = ulps(evaluate(function, x), expected)
    if function is T.erf and TARGET.lanes() == 16:
        bound = 3
    assert error.max() <= bound, (x[error.argmax()], error.max())


def gelu_tanh(x):
    return x * np.where(x < -20, 0.0, 1 / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


@pytest.mark.parametrize(("name", "reference"), [(GELU, lambda x: x * ndtr(x)), (GELU_TANH, gelu_tanh)], ids=["gelu", "gelu_tanh"])
def test_gelu(name, reference):
    """In whole vectors exact relative to the result, of negative numbers too, which 1 + erf has no bits of; in others with an error of the erf's or tanh's own."""
    x = np.concatenate([whole_range(), np.linspace(-9, 9, 1_000_001, dtype=np.float32)])
    x = x[np.abs(x) < 1e38]
    with np.errstate(all="ignore"):
        want = reference(x.astype(np.float64))
    got = evaluate(lambda v: tirx.call_intrin("float32", name, v), x)
    error, bell = np.abs(got - want), want - np.maximum(x, 0)
    assert np.nanmax(error[x > 0] / np.spacing(got[x > 0])) <= (3 if TARGET.lanes() == 16 else 8)
    assert np.max(error[x < 0]) < (2e-7 if TARGET.lanes() == 16 else 2e-6)
    if TARGET.lanes() == 16:
        for low, high, bound in ((-2, -1e-30, 6e-7), (-3, -2, 3e-6), (-4, -3, 3e-5), (-5, -4, 5e-4)):
            inside = (x >= low) & (x < high)
            assert np.max(error[inside] / np.abs(bell[inside])) < bound
        assert np.nanmax(error[x < -7.5]) < 2e-12
    edges = evaluate(lambda v: tirx.call_intrin("float32", name, v), np.float32([np.inf, -np.inf, np.nan]))
    np.testing.assert_allclose(edges, [np.inf, 0, np.nan], atol=1e-6)


def test_exponential_of_nonpositive_numbers():
    """What a softmax takes: relative error within a few ulps near 0, absolute error below 1e-38 far from it."""
    x = np.concatenate([-np.abs(whole_range()), np.linspace(-20, 0, 100_000, dtype="float32")])
    lanes = TARGET.lanes()
    x = np.resize(x, -(-x.size // lanes) * lanes)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        source, target = (T.arg(name, T.buffer((x.size,), "float32")) for name in "xy")
        with T.serial(T.int64(x.size // lanes)) as w:
            place = T.ramp(w * T.int64(lanes), T.int64(1), lanes)
            T.buffer_store(target, call_exp_nonpositive(source[place], f"float32x{lanes}"), [place])
    result = tvm.runtime.empty((x.size,), "float32")
    tvm.build(tvm.IRModule({"main": builder.get()}), tvm_target(TARGET), TIR_PIPELINE)["main"](tvm.runtime.tensor(x), result)
    got, want = result.numpy().astype("float64"), np.exp(x.astype("float64"))
    assert np.array_equal(np.isnan(got), np.isnan(want)) and (got[x < -88] == 0).all()
    error = np.abs(got - want)
    assert np.nanmax(error[x >= -87] / want[x >= -87]) < 2e-6 and np.nanmax(error[x >= -5] / want[x >= -5]) < 4e-7
    assert np.nanmax(error[x < -87]) < 2e-38


def test_power():
    rng = np.random.default_rng(1)
    special = np.float32([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 2, -2, 0.5, -0.5, 3, -3, 1e-40, -1e-40, 3e38, 1e9, -1e9])
    grid = [values.ravel() for values in np.meshgrid(special, special)]
    x = np.concatenate([grid[0], rng.uniform(0, 10, 100_000), np.exp(rng.uniform(-80, 80, 100_000)), -rng.integers(0, 20, 4000)]).astype(np.float32)
    y = np.concatenate([grid[1], rng.uniform(-10, 10, 100_000), rng.uniform(-3, 3, 100_000), rng.integers(-9, 9, 4000)]).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = np.power(x.astype(np.float64), y.astype(np.float64)).astype(np.float32)
    assert ulps(evaluate(T.pow, x, y), expected).max() <= 1


@pytest.mark.sweep
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, -1.0, -2.0, 0.3])
def test_constant_power(exponent):
    x = whole_range()
    with np.errstate(all="ignore"):
        expected = np.power(x.astype(np.float64), np.full(x.shape, np.float32(exponent), np.float64)).astype(np.float32)
    normal = (np.abs(expected) > 1e-37) | (expected == 0) | np.isnan(expected)
    got = evaluate(lambda v: T.pow(v, T.float32(exponent)), x)
    assert ulps(got[normal], expected[normal]).max() <= 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extrema_keep_nan(dtype):
    x = np.array([np.nan, -1.0, 2.0, np.inf, -np.inf, np.nan, 7.0, 0.0], dtype)
    y = np.array([1.0, np.nan, 3.0, -1.0, np.nan, np.nan, 6.0, 0.5], dtype)

    def constant(value: float):
        return tirx.FloatImm(dtype, value)

    np.testing.assert_array_equal(evaluate(lambda a: T.max(a, constant(0.0)), x), np.maximum(x, 0))
    np.testing.assert_array_equal(evaluate(lambda a: T.max(T.min(a, constant(6.0)), constant(0.0)), x), np.clip(x, 0, 6))
    np.testing.assert_array_equal(evaluate(lambda a, b: T.max(a, b), x, y), np.maximum(x, y))
    np.testing.assert_array_equal(evaluate(lambda a, b: T.min(a, b), x, y), np.minimum(x, y))


def test_a_long_chain_of_clips_compiles():
    """Each clip reads its operand three times: put into each other, twelve would be a tree of half a million nodes."""

    def chain(x):
        for _ in range(12):
            x = T.bind(T.max(T.min(tirx.nearbyint(x * T.float32(0.9)), T.float32(255)), T.float32(0)))
        return x

    x = np.float32([-3, 0.4, 17, 300, 1e9, 250, 100, 2])
    expected = x
    for _ in range(12):
        expected = np.clip(np.round(expected * np.float32(0.9)), 0, 255)
    np.testing.assert_array_equal(evaluate(chain, x), expected)


def test_guarded_extrema_read_nothing_before_the_test():
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        x, y, z = (T.arg(name, T.buffer((8,), "float32")) for name in "xyz")
        with T.serial(T.int64(8)) as i:
            T.buffer_store(z, T.if_then_else(i > 2, T.max(x[i - 3], y[i - 3]), T.float32(0)) + T.max(x[i], T.float32(0)), [i])
    read = []
    for statement in named(vector_math(builder.get())):
        structural_walk(statement.value, (TensorLoad, read.append))
    assert [isinstance(load.indices[0], tirx.Var) for load in read] == [True]  # x[i] alone


def named(func) -> list:
    """The stores into values that are computed ahead of a statement."""
    stores = []
    structural_walk(func.body, (tirx.BufferStore, lambda store: stores.append(store) if store.buffer.name != "z" else None))
    return stores


@pytest.mark.parametrize("function", [T.exp, T.log, T.erf, T.tanh, T.sigmoid, T.sin], ids=["exp", "log", "erf", "tanh", "sigmoid", "sin"])
def test_code_is_vector_code(function):
    assembly = build(function, 1024).inspect_source("asm")
    assert {256: "ymm", 512: "zmm"}[TARGET.vector_bits] in assembly
    assert not CALLS.search(assembly)


def test_relu_is_one_instruction():
    assembly = build(lambda x: T.max(x, T.float32(0)), 1024).inspect_source("asm")
    assert "vmaxps" in assembly
    assert "vcmp" not in assembly
