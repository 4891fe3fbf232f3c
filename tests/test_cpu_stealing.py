"""Parallel loops whose iterations go to whichever thread is free."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from machines import HASWELL
from tcompile.compiler import threads as pool
from tcompile.compiler.tvm import IRBuilder, T, tirx, tvm
from tcompile.compiler.tvm_runtime import config_threadpool
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE


def counter(extent: int | None, target=HASWELL):
    """A function that adds 1 to every element of a vector in a parallel loop; an iteration takes the longer the larger its number in `weights` is."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        size = tirx.Var("n", "int64") if extent is None else extent
        counts, weights = T.arg("counts", T.buffer((size,), "int32")), T.arg("weights", T.buffer((size,), "int32"))
        with T.parallel(size if extent is None else T.int64(extent)) as i:
            T.buffer_store(work := T.alloc_buffer((1,), "float32"), T.float32(1), [0])
            with T.serial(weights[i]):
                T.buffer_store(work, T.sqrt(work[0] + T.float32(1)), [0])
            with T.If(work[0] > T.float32(0)), T.Then():
                T.buffer_store(counts, counts[i] + 1, [i])
    return tvm.build(tvm.IRModule({"main": builder.get()}), tvm_target(target), TIR_PIPELINE)


@pytest.mark.parametrize("extent", [1, 2, 31, 32, 33, 97, 1000, None])
@pytest.mark.parametrize("cores", [1, 16])
def test_every_iteration_runs_once(extent, cores):
    """Whatever the number of threads, and however unequal their work is."""
    run = counter(extent, replace(HASWELL, cores=cores))["main"]
    for threads in (1, 2, 3, 5):
        pool.use(threads, config_threadpool)
        for size in [extent] if extent is not None else [0, 1, 7, 32, 1000]:
            for weights in (np.ones(size, np.int32), 3000 * (np.arange(size, dtype=np.int32) < size // 8)):
                counts = tvm.runtime.tensor(np.zeros(size, np.int32))
                for _ in range(3):
                    run(counts, tvm.runtime.tensor(weights.astype(np.int32)))
                np.testing.assert_array_equal(counts.numpy(), 3)
    pool.use(1, config_threadpool)


def test_threads_claim_ranges():
    assert "xchg" in counter(100).inspect_source("asm")
    assert "xchg" not in counter(1).inspect_source("asm")
