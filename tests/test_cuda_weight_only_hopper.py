"""Products of 16-bit activations by weights of 1 to 8 bits by wgmma: the order of the codes simulated in numpy, the kernels run by the emulation, facts of the machine code."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from cuda_models import compiled, emulation, program_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.dialect.weight_only import reference, weight_only_matmul
from tcompile.compiler.program import DimRange
from tcompile.compiler.tvm import relax
from tcompile.passes.quantization.formats import GroupedInt
from tcompile.targets.base import Target
from tcompile.targets.cuda import weight_only_hopper
from tcompile.targets.cuda.machines import MACHINES
from tcompile.targets.cuda.weight_only_hopper import HopperRows, HopperWeightOnly, best, space
from tcompile.targets.cuda.weight_only_schedule import Shape
from test_cuda_half import SUMS, constant, short
from test_cuda_hopper import harness
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc
from test_cuda_weight_only import code_of, needs_gxx, weights_of

op = relax.op
TARGET = "cuda:sm_90a"

#: M, K, N, format, schedule: one row, one column, tails in every direction, groups shorter and longer than a step, that end in it, that are one; parts of K; strips that are not there
CASES = [
    (1, 64, 64, GroupedInt(4, 64), HopperRows(32, 1, 3)),
    (70, 456, 131, GroupedInt(4, 32, symmetric=False), HopperRows(64, 2, 4)),
    (33, 200, 1, GroupedInt(8, 16), HopperRows(32, 2, 3)),
    (150, 1000, 70, GroupedInt(4, 128), HopperRows(128, 1, 3)),
    (97, 328, 200, GroupedInt(3, 48, symmetric=False), HopperRows(96, 3, 3)),
    (65, 520, 129, GroupedInt(6, 96), HopperRows(32, 2, 4, parts=3)),
    (40, 136, 61, GroupedInt(8, 256, symmetric=False), HopperRows(64, 1, 3)),
    (31, 72, 65, GroupedInt(1, 32), HopperRows(32, 2, 3)),
    (5, 264, 190, GroupedInt(2, 192, symmetric=False), HopperRows(32, 1, 4, parts=2)),
]


def floats(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def check(cases, precision, monkeypatch):
    """With an epilogue of a bias and a residual."""
    rng = np.random.default_rng(7)
    chosen = {(m, k, n): schedule for m, k, n, _, schedule in cases}
    monkeypatch.setattr(HopperWeightOnly, "best", lambda self: chosen[self.shape.m, self.shape.k, self.shape.n])
    operands = [weights_of(k, n, made) for _, k, n, made, _ in cases]
    bias, x = [floats(rng, n) for _, _, n, *_ in cases], {f"x{number}": floats(rng, m, k) for number, (m, k, *_) in enumerate(cases)}
    more = {f"r{number}": floats(rng, m, n) for number, (m, _, n, *_) in enumerate(cases)}

    def build(emit, *given):
        results = []
        for x, residual, arrays, add, (*_, made, _) in zip(given[: len(cases)], given[len(cases) :], operands, bias, cases, strict=True):
            product = emit(weight_only_matmul(x, *map(constant, arrays), bits=made.bits, group=made.group))
            results.append(emit(op.add(emit(op.nn.relu(emit(op.add(product, constant(add))))), residual)))
        return results

    outputs, lowered = run(build, x | more, target=TARGET, precision=precision)
    for out, rows, residual, arrays, add, (*_, made, _) in zip(outputs, x.values(), more.values(), operands, bias, cases, strict=True):
        weight, rows = reference(np.eye(rows.shape[1]), *arrays, bits=made.bits, group=made.group), short(rows, precision)
        bound = SUMS * (np.abs(rows) @ np.abs(weight) + np.abs(add) + np.abs(residual))
        assert (np.abs(out - np.maximum(rows @ weight + add, 0) - residual) <= bound).all(), made
    rows = [row for row in lowered.report["kernels"] if row["template"] == "weight only hopper"]
    assert [row["schedule"] for row in rows] == [str(schedule) for *_, schedule in cases]
    return lowered


@needs_gxx
@pytest.mark.parametrize("cases", [CASES[:3], pytest.param(CASES[3:], marks=pytest.mark.networks)])
def test_products_of_awkward_sizes(cases, monkeypatch):
    check(cases, "bf16", monkeypatch)


@needs_gxx
@pytest.mark.networks
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_every_width(symmetric, monkeypatch):
    cases = [(30 + bits, 136, 70 + bits, GroupedInt(bits, 16 * (1 + bits % 3), symmetric), HopperRows(32, 2, 3)) for bits in range(1, 9)]
    check(cases, "fp16", monkeypatch)


@needs_gxx
@pytest.mark.networks
def test_numbers_that_are_none_stay_in_their_row(monkeypatch):
    monkeypatch.setattr(HopperWeightOnly, "best", lambda self: HopperRows(32, 2, 3))
    x, arrays = floats(np.random.default_rng(3), 40, 96), weights_of(96, 70, GroupedInt(4, 32))
    x[1, 5], x[2, 7] = np.nan, np.inf
    (out,), _ = run(
        lambda emit, x: [emit(weight_only_matmul(x, *map(constant, arrays), bits=4, group=32))], {"x": x}, target=TARGET, precision="bf16"
    )
    assert not np.isfinite(out[1:3]).any() and np.isnan(out[1]).all() and np.isfinite(np.delete(out, [1, 2], axis=0)).all()


@needs_gxx
@pytest.mark.networks
def test_rows_that_are_open(monkeypatch):
    """One artifact for many numbers of rows, none of them few."""
    arrays = weights_of(136, 70, GroupedInt(4, 64))
    monkeypatch.setattr(HopperWeightOnly, "_faster", lambda self, shape: True)
    program = program_of(
        lambda emit, x: [emit(weight_only_matmul(x, *map(constant, arrays), bits=4, group=64))],
        {"x": (("rows", 136), "float32")},
        {"rows": DimRange(32, 5000)},
    )
    lowered = compiled(program, TARGET, "bf16")
    assert {row["template"] for row in lowered.report["kernels"]} >= {"weight only hopper"}
    weight, model = reference(np.eye(136), *arrays, bits=4, group=64), emulation(lowered)
    for rows in (32, 131):
        x = floats(np.random.default_rng(rows), rows, 136)
        (out,) = model(x)
        x = short(x, "bf16")
        assert (np.abs(out - x @ weight) <= SUMS * (np.abs(x) @ np.abs(weight))).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 12).map(lambda k: 8 * k), st.integers(1, 140), st.sampled_from([16, 32, 48, 64, 128]), st.integers(0, 2**32 - 1)
)
def test_codes_are_the_registers_that_wgmma_reads(bits, k, n, group, seed):
    """By the layout of A in registers in the PTX manual (wgmma m64nNk16): register i of lane 4 g + t of warp w has row 16 w + g + 8 (i % 2) and, in its halves, k = 2 t + 8 (i / 2) and the
    next. Row 16 w + g + 8 r of the product is column 16 w + 2 g + r of a strip."""
    made = GroupedInt(bits, group)
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (made.groups(k) * group, n)).astype("uint8")
    shape = Shape(1, k, n, bits, min(group, k), False, 1, True, True)
    words = weight_only_hopper.columns(made.pack(codes), shape)
    strips, steps = -(-n // 64), -(-k // 64)
    assert words.shape == (strips, steps, 128 * bits)
    matrix = np.zeros((steps, 64, strips, 64), np.int64)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for i, warp, register, half in np.ndindex(4, 4, 4, 2):
        row, at = 16 * warp + g + 8 * (register % 2), 16 * i + 2 * t + 8 * (register // 2) + half
        column = row // 16 * 16 + row % 8 * 2 + row // 8 % 2
        found = code_of(np.ascontiguousarray(words.reshape(strips, steps, 4, -1)[:, :, warp]), bits, i // 2, i % 2, register, half)
        matrix[:, at, :, column] = found.transpose(2, 1, 0)
    np.testing.assert_array_equal(matrix.reshape(steps * 64, -1)[:k, :n], codes[:k])


def test_the_schedule_decides():
    target = Target.parse(TARGET)
    for bits, group, zeros in ((4, 32, True), (8, 16, True), (1, 128, False), (4, 4096, False)):
        for m in (32, 4096):
            shape = Shape(m, 4096, 4096, bits, group, zeros, 1, True, True)
            for each in space(shape, target):
                assert each.resident * (each.shared_bytes(shape) + 1024) <= 228 * 1024 and each.steps(shape) * (each.parts - 1) < 64
    large = best(Shape(4096, 4096, 4096, 4, 128, False, 1, True, True), target)
    assert (large.rows, large.parts) == (128, 1)
    assert best(Shape(64, 4096, 4096, 4, 128, False, 1, True, True), target).parts > 1

    def kind(m, k=4096, group=128, target=target, precision="bf16"):
        arrays = weights_of(k, 1024, GroupedInt(4, group))
        build = lambda emit, x: [emit(weight_only_matmul(x, *map(constant, arrays), bits=4, group=group))]  # noqa: E731
        lowered = compiled(program_of(build, {"x": ((m, k), "float32")}), target.text, precision, emit_only=True)
        return lowered.report["kernels"][-1 if m > 8 else -2]["template"]

    assert kind(2048) == "weight only hopper"
    assert kind(2048, precision="fp32") == kind(2048, k=1020) == kind(2048, group=24) == "weight only"
    assert {kind(2048, target=each) for name, each in MACHINES.items() if name != "sm_90a"} == {"weight only"}


#: a block of the template on small integers, whose product is exact, for groups of SIZE: exits with 0 when it is right
HARNESS = r"""
#include "tcompile.cuh"
#include "weight_only_hopper.cuh"
constexpr int M = 32, N = 128, K = 448;
using W = tc::HopperWeights<4, K, N, SIZE, true>;
using T = tc::HopperStrips<W, 32, 2, 3, 1>;
alignas(16) static uint16_t x[M][K];
static int codes[K][N];
alignas(16) static int packed[N / 64][W::STEPS][4][32][4];
alignas(16) static float scales[N / 64][W::KEPT][64];
alignas(16) static unsigned char zeros[N / 64][W::KEPT][64];
static float c[M][N];
TC_KERNEL(T::THREADS, 1) product(TC_MAP map) {
  const tc::To<float> out{&c[0][0]};
  const W w{&packed[0][0][0][0][0], &scales[0][0][0], &zeros[0][0][0]};
  tc::weight_only_hopper<true, W, T>(w, map, out, M, 0, 0, 0, W::STEPS, [&](int, int, float sum) { return sum; });
}
int main() {
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) x[m][k] = tc::round_half<true>(float((m * 7 + k * 3) % 11 - 5));
  for (int n = 0; n < N; ++n) {
    for (int i = 0; i < W::GROUPS; ++i) scales[n / 64][i][n % 64] = float(1 << (n + i) % 3), zeros[n / 64][i][n % 64] = (n * 5 + i) % 16;
    for (int k = 0; k < K; ++k) {
      codes[k][n] = (n * 11 + k * 7 + k / 16) % 16;
      const int w = n % 64 / 16, g = n % 16 / 2, r = n % 2, s = k % 64 / 32, i = k % 32 / 16, h = k % 16 / 8, t = k % 8 / 2, e = k % 2;
      packed[n / 64][k / 64][w][4 * g + t][2 * s + i] |= (unsigned)codes[k][n] << 4 * (4 * e + 2 * h + r);
    }
  }
  tc::simt::launch(product, dim3(1), T::THREADS, T::STAGES * (T::STAGE_BYTES + 16) + 1024, tc::TensorMap{(const char*)x, M, K / 2, T::ROWS});
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += tc::widen_half<true>(x[m][k]) * (codes[k][n] - zeros[n / 64][k / SIZE][n % 64]) * scales[n / 64][k / SIZE][n % 64];
      if (!(sum == c[m][n])) return 1;
    }
  return 0;
}
"""

#: what the template cannot do without -> what is there in its place
NEEDED = {
    "products_begin();": "",
    "products_commit();": "",
    "products_wait<1>();": "",
    "if (ends || piece == PIECES - 1) products_wait<0>();": "",
    "ring.release(slot);": "",
    "more = !ends;": "",
    "          ring.next();": "",
    "          rows_of_x = ring.read();": "",
    "own = T::X_BYTES + number * W::STEP_BYTES": "own = T::X_BYTES",
    "step, barrier);\n    }": "first, barrier);\n    }",
    "copy_tile(stage, x, step * 32": "copy_tile(stage, x, first * 32",
    "64 * step / GROUP) * 64;": "0) * 64;",
    "weights.unpack(stage + own, step + 1, 0);": "",
    "weights.load(stage + own);\n          weights": "weights",
}


@needs_gxx
@pytest.mark.networks
def test_the_emulation_notices_what_is_missing(tmp_path):
    def outcome(group, **changes):
        program = harness(tmp_path, HARNESS, "weight_only_hopper.cuh", f"-DSIZE={group}", **changes)
        return subprocess.run([program], timeout=120, stderr=subprocess.DEVNULL, check=False).returncode

    assert [outcome(group) for group in (16, 32, 48, 64, 96, 192, 448)] == [0] * 7
    assert [left_out for left_out, instead in NEEDED.items() if outcome(192, left_out=left_out, instead=instead) == 0] == []


#: m, k, n, format, schedule: short and long groups, all kinds of planes, tiles of every number of warp groups
CODE = [
    (512, 1024, 512, GroupedInt(4, 32), HopperRows(128, 2, 4)),
    (512, 1024, 640, GroupedInt(4, 128, symmetric=False), HopperRows(128, 1, 4)),
    (512, 1024, 1024, GroupedInt(7, 64, symmetric=False), HopperRows(64, 3, 4)),
    (512, 1024, 768, GroupedInt(8, 16, symmetric=False), HopperRows(128, 2, 3)),
]


def golden(cases, precision, folder, monkeypatch):
    chosen = {n: schedule for _, _, n, _, schedule in cases}
    monkeypatch.setattr(HopperWeightOnly, "best", lambda self: chosen[self.shape.n])
    operands = [weights_of(k, n, made) for _, k, n, made, _ in cases]

    def build(emit, *xs):
        made = zip(xs, operands, cases, strict=True)
        return [
            emit(op.nn.silu(emit(weight_only_matmul(x, *map(constant, arrays), bits=case[3].bits, group=case[3].group)))) for x, arrays, case in made
        ]

    lowered = compiled(program_of(build, {f"x{i}": ((m, k), "float32") for i, (m, k, *_) in enumerate(cases)}), TARGET, precision, emit_only=False)
    assert lowered.report["code_generation"]["remarks"] == []  # none about products that wait for each other, nor about setmaxnreg
    code = {
        name.strip(): text for name, _, text in (part.partition("\n") for part in dump(lowered.library, folder, "-sass").split("Function : ")[1:])
    }
    usage = dict(re.findall(r"Function (\S+):\s*REG:(\d+) STACK:0 SHARED:\d+ LOCAL:0", dump(lowered.library, folder, "-res-usage")))
    rows = [row for row in lowered.report["kernels"] if row["template"] == "weight only hopper"]
    assert len(rows) == len(cases)
    for row, (*_, made, schedule) in zip(rows, cases, strict=True):
        text, kind = code[f"k_{row['kernel']}"], "F32.BF16" if precision == "bf16" else "F32"
        # the weights are registers, the rows of x a matrix of shared memory that is read as it lies; 64 k a step
        products = re.findall(rf"HGMMA\.64x{schedule.rows}x16\.{re.escape(kind)} R\d+, R\d+, gdesc\[UR\d+\],", text)
        assert len(products) == text.count("HGMMA") == 4
        assert text.count("UTMALDG.2D") == 1 and text.count("UBLKCP") == schedule.groups * (2 if made.symmetric else 3)
        assert not re.search(r"\b(LDL|STL|STS|LDGSTS|I2F|F2I|I2FP)\b", text), row  # codes are read by their own lanes and never converted
        if made.bits == 4:  # a mask with an or, by one instruction for two codes
            assert "0xf000f, R" in text and "0xf000f, RZ" not in text
        for width, load in ((4, "LDS.128"), (2, "LDS.64"), (1, "LDS ")):
            assert load in text or not (width == 4 if made.bits == 8 else made.bits & width), (row, load)
        resident = schedule.resident
        assert (
            int(usage[f"k_{row['kernel']}"]) == 65536 // (row["threads"] * resident) // 8 * 8
            and resident * (row["shared_bytes"] + 1024) <= 228 * 1024
        )


@needs_nvcc
@needs_cuobjdump
def test_weights_are_registers_and_nothing_spills(tmp_path, monkeypatch):
    golden(CODE[:1], "bf16", tmp_path, monkeypatch)


@needs_nvcc
@needs_cuobjdump
@pytest.mark.networks
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_of_every_kind_are_registers(tmp_path, monkeypatch, precision):
    golden(CODE[1:], precision, tmp_path, monkeypatch)


@needs_nvcc
@needs_cuobjdump
@pytest.mark.networks
@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_of_every_width_are_registers(tmp_path, monkeypatch, bits):
    cases = [
        (512, 1024, 128 + 64 * i, GroupedInt(bits, group, symmetric), schedule)
        for i, (group, symmetric, schedule) in enumerate(
            [
                (48, False, HopperRows(128, 2, 3)),
                (32, True, HopperRows(64, 3, 4)),
                (96, True, HopperRows(128, 1, 3)),
                (128, False, HopperRows(96, 2, 3)),
                (64, False, HopperRows(32, 2, 4)),
            ]
        )
    ]
    golden(cases, "bf16", tmp_path, monkeypatch)
