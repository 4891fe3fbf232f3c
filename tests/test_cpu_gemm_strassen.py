"""GEMM in seven products instead of eight: the table of products, numbers over awkward sizes and magnitudes, the instructions it compiles to, and where it is chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from machines import runnable
from tcompile.compiler.tvm import relax, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cpu.candidates import offers
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.gemm_strassen import GemmStrassen, StrassenSchedule
from tcompile.targets.cpu.gemm_strassen_emit import PRODUCTS
from tcompile.targets.cpu.lower import templates
from tcompile.targets.cpu.sparse_weights import Constants
from test_cpu_conv import Case, fused_conv, inner_loops
from test_cpu_gemm import compiled, fused

ZEN4 = replace(Target.parse("cpu:znver4"), cores=1)


def test_seven_products_make_the_product():
    """Of symbols: every product of an element of A and one of B, as often as the product of two matrices has it."""
    made: dict[tuple[tuple[int, ...], ...], int] = {}
    for of_a, of_b, of_c in PRODUCTS:
        for a, b, c in itertools.product(of_a, of_b, of_c):
            key = a[:2], b[:2], c[:2]
            made[key] = made.get(key, 0) + a[2] * b[2] * c[2]
    want = {((i, k), (k, j), (i, j)): 1 for i, j, k in itertools.product(range(2), repeat=3)}
    assert {key: count for key, count in made.items() if count} == want


def kernel_of(func: Any, schedule: tuple[int, ...], target: Target) -> Any:
    """schedule: mr, nv, hc, kc."""
    mr, nv, hc, kc = schedule
    template = GemmStrassen()
    return template.build(func, template.workload(func, frozenset([1])), StrassenSchedule(mr, nv, target.lanes(), hc, kc), target)


def run(kernel: Any, target: Target, x: np.ndarray, w: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = tvm.runtime.tensor(np.full(shape, np.nan, "float32"))
    compiled(kernel, target)["f"](*map(tvm.runtime.tensor, (x, kernel.packings[0].pack(w), b)), out)
    return out.numpy()


def numbers(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("lead", "m", "k", "n", "schedule"),
    [
        ((), 64, 192, 96, (4, 3, 32, 96)),
        ((), 77, 202, 49, (4, 3, 39, 101)),  # one more row in the upper half, a panel for the sake of pairs, a half of K that is prime
        ((), 131, 198, 100, (3, 3, 17, 50)),  # chunks that overlap, blocks of two sizes, a column in a panel by itself
        ((3,), 43, 194, 31, (5, 2, 65, 97)),
        ((2, 33), 1, 256, 200, (8, 3, 33, 64)),
        ((), 66, 1030, 17, (1, 1, 33, 128)),
    ],
)
@pytest.mark.parametrize("target", runnable())
def test_awkward_sizes(lead, m, k, n, schedule, target):
    func = fused(lead, m, k, n)
    x, w, b = numbers((*lead, m, k), (k, n), (n,))
    w /= np.sqrt(np.float32(k))
    found = run(kernel_of(func, schedule, target), target, x, w, b, (*lead, m, n))
    np.testing.assert_allclose(found, np.maximum(x.astype("float64") @ w + b, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("target", runnable())
def test_pointwise_convolution(strides, target):
    func = fused_conv(Case((1, 17, 19, 200), 70, (1, 1), strides), "relu")
    kernel = kernel_of(func, (4, 3, 45, 100), target)
    x, w, b = numbers((1, 17, 19, 200), (1, 1, 200, 70), (70,))
    seen = x[:, :: strides[0], :: strides[1]]
    found = run(kernel, target, x, w, b, (*seen.shape[:3], 70))
    np.testing.assert_allclose(found, np.maximum(seen.astype("float64") @ w[0, 0] + b, 0), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("target", runnable())
def test_errors_are_those_of_each_row_and_column(target):
    """Rows that are added up differ by 10^30, columns too: relative to its own row and column every sum is as close as the direct product's."""
    m, k, n = 70, 384, 96
    func = fused((), m, k, n, activation=relax.op.abs)
    kernel = kernel_of(func, (4, 3, 35, 96), target)
    x, w, _ = numbers((m, k), (k, n), (n,))
    x *= (10.0 ** np.linspace(-15, 15, m)).astype("float32")[:, None]
    w *= (10.0 ** np.linspace(10, -10, n)).astype("float32")
    found = run(kernel, target, x, w, np.zeros(n, "float32"), (m, n))
    want = np.abs(x.astype("float64") @ w.astype("float64"))
    size = np.linalg.norm(x.astype("float64"), axis=1)[:, None] * np.linalg.norm(w.astype("float64"), axis=0)
    assert (np.abs(found - want) / size).max() < 1e-6


@pytest.mark.parametrize("target", runnable())
def test_columns_that_weights_make_small_do_no_harm(target):
    """As in language models: a few features of activations are 10^6 times the others, their weights as much smaller. Errors are relative to the sum of magnitudes that is added up."""
    m, k, n = 66, 384, 96
    kernel = kernel_of(fused((), m, k, n, activation=relax.op.abs), (4, 3, 33, 96), target)
    x, w, _ = numbers((m, k), (k, n), (n,))
    scale = np.ones(k, "float32")
    scale[[3, 200, 383]] = 1e6
    x, w = x * scale, w / scale[:, None]
    found = run(kernel, target, x, w, np.zeros(n, "float32"), (m, n))
    exact, magnitude = x.astype("float64") @ w.astype("float64"), np.abs(x).astype("float64") @ np.abs(w)
    assert (np.abs(found - np.abs(exact)) / magnitude).max() < 1e-6


@pytest.mark.parametrize("target", runnable())
def test_powers_of_two_of_a_row_pass_through_exactly(target):
    m, k, n = 65, 200, 50
    kernel = kernel_of(fused((), m, k, n, activation=relax.op.abs), (4, 2, 33, 50), target)
    x, w, _ = numbers((m, k), (k, n), (n,))
    powers = 2.0 ** np.random.default_rng(1).integers(-40, 40, m).astype("float32")[:, None]
    zero = np.zeros(n, "float32")
    np.testing.assert_array_equal(run(kernel, target, x * powers, w, zero, (m, n)), run(kernel, target, x, w, zero, (m, n)) * powers)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", runnable())
def test_a_row_that_is_not_finite_leaves_others_alone(target, value):
    m, k, n = 64, 192, 48
    kernel = kernel_of(fused((), m, k, n, activation=relax.op.negative), (4, 3, 32, 96), target)
    x, w, b = numbers((m, k), (k, n), (n,))
    x[40] = 0  # the partner of row 8
    plain = run(kernel, target, x, w, b, (m, n))
    np.testing.assert_array_equal(plain[40], -b)
    x[40, 100] = value
    found = run(kernel, target, x, w, b, (m, n))
    assert np.isnan(found[40]).all()
    others = np.arange(m) != 40
    np.testing.assert_array_equal(found[others], plain[others])


def test_inner_loops_are_fma_without_spills():
    func = fused((), 128, 768, 3072)
    loops = inner_loops(compiled(kernel_of(func, (8, 3, 64, 128), ZEN4), ZEN4).mod.inspect_source("asm"), 24)
    products = [text for text in map("\n".join, loops) if "vmulps" not in text]  # an epilogue multiplies by scales
    assert len(products) == 4  # the first tile adds, subtracts or copies; the others ask for what comes next
    assert sum("prefetcht1" in text for text in products) == 1
    for text in products:
        assert "zmm" in text and not [line for line in text.splitlines() if "(%rsp)" in line and "vmov" in line]


def test_it_is_chosen_where_products_are_large():
    """By the cost model among all templates, on machines that start one multiply-add of 512 bits in a cycle."""
    from tcompile.autotune.learned import default_model
    from tcompile.targets.cpu.template import machine

    def chosen(m: int, k: int, n: int, target: Target) -> str:
        found = offers(fused((), m, k, n), frozenset([1]), templates(), target).candidates
        return default_model().choose(found, machine(target))[0].template

    assert chosen(128, 768, 3072, ZEN4) == chosen(1024, 3072, 768, ZEN4) == GemmStrassen.name
    assert chosen(128, 768, 64, ZEN4) == chosen(64, 200, 200, ZEN4) == chosen(1, 768, 3072, ZEN4) == Gemm.name
    for other in ("haswell", "sapphirerapids"):
        assert chosen(128, 768, 3072, replace(Target.parse(f"cpu:{other}"), cores=1)) != GemmStrassen.name


@pytest.mark.parametrize(
    ("sizes", "constants", "why"),
    [
        ((128, 767, 768), frozenset([1]), "odd"),
        ((60, 768, 768), frozenset([1]), "too small"),
        ((128, 768, 768), frozenset(), "constant"),
        ((128, 768, 768), Constants.of({1: [np.full((768, 768), np.inf, "float32")]}), "infinities"),
    ],
)
def test_refusals(sizes, constants, why):
    with pytest.raises(Unfusable, match=why):
        GemmStrassen().workload(fused((), *sizes), constants)
