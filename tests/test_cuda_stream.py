"""Products in equal shares (stream-K) on the CUDA target: emulated at awkward sizes, chosen where waves quantise badly, without spills."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from cuda_models import compiled, program_of, run, templates
from tcompile.compiler.element_types import FLOAT8, numpy_dtype
from tcompile.compiler.tvm import relax
from tcompile.targets.base import Target
from tcompile.targets.cuda import templates as templates_of
from tcompile.targets.cuda.gemm import Gemm
from tcompile.targets.cuda.gemm_hopper import HopperGemm
from tcompile.targets.cuda.schedule import GemmShape, TileSchedule, best_tile, predicted_cycles
from tcompile.targets.cuda.schedule_hopper import HopperSchedule
from test_cuda_kernels import convolution
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

op = relax.op
RANDOM = np.random.default_rng(17)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def schedule(monkeypatch, *numbers):
    monkeypatch.setattr(Gemm, "best", lambda self: TileSchedule(*numbers))


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
@pytest.mark.parametrize(
    ("m", "k", "n", "shares"),
    [
        (37, 150, 70, 4),  # 9 tiles of 5 steps, cut in and between
        (16, 257, 32, 5),  # one tile that many blocks have
        (33, 64, 65, 9),  # a share is a tile: nothing to add up
        (1, 1000, 1, 1),
        (50, 96, 33, 23),  # shares of one step and of two
    ],
)
def test_shares_of_products_and_windows(m, k, n, shares, monkeypatch):
    """With an epilogue of other tensors; the sums of integers are exact, whatever part of them is added up first."""
    schedule(monkeypatch, 16, 32, 1, 2, 3, 1, shares)
    x, weight, row, codes = floats(m, k), floats(k, n), floats(m, n), RANDOM.integers(-128, 128, (4 * k, n), "int8")
    small = RANDOM.integers(0, 256, (m, 4 * k), "uint8")

    def build(emit, x, row, small):
        exact = emit(op.matmul(small, relax.const(codes), out_dtype="int32"))
        return [emit(op.nn.relu(emit(op.add(emit(op.matmul(x, relax.const(weight))), row)))), emit(op.add(exact, relax.const(np.int32(7))))]

    (found, exact), lowered = run(build, {"x": x, "row": row, "small": small})
    assert templates(lowered) == ["gemm", "sums"] * 2
    want = np.maximum(x.astype("float64") @ weight + row, 0)
    assert np.abs(found - want).max() <= 2e-6 * max(1, np.abs(want).max())
    np.testing.assert_array_equal(exact, small.astype("int64") @ codes + 7)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
def test_shares_of_a_convolution_in_16_bits(monkeypatch):
    schedule(monkeypatch, 32, 32, 2, 2, 3, 1, 5)
    image, kernel = floats(2, 7, 9, 18).astype("float16"), floats(3, 3, 18, 35).astype("float16")

    def build(emit, image):
        return [emit(op.nn.conv2d(image, relax.const(kernel), 1, 1, 1, 1, "NHWC", "HWIO", "NHWC", "float32"))]

    (found,), lowered = run(build, {"image": image})
    assert templates(lowered) == ["conv2d", "sums"]
    want = convolution(image, kernel, 1, 1, 1)
    assert np.abs(found - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
@pytest.mark.parametrize(
    ("numbers", "shares"),
    [
        ((64, 64, 4, 1, 3), 5),
        pytest.param((128, 64, 8, 1, 4), 7, marks=pytest.mark.networks),
        pytest.param((64, 128, 4, 1, 3), 2, marks=pytest.mark.networks),
    ],
)
def test_shares_of_the_hopper_template(numbers, shares, monkeypatch):
    """The ring goes on over tiles; a product in 16 bits, exact bytes, float8 whose steps are summed apart, and windows."""
    monkeypatch.setattr(HopperGemm, "best", lambda self: HopperSchedule(*numbers, 1, shares))
    x, weight, row = floats(150, 264).astype("float16"), floats(264, 136).astype("float16"), floats(150, 136)
    small, codes = RANDOM.integers(0, 256, (150, 208), "uint8"), RANDOM.integers(-128, 128, (208, 72), "int8")
    image, kernel = floats(1, 13, 14, 24).astype("float16"), floats(3, 3, 24, 72).astype("float16")
    short, other = ((0.5 * floats(*shape)).astype(numpy_dtype(FLOAT8)) for shape in ((150, 272), (272, 72)))

    def build(emit, x, row, small, image, short):
        return [
            emit(op.nn.relu(emit(op.add(emit(op.matmul(x, relax.const(weight), out_dtype="float32")), row)))),
            emit(op.matmul(small, relax.const(codes), out_dtype="int32")),
            emit(op.nn.conv2d(image, relax.const(kernel), 1, 1, 1, 1, "NHWC", "HWIO", "NHWC", "float32")),
            emit(op.matmul(short, relax.const(other, FLOAT8), out_dtype="float32")),
        ]

    inputs = {"x": x, "row": row, "small": small, "image": image, "short": short}
    (product, exact, windows, eights), lowered = run(build, inputs, target="cuda:sm_90a")
    assert templates(lowered) == [*["gemm hopper", "sums"] * 2, "conv2d hopper", "sums", "gemm hopper", "sums"]
    wide = [array.astype("float64") for array in (x, weight, short, other)]
    for found, want in (
        (product, np.maximum(wide[0] @ wide[1] + row, 0)),
        (windows, convolution(image, kernel, 1, 1, 1)),
    ):
        assert np.abs(found - want).max() <= 2e-5 * np.abs(want).max()
    assert np.abs(eights - wide[2] @ wide[3]).max() <= 2e-3 * np.abs(wide[2] @ wide[3]).max()
    np.testing.assert_array_equal(exact, small.astype("int64") @ codes)


def test_shares_are_taken_where_waves_quantise_badly():
    """150 tiles of 128 x 128 on 132 multiprocessors leave most of the second wave idle; 132 of them are one wave."""
    target = Target.parse("cuda:sm_90a")
    one, other = (GemmShape(1, rows, 8192, 1280) for rows in (1920, 1408))
    taken = best_tile(one, target, "Bf16", shares=True)
    assert taken.shares % target.cores == 0 and taken.shares > 0 and str(taken).endswith("equal shares")
    assert predicted_cycles(one, taken, target, "Bf16") < 0.9 * predicted_cycles(one, best_tile(one, target, "Bf16"), target, "Bf16")
    assert not best_tile(one, target, "Bf16").shares
    for rows in (1, 128):  # fewer tiles than multiprocessors: parts of K
        assert not best_tile(GemmShape(1, rows, 8192, 1280), target, "Bf16", shares=True).shares
    assert predicted_cycles(other, best_tile(other, target, "Bf16", shares=True), target, "Bf16") > 0


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_machine_code_of_shares(arch, precision, monkeypatch, tmp_path):
    weight = floats(512, 640)
    for tile in ((64, 64, 2, 2, 3), (128, 128, 4, 4, 3), (16, 64, 1, 4, 4)):
        schedule(monkeypatch, *tile, 1, 33)
        monkeypatch.setattr(templates_of, "DENSE", (Gemm,))
        program = program_of(lambda emit, x: [emit(op.nn.gelu(emit(op.matmul(x, relax.const(weight)))))], {"x": ((700, 512), "float32")})
        code = compiled(program, f"cuda:{arch}", precision, emit_only=False)
        listing = dump(code.library, tmp_path, "-sass")
        assert re.search(r"\bHMMA\b", listing) and not re.search(r"\b(LDL|STL|ATOM|RED)\b", listing)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("numbers", [(64, 128, 4, 1, 3), (128, 256, 8, 1, 4), (256, 128, 8, 1, 3)])
def test_the_machine_code_of_shares_on_hopper(numbers, monkeypatch, tmp_path):
    monkeypatch.setattr(HopperGemm, "best", lambda self: HopperSchedule(*numbers, 1, 132))
    weight = floats(512, 1024)
    program = program_of(lambda emit, x: [emit(op.nn.gelu(emit(op.matmul(x, relax.const(weight)))))], {"x": ((4096, 512), "float32")})
    code = compiled(program, "cuda:sm_90a", "bf16", emit_only=False)
    assert [row["schedule"] for row in code.report["kernels"] if row["template"] == "gemm hopper"][0].endswith("132 equal shares")
    listing = dump(code.library, tmp_path, "-sass")
    assert "HGMMA" in listing and "UTMALDG" in listing and not re.search(r"\b(LDL|STL|ATOM|RED)\b", listing)
    assert not any("serialized" in remark for remark in code.report["code_generation"]["remarks"])
