"""float32 products by AMX tiles of bfloat16: how close two and three terms come to float64, over awkward sizes and every block of tiles; the instructions; who gets them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tcompile
import test_cpu_conv as conv
import test_cpu_gemm as gemm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile import UsageError
from tcompile.compiler.tvm import tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cpu.amx import Tiles
from tcompile.targets.cpu.amx_gather import run_copies
from tcompile.targets.cpu.amx_schedules import PAIRS, AmxSchedule
from tcompile.targets.cpu.backend import having
from tcompile.targets.cpu.conv_amx import ConvAmx
from tcompile.targets.cpu.conv_amx_rows import ConvAmxRows
from tcompile.targets.cpu.gemm_amx import GemmAmx, summands
from test_cpu_amx import RAPIDS, ROWS, Layers, runs
from test_cpu_conv import Case

WEIGHT = frozenset([1])
#: terms -> error of a sum, of the sum of the absolute products: what is left of operands with 16 bits, and of sums in float32
BOUNDS = {2: 2.0**-16, 3: 3e-7}
TERMS = pytest.mark.parametrize("terms", BOUNDS)


def machine(terms: int) -> Target:
    return having(RAPIDS, f"bf16x{terms}")


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def check_gemm(func: Any, schedule: Any, terms: int, rows: int = 0) -> None:
    """relu(x @ w + b)."""
    template, (a, b) = GemmAmx(terms), func.inputs
    kernel = template.build(func, template.workload(func, WEIGHT), schedule, machine(terms))
    x = values(*(rows if isinstance(dim, tirx.Var) else int(dim) for dim in a.shape))
    w, bias = values(*map(int, b.shape), seed=1), values(int(b.shape[1]), seed=2)
    out = tvm.runtime.tensor(np.full((*x.shape[:-1], w.shape[1]), np.nan, "float32"))
    gemm.compiled(kernel, RAPIDS)["f"](*map(tvm.runtime.tensor, (x, kernel.packings[0].pack(w), bias)), out)
    scale = np.abs(x).astype("float64") @ np.abs(w).astype("float64") + np.abs(bias)
    error = np.abs(out.numpy() - np.maximum(x.astype("float64") @ w + bias, 0))
    assert (error <= BOUNDS[terms] * scale).all(), (error / scale).max()


@pytest.mark.sweep
@runs
@TERMS
@pytest.mark.parametrize(
    ("lead", "m", "k", "n"), [((), 13, 17, 31), ((), 1, 3, 1), ((2, 3), 7, 64, 100), ((), 129, 33, 50), ((), 1, 1, 1), ((), 5, 130, 257)]
)
def test_every_block_of_tiles(terms, lead, m, k, n):
    func, template = gemm.fused(lead, m, k, n), GemmAmx(terms)
    found = template.space(template.workload(func, WEIGHT), machine(terms))
    for schedule in {schedule.tiles: schedule for schedule in found}.values():
        check_gemm(func, schedule, terms)


@pytest.mark.sweep
@runs
@TERMS
@pytest.mark.parametrize(("m", "k", "n"), [(40, 900, 70), (64, 416, 33), (16, 288, 32), ("rows", 1000, 90)])
def test_slices_of_k(terms, m, k, n):
    func, template = gemm.fused((), tirx.Var(m, "int64") if isinstance(m, str) else m, k, n), GemmAmx(terms)
    found = [schedule for schedule in template.space(template.workload(func, WEIGHT), machine(terms)) if schedule.depth]
    assert found
    for schedule in {each.tiles: each for each in found}.values():
        for rows in (1, 70) if m == "rows" else (0,):
            check_gemm(func, schedule, terms, rows)


@runs
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 80), st.integers(1, 140), st.integers(1, 90), st.sampled_from(list(BOUNDS)), st.integers(0, 10**6))
def test_any_size(m, k, n, terms, pick):
    func, template = gemm.fused((), m, k, n), GemmAmx(terms)
    found = template.space(template.workload(func, WEIGHT), machine(terms))
    check_gemm(func, found[pick % len(found)], terms)


CONVOLUTIONS = [(case, "pointwise" if case.k == (1, 1) and case.pad == (0, 0, 0, 0) else "gathered") for case in conv.CASES if case.groups == 1]


@pytest.mark.sweep
@runs
@TERMS
@pytest.mark.parametrize(("case", "form"), [*CONVOLUTIONS, *((case, "windows") for case in ROWS)], ids=str)
def test_convolutions(case: Case, form: str, terms: int) -> None:
    template = {"pointwise": GemmAmx, "gathered": ConvAmx, "windows": ConvAmxRows}[form](terms)
    func = conv.fused_conv(case)
    workload = template.workload(func, WEIGHT)
    found = list(template.space(workload, machine(terms)))
    x, w = values(*(case.sizes.get(dim, dim) for dim in case.x)), values(*case.k, case.x[3], case.co, seed=1)
    want, scale = (conv.reference(case, f(x), f(w), [], "none") for f in (np.positive, np.abs))
    for schedule in {each.tiles: each for each in found}.values():
        kernel = template.build(func, workload, schedule, machine(terms))
        out = tvm.runtime.tensor(np.full(want.shape, np.nan, "float32"))
        gemm.compiled(kernel, RAPIDS)["f"](*map(tvm.runtime.tensor, (x, kernel.packings[0].pack(w))), out)
        assert (np.abs(out.numpy() - want) <= BOUNDS[terms] * scale + 1e-30).all(), schedule


@runs
def test_three_terms_are_as_close_as_float32():
    """To float64, over 768 products: within the error of a product in float32 itself, whose sums round as often."""
    func, template = gemm.fused((), 64, 768, 96), GemmAmx(3)
    x, w, bias = values(64, 768), values(768, 96, seed=1), np.zeros(96, "float32")
    kernel = template.build(func, template.workload(func, WEIGHT), AmxSchedule(Tiles(2, 2), 0, 0), machine(3))
    out = tvm.runtime.tensor(np.zeros((64, 96), "float32"))
    gemm.compiled(kernel, RAPIDS)["f"](*map(tvm.runtime.tensor, (x, kernel.packings[0].pack(w), bias)), out)
    want = np.maximum(x.astype("float64") @ w, 0)
    in_turn = np.zeros((64, 96), "float32")
    for k in range(768):
        in_turn += x[:, k : k + 1] * w[k]
    assert np.abs(out.numpy() - want).max() < np.abs(np.maximum(in_turn, 0) - want).max()


def test_three_terms_hold_a_float32():
    """Over all exponents that leave their last term a normal number."""
    x = np.ldexp(values(4096), np.random.default_rng(3).integers(-100, 127, 4096)).astype("float32")
    assert np.isfinite(x).all()
    assert (sum(term.astype("float64") for term in summands(x, 3)) == x).all()
    two = sum(term.astype("float64") for term in summands(x, 2))
    assert (np.abs(two - x) <= np.abs(x) * 2.0**-16).all()


def test_runs_are_copied_once_and_whole():
    for count in range(1, 40):
        for before in (0, 1, 5, 64):
            spans = list(run_copies(count, before))
            assert set().union(*(range(first, first + length) for first, length in spans)) >= set(range(count))
            assert all(first >= -before and first + length <= count for first, length in spans)


def test_products_of_a_step():
    """Two by two tiles: every pair of terms whose product matters, and no tile is loaded again for a pair that shares it with the one before."""
    for terms, pairs in PAIRS.items():
        assert set(pairs) == {(left, right) for left in range(terms) for right in range(terms) if left + right < terms}
    for terms, loads in ((2, 8), (3, 14)):
        func = gemm.fused((), 128, 1024, 384)
        kernel = GemmAmx(terms).build(func, GemmAmx(terms).workload(func, WEIGHT), AmxSchedule(Tiles(2, 2), 0, 4), machine(terms))
        blocks = re.split(r"\n\.LBB", gemm.compiled(kernel, RAPIDS).mod.inspect_source("asm"))
        hot = re.split(r"\n\tj", max(blocks, key=lambda block: block.count("tdpbf16ps")))[0]
        steps = hot.count("tdpbf16ps") // (4 * len(PAIRS[terms]))
        assert steps and hot.count("tdpbf16ps") == steps * 4 * len(PAIRS[terms]) and hot.count("tileloadd") == steps * loads and "prefetch" in hot


@pytest.mark.parametrize("template", [GemmAmx, ConvAmx, ConvAmxRows])
def test_nobody_gets_them_unasked(template):
    func = gemm.fused((), 64, 64, 64) if template is GemmAmx else conv.fused_conv(ROWS[0])
    assert {template(terms).name for terms in (1, 2, 3)} == {template().name, f"{template().name}_bf16x2", f"{template().name}_bf16x3"}
    for terms in BOUNDS:
        for target in (RAPIDS, machine(5 - terms), having(Target.parse("cpu:icelake-server"), f"bf16x{terms}")):
            with pytest.raises(Unfusable, match="no tiles"):
                template(terms).space(template(terms).workload(func, WEIGHT), target)
    with pytest.raises(Unfusable, match="float32"):
        template().workload(func, WEIGHT)


class Wide(torch.nn.Module):
    """A linear layer and a 1x1 convolution, large enough for six products to be worth it, and one of 3 x 3, which Winograd's algorithm may be better for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(512, 384)
        self.conv, self.pointwise = torch.nn.Conv2d(128, 128, 3, padding=1), torch.nn.Conv2d(128, 256, 1)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), self.pointwise(torch.relu(self.conv(image)))


@pytest.mark.sweep
@pytest.mark.parametrize("precision", ["bf16x2", "bf16x3"])
def test_programs_choose_them(precision, tmp_path):
    """Where they are asked for, and there are tiles; the artifact keeps it. Elsewhere products are in float32."""
    torch.manual_seed(0)
    layers, feeds = Wide().eval(), (torch.randn(256, 512), torch.randn(1, 128, 28, 28))
    with torch.no_grad():
        want = layers(*feeds)
    for target, expected in (("cpu:sapphirerapids", 2), ("cpu:haswell", 0)):
        model = tcompile.compile(layers, example_inputs=feeds, target=target, precision=precision)
        chosen = [row["template"] for row in model.report()["kernels"]]
        assert chosen.count(f"gemm_amx_{precision}") == expected, chosen
        path = tmp_path / f"{expected}.tcm"
        model.save(path)
        if expected and runs.args[0]:
            continue
        for ours, theirs in zip(tcompile.load(path)(*feeds), want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * (5e-6 if precision == "bf16x3" else 3e-5))


def test_other_names_are_refused():
    layers, feeds = Layers().eval(), (torch.randn(2, 64, 64), torch.randn(1, 32, 28, 28))
    with pytest.raises(UsageError, match="fp32, bf16, bf16x2, bf16x3, not in 'tf32'"):
        tcompile.compile(layers, example_inputs=feeds, target="cpu", precision="tf32")
    with pytest.raises(UsageError, match="bf16x3"):
        tcompile.compile(layers, example_inputs=feeds, target="cuda", precision="bf16x3", emit_only=True)
