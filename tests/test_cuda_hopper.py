"""The GEMM of sm_90a (TMA, wgmma, warp groups with a part each): its source run by the emulation against numpy in float64, its address maps, and facts of its machine code."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
from cuda_models import compiled, program_of, run
from tcompile.compiler.element_types import numpy_dtype
from tcompile.compiler.tvm import relax
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable
from tcompile.targets.cuda import gemm_hopper, toolchain
from tcompile.targets.cuda.host import INCLUDE
from tcompile.targets.cuda.machines import MACHINES
from tcompile.targets.cuda.schedule import GemmShape
from tcompile.targets.cuda.schedule_hopper import HopperSchedule, best_tile, space
from test_cuda_half import SUMS, constant, short
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(17)
TARGET = "cuda:sm_90a"


@pytest.fixture(autouse=True)
def _seeded():
    global RANDOM
    RANDOM = np.random.default_rng(17)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def halves(*shape):
    return floats(*shape).astype("float16")


def tile(bm, bn, groups, stages, parts=1):
    return HopperSchedule(bm, bn, 4 * groups, 1, stages, parts)


def forced_tiles(monkeypatch):
    """Columns of a product -> the tile that it takes, however small it is; those that are not here keep mma.sync."""
    found = {}

    def best(self):
        if self.n not in found:
            raise Unfusable("the tiles of mma.sync are faster")
        return found[self.n]

    monkeypatch.setattr(gemm_hopper.HopperGemm, "best", best)
    return found


@pytest.fixture
def tiles(monkeypatch):
    return forced_tiles(monkeypatch)


#: M, K, N, tile: one row, one column, one step, primes, tails of tiles in every direction, more and fewer steps than stages, a result of several blocks, parts of K
PRODUCTS = [
    (1, 8, 1, tile(64, 64, 1, 3)),
    (67, 1000, 131, tile(64, 64, 1, 5)),
    (64, 64, 128, tile(64, 128, 1, 4)),
    (97, 456, 190, tile(64, 192, 1, 3)),
    (131, 200, 61, tile(128, 64, 1, 4)),
    (128, 328, 257, tile(128, 128, 1, 3)),
    (257, 72, 129, tile(128, 128, 2, 5)),
    (70, 136, 193, tile(128, 192, 2, 4)),
    (129, 520, 255, tile(128, 256, 2, 4)),
    (300, 264, 127, tile(256, 128, 2, 3)),
    (5, 1032, 40, tile(64, 64, 1, 4, parts=4)),
]


@needs_gxx
@pytest.mark.parametrize("cases", [PRODUCTS[::2], pytest.param(PRODUCTS[1::2], marks=pytest.mark.networks)])
def test_products_of_awkward_sizes(tiles, cases, precision="bf16"):
    tiles |= {n: each for _, _, n, each in cases}
    inputs = {f"x{number}": floats(m, k) for number, (m, k, *_) in enumerate(cases)}
    weights = [floats(k, n) for _, k, n, _ in cases]

    outputs, lowered = run(
        lambda emit, *x: [emit(op.matmul(a, constant(w))) for a, w in zip(x, weights, strict=True)], inputs, target=TARGET, precision=precision
    )
    for out, x, w in zip(outputs, inputs.values(), weights, strict=True):
        a, b = short(x, precision), short(w, precision)
        assert (np.abs(out - a @ b) <= SUMS * (np.abs(a) @ np.abs(b))).all()
    rows = [row for row in lowered.report["kernels"] if row["template"] == "gemm hopper"]
    assert [row["schedule"] for row in rows] == [str(each) for *_, each in cases]


@needs_gxx
def test_batches_epilogues_and_bytes(tiles):
    """What gemm.py does around a product is done around this one, too; A read by the epilogue as well; bytes exactly; a convolution of one tap."""
    tiles |= {40: tile(64, 64, 1, 3), 56: tile(128, 64, 1, 3), 48: tile(64, 64, 1, 3), 50: tile(128, 64, 2, 3), 24: tile(64, 64, 1, 3)}
    x, each, shared = (halves(*shape) for shape in ((2, 3, 20, 48), (3, 48, 40), (1, 48, 48)))
    tall, w1, w2 = floats(70, 400), floats(400, 56), floats(56, 50)
    codes, table, image, taps = (
        RANDOM.integers(0, 256, (75, 208), "uint8"),
        RANDOM.integers(-128, 128, (208, 50), "int8"),
        halves(2, 5, 7, 16),
        halves(1, 1, 16, 24),
    )

    def build(emit, x, tall, codes, image):
        hidden = emit(op.nn.relu(emit(op.add(emit(op.matmul(tall, constant(w1))), constant(w1[0])))))  # also read as float32: written in both forms
        wide, image = emit(op.astype(x, "float32")), emit(op.astype(image, "float32"))
        product = emit(op.matmul(wide, constant(shared.astype("float32"))))
        return [
            emit(op.matmul(wide, constant(each.astype("float32")))),
            emit(op.add(emit(op.astype(product, "float16")), x)),
            hidden,
            emit(op.matmul(hidden, constant(w2))),
            emit(op.matmul(codes, relax.const(table), out_dtype="int32")),
            emit(op.nn.conv2d(image, constant(taps.astype("float32")), 1, 0, 1, 1, "NHWC", "HWIO", "NHWC")),
        ]

    inputs = {"x": x, "tall": tall, "codes": codes, "image": image}
    outputs, lowered = run(build, inputs, target=TARGET, precision="bf16")
    wide = x.astype("float64")
    hidden = np.maximum(short(tall, "bf16") @ short(w1, "bf16") + w1[0], 0)
    exact = [wide @ each.astype("float64"), wide @ shared.astype("float64") + x, hidden, short(hidden, "bf16") @ short(w2, "bf16")]
    for out, want, tolerance in zip(outputs, exact, (1e-6, 2.0**-10, 1e-6, 2.0**-8), strict=False):
        assert np.abs(out.astype("float64") - want).max() <= tolerance * np.abs(want).max()
    np.testing.assert_array_equal(outputs[4], codes.astype("int64") @ table.astype("int64"))
    want = image.astype("float64") @ taps[0, 0].astype("float64")
    assert np.abs(outputs[5] - want).max() <= 1e-6 * np.abs(want).max()
    kinds = [row["template"] for row in lowered.report["kernels"]]
    assert kinds.count("gemm hopper") == 5 and kinds.count("conv2d hopper") == 1
    assert "tc::To<float, tc::bfloat16> out" in lowered.sources["model.cu"]


#: image N, H, W, C; taps, output channels; strides, padding (top, left, bottom, right), dilation; type; tile: rows of a tile that begin anywhere in a line, an image, behind the last one
WINDOWS = [
    ((2, 9, 7, 8), (3, 3), 61, (1, 1), (1, 1, 1, 1), (1, 1), "float16", tile(64, 64, 1, 3)),
    ((3, 11, 6, 72), (3, 2), 70, (2, 1), (0, 1, 2, 0), (1, 2), "float16", tile(128, 128, 1, 3)),
    ((1, 13, 13, 64), (1, 1), 66, (2, 2), (0, 0, 0, 0), (1, 1), "bfloat16", tile(64, 64, 1, 4)),
    ((2, 8, 9, 48), (5, 3), 30, (3, 2), (2, 0, 1, 1), (1, 1), "uint8", tile(128, 64, 2, 3)),
    ((1, 4, 4, 136), (3, 3), 24, (1, 1), (1, 1, 1, 1), (1, 1), "bfloat16", tile(64, 64, 1, 4, parts=4)),
]


@needs_gxx
def test_windows_of_convolutions(tiles):
    inputs, weights, exact = {}, [], []
    for number, (image, taps, features, strides, (top, left, bottom, right), dilation, dtype, each) in enumerate(WINDOWS):
        tiles[features] = each
        shape = (*taps, image[-1], features)
        if dtype == "uint8":
            x, w = RANDOM.integers(0, 256, image, "uint8"), RANDOM.integers(-128, 128, shape, "int8")
        else:
            x, w = (floats(*dims).astype(numpy_dtype(dtype)) for dims in (image, shape))
            x, w = x if dtype == "float16" else x.astype("float32"), w.astype("float32")
        inputs[f"x{number}"] = x
        weights.append(w)
        padded = np.pad(x.astype("float64"), ((0, 0), (top, bottom), (left, right), (0, 0)))
        view = np.lib.stride_tricks.sliding_window_view(
            padded, [(count - 1) * apart + 1 for count, apart in zip(taps, dilation, strict=True)], axis=(1, 2)
        )
        view = view[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
        exact.append(np.einsum("nhwcij,ijco->nhwo", view, w.astype("float64")))

    def build(emit, *x):
        results = []
        for data, w, (_, _, _, strides, padding, dilation, dtype, _) in zip(x, weights, WINDOWS, strict=True):
            wide = data if dtype == "uint8" else emit(op.astype(data if dtype == "float16" else emit(op.astype(data, dtype)), "float32"))
            kind = {"out_dtype": "int32"} if dtype == "uint8" else {}
            results.append(emit(op.nn.conv2d(wide, relax.const(w), strides, padding, dilation, 1, "NHWC", "HWIO", "NHWC", **kind)))
        return results

    outputs, lowered = run(build, inputs, target=TARGET)
    for out, want in zip(outputs, exact, strict=True):
        assert np.abs(out - want).max() <= 2e-6 * np.abs(want).max()
    assert [row["schedule"] for row in lowered.report["kernels"] if row["template"] == "conv2d hopper"] == [str(each) for *_, each in WINDOWS]


def test_the_schedule_decides():
    target, others = Target.parse(TARGET), [each for name, each in MACHINES.items() if name != "sm_90a"]
    for each in space(target):
        assert each.resident * (each.shared_bytes + 1024) <= 228 * 1024 and each.bm * each.bn <= 128 * 128 * each.groups
    large = best_tile(GemmShape(1, 4096, 2048, 4096), target)
    assert (large.bm, large.bn, large.groups, large.parts) == (128, 256, 2, 1) and large.stages >= 4
    assert best_tile(GemmShape(1, 64, 2048, 4096), target).parts > 1

    def kinds(m, k, n, target):
        weight = RANDOM.integers(-128, 128, (k, n), "int8")
        given = {"x": RANDOM.integers(0, 256, (m, k), "uint8")}
        lowered = compiled(
            program_of(lambda emit, x: [emit(op.matmul(x, relax.const(weight), out_dtype="int32"))], given), target.text, emit_only=True
        )
        return lowered.report["kernels"][0]["template"]

    assert kinds(2048, 1024, 1024, target) == "gemm hopper"
    assert kinds(1, 4096, 4096, target) == "gemm"  # few rows
    assert kinds(2048, 1020, 1024, target) == "gemm"  # rows that begin where TMA cannot
    assert {kinds(2048, 1024, 1024, each) for each in others} == {"gemm"}


#: a block of the template on a matrix of small integers, whose product is exact: exits with 0 when it is right; and what the host would see of the address maps
HARNESS = r"""
#include "tcompile.cuh"
#include "hopper.cuh"
using T = tc::HopperTile<128, 64, 2, 3, 1>;
constexpr int M = 128, N = 64, K = 256;
static uint16_t a[M][2 * K], b[N][2 * K];
static float c[M][N];
TC_KERNEL(T::THREADS, 1) product(TC_MAP first, TC_MAP second) {
  const tc::To<float> out{&c[0][0]};
  tc::gemm_hopper<tc::Bf16x2, T, N>(tc::MappedRows{first, 0}, tc::MappedRows{second, 0}, out, M, 0, 0, 0, K / 32, [&](int, int, float sum) { return sum; });
}
int main() {
  for (int k = 0; k < 2 * K; ++k) {
    for (int m = 0; m < M; ++m) a[m][k] = tc::round_half<true>(float((m * 7 + k * 3) % 11 - 5));
    for (int n = 0; n < N; ++n) b[n][k] = tc::round_half<true>(float((n * 5 + k * 2) % 13 - 6));
  }
  tc::simt::launch(product, dim3(1), T::THREADS, T::STAGES * (T::STAGE_BYTES + 16) + 1024, tc::TensorMap{(const char*)a, M, K, T::BM}, tc::TensorMap{(const char*)b, N, K, T::BN});
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float sum = 0;
      for (int k = 0; k < 2 * K; ++k) sum += tc::widen_half<true>(a[m][k]) * tc::widen_half<true>(b[n][k]);
      if (!(sum == c[m][n])) return 1;
    }
  return 0;
}
extern "C" uint64_t descriptor_of(uint32_t address) { return tc::descriptor(address); }
extern "C" void staged(const char* words, int rows, int columns, int column, int row, int box, char* to) {
  tc::simt::machine.shared.assign((1024 + box * 128) / 4, 0.0f);
  uint64_t barrier = 0;
  char* const at = tc::simt::at(1024);
  tc::simt::arrive({at, {words, (uint64_t)rows, (uint64_t)columns, (uint32_t)box}, &barrier, column, row});
  memcpy(to, at, box * 128);
}
"""


def harness(folder, source, file, *flags, left_out="", instead=""):
    """A program built, with something left out of a file of the templates."""
    for path in INCLUDE.iterdir():
        text = path.read_text()
        if path.name == file and left_out:
            assert text.count(left_out) == 1
            text = text.replace(left_out, instead)
        (folder / path.name).write_text(text)
    (folder / "harness.cpp").write_text(source)
    line = ["g++", "-std=c++17", "-O1", "-march=x86-64-v3", "-fno-strict-aliasing", "-w", "-DTCOMPILE_SIMT", *flags, "harness.cpp", "-o", "harness"]
    subprocess.run(line, cwd=folder, check=True)
    return folder / "harness"


@needs_gxx
def test_addresses_of_boxes_and_descriptors(tmp_path):
    """numpy's model of the two maps: TMA puts piece j of a row i of 128 bytes at j ^ i % 8 (CUDA driver API, 128-byte swizzle), and a descriptor finds row r, byte b of a matrix
    at start + r / 8 * stride + r % 8 * 128 + b with bits 4-6 of that address flipped by bits 7-9 (PTX manual, canonical K-major layout)."""
    library = ctypes.CDLL(str(harness(tmp_path, HARNESS, "hopper.cuh", "-shared", "-fPIC")))
    library.descriptor_of.restype = ctypes.c_uint64
    rows, columns, first, start, box = 150, 75, 40, 48, 128  # the box ends outside of the matrix both ways
    words = RANDOM.integers(0, 2**31, (rows, columns)).astype("int32")
    image = np.zeros((box, 128), np.uint8)
    library.staged(words.ctypes.data_as(ctypes.c_void_p), rows, columns, start, first, box, image.ctypes.data_as(ctypes.c_void_p))

    inside = np.zeros((box, 32), np.int32)
    inside[: rows - first, : columns - start] = words[first:, start:]
    plain = inside.view(np.uint8).reshape(box, 8, 16)
    row, piece = np.arange(box)[:, None], np.arange(8)[None]
    placed = np.empty_like(plain)
    placed[row, piece ^ row % 8] = plain
    np.testing.assert_array_equal(image.reshape(box, 8, 16), placed)

    base = 5 * 1024
    for block in range(0, box, 64):
        for step in range(4):  # 32 bytes of k each; the template adds to the field of the address
            code = library.descriptor_of(ctypes.c_uint32(base)) + (block * 128 + step * 32 >> 4)
            begin, stride, swizzle = (code & 0x3FFF) << 4, (code >> 32 & 0x3FFF) << 4, code >> 62
            assert swizzle == 1 and code >> 49 & 7 == 0
            r, b = np.arange(64)[:, None], np.arange(32)[None]
            address = begin + r // 8 * stride + r % 8 * 128 + b
            address ^= (address >> 7 & 7) << 4
            np.testing.assert_array_equal(image.reshape(-1)[address - base], inside.view(np.uint8)[block : block + 64, step * 32 : step * 32 + 32])


#: what the template cannot do without -> what is there in its place
NEEDED = {
    "barrier_wait(full + slot, round ^ (uint32_t)never);": "",
    "barrier_wait(empty + slot, round ^ 1);": "",
    "if (step > 0) ring.release(before);": "",
    "products_wait<1>();": "",
    "ring.release(before)": "ring.release(ring.slot)",
    "products_begin();": "",
    "products_commit();": "",
    "\n  products_wait<0>();": "",
    "round ^ 1);": "round);",
    "(-shared_address(shared) & 1023)": "0",
    "ring.open(4 * T::GROUPS)": "ring.open(4)",
    "b.bring(stage + T::A_BYTES, first + step": "b.bring(stage + T::A_BYTES, first",
}


@needs_gxx
@pytest.mark.networks
def test_the_emulation_notices_what_is_missing(tmp_path):
    def outcome(**changes):
        return subprocess.run([harness(tmp_path, HARNESS, "hopper.cuh", **changes)], timeout=120, stderr=subprocess.DEVNULL, check=False).returncode

    assert outcome() == 0
    assert [left_out for left_out, instead in NEEDED.items() if outcome(left_out=left_out, instead=instead) == 0] == []


def build():
    """Large products of 16 bits and of bytes, with an epilogue, one of few rows that takes K in parts, and windows of an image."""
    codes = RANDOM.integers(-128, 128, (1024, 2048), "int8")
    inputs = {"x": floats(1024, 512), "few": floats(64, 4096), "short": floats(1536, 256), "image": floats(8, 28, 28, 128)}
    inputs["bytes"] = RANDOM.integers(0, 256, (512, 1024), "uint8")

    def graph(emit, x, few, halves, image, octets):
        def short(x, dtype):  # what a model in dtype becomes
            return emit(op.astype(emit(op.astype(x, dtype)), "float32"))

        def weight(dtype, *shape):
            return constant(floats(*shape).astype(numpy_dtype(dtype)).astype("float32"))

        wide = emit(op.nn.gelu(emit(op.matmul(short(x, "bfloat16"), weight("bfloat16", 512, 8192)))))
        return [
            wide,
            emit(op.matmul(short(few, "bfloat16"), weight("bfloat16", 4096, 1024))),
            emit(op.matmul(short(halves, "float16"), weight("float16", 256, 2048))),
            emit(op.matmul(octets, relax.const(codes), out_dtype="int32")),
            emit(op.nn.relu(emit(op.nn.conv2d(short(image, "bfloat16"), weight("bfloat16", 3, 3, 128, 256), 1, 1, 1, 1, "NHWC", "HWIO", "NHWC")))),
        ]

    return compiled(program_of(graph, inputs), TARGET, emit_only=False)


@needs_nvcc
@needs_cuobjdump
def test_products_are_asynchronous_and_nothing_spills(tmp_path):
    lowered = build()
    assert lowered.report["code_generation"]["remarks"] == []  # none about products that wait for each other, nor about setmaxnreg
    code = {
        name.strip(): text for name, _, text in (part.partition("\n") for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:])
    }
    usage = {
        name: int(count)
        for name, count in re.findall(r"Function (\S+):\s*REG:(\d+) STACK:0 SHARED:\d+ LOCAL:0", dump(lowered.library, tmp_path, "-res-usage"))
    }
    rows = [row for row in lowered.report["kernels"] if "hopper" in row["template"]]
    assert [row["workload"].split()[-1] for row in rows] == ["Bf16x2", "Bf16x2", "Fp16x2", "U8S8", "Bf16x2"] and rows[-1][
        "template"
    ] == "conv2d hopper"
    assert any("parts" in row["schedule"] for row in rows)
    names = {"Bf16x2": "HGMMA.64x{}x16.F32.BF16", "Fp16x2": "HGMMA.64x{}x16.F32 ", "U8S8": "IGMMA.64x{}x32.U8.S8"}
    for row in rows:
        text, registers = code[f"k_{row['kernel']}"], usage[f"k_{row['kernel']}"]
        width = row["schedule"].split("x")[1]
        assert names[row["workload"].split()[-1]].format(width) in text
        assert re.findall(r"UTMALDG\.\S+", text) == (["UTMALDG.4D.IM2COL", "UTMALDG.2D"] if row is rows[-1] else ["UTMALDG.2D"] * 2)
        assert text.count("USETMAXREG") == 2 and "SYNCS.PHASECHK" in text
        assert not re.search(r"\b(LDL|STL|LDGSTS|LDS|STS)\b", text), row
        # setmaxnreg gives out what the launch took: all registers of the multiprocessor
        resident = 2 if row["threads"] == 256 else 1
        assert registers == 65536 // (row["threads"] * resident) // 8 * 8 and resident * (row["shared_bytes"] + 1024) <= 228 * 1024


@needs_nvcc
@pytest.mark.networks
def test_nvcc_remarks_on_products_that_wait_for_each_other():
    sources = dict(build().sources)
    needed = "if (step > 0) ring.release(before);"
    assert needed in sources["hopper.cuh"]
    sources["hopper.cuh"] = sources["hopper.cuh"].replace(needed, f"c[0][0] += 1; {needed}")
    assert any("wgmma.mma_async instructions are serialized" in remark for remark in toolchain.build(sources, "sm_90a").remarks)
