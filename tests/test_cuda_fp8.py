"""float8_e4m3fn on CUDA: its casts and products by mma.sync and wgmma, run by the emulation, whose tensor cores add such products up with about 14 bits; facts of nvcc's code."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import tcompile
import torch
from cuda_models import compiled, emulation, program_of, run
from tcompile.compiler.element_types import FLOAT8
from tcompile.compiler.tvm import relax
from tcompile.passes.quantization.formats import float8
from tcompile.passes.quantization.quantize import Quantize
from tcompile.targets.cuda import gemm
from tcompile.targets.cuda.schedule import TileSchedule
from test_cuda_hopper import forced_tiles, tile
from test_cuda_kernels import convolution
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc
from test_fp8 import awkward_numbers, cast_there_and_back, same_bits

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(19)
#: error of a sum over the sum of magnitudes: of 128 products in the tensor cores, of fp32
SUMS = {"cuda:sm_80": 1e-6, "cuda:sm_89": 1e-3, "cuda:sm_90a": 1e-3}
NATIVE = ("cuda:sm_89", "cuda:sm_90a")


@pytest.fixture(autouse=True)
def _seeded():
    global RANDOM
    RANDOM = np.random.default_rng(19)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def weight(*shape):
    return float8(floats(*shape))


def times(emit, x, w):
    return emit(op.matmul(emit(op.astype(x, FLOAT8)), relax.const(w, FLOAT8), out_dtype="float32"))


def exact(x, w):
    """(product of the rounded operands, sums of magnitudes), float64."""
    a, b = float8(x).astype("float64"), w.astype("float64")
    return a @ b, np.abs(a) @ np.abs(b)


#: M, K, N, tile of sm_90a: ones, primes, K that fills no words, more K than a block is summed apart, tails, parts of K
PRODUCTS = [
    (1, 1, 1, None),
    (17, 7, 19, None),
    (31, 130, 33, None),
    (67, 1008, 131, tile(64, 192, 1, 3)),
    (131, 272, 61, tile(128, 64, 1, 4)),
    (129, 400, 193, tile(128, 192, 2, 4)),
    (5, 1040, 40, tile(64, 64, 1, 4, parts=4)),
]


@needs_gxx
@pytest.mark.parametrize("target", ["cuda:sm_90a", *(pytest.param(each, marks=pytest.mark.networks) for each in ("cuda:sm_89", "cuda:sm_80"))])
def test_casts_and_products_of_awkward_sizes(monkeypatch, target):
    if target == "cuda:sm_90a":
        forced_tiles(monkeypatch).update({n: each for _, _, n, each in PRODUCTS if each})
    inputs = {f"x{number}": 3 * floats(m, k) for number, (m, k, *_) in enumerate(PRODUCTS)}
    weights = [weight(k, n) for _, k, n, _ in PRODUCTS]

    def build(emit, numbers, *x):
        return [*cast_there_and_back(emit, numbers), *(times(emit, a, w) for a, w in zip(x, weights, strict=True))]

    numbers = awkward_numbers()
    (cast, *outputs), lowered = run(build, {"numbers": numbers, **inputs}, target=target)
    same_bits(cast, numbers)
    for out, x, w in zip(outputs, inputs.values(), weights, strict=True):
        want, magnitude = exact(x, w)
        assert (np.abs(out - want) <= SUMS[target] * magnitude).all()
    rows = [row for row in lowered.report["kernels"] if row["template"].startswith("gemm")]
    assert {row["workload"].split()[-1] for row in rows} == {"E4m3x4" if target in NATIVE else "Fp16x2"}
    hopper = [str(each) for *_, each in PRODUCTS if each] if target == "cuda:sm_90a" else []
    assert [row["schedule"] for row in rows if row["template"] == "gemm hopper"] == hopper
    assert sum(array.nbytes for array in lowered.weights.values()) >= sum(w.size for w in weights) * (1 if target in NATIVE else 2)


@pytest.fixture
def whole_sums(monkeypatch):
    """Products of 24 columns take all of K in one part: by wgmma on sm_90a, by mma.sync elsewhere."""
    forced_tiles(monkeypatch)[24] = tile(64, 64, 1, 4)
    monkeypatch.setattr(gemm, "best_tile", lambda *_, **__: TileSchedule(16, 32, 1, 2, 3))


@needs_gxx
@pytest.mark.usefixtures("whole_sums")
def test_long_sums_are_added_up_in_fp32():
    """Sums of positive numbers: the tensor cores would lose most of what comes last."""
    x, w = np.abs(floats(16, 8192)) + np.float32(0.25), float8(np.abs(floats(8192, 24)) + np.float32(0.25))
    want, _ = exact(x, w)
    for target in NATIVE:
        (out,), lowered = run(lambda emit, x: [times(emit, x, w)], {"x": x}, target=target)
        assert np.abs(out / want - 1).max() < 2e-3
        assert lowered.report["kernels"][-1]["template"] == ("gemm" if target == "cuda:sm_89" else "gemm hopper")


@needs_gxx
@pytest.mark.networks
@pytest.mark.usefixtures("whole_sums")
def test_the_emulation_notices_sums_that_stay_in_the_tensor_cores():
    x, w = np.abs(floats(16, 8192)) + np.float32(0.25), float8(np.abs(floats(8192, 24)) + np.float32(0.25))
    want, _ = exact(x, w)
    for target in NATIVE:
        lowered = compiled(program_of(lambda emit, x: [times(emit, x, w)], {"x": x}), target, emit_only=True)
        promoted = "using E4m3x4 = Words<MmaE4m3, true>;"
        assert promoted in lowered.sources["tcompile.cuh"]
        lowered.sources["tcompile.cuh"] = lowered.sources["tcompile.cuh"].replace(promoted, "using E4m3x4 = Words<MmaE4m3>;")
        (out,) = emulation(lowered)(x)
        assert np.abs(out / want - 1).min() > 0.03


#: image, taps, features, stride, padding, groups
IMAGES = [((2, 7, 9, 3), 3, 10, 2, 1, 1), ((1, 6, 5, 8), 1, 12, 1, 0, 1), ((1, 8, 8, 32), 3, 24, 1, 1, 2), ((1, 9, 7, 16), 3, 30, 1, 1, 1)]


@needs_gxx
@pytest.mark.networks
@pytest.mark.parametrize("target", NATIVE)
def test_convolutions(monkeypatch, target):
    forced_tiles(monkeypatch)[30] = tile(64, 64, 1, 3)
    inputs = {f"x{number}": floats(*image) for number, (image, *_) in enumerate(IMAGES)}
    weights = [weight(taps, taps, image[-1] // groups, features) for image, taps, features, _, _, groups in IMAGES]

    def build(emit, *x):
        return [
            emit(op.nn.conv2d(emit(op.astype(data, FLOAT8)), relax.const(w, FLOAT8), stride, padding, 1, groups, "NHWC", "HWIO", "NHWC", "float32"))
            for data, w, (*_, stride, padding, groups) in zip(x, weights, IMAGES, strict=True)
        ]

    outputs, lowered = run(build, inputs, target=target)
    for out, x, w, (*_, stride, padding, groups) in zip(outputs, inputs.values(), weights, IMAGES, strict=True):
        images, taps = np.split(float8(x).astype("float64"), groups, axis=-1), np.split(w.astype("float64"), groups, axis=-1)
        want = np.concatenate([convolution(image, tap, stride, padding, 1) for image, tap in zip(images, taps, strict=True)], axis=-1)
        assert np.abs(out - want).max() <= 2e-3 * np.abs(want).max()
    kinds = [row["template"] for row in lowered.report["kernels"] if row["template"].startswith("conv2d")]
    assert len(kinds) == 4 and ("conv2d hopper" in kinds) == (target == "cuda:sm_90a")


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.norm = torch.nn.Conv2d(3, 32, 3, 2, 1), torch.nn.LayerNorm(32)
        self.up, self.down, self.head = torch.nn.Linear(32, 72), torch.nn.Linear(72, 32), torch.nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x)).flatten(2).transpose(1, 2)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


@needs_gxx
@pytest.mark.networks
@pytest.mark.parametrize(("target", "observer"), [("cuda:sm_89", "dynamic"), ("cuda:sm_90a", "minmax"), ("cuda:sm_80", "mse")])
def test_a_network_as_on_the_cpu(target, observer):
    network, samples = Mixer().eval(), [(floats(2, 3, 14, 10),) for _ in range(3)]
    options = {"example_inputs": samples[0], "quantize": Quantize("fp8", observer=observer), "calibration": samples}
    artifact = tcompile.compile(network, target=target, emit_only=True, **options).artifact
    step = next(entry for entry in artifact.report["passes"] if entry["name"] == "quantize")
    assert step["matches"] == {"matmul": 3, "conv2d": 1} and 0 < step["loss"]["cosine"] < 2e-3
    assert bool(step["notes"]) == (target == "cuda:sm_80")
    (out,) = emulation(artifact)(*samples[1])
    ours, reference = tcompile.compile(network, **options)(*samples[1]), network(torch.from_numpy(samples[1][0])).detach().numpy()
    size = np.abs(reference).max()
    # a sum that differs in its last bits may round to the neighbour
    assert np.abs(out - ours).max() < 0.01 * size and np.abs(out - reference).max() < 0.1 * size
    if observer != "dynamic" and target in NATIVE:  # codes are made where the tensors are
        assert "tc::To<tc::float8> out" in artifact.sources["model.cu"]


def build(target):
    """A large product with an epilogue, one of few rows, and windows of an image."""
    inputs = {"x": ((2048, 1024), "float32"), "few": ((8, 1024), "float32"), "image": ((8, 28, 28, 128), "float32")}
    taps = weight(3, 3, 128, 256)

    def graph(emit, x, few, image):
        windows = emit(op.nn.conv2d(emit(op.astype(image, FLOAT8)), relax.const(taps, FLOAT8), 1, 1, 1, 1, "NHWC", "HWIO", "NHWC", "float32"))
        return [emit(op.nn.gelu(times(emit, x, weight(1024, 4096)))), times(emit, few, weight(1024, 1024)), windows]

    return compiled(program_of(graph, inputs), target, emit_only=False)


@needs_nvcc
@needs_cuobjdump
@pytest.mark.networks
@pytest.mark.parametrize(
    ("target", "products"),
    [("cuda:sm_89", ["QMMA.16832.F32.E4M3.E4M3"] * 3), ("cuda:sm_90a", ["QGMMA.64x", "QGMMA.64x", "HMMA.16816.F32"])],  # by how many rows they have
)
def test_tensor_cores_multiply_and_nothing_spills(tmp_path, target, products):
    lowered = build(target)
    assert lowered.report["code_generation"]["remarks"] == []
    code = {
        name.strip(): text for name, _, text in (part.partition("\n") for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:])
    }
    rows = [row for row in lowered.report["kernels"] if row["workload"].endswith("E4m3x4")]
    assert len(rows) == 3
    rows.sort(key=lambda row: -int(row["workload"].split("x")[1]))
    for row, product in zip(rows, products, strict=True):
        text = code[f"k_{row['kernel']}"]
        assert product in text and not re.search(r"\b(LDL|STL)\b", text), row
    assert sum("F2FP.SATFINITE.E4M3.F32" in text for text in code.values()) == 3  # the inputs are rounded by one instruction
