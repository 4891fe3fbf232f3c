"""Few-bit weights by int8 activations on CUDA: the order of the codes simulated in numpy, the kernels run by the emulation against the operator's reference, facts of the machine code."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tcompile
import torch
from cuda_models import compiled, emulation, program_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.dialect.weight_only import reference, weight_only_matmul
from tcompile.compiler.tvm import relax
from tcompile.passes.quantization.formats import GroupedInt
from tcompile.targets.common.words import planes
from tcompile.targets.cuda import weight_only
from tcompile.targets.cuda.weight_only_schedule import FewRows, ManyRows, Shape, best
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc
from test_cuda_weight_only import constant, needs_gxx, weights_of

op = relax.op

#: M, K, N, format, schedule (None: the best)
CASES = [
    (1, 128, 64, GroupedInt(4, 32), None),
    (9, 1, 5, GroupedInt(3, 4), None),
    (3, 97, 34, GroupedInt(1, 32), FewRows(2, 8, 1)),
    (33, 200, 65, GroupedInt(7, 48, symmetric=False), ManyRows(32, 4, 3, 1)),
    (8, 260, 40, GroupedInt(8, 64, symmetric=False), FewRows(2, 2, 2)),
    (19, 96, 33, GroupedInt(6, 20), ManyRows(16, 2, 3, 1)),
    (2, 131, 31, GroupedInt(2, 128, symmetric=False), None),
]


def check(cases, monkeypatch):
    rng = np.random.default_rng(0)
    operands = [weights_of(k, n, made) for _, k, n, made, _ in cases]
    inputs = {f"x{number}": rng.integers(-128, 128, (m, k), dtype=np.int8) for number, (m, k, *_) in enumerate(cases)}
    asked = {(m, k + -k % 4, n): schedule for m, k, n, _, schedule in cases}
    monkeypatch.setattr(weight_only, "best", lambda shape, target: asked[shape.m, shape.k, shape.n] or best(shape, target))

    def build(emit, *xs):
        made = zip(xs, operands, cases, strict=True)
        return [
            emit(op.nn.relu(emit(weight_only_matmul(x, *map(constant, arrays), bits=case[3].bits, group=case[3].group)))) for x, arrays, case in made
        ]

    outputs, lowered = run(build, inputs)
    for out, x, arrays, (*_, made, _) in zip(outputs, inputs.values(), operands, cases, strict=True):
        weight = reference(np.eye(x.shape[1]), *arrays, bits=made.bits, group=made.group)
        # sums of 32 k are exact
        error = np.abs(out - np.maximum(x.astype(np.float64) @ weight, 0)) / (np.abs(x.astype(np.float64)) @ np.abs(weight) + 1e-30)
        assert out.dtype == np.float32 and error.max() <= 1e-6, (made, error.max())
    rows = [row for row in lowered.report["kernels"] if row["template"] == "weight only"]
    assert len(rows) == len(cases) and all(row["workload"].startswith("int8 x int") for row in rows)


@needs_gxx
def test_products_of_awkward_sizes(monkeypatch):
    check(CASES, monkeypatch)


@pytest.mark.networks
@needs_gxx
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_every_width(symmetric, monkeypatch):
    check(
        [(m + bits, k, 39 + bits, GroupedInt(bits, group, symmetric), None) for bits in range(1, 9) for m, k, group in ((0, 97, 32), (15, 132, 12))],
        monkeypatch,
    )


@pytest.mark.slow
@needs_gxx
def test_a_model_agrees_with_the_cpu_target():
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(20, 37), torch.nn.ReLU(), torch.nn.Linear(37, 24), torch.nn.GELU(), torch.nn.Linear(24, 7)).eval()
    x = torch.randn(5, 20)
    for quantize in ("w4a8", "w3fp8"):
        artifact = tcompile.compile(net, example_inputs=(x,), target="cuda", quantize=quantize, emit_only=True).artifact
        (ours,) = emulation(artifact)(x.numpy())
        host = tcompile.compile(net, example_inputs=(x,), quantize=quantize)(x.numpy())
        assert np.abs(ours - host).max() <= 0.02 * np.abs(host).max()  # a number of eight bits may be rounded to the other side
        assert [row["template"] for row in artifact.report["kernels"]].count("weight only") == 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 25), st.integers(1, 70), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_codes_in_the_order_of_fragments_are_the_matrix(bits, words, n, group, seed):
    """What `mma.sync` m16n8k32 multiplies by: register r + 2 s of lane 4 g + t has row g + 8 r and k = 16 s + 4 t and the next three."""
    k, made = 4 * words, GroupedInt(bits, 4 * group)
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (made.groups(k) * made.group, n)).astype("uint8")
    shape = Shape(1, k, n, bits, min(made.group, k), False, 1, False, False, True)
    packed = weight_only.shuffled(made.pack(codes), shape).view(np.uint32)
    lane = np.arange(32)
    matrix = np.zeros((shape.all_units * 32, shape.strips * 32), np.int64)
    for q in range(8):
        for octet in range(4):
            found, start = 0, 0
            for width, low in planes(bits):
                per_word = 8 // width
                place = start + 128 * (q // 4) + 4 * lane + q % 4 if width == 8 else start + lane * width + q // per_word
                found, start = (
                    found | (packed[:, :, place] >> np.uint32(8 * octet + width * (q % per_word)) & (1 << width) - 1) << low,
                    start + 32 * width,
                )
            row = 16 * (q // 2 % 2) + 4 * (lane % 4) + octet
            column = 4 * (lane // 4) + 2 * (q // 4) + q % 2
            for strip in range(shape.strips):
                for unit in range(shape.all_units):
                    matrix[32 * unit + row, 32 * strip + column] = found[strip, unit] ^ 1 << (bits - 1)
    place = np.arange(k) // shape.group * shape.spread + np.arange(k) % shape.group
    np.testing.assert_array_equal(matrix[place, :n], codes[:k])


def golden(arch, cases, folder):
    operands = [weights_of(k, n, made) for _, k, n, made in cases]
    inputs = {f"x{number}": ((m, k), "int8") for number, (m, k, *_) in enumerate(cases)}

    def build(emit, *xs):
        made = zip(xs, operands, cases, strict=True)
        return [emit(weight_only_matmul(x, *map(constant, arrays), bits=case[3].bits, group=case[3].group)) for x, arrays, case in made]

    lowered = compiled(program_of(build, inputs), f"cuda:{arch}", emit_only=False)
    code = dict(part.partition("\n")[::2] for part in dump(lowered.library, folder, "-sass").split("Function : ")[1:])
    code = {name.strip(): text for name, text in code.items()}
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump(lowered.library, folder, "-res-usage"))
    rows = {f"k_{row['kernel']}": row for row in lowered.report["kernels"]}
    assert len(usage) == len(cases)
    for name, _, stack, _, local in usage:
        row, text = rows[name], code[name]
        assert int(stack) == int(local) == 0 and not re.search(r"\b(LDL|STL|I2F|F2I|I2FP)\b", text), row
        assert "IMMA.16832.S8.S8" in text, row
        bits, zeros = int(re.search(r"x int(\d)", row["workload"])[1]), "zeros" in row["workload"]
        if "strips" in row["schedule"] and not zeros:
            units = len(re.findall(r"\bIMMA\b", text)) // 2
            # a mask for four codes of each plane; the rest finds places of activations
            assert len(re.findall(r"\bLOP3\b", text)) <= units * (8 * (bits % 8).bit_count() + 16), row


@needs_nvcc
@needs_cuobjdump
def test_codes_are_multiplied_as_bytes_on_tensor_cores(tmp_path):
    golden("sm_80", [(1, 512, 256, GroupedInt(4, 32)), (40, 512, 96, GroupedInt(3, 128, symmetric=False))], tmp_path)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_codes_of_every_width_are_multiplied_as_bytes(arch, tmp_path):
    golden(arch, [(m, 512, 32 * bits, GroupedInt(bits, 32)) for bits in range(1, 9) for m in (1, 40)], tmp_path)
