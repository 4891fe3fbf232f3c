"""Maps that put a few planes side by side: values, sizes that do not fill a vector, and the code, which stores whole vectors."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from machines import runnable
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.generic import schedule
from tcompile.targets.cpu.lower import code_generation, tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE

LAST = (0, 2, 3, 1)
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "uint8": np.uint8}


def kernel(shape, dtype, perm):
    """clip(x * 3 + 100), its axes permuted, in another type: one function."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(
                relax.op.clip(builder.emit(relax.op.add(builder.emit(relax.op.multiply(x, relax.const(3.0))), relax.const(100.0))), 0, 255)
            )
            y = builder.emit(relax.op.astype(builder.emit(relax.op.round(y)), dtype)) if dtype != "float32" else y
            y = builder.emit_output(relax.op.permute_dims(y, perm))
        builder.emit_func_output(y)
    passes = [getattr(relax.transform, name)() for name in ("AnnotateTIROpPattern", "FuseOps", "FuseTIR")]
    module = tvm.transform.Sequential(passes)(legalize(builder.get()))
    (func,) = (func for _, func in module.functions_items() if isinstance(func, tirx.PrimFunc))
    return func


def built(func, target):
    with code_generation():
        return tvm.compile(schedule(func, target).func.with_attr("global_symbol", "kernel"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)


@pytest.mark.sweep
@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 3, 16, 20), (2, 3, 5, 7), (1, 2, 9, 33), (3, 4, 6, 11), (1, 3, 1, 3), (1, 5, 6, 8), (2, 3, 2, 16)], ids=str)
def test_values(shape, dtype, target):
    x = np.random.default_rng(0).uniform(-40, 60, shape).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros([shape[axis] for axis in LAST], TYPES[dtype]))
    built(kernel(shape, dtype, LAST), target)["kernel"](tvm.runtime.tensor(x), out)
    want = np.clip(x * np.float32(3) + np.float32(100), 0, 255)
    want = (np.round(want).astype(TYPES[dtype]) if dtype != "float32" else want).transpose(LAST)
    difference = np.abs(out.numpy().astype(np.float32) - want.astype(np.float32))
    # a multiply-add rounds once: halves may go to the other side
    assert difference.max() <= {"float32": 1e-4, "bfloat16": 1.0, "uint8": 1.0}[dtype] and (difference > 1e-4).mean() < 0.01


@pytest.mark.parametrize("perm", [(1, 0), (0, 1)], ids=str)
def test_two_axes(perm):
    (target,) = (each.values[0] for each in runnable() if each.id == "haswell")
    x = np.random.default_rng(0).uniform(-40, 60, (3, 50)).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros([x.shape[axis] for axis in perm], np.float32))
    built(kernel(x.shape, "float32", perm), target)["kernel"](tvm.runtime.tensor(x), out)
    np.testing.assert_allclose(out.numpy(), np.clip(x * 3 + 100, 0, 255).transpose(perm), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", runnable())
def test_stores_are_vectors(target):
    assembly = built(kernel((1, 3, 64, 64), "float32", LAST), target).mod.inspect_source("asm")
    loop = max(re.split(r"\n\.LBB", assembly), key=lambda block: len(re.findall(r"vmulps|vfmadd", block)))
    assert re.search(r"vmov[au]p[sd]\s+%[yz]mm", loop) and not re.search(r"vextractps|vmovss\s+%xmm", loop)
