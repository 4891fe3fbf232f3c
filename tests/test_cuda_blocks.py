"""Products by weights of which whole tiles are zero on CUDA: both templates run by the emulation over awkward sizes, what is stored and which schedule is taken, facts of the machine code."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tcompile
from cuda_models import compiled, emulation, program_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.element_types import numpy_dtype
from tcompile.compiler.program import DimRange
from tcompile.compiler.tvm import relax
from tcompile.passes.sparsity.patterns import Blocks
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cuda import blocks, lower, schedule, schedule_hopper
from tcompile.targets.cuda.schedule import GemmShape, TileSchedule
from tcompile.targets.cuda.schedule_hopper import HopperSchedule
from tcompile.targets.cuda.zeros import Zeros, occupied, zeros_of
from test_cuda_half import SUMS, short
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
HOPPER = "cuda:sm_90a"


def hopper(bm, bn, groups, stages, parts=1):
    return HopperSchedule(bm, bn, 4 * groups, 1, stages, parts)


def mask(k, n, rows, columns, kept, seed=0):
    """bool [k, n]: which numbers stay: tiles of rows x columns at random, or all or none, or those of every strip but some."""
    generator = np.random.default_rng([k, n, seed])
    tiles = generator.random((-(-k // rows), -(-n // columns))) < (0.5 if isinstance(kept, str) else kept)
    if kept == "strips":  # empty ones, a full one
        tiles[:, ::2], tiles[:, -1] = False, True
    return tiles.repeat(rows, axis=0)[:k].repeat(columns, axis=1)[:, :n]


#: M, K, N, zeros in tiles of k x columns, kept share, tile: one row, primes, tails in every direction, all kept, none, strips without any, more parts than some strips have tiles
CASES = [
    (1, 70, 37, 16, 32, 0.5, TileSchedule(16, 32, 1, 2, 3)),
    (67, 331, 131, 64, 64, 0.4, TileSchedule(32, 64, 2, 2, 4)),
    (130, 200, 190, 16, 64, "strips", TileSchedule(128, 64, 4, 2, 3)),
    (33, 132, 257, 32, 128, 0.5, TileSchedule(64, 128, 2, 4, 3)),
    (17, 128, 64, 64, 64, 1.0, TileSchedule(32, 32, 2, 2, 3)),
    (5, 96, 40, 32, 32, 0.0, TileSchedule(16, 32, 1, 2, 3)),
    (9, 1032, 97, 32, 32, 0.3, TileSchedule(16, 32, 1, 2, 3, parts=4)),
]
#: the same for wgmma: rows of 16 bytes
ON_HOPPER = [
    (1, 136, 37, 64, 64, 0.5, hopper(64, 64, 1, 3)),
    (131, 1000, 131, 64, 64, 0.4, hopper(128, 64, 1, 4)),
    (300, 264, 190, 64, 64, "strips", hopper(256, 64, 2, 3)),
    (97, 456, 257, 64, 128, 0.5, hopper(128, 128, 2, 3)),
    (64, 128, 64, 64, 64, 1.0, hopper(64, 64, 1, 3)),
    (5, 96, 40, 64, 64, 0.0, hopper(64, 64, 1, 5)),
    (70, 2056, 97, 64, 64, 0.3, hopper(64, 64, 1, 4, parts=4)),
    (129, 392, 250, 64, 64, 0.7, hopper(128, 192, 2, 4)),
]


def forced(monkeypatch, template, cases):
    """Columns of a product -> the tile that it takes; no other template takes any, even where all tiles are kept."""
    tiles = {case[2]: case[-1] for case in cases}
    monkeypatch.setattr(template, "_best", lambda self, shape: tiles[self.n])
    monkeypatch.setattr(template, "_faster", lambda self, shape: True)
    monkeypatch.setattr(lower, "zeros_of", lambda weight: Zeros(False, (tiles := occupied(weight)).shape, tiles.tobytes()) if weight.ndim > 1 else None)
    if template is blocks.BlockGemm:
        monkeypatch.setattr(blocks.HopperBlockGemm, "_faster", lambda self, shape: False)


def operands(cases, dtype):
    generator = np.random.default_rng(5)
    inputs, weights = {}, []
    for number, (m, k, n, *zeros, _) in enumerate(cases):
        if dtype == "uint8":
            k -= k % 4
            x, weight = generator.integers(0, 256, (m, k), "uint8"), generator.integers(-128, 128, (k, n), "int8")
        else:
            x, weight = generator.standard_normal((m, k)).astype("float32"), generator.standard_normal((k, n)).astype("float32")
        inputs[f"x{number}"] = x
        weights.append(weight * mask(k, n, *zeros).astype(weight.dtype))  # zeros of both signs
    return inputs, weights


def check(template, cases, precision, monkeypatch, target="cuda:sm_80"):
    """precision: of float32, or "int8" for bytes."""
    integers = precision == "int8"
    forced(monkeypatch, template, cases)
    inputs, weights = operands(cases, "uint8" if integers else "float32")
    biases = [np.random.default_rng(w.shape).standard_normal(w.shape[1]).astype("float32") for w in weights]

    def build(emit, *xs):
        products = [emit(op.matmul(x, relax.const(w), out_dtype="int32" if integers else None)) for x, w in zip(xs, weights, strict=True)]
        return products if integers else [emit(op.nn.relu(emit(op.add(each, relax.const(bias))))) for each, bias in zip(products, biases, strict=True)]

    outputs, lowered = run(build, inputs, target=target, **({} if integers else {"precision": precision}))
    for out, x, w, bias in zip(outputs, inputs.values(), weights, biases, strict=True):
        if integers:
            np.testing.assert_array_equal(out, x.astype("int64") @ w.astype("int64"))
            continue
        a, b = (short(x, precision), short(w, precision)) if precision in ("bf16", "fp16") else (x.astype("float64"), w.astype("float64"))
        bound = {"tf32": 2.0**-10}.get(precision, SUMS)
        assert (np.abs(out - np.maximum(a @ b + bias, 0)) <= bound * (np.abs(a) @ np.abs(b) + np.abs(bias))).all()
    kind = "gemm blocks" if template is blocks.BlockGemm else "gemm hopper blocks"
    rows = [row for row in lowered.report["kernels"] if row["template"] not in ("map", "sums")]
    assert [(row["template"], row["schedule"]) for row in rows] == [(kind, str(case[-1])) for case in cases]
    group = 4 if integers else 2 if precision in ("bf16", "fp16") else 1
    assert stored(lowered) == sum(bytes_of(template, w, case[-1].bn, group) + (0 if integers else 4 * w.shape[1]) for w, case in zip(weights, cases, strict=True))


def stored(lowered):
    return sum(array.nbytes for array in lowered.weights.values())


def bytes_of(template, weight, width, group):
    """Of kept tiles and the walk."""
    k, n = weight.shape
    units, strips = -(-k // (template.unit * group)), -(-n // width)
    filled = np.pad(weight != 0, ((0, units * template.unit * group - k), (0, strips * width - n)))
    kept = np.count_nonzero(filled.reshape(units, -1, strips, width).any(axis=(1, 3)))
    return 4 * (kept * template.unit * width + strips * (-(-(4 + units) // 32) * 32))


@needs_gxx
@pytest.mark.parametrize("precision", ["fp32", "int8", *(pytest.param(name, marks=pytest.mark.networks) for name in ("bf16", "tf32", "fp16"))])
def test_products_of_awkward_sizes(precision, monkeypatch):
    check(blocks.BlockGemm, CASES, precision, monkeypatch)


@needs_gxx
@pytest.mark.parametrize("precision", ["bf16", *(pytest.param(name, marks=pytest.mark.networks) for name in ("fp16", "int8"))])
def test_products_on_hopper(precision, monkeypatch):
    cases = [(m, k * 2 if precision == "int8" else k, *rest) for m, k, *rest in ON_HOPPER]
    check(blocks.HopperBlockGemm, cases, precision, monkeypatch, HOPPER)
