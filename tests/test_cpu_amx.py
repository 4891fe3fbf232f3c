"""Kernels by AMX tiles: exact in int8, within the rounding of bfloat16, over awkward sizes and every block of tiles; the instructions; and that programs choose them."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
import tcompile
import test_cpu_attention as attention
import test_cpu_bf16 as bf16
import test_cpu_int8_conv as int8_conv
import test_cpu_int8_gemm as int8_gemm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.tvm import tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cpu import amx, amx_emit
from tcompile.targets.cpu.amx import Tiles
from tcompile.targets.cpu.amx_schedules import AmxSchedule
from tcompile.targets.cpu.attention_amx import AttentionAmx
from tcompile.targets.cpu.conv_amx import ConvAmx
from tcompile.targets.cpu.conv_amx_rows import ConvAmxRows
from tcompile.targets.cpu.gemm_amx import GemmAmx
from tcompile.targets.cpu.host import host_features
from test_cpu_conv import Case, fused_conv, reference

RAPIDS = Target.parse("cpu:sapphirerapids")
runs = pytest.mark.skipif(
    not host_features() >= RAPIDS.features, reason="this host has no AMX, or the system gives none: code for it can be compiled, not run"
)
SIZES = [
    ((), 13, 17, 31),
    ((), 1, 3, 1),
    ((2, 3), 7, 64, 100),
    ((), 129, 33, 50),
    ((), 1, 1, 1),
    ((), 5, 130, 257),
    ((), 197, 128, 70),
    ((), 64, 64, 64),
]


def space(func):
    return list(GemmAmx().space(GemmAmx().workload(func, frozenset([1])), RAPIDS))


@pytest.fixture(params=[True, False], ids=["blocks by panels", "panels by blocks"])
def order(request, monkeypatch):
    """Both orders of blocks and panels, whatever the size of the weights."""
    monkeypatch.setattr(amx_emit, "NEAR", 1 << 30 if request.param else 0)


@pytest.mark.sweep
@runs
@pytest.mark.usefixtures("order")
@pytest.mark.parametrize(("lead", "m", "k", "n"), [*SIZES, ((), 77, 40, 200)])
def test_int8_products_are_exact(lead, m, k, n):
    func = int8_gemm.fused(lead, m, k, n)
    found = {schedule.tiles: schedule for schedule in space(func)}
    for schedule in found.values():
        int8_gemm.check(func, "none", schedule, RAPIDS, template=GemmAmx())


@pytest.mark.sweep
@runs
@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("epilogue", ["dequantize", "residual", "requantize", "residual8"])
@pytest.mark.parametrize(("m", "k", "n"), [(7, 30, 50), ("rows", 18, 33), ("rows", 64, 180)])
@pytest.mark.parametrize("rows", [11, 77])
def test_epilogues(epilogue, m, k, n, rows):
    func = int8_gemm.fused((2,) if m == 7 else (), m, k, n, epilogue)
    found = space(func)
    for pick in (len(found) // 2, -1):
        int8_gemm.check(func, epilogue, found[pick], RAPIDS, rows, GemmAmx())


@runs
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 80), st.integers(1, 140), st.integers(1, 200), st.integers(0, 10**6))
def test_any_size(m, k, n, pick):
    func = int8_gemm.fused((), m, k, n)
    found = space(func)
    int8_gemm.check(func, "none", found[pick % len(found)], RAPIDS, template=GemmAmx())


@pytest.mark.sweep
@runs
@pytest.mark.parametrize(("m", "k", "n"), [(13, 17, 31), (1, 3, 1), (129, 34, 50), (1, 1, 1), (5, 1300, 257), ("rows", 19, 45), ("rows", 64, 45)])
@pytest.mark.parametrize("pick", [0, 0.5, 1])
def test_bfloat16_products(m, k, n, pick):
    func = bf16.product(m, k, n, short=m == "rows")
    found = space(func)
    bf16.check(func, found[int(pick * (len(found) - 1))], RAPIDS, 53 if m == "rows" else m, GemmAmx())


@pytest.mark.sweep
@runs
@pytest.mark.parametrize("index", range(len(int8_conv.CASES)), ids=[str(case) for case in int8_conv.CASES])
def test_int8_convolutions_are_exact(index):
    case = int8_conv.CASES[index]
    if case.groups > 1:
        with pytest.raises(Unfusable, match="groups"):
            ConvAmx().workload(int8_conv.fused_conv(case), frozenset([1]))
        return
    int8_conv.check(index, RAPIDS, GemmAmx() if case.k == (1, 1) else ConvAmx())


@pytest.mark.sweep
@runs
@pytest.mark.parametrize("epilogue", ["none", "residual8"])
@pytest.mark.parametrize(("m", "k", "n"), [(40, 900, 70), (64, 1664, 33), (16, 832, 32), ("rows", 1000, 90), (150, 1025, 200)])
def test_slices_of_k(m, k, n, epilogue):
    """Sums wait in memory for the next slice: whole blocks of rows and rests, last slices that are shorter, open rows."""
    func = int8_gemm.fused((), m, k, n, epilogue)
    found = [schedule for schedule in space(func) if schedule.depth]
    assert found and all(schedule.tiles.columns == 2 for schedule in found)
    for schedule in {(each.tiles, each.panels > 1): each for each in found}.values():
        for rows in (1, 15, 64, 131) if m == "rows" else (None,):
            int8_gemm.check(func, epilogue, schedule, RAPIDS, *((rows,) if rows else ()), template=GemmAmx())


@runs
def test_slices_of_k_in_bfloat16():
    func = bf16.product(52, 900, 70)
    for schedule in {each.tiles: each for each in space(func) if each.depth}.values():
        bf16.check(func, schedule, RAPIDS, 52, GemmAmx())


ROWS = [
    Case((1, 9, 11, 64), 19, (3, 3), pad=(1, 1, 1, 1)),
    Case((2, 8, 13, 64), 40, (3, 3), pad=(1, 2, 0, 1)),
    Case((1, 7, 7, 128), 32, (3, 3), pad=(1, 1, 1, 1)),
    Case((2, 10, 20, 32), 24, (1, 4), pad=(0, 1, 0, 2)),
    Case((3, 12, 9, 64), 16, (5, 5)),
    Case((1, 6, 5, 64), 70, (2, 1), pad=(1, 0, 0, 0)),
    Case((1, 8, 9, 128), 40, (3, 3), pad=(1, 1, 1, 1)),
]
#: rows of windows that are no whole tiles
CODES = [
    Case((2, 21, 22, 3), 33, (7, 7), stride=(2, 2), pad=(3, 3, 3, 3)),
    Case((1, 12, 15, 3), 16, (3, 3), stride=(2, 2), pad=(0, 0, 1, 1)),
    Case((1, 7, 9, 5), 20, (3, 3), pad=(1, 1, 1, 1)),
    Case((2, 6, 7, 24), 24, (3, 3)),
    Case((1, 9, 12, 40), 19, (3, 3), stride=(2, 2), pad=(1, 1, 1, 1)),
    Case((2, 11, 7, 72), 24, (3, 3), stride=(2, 1), pad=(0, 1, 1, 0)),
    Case((1, 13, 11, 10), 16, (5, 4), stride=(3, 2)),
    Case((1, 5, 9, 1), 17, (2, 5), stride=(1, 3)),
]


@pytest.mark.sweep
@runs
@pytest.mark.parametrize("case", [*ROWS, *CODES], ids=str)
def test_windows_in_place(case):
    """With padding on some or all sides and without, strides, rows that go on into the next pixels: every sixth schedule, and one of each form with slices of K."""
    rng = np.random.default_rng(0)
    fused, template = int8_conv.fused_conv(case, requantize=False), ConvAmxRows()
    x, w = rng.integers(0, 256, case.x).astype(np.uint8), rng.integers(-128, 128, (*case.k, case.x[3], case.co)).astype(np.int8)
    want = reference(case, x.astype(np.float64), w.astype(np.float64), [], "none").astype(np.int32)
    workload = template.workload(fused, frozenset([1]))
    found = list(template.space(workload, RAPIDS))
    for schedule in [*found[::6], *{each.tiles: each for each in found if each.depth}.values()]:
        kernel = template.build(fused, workload, schedule, RAPIDS)
        out = tvm.runtime.tensor(np.zeros(want.shape, np.int32))
        int8_conv.compiled(kernel, RAPIDS)["kernel"](tvm.runtime.tensor(x), tvm.runtime.tensor(kernel.packings[0].pack(w)), out)
        np.testing.assert_array_equal(out.numpy(), want, err_msg=str(schedule))


def test_windows_are_copied_where_more_would_be_read():
    """What is read behind a window is multiplied by zero weights: codes alone have no infinities."""
    for case in CODES:
        with pytest.raises(Unfusable, match="whole tiles"):
            ConvAmxRows(terms=2).workload(fused_conv(case), frozenset([1]))


@pytest.mark.sweep
@runs
@pytest.mark.parametrize("index", [index for index, case in enumerate(bf16.CASES) if case.groups == 1], ids=str)
def test_bfloat16_convolutions(index):
    bf16.check_convolution(index, RAPIDS, GemmAmx() if bf16.CASES[index].k == (1, 1) else ConvAmx())


@pytest.mark.sweep
@runs
@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 1, 64, 64, 64, 64), (2, 4, 2, 37, 131, 32, 48), (1, 2, 1, 5, 3, 32, 16), (1, 3, 1, 79, 300, 96, 80), (1, 2, 1, 33, 17, 64, 128)],
    ids=str,
)
@pytest.mark.parametrize(("mask", "attrs"), [("none", {}), ("padding", {"layout": "BSHD"}), ("bool", {"scale": 0.3}), ("none", {"causal": True})])
@pytest.mark.parametrize("pick", [0.6, 1])
def test_attention(sizes, mask, attrs, pick):
    attention.check_bfloat16(sizes, mask, attrs, RAPIDS, pick, AttentionAmx())


@pytest.mark.sweep
@runs
@pytest.mark.parametrize("keys", [1, 15, 16, 33, 150])
@pytest.mark.parametrize("attrs", [{}, {"received": True}, {"causal": True, "logsum": True}], ids=str)
def test_attention_of_open_sizes(keys, attrs):
    """Numbers of queries and keys that are known only at run time, and what the second outputs are."""
    arrays = [array.astype(ml_dtypes.bfloat16) for array in attention.operands(1, 2, 1, keys + 3, keys, 64, 48)]
    queries, number = tirx.Var("queries", "int64"), tirx.Var("keys", "int64")
    types = [((1, 2, size, array.shape[3]), "bfloat16") for size, array in zip((queries, number, number), arrays, strict=True)]
    found = attention.run(arrays, RAPIDS, pick=0.5, types=types, template=AttentionAmx(), **attrs)
    want = attention.reference(*(array.astype(np.float64) for array in arrays), **attrs)
    for ours, theirs in zip(found, want if isinstance(want, tuple) else (want,), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02 if ours.ndim == 4 else 1e-4)


@pytest.mark.parametrize(("kind", "instruction"), [("int8", "tdpbusd"), ("bf16", "tdpbf16ps")])
def test_code_multiplies_tiles(kind, instruction):
    """One block of 2 x 2: four products a step, four loads, requests for the next panel; tiles are configured and cleared outside of the loop."""
    func = int8_gemm.fused((), 128, 1024, 384, "requantize") if kind == "int8" else bf16.product(128, 1024, 384, short=True)
    kernel = GemmAmx().build(func, GemmAmx().workload(func, frozenset([1])), AmxSchedule(Tiles(2, 2), 0, 4), RAPIDS)
    module = int8_gemm.compiled(kernel, RAPIDS) if kind == "int8" else bf16.compiled(kernel, RAPIDS)
    blocks = re.split(r"\n\.LBB", module.mod.inspect_source("asm"))
    hot = re.split(r"\n\tj", max(blocks, key=lambda block: block.count(instruction)))[0]
    assert hot.count(instruction) == hot.count("tileloadd") in (4, 8) and "prefetch" in hot
    assert "ldtilecfg" not in hot and "tilezero" not in hot and "tilerelease" in "".join(blocks)


@pytest.mark.parametrize("m", [1, 9, 16, "rows"])
def test_few_rows_ask_for_their_own_panel(m):
    """A block by itself, whole or in part, asks for all of what it multiplies some steps later: as many lines as its tiles of weights have."""
    func = bf16.product(m, 1024, 384, short=True)
    kernel = GemmAmx().build(func, GemmAmx().workload(func, frozenset([1])), AmxSchedule(Tiles(1, 2), 0, 0), RAPIDS)
    blocks = re.split(r"\n\.LBB", bf16.compiled(kernel, RAPIDS).mod.inspect_source("asm"))
    loops = [re.split(r"\n\tj", block)[0] for block in blocks if "tdpbf16ps" in block]
    assert any(loop.count("prefetcht1") >= 16 * loop.count("tdpbf16ps") for loop in loops)


def test_tiles_number_their_registers_apart():
    for tiles in amx.shapes(None, 1000):
        sums = {tiles.c(i, j) for i in range(tiles.rows) for j in range(tiles.columns)}
        rows, columns = {tiles.a(i) for i in range(tiles.rows)}, {tiles.b(j) for j in range(tiles.columns)}
        assert tiles.fits and len(sums) == tiles.rows * tiles.columns and len(rows) == tiles.rows
        assert not (sums & rows or sums & columns or rows & columns) and max(sums | rows | columns) < 8


def test_machines_without_tiles_refuse():
    func = int8_gemm.fused((), 13, 17, 31)
    with pytest.raises(Unfusable, match="no tiles"):
        GemmAmx().space(GemmAmx().workload(func, frozenset([1])), Target.parse("cpu:icelake-server"))


class Layers(torch.nn.Module):
    """Two linear layers and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 96), torch.nn.Linear(96, 33)
        self.conv, self.pointwise = torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.Conv2d(64, 48, 1)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.second(torch.relu(self.first(x))), self.pointwise(torch.relu(self.conv(image)))


@pytest.mark.sweep
@pytest.mark.parametrize("compression", [{"precision": "bf16"}, {"quantize": "int8"}], ids=str)
def test_programs_choose_tiles(compression, tmp_path):
    """Products of many rows take tiles, also in code for another machine, and the artifact says what it needs; where this host has tiles, results are close to float32."""
    torch.manual_seed(0)
    layers, feeds = Layers().eval(), (torch.randn(2, 64, 64), torch.randn(1, 32, 28, 28))
    calibration = [feeds] if "quantize" in compression else None
    compiled = tcompile.compile(layers, example_inputs=feeds, target="cpu:sapphirerapids", calibration=calibration, **compression)
    chosen = [row["template"] for row in compiled.report()["kernels"]]
    assert chosen.count("gemm_amx") == 3 and sum(name.startswith("conv_amx") for name in chosen) == 1
    compiled.save(tmp_path / "layers.tcm")
    if not host_features() >= RAPIDS.features:
        with pytest.raises(tcompile.ToolchainError, match="amx"):
            tcompile.load(tmp_path / "layers.tcm").start()
        return
    with torch.no_grad():
        for ours, theirs in zip(tcompile.load(tmp_path / "layers.tcm")(*feeds), layers(*feeds), strict=True):
            assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999


def test_few_rows_go_by_vectors():
    """Weights that are passed once come from memory, and hardware prefetchers do not follow loads of tiles."""
    feeds = (torch.randn(4, 768),)
    compiled = tcompile.compile(
        torch.nn.Linear(768, 3072).eval(), example_inputs=feeds, target="cpu:sapphirerapids", quantize="int8", calibration=[feeds]
    )
    assert [row["template"] for row in compiled.report()["kernels"] if "u8s8" in row["workload"]] == ["gemm"]
