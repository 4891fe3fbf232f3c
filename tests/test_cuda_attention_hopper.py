"""Attention of sm_90a (TMA, wgmma, warp groups that take turns): its source run by the emulation against numpy in float64, its address maps, and facts of its machine code."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from cuda_models import compiled, program_of, run
from tcompile.compiler.dialect.attention import AttentionAttrs, attention, reference
from tcompile.compiler.element_types import numpy_dtype
from tcompile.targets.base import Target
from tcompile.targets.cuda import attention_hopper
from tcompile.targets.cuda.machines import MACHINES
from tcompile.targets.cuda.schedule_hopper import AttentionSchedule, attention_space
from test_cuda_half import TYPES, short
from test_cuda_hopper import harness
from test_cuda_kernels import each_attention
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
RANDOM = np.random.default_rng(23)
TARGET = "cuda:sm_90a"


@pytest.fixture(autouse=True)
def _seeded():
    global RANDOM
    RANDOM = np.random.default_rng(23)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def forced(monkeypatch, groups=2, stages=4, cores=132):
    """Every attention that the template can do takes it, however small it is, on a GPU of so many multiprocessors."""
    monkeypatch.setattr(attention_hopper, "best", lambda this, target: AttentionSchedule(groups, stages, this.depth, this.width))
    monkeypatch.setitem(MACHINES, "sm_90a", replace(MACHINES["sm_90a"], cores=cores))


CASES = [
    # batch, heads, kv heads, queries, keys, depth, width, mask, options: ones, primes, tails, several steps, more and fewer keys than queries
    (1, 1, 1, 1, 1, 8, 8, None, {}),
    (2, 4, 2, 65, 300, 64, 64, None, {}),
    (1, 3, 1, 257, 257, 64, 48, None, {"causal": True}),
    (1, 2, 2, 131, 383, 128, 128, None, {"causal": True}),
    (1, 2, 1, 200, 71, 80, 104, None, {"causal": True, "layout": "BSHD"}),
    (2, 2, 1, 5, 133, 24, 16, "bool", {}),
    (1, 2, 2, 40, 140, 80, 96, "bool", {"fill": -1e9, "causal": True}),
    (2, 2, 1, 133, 129, 16, 128, "float", {"layout": "BSHD", "scale": 0.5}),
    (1, 2, 2, 70, 260, 32, 32, None, {"layout": "BSHD,BHSD,BSHD,BHSD", "scale": -0.3, "causal": True}),
    (1, 1, 1, 64, 256, 112, 32, "all", {"safe": False}),
]


def check(cases, precision):
    inputs, expected = {}, []
    for number, (b, h, hk, s, t, d, e, mask, options) in enumerate(cases):
        given = {f"q{number}": floats(b, h, s, d), f"k{number}": floats(b, hk, t, d), f"v{number}": floats(b, hk, t, e)}
        if s > 1:
            given[f"q{number}"][0, 0, -1, 0] = np.nan  # of one query alone
        extra = {}
        if mask == "float":
            extra[f"m{number}"] = floats(b, 1, 1, t)
        elif mask:
            extra[f"m{number}"] = RANDOM.random((b, 1, s, t)) > 0.4
            extra[f"m{number}"][..., 0, :] = False  # a query that sees nothing
        for name, layout in zip(list(given), AttentionAttrs(**options).layouts, strict=False):
            given[name] = given[name] if layout == "BHSD" else np.ascontiguousarray(given[name].transpose(0, 2, 1, 3))
        expected.append(reference(*(short(value, precision) for value in given.values()), *extra.values(), **options))
        inputs |= given | extra
    outputs, lowered = run(each_attention(cases), inputs, target=TARGET, precision=precision)
    for out, exact in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
        assert np.nanmax(np.abs(out - exact)) <= 2 * TYPES[precision][1] * np.nanmax(np.abs(exact))  # probabilities are rounded
    return [row for row in lowered.report["kernels"] if row["template"] == "attention hopper"]


@pytest.mark.sweep
@needs_gxx
@pytest.mark.parametrize("cases", [CASES[::2], pytest.param(CASES[1::2], marks=pytest.mark.networks)])
def test_awkward_sizes(monkeypatch, cases, precision="bf16"):
    forced(monkeypatch)
    assert len(check(cases, precision)) == len(cases)


@needs_gxx
@pytest.mark.slow
def test_blocks_take_several_pieces_of_work(monkeypatch, precision="fp16"):
    """Three warp groups that multiply, as few stages as there may be; heads of several batches and lengths by two blocks, in turns."""
    forced(monkeypatch, groups=3, stages=3, cores=2)
    cases = [
        (2, 3, 1, 200, 260, 64, 64, None, {"causal": True}),
        (1, 2, 2, 193, 130, 40, 56, None, {"layout": "BSHD"}),
        (1, 5, 5, 60, 50, 48, 64, "float", {}),
    ]
    assert [row["grid"] for row in check(cases, precision)] == [[2, 1, 1]] * len(cases)


def test_the_schedule_decides(monkeypatch):
    def made(heads, own, queries, keys, depth, width, target=TARGET, dtype="bfloat16", **options):
        shapes = ((1, heads, queries, depth), (1, own, keys, depth), (1, own, keys, width))
        x = {name: np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape) for name, shape in zip("qkv", shapes, strict=True)}
        return compiled(program_of(lambda emit, *x: [emit(attention(*x, **options))], x), target, emit_only=True).report["kernels"][0]

    long = made(16, 16, 4096, 4096, 128, 128, causal=True)
    assert (long["template"], long["threads"], long["grid"]) == ("attention hopper", 384, [132, 1, 1])
    assert made(64, 8, 4096, 4096, 64, 64, dtype="float16")["threads"] == 512
    sizes = (16, 16, 4096, 4096, 128, 128)
    others = [each for name, each in MACHINES.items() if name != "sm_90a"]
    assert {made(*sizes, target=each.text)["template"] for each in others} == {"attention"}
    assert made(*sizes, dtype="float32")["template"] == "attention"
    assert made(16, 16, 4096, 4096, 124, 128)["template"] == "attention"  # rows that begin where TMA cannot
    assert made(32, 8, 1, 4096, 128, 128)["template"] == "attention"  # decoding
    assert made(32, 8, 64, 4096, 128, 128)["template"] == "attention"
    for depth, width in ((8, 8), (64, 64), (128, 8), (72, 128), (128, 128)):
        for each in attention_space(depth, width, Target.parse(TARGET)):
            assert each.shared_bytes <= 227 * 1024 and each.groups * (each.keys // 2 + each.keys // 4 + width // 2) <= 128 * (1 + each.groups)


#: blocks of the template that take several pieces of work each: exits with 0 when the results are right; a product by itself, and what the host would see of the address maps
HARNESS = r"""
#include "tcompile.cuh"
#include "attention_hopper.cuh"
constexpr int HEADS = 3, S = 300, K = 420, D = 80, E = 96;
using T = tc::HopperHeads<D, E, 128, 2, 3>;
using B = tc::Blocks<T::BQ, S, HEADS, 1, HEADS, FORWARD>;
static uint16_t q[HEADS][S][D], k[HEADS][K][D], v[HEADS][K][E];
static float out[HEADS][S][E];
TC_KERNEL(T::THREADS, 1) attention(TC_MAP first, TC_MAP second, TC_MAP third) {
  const auto to = [&](int, int head) { return tc::To<float>{&out[head][0][0]}; };
  const tc::MappedHeads<false> queries{first}, keys{second}, values{third};
  const tc::EveryKey<T, K, FORWARD> seen;
  tc::attention_hopper<tc::Bf16x2, T, B, 1, S, K, E, E, true, true>(queries, keys, values, 0.125f, to, seen, [&](int, int, int s, int t, float x) {
    return FORWARD && t > s ? -INFINITY : x;
  });
}
static uint32_t state = 1;
static void fill(uint16_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = tc::round_half<true>((int)((state = state * 1664525u + 1013904223u) >> 24) / 64.0f - 2.0f);
}
static tc::TensorMap map(const void* data, int rows, int columns, int box) {
  tc::TensorMap made{(const char*)data, (uint64_t)rows, (uint64_t)columns / 2, (uint32_t)box};
  made.stack = {1, HEADS, rows};
  return made;
}
int main() {
  fill(&q[0][0][0], HEADS * S * D), fill(&k[0][0][0], HEADS * K * D), fill(&v[0][0][0], HEADS * K * E);
  constexpr int SHARED = 2 * (T::Q_BYTES + 16) + T::STAGES * (T::STAGE_BYTES + 16) + 1024;
  tc::simt::launch(attention, dim3(2), T::THREADS, SHARED, map(q, S, D, T::BQ), map(k, K, D, T::BT), map(v, K, E, T::BT));
  for (int h = 0; h < HEADS; ++h)
    for (int s = 0; s < S; ++s) {
      double p[K], total = 0, sums[E] = {};
      for (int t = 0; t < (FORWARD ? s + 1 : K); ++t) {
        double x = 0;
        for (int d = 0; d < D; ++d) x += tc::widen_half<true>(q[h][s][d]) * tc::widen_half<true>(k[h][t][d]);
        total += p[t] = exp2(x * 0.125);
        for (int e = 0; e < E; ++e) sums[e] += p[t] * tc::widen_half<true>(v[h][t][e]);
      }
      for (int e = 0; e < E; ++e)
        if (!(fabs(sums[e] / total - out[h][s][e]) < 0.005)) return 1;
    }
  return 0;
}
extern "C" uint64_t descriptor_of(uint32_t address, int apart) { return tc::descriptor(address, apart); }
static const uint32_t* registers;
static const char* image;
static int bytes;
static float* sums;
TC_KERNEL(128) one() {
  if (threadIdx.x == 0) memcpy(tc::simt::at(1024), image, bytes);
  __syncthreads();
  uint32_t a[4];
  memcpy(a, registers + 4 * threadIdx.x, 16);
  float c[48] = {};
  tc::products_begin();
  tc::WgmmaRows<tc::Fp16x2, 96>::multiply(c, a, tc::descriptor(1024 + 2048, bytes / 2));
  tc::products_commit();
  tc::products_wait<0>();
  memcpy(sums + 48 * threadIdx.x, c, sizeof c);
}
extern "C" void product(const uint32_t* a, const char* staged, int count, float* c) {
  registers = a, image = staged, bytes = count, sums = c;
  tc::simt::launch(one, dim3(1), 128, 1024 + count);
}
extern "C" void staged(const char* words, int batch, int outer, int inner, int columns, bool along_outer, int column, int at_inner, int at_outer, int at_batch, int box, char* to) {
  tc::simt::machine.shared.assign((1024 + box * 128) / 4, 0.0f);
  uint64_t barrier = 0;
  tc::TensorMap map{words, (uint64_t)inner, (uint64_t)columns, (uint32_t)box};
  map.stack = {batch, outer, inner, along_outer};
  char* const at = tc::simt::at(1024);
  tc::simt::arrive({at, map, &barrier, column, 0, 0, 0, 0, 0, 0, at_inner, at_outer, at_batch});
  memcpy(to, at, box * 128);
}
"""


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


@needs_gxx
def test_addresses_of_heads_and_of_rows_that_are_k(tmp_path):
    """numpy's model: TMA's boxes of a head of a tensor, whatever lies behind it; a register operand of wgmma (PTX manual, m64k16: rows 16 w + g and 8 more, k = 2 t and 8 more), and
    number n of row k of a matrix whose rows are k at start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2, bits 4-6 flipped by bits 7-9 (canonical MN-major layout)."""
    library = ctypes.CDLL(str(harness(tmp_path, HARNESS, "attention_hopper.cuh", "-DFORWARD=true", "-shared", "-fPIC")))
    library.descriptor_of.restype = ctypes.c_uint64
    batch, heads, rows, columns, box = 2, 3, 41, 48, 32  # words
    numbers = floats(batch, heads, rows, 2 * columns).astype("float16")
    for layout in ("BHSD", "BSHD"):
        tensor = numbers if layout == "BHSD" else np.ascontiguousarray(numbers.transpose(0, 2, 1, 3))
        dims, at = ((batch, heads, rows), (16, 2)) if layout == "BHSD" else ((batch, rows, heads), (2, 16))
        image = np.zeros((2, box, 128), np.uint8)
        for half in range(2):
            place = np.zeros((box, 128), np.uint8)
            library.staged(pointer(tensor), *dims, columns, layout == "BSHD", 32 * half, *at, 1, box, pointer(place))
            image[half] = place
        inside = np.zeros((box, 128), np.float16)  # the second box ends behind the columns, both behind the rows
        inside[: rows - 16, : 2 * columns] = numbers[1, 2, 16:]
        k, n = np.arange(box)[:, None], np.arange(128)[None]
        address = n // 64 * box * 128 + k * 128 + n % 64 * 2
        address ^= (address >> 7 & 7) << 4
        np.testing.assert_array_equal(image.reshape(-1).view(np.float16)[address // 2], inside)

    code = library.descriptor_of(ctypes.c_uint32(1024 + 2048), box * 128)
    assert [code >> 4 & 0, code & 0x3FFF, code >> 16 & 0x3FFF, code >> 32 & 0x3FFF, code >> 62] == [0, 3072 >> 4, box * 128 >> 4, 1024 >> 4, 1]
    a, registers = floats(64, 16).astype("float16"), np.zeros((128, 4, 2), np.float16)
    thread, register, number = np.ogrid[:128, :4, :2]
    row, k = thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8, thread % 4 * 2 + register // 2 * 8 + number
    registers[:] = a[row, k]
    got = np.zeros((128, 48), np.float32)
    library.product(pointer(registers), pointer(image), image.nbytes, pointer(got))
    thread, place = np.ogrid[:128, :48]
    product = a.astype("float32") @ inside[16:32, :96].astype("float32")
    expected = product[thread // 32 * 16 + thread % 32 // 4 + place // 2 % 2 * 8, place // 4 * 8 + thread % 4 * 2 + place % 2]
    np.testing.assert_allclose(got, expected, atol=1e-4)


#: what the template cannot do without -> what is there in its place; by file
NEEDED = {
    "hopper.cuh": {
        "barrier_wait(full + slot, round ^ (uint32_t)never);": "",
        "barrier_wait(empty + slot, round ^ 1);": "",
    },
    "attention_hopper.cuh": {
        "heads.open(4 * T::GROUPS)": "heads.open(4)",
        "ring.open(4 * T::GROUPS)": "ring.open(4)",
        "heads.release(heads.slot);": "",
        "if (step > 0) return;": "",
        "heads.release(heads.slot);\n      heads.next();": "heads.release(heads.slot);",
        "      ring.release(keys);": "",
        "ring.release(keys);": "ring.release(values);",
        "      ring.release(values);": "",
        "descriptor(keys);\n      products_begin();": "descriptor(keys);",
        "descriptor(values, T::BOX);\n      products_begin();": "descriptor(values, T::BOX);",
        "      products_wait<1>();": "",
        "      products_wait<0>();\n      products_end(o);": "",
        "    scores(ring.read());\n    products_wait<0>();": "scores(ring.read());",
        "    results(next);\n    products_wait<0>();": "results(next);",
        "  // exponentials before the wait for the results\n": "probabilities();\n",
        ", d > 0);\n      products_commit();": ", d > 0);",
        "(i * 16 * 128 >> 4));\n      products_commit();": "(i * 16 * 128 >> 4));",
        ", d > 0);": ");",
        "descriptor(values, T::BOX)": "descriptor(values)",
        "turn_give(group % T::GROUPS + 1);": "",
        "if (group > 1 || !first) turn_wait(group);": "",
        "if (group == 1 && !first) turn_wait(group);": "",
        "(-shared_address(shared) & 1023)": "0",
        "        rows = heads.read() +": "rows = shared_address(heads.data) +",
        "if (last) top[0] = top[1] = -INFINITY, total[0] = total[1] = 0.0f;": "",
        "store(before, sums);": "store(before, total);",
        "            values(before, last);": "",
        "        keys(step);\n        values(before, last);": "keys(step); values(block, last);",
        "          queries();": "",
    },
}


@needs_gxx
@pytest.mark.networks
@pytest.mark.parametrize("causal", ["false", "true"])
def test_the_emulation_notices_what_is_missing(tmp_path, causal):
    def outcome(file="attention_hopper.cuh", **changes):
        program = harness(tmp_path, HARNESS, file, f"-DFORWARD={causal}", **changes)
        return subprocess.run([program], timeout=120, stderr=subprocess.DEVNULL, check=False).returncode

    assert outcome() == 0
    unnoticed = [
        left_out for file, needed in NEEDED.items() for left_out, instead in needed.items() if outcome(file, left_out=left_out, instead=instead) == 0
    ]
    assert unnoticed == []


@needs_nvcc
@needs_cuobjdump
def test_products_and_softmax_overlap_and_nothing_spills(tmp_path):
    """Causal and masked, both kinds of numbers, two and three warp groups, heads of all sizes of boxes."""
    cases = [
        (1, 16, 16, 4096, 4096, 128, 128, None, {"causal": True, "dtype": "bfloat16"}),
        (1, 16, 4, 2000, 3000, 64, 64, None, {"causal": True}),
        (8, 12, 12, 512, 512, 64, 64, "float", {"dtype": "bfloat16"}),
        (1, 64, 64, 1024, 1000, 80, 104, None, {"layout": "BSHD"}),
    ]
    inputs = {}
    for number, (b, h, hk, s, t, d, e, mask, options) in enumerate(cases):
        dtype = numpy_dtype(options.get("dtype", "float16"))
        shapes = {f"q{number}": (b, h, s, d), f"k{number}": (b, hk, t, d), f"v{number}": (b, hk, t, e)}
        shapes = {name: (b, n, h, w) if options.get("layout") else (b, h, n, w) for name, (b, h, n, w) in shapes.items()}
        inputs |= {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape in shapes.items()}
        inputs |= {f"m{number}": np.zeros((b, 1, 1, t), "float32")} if mask else {}
    lowered = compiled(program_of(each_attention(cases), inputs), TARGET, emit_only=False)
    assert lowered.report["code_generation"]["remarks"] == []  # none about products that wait for each other, nor about setmaxnreg
    code = {
        name.strip(): text for name, _, text in (part.partition("\n") for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:])
    }
    usage = dict(re.findall(r"Function (\S+):\s*REG:(\d+) STACK:0 SHARED:\d+ LOCAL:0", dump(lowered.library, tmp_path, "-res-usage")))
    rows = lowered.report["kernels"]
    assert [row["template"] for row in rows] == ["attention hopper"] * len(cases) and {row["threads"] for row in rows} == {384, 512}
    for row, (*_, width, mask, _) in zip(rows, cases, strict=True):
        text, name = code[f"k_{row['kernel']}"], f"k_{row['kernel']}"
        kind = "F32.BF16" if "Bf16x2" in row["workload"] else "F32"
        assert f"HGMMA.64x128x16.{kind} " in text
        assert re.search(rf"HGMMA\.64x{-(-width // 16) * 16}x16\.{kind} R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", text)
        assert "UTMALDG.4D" in text and text.count("USETMAXREG") == 2 and "SYNCS.PHASECHK" in text
        assert not re.search(r"\b(LDL|STL|LDS|STS|LDSM|LDGSTS|HMMA)\b", text), row
        assert bool(re.search(r"\bLDG\b", text)) == bool(mask)
        assert int(usage[name]) == 65536 // row["threads"] // 8 * 8 and row["shared_bytes"] <= 227 * 1024
        # every exponential of the loop lies between the wait for the scores and that for the results of the former keys
        parts = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[01])", text)
        scores = parts.index("0x1")
        assert parts[scores + 1].count("MUFU.EX2") == 64 + 2 and "HGMMA" not in parts[scores + 1]
