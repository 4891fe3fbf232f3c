"""Depthwise and grouped convolutions of the CUDA target, run thread by thread on the CPU, against numpy, and what their machine code issues."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from cuda_models import compiled, program_of, run, templates
from tcompile.compiler.tvm import relax
from tcompile.targets.cuda.depthwise import Depthwise
from test_cuda_kernels import close, convolution
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(13)


def grouped(x, w, groups, stride, padding, dilation):
    """NHWC by HWIO in float64."""
    parts = zip(np.split(x, groups, 3), np.split(w, groups, 3), strict=True)
    return np.concatenate([convolution(image, kernel, stride, padding, dilation) for image, kernel in parts], 3)


def conv(emit, x, w, groups, stride, padding, dilation, dtype="float32"):
    return emit(op.nn.conv2d(x, w, stride, padding, dilation, groups, "NHWC", "HWIO", "NHWC", dtype))


#: N, H, W, C, taps, stride, padding, dilation: one pixel, primes, rows shorter than taps, channels that no vector divides, strides and dilations that skip rows
DEPTHWISE = [
    (1, 1, 1, 3, 1, 1, 0, 1),
    (2, 7, 11, 8, 3, 1, 1, 1),
    (1, 13, 9, 20, 5, 2, 2, 1),
    (1, 9, 10, 5, 3, 1, 2, 2),
    (1, 3, 17, 16, 7, 1, 3, 1),
    (1, 11, 11, 4, 2, 3, 0, 3),
]


def test_depthwise_tiles_of_awkward_sizes(monkeypatch):
    """Every size by all the kinds of tiles in turn: what a thread makes reaches over the edge in both directions; an epilogue on the sums."""
    seen = []

    def turn(self):
        fitting = self.space()
        seen.append(fitting[(7 * len(seen)) % len(fitting)])
        return seen[-1]

    monkeypatch.setattr(Depthwise, "best", turn)
    inputs = {}
    for number, (n, h, w, c, taps, *_) in enumerate(3 * DEPTHWISE):
        inputs |= {
            f"x{number}": RANDOM.standard_normal((n, h, w, c)).astype("float32"),
            f"w{number}": RANDOM.standard_normal((taps, taps, 1, c)).astype("float32"),
        }

    def build(emit, *x):
        cases = zip(3 * DEPTHWISE, x[::2], x[1::2], strict=True)
        return [
            emit(op.nn.relu(emit(op.add(conv(emit, image, kernel, case[3], *case[5:]), relax.const(np.float32(number))))))
            for number, (case, image, kernel) in enumerate(cases)
        ]

    outputs, lowered = run(build, inputs)
    values = list(inputs.values())
    for number, (case, found) in enumerate(zip(3 * DEPTHWISE, outputs, strict=True)):
        exact = grouped(values[2 * number], values[2 * number + 1], case[3], *case[5:])
        close(found, np.maximum(exact + number, 0), 1e-6)
    assert set(templates(lowered)) == {"depthwise"}
    assert len({(tile.high, tile.wide) for tile in seen}) > 6 and {tile.channels for tile in seen} >= {1, 2, 4}


def test_depthwise_of_short_numbers():
    """Bytes with exact sums, 16-bit numbers, and a result in two types."""
    x = {"codes": RANDOM.integers(0, 256, (1, 9, 7, 24), "uint8"), "half": RANDOM.standard_normal((1, 9, 7, 24)).astype("float16")}
    weights = {"codes": RANDOM.integers(-128, 128, (3, 3, 1, 24), "int8"), "half": RANDOM.standard_normal((3, 3, 1, 24)).astype("float16")}

    def build(emit, codes, half):
        wide = conv(emit, codes, relax.const(weights["codes"]), 24, 1, 1, 1, "int32")
        same = conv(emit, emit(op.astype(half, "float32")), relax.const(weights["half"].astype("float32")), 24, 2, 1, 1)
        return [wide, emit(op.astype(same, "float16")), emit(op.add(same, relax.const(np.float32(1))))]

    (wide, short, long), lowered = run(build, x)
    np.testing.assert_array_equal(wide, grouped(x["codes"].astype("int64"), weights["codes"].astype("int64"), 24, 1, 1, 1))
    exact = grouped(x["half"], weights["half"], 24, 2, 1, 1)
    close(short, exact, 1e-3)
    close(long, exact + 1, 1e-6)
    assert [row["workload"].split(", ")[-1] for row in lowered.report["kernels"] if row["template"] == "depthwise"] == ["uint8", "float16"]


#: N, H, W, C in, C out, groups, taps, stride, padding
GROUPED = [(1, 7, 9, 12, 24, 3, 3, 1, 1), (2, 6, 5, 32, 16, 2, 1, 1, 0), (1, 9, 8, 16, 68, 4, 3, 2, 1)]


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["float32", "float16", "uint8"])
def test_grouped_convolutions_are_products_of_groups(kind):
    cases = [case for case in GROUPED if kind != "uint8" or case[3] // case[5] % 4 == 0]
    inputs, weights = {}, []
    for number, (n, h, w, ci, co, groups, taps, *_) in enumerate(cases):
        shapes = (n, h, w, ci), (taps, taps, ci // groups, co)
        x, weight = (
            (RANDOM.integers(0, 256, shapes[0], "uint8"), RANDOM.integers(-128, 128, shapes[1], "int8"))
            if kind == "uint8"
            else (RANDOM.standard_normal(shape).astype(kind) for shape in shapes)
        )
        inputs[f"x{number}"] = x
        weights.append(weight)

    def build(emit, *images):
        results = []
        for (*_, groups, _taps, stride, padding), image, weight in zip(cases, images, weights, strict=True):
            dtype = "int32" if kind == "uint8" else "float32"
            image, weight = (image, weight) if kind == "uint8" else (emit(op.astype(image, "float32")), weight.astype("float32"))
            results.append(
                emit(
                    op.add(
                        conv(emit, image, relax.const(weight), groups, stride, padding, 1, dtype),
                        relax.const(np.arange(weight.shape[3], dtype=dtype)),
                    )
                )
            )
        return results

    outputs, lowered = run(build, inputs)
    for (*_, groups, _taps, stride, padding), x, weight, found in zip(cases, inputs.values(), weights, outputs, strict=True):
        exact = grouped(x.astype("float64"), weight.astype("float64"), groups, stride, padding, 1) + np.arange(weight.shape[3])
        close(found, exact, 0 if kind == "uint8" else 1e-6)
    assert templates(lowered).count("conv2d") == len(cases)


def instructions(text):
    """The opcodes of a kernel in SASS, in order."""
    return re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", text, re.MULTILINE)


@needs_nvcc
@needs_cuobjdump
def test_neighbours_share_loads_and_groups_are_on_tensor_cores(tmp_path):
    """An output of 3 x 3 taps took 96 instructions and 18 loads when each had a thread of its own, one of 5 x 5 taps 176 and 50."""
    shapes = {
        "small": (1, 56, 56, 72),
        "large": (8, 56, 56, 144),
        "wide": (1, 28, 28, 120),
        "codes": (1, 56, 56, 72),
        "images": (1, 14, 14, 64),
        "bytes": (1, 14, 14, 64),
    }
    inputs = {name: np.zeros(shape, "uint8" if name in ("codes", "bytes") else "float32") for name, shape in shapes.items()}
    taps = {
        name: np.ones((5 if name == "wide" else 3,) * 2 + (1, shapes[name][3]), "int8" if name == "codes" else "float32") for name in list(shapes)[:4]
    }

    def build(emit, *x):
        single = [
            conv(emit, image, relax.const(w), w.shape[3], 1, w.shape[0] // 2, 1, "int32" if w.dtype == "int8" else "float32")
            for image, w in zip(x, taps.values(), strict=False)
        ]
        weights = relax.const(np.ones((3, 3, 16, 64), "float32")), relax.const(np.ones((3, 3, 16, 64), "int8"))
        return [*single, conv(emit, x[4], weights[0], 4, 1, 1, 1), conv(emit, x[5], weights[1], 4, 1, 1, 1, "int32")]

    lowered = compiled(program_of(build, inputs), emit_only=False)
    code = {part.partition("\n")[0].strip(): part for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:]}
    found = []
    for row in lowered.report["kernels"]:
        text = code[f"k_{row['kernel']}"]
        assert not re.search(r"\b(LDL|STL)\b", text), row
        if row["template"] == "depthwise":
            high, wide, channels = map(int, re.match(r"(\d+)x(\d+) pixels x (\d+)", row["schedule"]).groups())
            issued = instructions(text)
            found.append((len(issued) / (high * wide * channels), sum(name.startswith("LDG") for name in issued) / (high * wide * channels)))
        else:
            assert ("IMMA.16832.U8.S8" if "U8S8" in row["workload"] else "HMMA.1688.F32.TF32") in text, row
    assert len(found) == 4 and len(lowered.report["kernels"]) == 6
    for (issued, loads), most in zip(found, [(45, 8), (30, 4), (90, 18), (50, 8)], strict=True):
        assert issued <= most[0] and loads <= most[1], found
