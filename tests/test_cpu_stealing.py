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


def test_rows_of_a_buffer_outside_of_the_loop_stay_apart():
    """Every iteration fills its row, works for a while and reads it again: threads must not meet in one row, to which TVM would cut a buffer that the loop alone uses."""
    rows, columns = 8, 64
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        sums, steps = T.arg("sums", T.buffer((rows,), "float32")), T.arg("steps", T.buffer((1,), "int32"))
        with T.sblock("root"):
            kept = T.alloc_buffer((rows, columns), "float32")
            with T.parallel(T.int64(rows)) as i:
                with T.serial(T.int64(columns)) as j:
                    T.buffer_store(kept, T.Cast("float32", i), [i, j])
                T.buffer_store(work := T.alloc_buffer((1,), "float32"), T.float32(1), [0])
                with T.serial(steps[0]):
                    T.buffer_store(work, T.sqrt(work[0] + T.float32(1)), [0])
                T.buffer_store(sums, T.min(work[0], T.float32(0)), [i])
                with T.serial(T.int64(columns)) as j:
                    T.buffer_store(sums, sums[i] + kept[i, j], [i])
    run = tvm.build(tvm.IRModule({"main": builder.get()}), tvm_target(HASWELL), TIR_PIPELINE)["main"]
    pool.use(4, config_threadpool)
    found = tvm.runtime.tensor(np.zeros(rows, np.float32))
    for _ in range(20):
        run(found, tvm.runtime.tensor(np.array([200_000], np.int32)))
        np.testing.assert_array_equal(found.numpy(), columns * np.arange(rows))
    pool.use(1, config_threadpool)
