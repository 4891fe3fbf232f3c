"""Products by 2:4 weights on CUDA's sparse tensor cores: the order of weights and positions simulated in numpy, the kernel run by the emulation, facts of the machine code."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import tcompile
from cuda_models import compiled, emulation, program_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.element_types import numpy_dtype
from tcompile.compiler.tvm import relax
from tcompile.passes.sparsity.patterns import NofM
from tcompile.targets.base import Target
from tcompile.targets.cuda import sparse
from tcompile.targets.cuda.machines import MACHINES
from tcompile.targets.cuda.schedule import GemmShape
from tcompile.targets.cuda.sparse import SparseSchedule, best_tile, compressed, space, two_of_four
from test_cuda_half import SUMS, short
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
#: M, K, N, tile
CASES = [
    (1, 64, 64, SparseSchedule(8, 32, 1, 1, 3)),
    (17, 6, 19, SparseSchedule(8, 64, 1, 2, 3)),
    (31, 130, 33, SparseSchedule(32, 64, 1, 2, 4)),
    (9, 415, 40, SparseSchedule(16, 64, 1, 2, 3, 3)),
    (130, 96, 1, SparseSchedule(128, 64, 1, 2, 3)),
]


def pruned(k, n, seed=3):
    weight = np.random.default_rng(seed).standard_normal((k, n)).astype("float32")
    return np.where(NofM.of(2, 4).mask(np.abs(weight), 0.5), weight, 0).astype("float32")


def network(cases):
    generator = np.random.default_rng(1)
    inputs = {f"x{number}": generator.standard_normal((m, k)).astype("float32") for number, (m, k, *_) in enumerate(cases)}
    weights = [pruned(k, n) for _, k, n, *_ in cases]
    bias = [generator.standard_normal(n).astype("float32") for _, _, n, *_ in cases]

    def build(emit, *xs):
        products = [emit(op.matmul(x, relax.const(weight))) for x, weight in zip(xs, weights, strict=True)]
        return [emit(op.nn.relu(emit(op.add(product, relax.const(add))))) for product, add in zip(products, bias, strict=True)]

    return build, inputs, weights, bias


@needs_gxx
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.networks)])
def test_products_of_awkward_sizes(precision, monkeypatch):
    check(precision, monkeypatch)


def check(precision, monkeypatch):
    cases, tiles = CASES, {(m, n): tile for m, _, n, tile in CASES}
    monkeypatch.setattr(sparse.SparseGemm, "best", lambda self: tiles[self.m, self.n])
    build, inputs, weights, bias = network(cases)
    outputs, lowered = run(build, inputs, precision=precision)
    for out, x, weight, add in zip(outputs, inputs.values(), weights, bias, strict=True):
        a, b = short(x, precision), short(weight, precision)
        assert (np.abs(out - np.maximum(a @ b + add, 0)) <= SUMS * (np.abs(a) @ np.abs(b) + np.abs(add))).all()
    rows = [row for row in lowered.report["kernels"] if row["template"] not in ("map", "sums")]
    assert [(row["template"], row["schedule"]) for row in rows] == [("gemm 2:4", str(tile)) for *_, tile in cases]
    columns = [-(-n // 32) * -(-k // 32) * sparse.UNIT_WORDS * 4 for _, k, n, _ in cases]
    assert sum(array.nbytes for array in lowered.weights.values()) == sum(columns) + sum(4 * n for _, _, n, _ in cases)


def test_other_weights_stay_dense():
    """Three of four kept in one place, and float32 products."""
    weight = pruned(64, 48)
    weight[5:8, 40] = 1
    inputs = {"x": np.zeros((256, 64), "float32")}

    def build(emit, x):
        return [emit(op.matmul(x, relax.const(weight))), emit(op.matmul(x, relax.const(pruned(64, 48))))]

    for precision, kinds in (("bf16", {"gemm", "gemm 2:4"}), ("fp32", {"gemm"})):
        rows = compiled(program_of(build, inputs), precision=precision).report["kernels"]
        assert {row["template"] for row in rows if row["template"] != "map"} == kinds
    assert two_of_four(short_weight(pruned(7, 5))) and not two_of_four(short_weight(weight)) and not two_of_four(pruned(8, 5))


@needs_gxx
def test_a_pruned_model_agrees_with_products_of_rounded_operands():
    """One kernel for the weights of the pattern, and another one of the same shapes for a layer that was left alone."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[layer for _ in range(3) for layer in (torch.nn.Linear(64, 64), torch.nn.Tanh())]).eval()
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight.copy_(torch.from_numpy(pruned(64, 64).T.copy()))
    x = torch.randn(5, 64)
    options = {"example_inputs": (x,), "precision": "bf16"}
    artifact = tcompile.compile(model, target="cuda", emit_only=True, **options).artifact
    (ours,) = emulation(artifact)(x.numpy())
    theirs = x.numpy().astype("float64")
    for layer in model[::2]:
        weight, bias = (value.detach().numpy() for value in (layer.weight, layer.bias))
        theirs = np.tanh(short(theirs.astype("float32"), "bf16") @ short(weight, "bf16").T + bias)
    assert np.abs(ours - theirs).max() < 2.0**-7  # a sum that differs in its last bit may round to the neighbour
    calls = Counter(row["template"] for row in artifact.report["kernels"] for _ in range(row["calls"]))
    assert calls["gemm 2:4"] == 2 and calls["gemm"] == 1


def short_weight(weight, dtype="bfloat16"):
    return weight.astype(numpy_dtype(dtype))


def matrix_of(packed):
    """What mma.sp multiplies by, by the PTX manual: A's fragments are those of m16n8k16 on what stays, and the lanes 2 s, 2 s + 1 of every four (s the selector) have the positions of 16 k
    each, those of row g in the low half and those of row g + 8 in the high one, 4 bits per four k."""
    strips, units, _ = packed.shape
    matrix = np.zeros((units * 32, strips * 32), np.uint16)
    for strip in range(strips):
        for unit in range(units):
            words = packed[strip, unit].view(np.uint32)
            for tile in range(2):
                for row in range(16):
                    column = 32 * strip + 4 * (row % 8) + 2 * tile + row // 8
                    for four in range(8):
                        place = int(words[256 + row % 8 * 4 + 2 * tile + four // 4]) >> (16 * (row // 8) + 4 * (four % 4)) & 15
                        assert place & 3 < place >> 2
                        for number, position in enumerate((place & 3, place >> 2)):
                            kept = 2 * four + number  # slot among the 16 that stay
                            lane, register = row % 8 * 4 + kept % 8 // 2, row // 8 + 2 * (kept // 8)
                            word = int(words[128 * tile + 4 * lane + register])
                            matrix[32 * unit + 4 * four + position, column] = word >> 16 * (kept % 2) & 0xFFFF
    return matrix


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_weights_in_the_order_of_fragments_are_the_matrix(k, n, seed):
    weight = short_weight(pruned(k, n, seed))
    np.testing.assert_array_equal(matrix_of(compressed(weight))[:k, :n], weight.view(np.uint16))


@pytest.mark.parametrize("arch", sorted(MACHINES))
def test_schedules_fit_the_machine(arch):
    target = Target.parse(f"cuda:{arch}")
    assert all(tile.shared_bytes <= target.shared_bytes for tile in space(target))
    small, large = (best_tile(GemmShape(1, m, 2048, 4096), target) for m in (1, 4096))
    assert small.bm == 8 and large.bm >= 64


@needs_nvcc
@needs_cuobjdump
@pytest.mark.networks
@pytest.mark.parametrize(("arch", "precision"), [("sm_80", "bf16"), ("sm_90a", "fp16")])
def test_products_are_on_sparse_tensor_cores(arch, precision, tmp_path):
    build, inputs, *_ = network([(1, 256, 64), (64, 512, 256)])
    lowered = compiled(program_of(build, inputs), f"cuda:{arch}", precision, emit_only=False)
    rows = {f"k_{row['kernel']}": row for row in lowered.report["kernels"]}
    code = {part.partition("\n")[0].strip(): part for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:]}
    products = [name for name, row in rows.items() if row["template"] == "gemm 2:4"]
    assert products
    for name in products:
        assert "HMMA.SP.16832.F32" in code[name] and "LDGSTS.E.BYPASS.128" in code[name] and not re.search(r"\b(LDL|STL)\b", code[name])
    for name, registers, stack, local in re.findall(
        r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump(lowered.library, tmp_path, "-res-usage")
    ):
        assert int(stack) == int(local) == 0 and int(registers) * rows[name]["threads"] <= 65536
