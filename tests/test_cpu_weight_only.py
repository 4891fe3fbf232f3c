"""Weight-only GEMM: against the numpy reference of the operator over awkward sizes and formats, and the instructions that unpack the codes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from kernels import only_kernel
from machines import runnable
from tcompile.compiler.dialect.weight_only import reference, rows_of, weight_only_matmul
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.passes.quantization.formats import GroupedInt
from tcompile.targets.base import Target
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tcompile.targets.cpu.weight_only import WeightOnly

WEIGHTS = frozenset([1, 2, 3])


def fused(m: Any, k: int, n: int, made: GroupedInt, dtype: str = "float32") -> Any:
    """relu(x @ w + b) as Relax fuses it; m may be a symbol's name."""
    groups = made.groups(k)
    x = relax.Var("x", relax.TensorType((tirx.Var(m, "int64") if isinstance(m, str) else m, k), dtype))
    packed = relax.Var("w", relax.TensorType((rows_of(groups * made.group, made.bits), n), "uint8"))
    scales = relax.Var("s", relax.TensorType((groups, n), "float32"))
    zeros = [] if made.symmetric else [relax.Var("z", relax.TensorType((groups, n), "uint8"))]
    bias = relax.Var("b", relax.TensorType((n,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, packed, scales, *zeros, bias]):
        with builder.dataflow():
            y = builder.emit(weight_only_matmul(x, packed, scales, *zeros, bits=made.bits, group=made.group))
            y = builder.emit_output(relax.op.nn.relu(relax.op.add(y, bias)))
        builder.emit_func_output(y)
    return only_kernel(builder.get())


def compiled(kernel: Any, target: Target) -> Any:
    return tvm.compile(kernel.func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)


CASES = [
    (1, 128, 64, GroupedInt(4, 32)),
    (1, 70, 33, GroupedInt(4, 32, symmetric=False)),
    (3, 257, 50, GroupedInt(8, 64, symmetric=False)),
    (2, 5, 1, GroupedInt(8, 32)),
    (19, 96, 100, GroupedInt(4, 32, symmetric=False)),
    (33, 130, 40, GroupedInt(8, 128)),
    ("rows", 100, 70, GroupedInt(4, 32)),
    ("rows", 100, 128, GroupedInt(8, 32, symmetric=False)),
    (1, 1, 5, GroupedInt(3, 2)),
    (2, 97, 31, GroupedInt(1, 32)),
    (9, 100, 37, GroupedInt(3, 22, symmetric=False)),
    (1, 193, 40, GroupedInt(5, 64)),
    ("rows", 71, 33, GroupedInt(6, 18)),
]


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", runnable())
def test_against_the_reference(case, target):
    check(*case, target)


@pytest.mark.networks
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", runnable())
def test_every_width(bits, symmetric, target):
    for m, k, n, group in ((1, 67, 33, 32), (33, 129, 20, 48), (9, 64, 17, 2)):
        check(m, k, n, GroupedInt(bits, group, symmetric), target)


def check(m, k, n, made, target):
    rng = np.random.default_rng(k)
    weight = rng.standard_normal((k, n)).astype(np.float32)
    encoded = made.encode(weight + (0 if made.symmetric else 0.7))
    arrays = [made.pack(encoded.codes), np.ascontiguousarray(encoded.scale[:, 0])]
    arrays += [] if made.symmetric else [encoded.zero[:, 0].astype(np.uint8)]
    bias = rng.standard_normal(n).astype(np.float32)
    template, func = WeightOnly(), fused(m, k, n, made)
    workload = template.workload(func, WEIGHTS)
    space = list(template.space(workload, target))
    # some schedules of either kind
    picks = [schedule for panel in (False, True) for schedule in [one for one in space if one.panel == panel][:: max(1, len(space) // 2)]]
    for schedule in picks:
        kernel = template.build(func, workload, schedule, target)
        args = list(arrays)
        for packing in kernel.packings:
            args[packing.param - 1] = packing.pack(arrays[packing.param - 1])
            assert args[packing.param - 1].shape == packing.shape
        executable = compiled(kernel, target)
        for rows in [m] if isinstance(m, int) else [1, 6, 9, 40]:
            x = rng.standard_normal((rows, k)).astype(np.float32)
            want = np.maximum(reference(x, *arrays, bits=made.bits, group=made.group) + bias, 0)
            out = tvm.runtime.tensor(np.full((rows, n), np.nan, np.float32))
            executable["f"](*(tvm.runtime.tensor(array) for array in (x, *args, bias)), out)
            np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=str(schedule))


@pytest.mark.parametrize(
    ("machine", "bits", "instruction"),
    [
        ("cascadelake", 4, "vpermps"),
        ("cascadelake", 3, "vpermps"),
        ("cascadelake", 8, "vpmovsxbd"),
        ("haswell", 4, "vpslld"),
        ("haswell", 6, "vpslld"),
    ],
)
def test_codes_become_floats_in_registers(machine, bits, instruction):
    target = Target.parse(f"cpu:{machine}")
    template, func = WeightOnly(), fused(1, 256, 256, GroupedInt(bits, 32))
    workload = template.workload(func, WEIGHTS)
    schedule = next(schedule for schedule in template.space(workload, target) if schedule.tiles.nv == 4)
    assembly = compiled(template.build(func, workload, schedule, target), target).mod.inspect_source("asm")
    hot = max(re.split(r"\n\.LBB", assembly), key=lambda block: block.count(instruction))
    hot = re.split(r"\n\tj", hot)[0]
    assert hot.count("vfmadd") >= 32 * bits // 32
    assert not re.search(r"\tvmov\w+\t%[yz]mm\d+, [-\d]*\(%rsp", hot)


@pytest.mark.sweep
@pytest.mark.parametrize(("machine", "m", "ahead"), [("sapphirerapids", 1, True), ("sapphirerapids", "rows", True), ("haswell", 1, False)])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_asked_for_ahead_where_one_tile_passes_them(machine, m, ahead, bits):
    """As many lines as a step reads."""
    target, func = Target.parse(f"cpu:{machine}"), fused(m, 256, 64, GroupedInt(bits, 32))
    workload = WeightOnly().workload(func, WEIGHTS)
    kernel = WeightOnly().build(func, workload, WeightOnly().space(workload, target)[0], target)
    assert ("prefetcht1" in compiled(kernel, target).mod.inspect_source("asm")) == ahead
