"""Grouped products on CUDA: run by the emulation against the operator's reference over awkward sizes and ends, facts of the machine code."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from cuda_models import compiled, emulation, program_of
from tcompile.compiler.dialect.grouped import grouped_matmul, reference
from tcompile.compiler.tvm import relax
from tcompile.targets.cuda.grouped import Grouped
from tcompile.targets.cuda.schedule import TileSchedule
from test_cpu_grouped import ends_of
from test_cuda_half import SUMS
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(7)

#: S (a name: open), E, K, N, schedule (None: the best)
CASES = [
    (1, 1, 1, 1, None),
    (11, 4, 3, 5, None),
    (37, 5, 67, 33, TileSchedule(16, 32, 1, 2, 3)),
    (131, 3, 40, 72, TileSchedule(64, 32, 2, 2, 4)),
    (5, 8, 260, 34, TileSchedule(16, 64, 1, 4, 3, 4)),
    ("rows", 7, 36, 20, None),
]


def lowered_of(cases, **options):
    """relu(grouped(x, w, ends) * gates + bias) of every case."""
    weights = [RANDOM.standard_normal((experts, k, n)).astype("float32") for _, experts, k, n, _ in cases]
    bias = [RANDOM.standard_normal(n).astype("float32") for *_, n, _ in cases]
    inputs = {}
    for number, (rows, experts, k, *_) in enumerate(cases):
        inputs |= {f"x{number}": ((rows, k), "float32"), f"ends{number}": ((experts,), "int64"), f"gates{number}": ((rows, 1), "float32")}

    def build(emit, *values):
        results = []
        for number, (weight, add) in enumerate(zip(weights, bias, strict=True)):
            x, ends, gates = values[3 * number : 3 * number + 3]
            product = emit(op.multiply(emit(grouped_matmul(x, relax.const(weight), ends)), gates))
            results.append(emit(op.nn.relu(emit(op.add(product, relax.const(add))))))
        return results

    return compiled(program_of(build, inputs), **options), weights, bias


def check(cases, precision, error, monkeypatch):
    asked = {(k, n): schedule for *_, k, n, schedule in cases}
    best = Grouped._best
    monkeypatch.setattr(Grouped, "_best", lambda self, shape: asked[self.k * self.group, self.n] or best(self, shape))
    lowered, weights, bias = lowered_of(cases, precision=precision)
    run = emulation(lowered)
    for kind in ends_of(1, 1):
        values, wanted = [], []
        for (rows, experts, k, *_), weight, add in zip(cases, weights, bias, strict=True):
            rows = 19 if isinstance(rows, str) else rows
            x, gates = RANDOM.standard_normal((rows, k)).astype("float32"), RANDOM.standard_normal((rows, 1)).astype("float32")
            ends = ends_of(rows, experts)[kind]
            values += [x, ends, gates]
            wanted.append((reference(x, weight, ends) * gates + add, reference(np.abs(x), np.abs(weight), ends) * np.abs(gates) + np.abs(add)))
        outputs = run(*values)
        assert run.error == 0
        for out, (want, scale), case in zip(outputs, wanted, cases, strict=True):
            assert (np.abs(out - np.maximum(want, 0)) <= error * scale).all(), (case, kind)
    rows = [row for row in lowered.report["kernels"] if row["template"] == "grouped_gemm"]
    assert len(rows) >= len(cases)
    return rows


@needs_gxx
def test_products_of_awkward_sizes(monkeypatch):
    rows = check(CASES, "fp32", SUMS, monkeypatch)
    assert [row["schedule"] for row in rows][2:5] == [str(case[-1]) for case in CASES[2:5]]


@pytest.mark.networks
@needs_gxx
@pytest.mark.parametrize(("precision", "error"), [("tf32", 2.0**-9), ("fp16", 2.0**-9), ("bf16", 2.0**-6)])
def test_products_in_other_precisions(precision, error, monkeypatch):
    check(CASES, precision, error, monkeypatch)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(("precision", "instruction"), [("fp32", "HMMA.1688.F32.TF32"), ("bf16", "HMMA.16816.F32.BF16")])
def test_products_are_on_tensor_cores_and_nothing_spills(precision, instruction, tmp_path):
    cases = [(512, 8, 1024, 768, None), (4, 8, 1024, 768, None), ("rows", 8, 768, 511, None)]
    lowered, *_ = lowered_of(cases, precision=precision, emit_only=False)
    code = dict(part.partition("\n")[::2] for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:])
    code = {name.strip(): text for name, text in code.items()}
    for row in lowered.report["kernels"]:
        text = code[f"k_{row['kernel']}"]
        assert not re.search(r"\b(LDL|STL)\b", text), row
        assert (instruction in text) == ("LDGSTS" in text) == (row["template"] == "grouped_gemm"), row
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump(lowered.library, tmp_path, "-res-usage"))
    assert usage and all(int(stack) == int(local) == 0 for _, _, stack, _, local in usage)
