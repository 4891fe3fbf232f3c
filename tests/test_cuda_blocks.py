"""Products by weights of which whole tiles are zero on CUDA: both templates run by the emulation over awkward sizes, what is stored and which schedule is taken, facts of the machine code."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
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
from tcompile.passes.sparsity.patterns import parse
from tcompile.targets.base import Target
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
    monkeypatch.setattr(
        lower, "zeros_of", lambda weight: Zeros(False, (tiles := occupied(weight)).shape, tiles.tobytes()) if weight.ndim > 1 else None
    )
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
        return (
            products if integers else [emit(op.nn.relu(emit(op.add(each, relax.const(bias))))) for each, bias in zip(products, biases, strict=True)]
        )

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
    arrays = [array for array in lowered.weights.values() if array.dtype == np.int32]
    dtype = numpy_dtype({"int8": "int8", "bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32"))
    for array, w, case in zip(arrays, weights, cases, strict=True):
        np.testing.assert_array_equal(unpacked(array, template, dtype, w.shape, case[-1].bn), w.astype(dtype))


def unpacked(array, template, dtype, shape, width):
    """The weights that the kernel sees, each tile where the walk says that it lies; strips become shorter, and nothing but kept tiles is stored."""
    (k, n), group = shape, 4 // dtype.itemsize
    high = template.unit * group
    units, strips = -(-k // high), -(-n // width)
    row = -(-(4 + units) // 32) * 32
    walk, tiles = array[: strips * row].reshape(strips, row), array[strips * row :].reshape(-1, template.unit * width)
    assert sorted(walk[:, 0]) == [*range(strips)] and all(one >= other for one, other in pairwise(walk[:, 1]))
    assert len(tiles) == walk[:, 1].sum() and not walk[:, 3].any()
    matrix = np.zeros((units * high, strips * width), dtype)
    for strip, count, first, _, *places in walk:
        for place, tile in zip(places, tiles[first : first + count], strict=False):
            if template is blocks.HopperBlockGemm:  # rows of k
                numbers = tile.view(dtype).reshape(width, high).T
            else:  # words of k by columns
                numbers = tile.view(dtype).reshape(template.unit, width, group).transpose(0, 2, 1).reshape(high, width)
            assert numbers.astype("float32").any()
            matrix[place * high : (place + 1) * high, strip * width : (strip + 1) * width] = numbers
    return matrix[:k, :n]


@needs_gxx
@pytest.mark.parametrize(
    ("precision", "cases"),
    [("fp32", CASES[::2]), *(pytest.param(name, CASES, marks=pytest.mark.networks) for name in ("fp32", "tf32", "bf16", "fp16", "int8"))],
)
def test_products_of_awkward_sizes(precision, cases, monkeypatch):
    check(blocks.BlockGemm, cases, precision, monkeypatch)


@needs_gxx
@pytest.mark.parametrize(
    ("precision", "cases"),
    [("bf16", ON_HOPPER[::2]), *(pytest.param(name, ON_HOPPER, marks=pytest.mark.networks) for name in ("bf16", "fp16", "int8"))],
)
def test_products_on_hopper(precision, cases, monkeypatch):
    check_on_hopper(cases, precision, monkeypatch)


def check_on_hopper(cases, precision, monkeypatch):
    check(blocks.HopperBlockGemm, [(m, k * 2 if precision == "int8" else k, *rest) for m, k, *rest in cases], precision, monkeypatch, HOPPER)


def pruned(k, n, pattern="block64x64:0.5", seed=3):
    weight = np.random.default_rng(seed).standard_normal((k, n)).astype("float32")
    wanted = parse(pattern)
    return weight * wanted.mask(np.abs(weight), wanted.level)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("target", "precision", "pattern", "kind", "width"),
    [
        ("cuda:sm_80", "fp32", "block32x128:0.5", "gemm blocks", (32, 64, 128)),
        ("cuda:sm_80", "bf16", "block64x64:0.5", "gemm blocks", (32, 64)),
        ("cuda:sm_80", "bf16", "block64x128:0.5", "gemm blocks", (128,)),
        ("cuda:sm_80", "fp32", "block4x16:0.5", "gemm", (64, 128)),  # hardly a tile without numbers
        (HOPPER, "bf16", "block64x128:0.5", "gemm hopper blocks", (128,)),
        (HOPPER, "bf16", "block64x256:0.5", "gemm hopper blocks", (128, 256)),
        (HOPPER, "bf16", "block64x64:0.1", "gemm hopper", (256,)),  # few zeros
        (HOPPER, "bf16", "block4x16:0.5", "gemm hopper", (256,)),
    ],
)
def test_zeros_decide_on_the_template_and_its_tile(target, precision, pattern, kind, width):
    weight = pruned(2048, 2048, pattern)
    lowered = compiled(
        program_of(lambda emit, x: [emit(op.matmul(x, relax.const(weight)))], {"x": ((4096, 2048), "float32")}), target, precision, emit_only=True
    )
    (row,) = (row for row in lowered.report["kernels"] if row["template"] != "map")
    assert row["template"] == kind and int(row["schedule"].split("x")[1]) in width
    share = sum(array.nbytes for array in lowered.weights.values()) / (weight.size * (4 if precision == "fp32" else 2))
    assert (share < 0.52) == ("blocks" in kind) and share < 1.01


def test_the_model_knows_what_strips_keep():
    """All of K is the dense product; half of it less; one long strip holds up those that start with it, and no more."""
    shape = GemmShape(1, 4096, 2048, 4096)
    for target, cycles in (("cuda:sm_80", lambda *args: schedule.predicted_cycles(*args, "Bf16x2")), (HOPPER, schedule_hopper.predicted_cycles)):
        machine = Target.parse(target)
        tile = hopper(128, 128, 2, 4) if target == HOPPER else TileSchedule(128, 128, 2, 4, 4)
        dense, full, half, one = (
            cycles(replace(shape, strips=strips), tile, machine) for strips in ((), (2048,) * 32, (1024,) * 32, (2048, *(0,) * 31))
        )
        assert dense == full and 0.5 < half / dense < 0.6 and one < 0.3 * dense


@pytest.mark.networks
@needs_gxx
@pytest.mark.parametrize("target", ["cuda:sm_80", HOPPER])
def test_a_pruned_model_agrees_with_the_cpu_target(target):
    """Products by weights for which one kernel is best share it, though each has its own zeros; layers that were left alone have others, one of the same shapes."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(512, 512), torch.nn.Tanh())]).eval()
    with torch.no_grad():
        for layer, seed in ((model[0], 1), (model[2], 2)):
            layer.weight.copy_(torch.from_numpy(pruned(512, 512, "block128x128:0.5", seed).T.copy()))
    x = torch.randn(64, 512)
    options = {"example_inputs": (x,), "precision": "bf16"}
    artifact = tcompile.compile(model, target=target, emit_only=True, **options).artifact
    (ours,) = emulation(artifact)(x.numpy())
    theirs = tcompile.compile(model, **options)(x).numpy()
    assert np.abs(ours - theirs).max() < 2.0**-6  # a sum that differs in its last bit may round to the neighbour
    calls = Counter(row["template"] for row in artifact.report["kernels"] for _ in range(row["calls"]))
    assert sum(count for name, count in calls.items() if name.endswith("blocks")) == 2 and calls["gemm"] + calls["gemm hopper"] == 2
    assert len([row for row in artifact.report["kernels"] if row["template"].endswith("blocks")]) == 1


@pytest.mark.networks
@needs_gxx
@pytest.mark.parametrize(("target", "precision"), [("cuda:sm_80", "fp32"), (HOPPER, "fp16")])
def test_open_rows_and_numbers_that_zeros_do_not_meet(target, precision):
    """One packing for all numbers of rows; an infinity and a NaN reach the strips that keep a tile for them, and no other."""
    weight = pruned(512, 256, "block64x128:0.5")
    kept = (weight.reshape(8, 64, 2, 128) != 0).any(axis=(1, 3))
    (alone,) = np.flatnonzero(kept[:, 0] & ~kept[:, 1])[:1]  # a tile of k that the second strip leaves out

    def build(emit, x):
        return [emit(op.matmul(x, relax.const(weight)))]

    lowered = compiled(program_of(build, {"x": (("rows", 512), "float32")}, {"rows": DimRange(1, 100, 300)}), target, precision)
    assert all(row["template"].endswith("blocks") for row in lowered.report["kernels"] if row["template"] not in ("map", "sums"))
    model = emulation(lowered)
    for rows in (1, 37, 130):
        x = np.random.default_rng(rows).standard_normal((rows, 512)).astype("float32")
        (out,) = model(x)
        a, b = (short(x, precision), short(weight, precision)) if precision == "fp16" else (x.astype("float64"), weight.astype("float64"))
        assert (np.abs(out - a @ b) <= SUMS * (np.abs(a) @ np.abs(b))).all()
        x[0, 64 * alone] = np.nan
        (out,) = model(x)
        assert np.isnan(out[0, :128]).any() and np.isfinite(out[0, 128:]).all() and np.isfinite(out[1:]).all()


@pytest.mark.networks
@needs_gxx
@pytest.mark.parametrize("target", ["cuda:sm_80", HOPPER])
def test_taps_and_channels_of_convolutions(target, monkeypatch):
    """Whole taps, and channels of some features, are zero; windows are found as ever."""
    template = blocks.HopperBlockGemm if target == HOPPER else blocks.BlockGemm
    generator = np.random.default_rng(2)
    shapes = [
        ((2, 48, 9, 7), 3, 70, 2),
        ((1, 160, 6, 5), 3, 66, 1),
        ((3, 96, 5, 4), 1, 40, 1),
    ]  # channels that fill no tiles; more than a step of them; one tap
    tiles = {70: (64, 64), 66: (64, 64), 40: (64, 64)}
    make = (lambda bm, bn: hopper(bm, bn, 1, 3)) if target == HOPPER else (lambda bm, bn: TileSchedule(bm, bn, 2, 2, 3))
    forced(monkeypatch, template, [(0, 0, n, make(*each)) for n, each in tiles.items()])
    inputs, weights = {}, []
    for number, (image, taps, features, _) in enumerate(shapes):
        inputs[f"x{number}"] = generator.standard_normal(image).astype("float32")
        weight = generator.standard_normal((features, image[1], taps, taps)).astype("float32")
        weight[:, :, :1, :] *= taps == 1
        weight[:64, :64] = 0
        weights.append(weight)

    def build(emit, *xs):
        return [emit(op.nn.conv2d(x, relax.const(w), stride, w.shape[2] // 2)) for x, w, (*_, stride) in zip(xs, weights, shapes, strict=True)]

    outputs, lowered = run(build, inputs, target=target, precision="fp16")
    torch = pytest.importorskip("torch")
    for out, x, w, (*_, stride) in zip(outputs, inputs.values(), weights, shapes, strict=True):
        a, b = (torch.from_numpy(short(each, "fp16")) for each in (x, w))
        want = torch.nn.functional.conv2d(a, b, stride=stride, padding=w.shape[2] // 2).numpy()
        assert np.abs(out - want).max() <= 2e-6 * np.abs(want).max()
    kinds = [row["template"] for row in lowered.report["kernels"] if "conv" in row["template"]]
    assert kinds == ["conv2d hopper blocks" if target == HOPPER else "conv2d blocks"] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([(16, 32), (32, 64), (128, 256)]), st.integers(0, 2**32 - 1))
def test_tiles_are_told_by_the_values(k, n, tile, seed):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((k, n)).astype("float32") * mask(k, n, 16, 32, generator.random(), seed)
    found = zeros_of(weight)
    want = np.array([[bool(np.any(weight[i : i + tile[0], j : j + tile[1]])) for j in range(0, n, tile[1])] for i in range(0, k, tile[0])])
    assert found is None or (found.kept(*tile) == want).all()
    assert (found is None) == all(np.any(weight[i : i + 16, j : j + 32]) for i in range(0, k, 16) for j in range(0, n, 32))


@needs_nvcc
@needs_cuobjdump
@pytest.mark.networks
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_products_are_on_tensor_cores_and_nothing_spills(arch, tmp_path):
    """All tiles that wide patterns and narrow ones get, few rows (parts of K), and bytes."""
    weights = [pruned(2048, 2048, pattern) for pattern in ("block64x64:0.6", "block64x128:0.5", "block128x256:0.5")]
    codes = (np.sign(weights[2]) * 3).astype("int8")
    inputs = {"x": np.zeros((2048, 2048), "float32"), "few": np.zeros((64, 2048), "float32"), "octets": np.zeros((1024, 2048), "uint8")}

    def build(emit, x, few, octets):
        products = [emit(op.nn.relu(emit(op.matmul(x, relax.const(w))))) for w in weights]
        return [*products, emit(op.matmul(few, relax.const(weights[1]))), emit(op.matmul(octets, relax.const(codes), out_dtype="int32"))]

    precisions = ["bf16", "fp32"] if arch == "sm_80" else ["bf16"]
    for precision in precisions:
        lowered = compiled(program_of(build, inputs), f"cuda:{arch}", precision, emit_only=False)
        assert lowered.report["code_generation"]["remarks"] == []
        rows = {f"k_{row['kernel']}": row for row in lowered.report["kernels"]}
        code = {part.partition("\n")[0].strip(): part for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:]}
        products = {name: row for name, row in rows.items() if row["template"].endswith("blocks")}
        assert len(products) >= 4  # two may share one
        assert sum(row["template"] == "gemm hopper blocks" for row in products.values()) >= (3 if arch == "sm_90a" else 0)
        for name, row in products.items():
            integers = row["workload"].endswith("U8S8")
            if row["template"] == "gemm hopper blocks":
                assert ("IGMMA" if integers else "HGMMA") in code[name] and re.findall(r"UTMALDG\.\S+", code[name]) == ["UTMALDG.2D"] * 2
            else:
                assert ("IMMA.16832.U8.S8" if integers else "HMMA") in code[name] and "LDGSTS.E.BYPASS.128" in code[name]
            assert not re.search(r"\b(LDL|STL)\b", code[name]), row
        for name, registers, stack, local in re.findall(
            r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump(lowered.library, tmp_path, "-res-usage")
        ):
            assert int(stack) == int(local) == 0 and int(registers) * rows[name]["threads"] <= 65536
