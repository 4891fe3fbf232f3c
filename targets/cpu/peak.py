"""What this machine can do: multiply-adds in registers (or tiles), and reads of memory, per second. Rooflines stand on these where times are measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ...compiler.tvm import IRBuilder, T, tvm
from . import amx
from .amx import Tiles
from .amx_schedules import PAIRS
from .dot import QUADS, dot_for, splat, vector
from .emit import ATTRS, Accumulators
from .gemm_amx import tile_dot
from .host import host
from .llvm_text import defining
from .lower import tvm_target
from .math_lowering import TIR_PIPELINE

#: accumulators: more than the latency of a multiply-add times how many start per cycle, fewer than registers; and of products that are added by an instruction of their own, which takes one cycle
_ROWS, _FEW_ROWS = 12, 6
_STEPS = 1_000_000
_TRIALS = 20
#: bytes that no cache holds
_MEMORY = 1 << 28
_KINDS = {"float32": "f32", "bfloat16": "bf16", "int8": QUADS.kind}


@functools.cache
def operations_per_second(dtype: str = "float32") -> float:
    """Multiplications and additions per second of one core by numbers of this type: the best of several trials of a few milliseconds. "bf16x2" and "bf16x3": of float32 in so many terms."""
    if dtype in amx.TERMS:
        return operations_per_second("bfloat16") / len(PAIRS[amx.TERMS[dtype]])
    target = host()
    if amx.available(_KINDS[dtype], target):
        return _tile_operations(_KINDS[dtype])
    dot, lanes = dot_for(_KINDS[dtype], target), target.lanes()
    rows, distinct = (_FEW_ROWS, 2) if dot.separate else (_ROWS, 1)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({**ATTRS, "global_symbol": "peak"})
        words, out = T.arg("words", T.buffer((distinct, lanes * dot.parts), dot.word)), T.arg("out", T.buffer((rows, lanes), dot.accumulator))
        with defining(dot.llvm):
            acc, everything = Accumulators(rows, 1, lanes, dot), vector(T.int64(0), lanes)
            acc.fill()
            operands = [dot.weights(lambda place: words[j, place], lanes, 0, lanes) for j in range(distinct)]  # noqa: B023
            with T.serial(T.int64(_STEPS)) as step:
                for i in range(rows):
                    # a product that is the same in every step, or for two rows, would be computed once
                    a = _varied(operands[0], step + i // distinct, lanes) if dot.separate else operands[0]
                    acc.fma(i, 0, a, operands[i % distinct])
            for i in range(rows):
                T.buffer_store(out, acc.load(i, 0), [T.int64(i), everything])
    run = _compiled(builder.get(), np.zeros((distinct, lanes * dot.parts), dot.word), np.zeros((rows, lanes), dot.accumulator))
    return 2.0 * _STEPS * rows * lanes * dot.group / _best(run)


def _tile_operations(kind: str) -> float:
    """The same by AMX tiles: four products of two tiles of random numbers by two others."""
    dot, tiles, size = tile_dot(kind), Tiles(2, 2), amx.ROWS * amx.ROW_BYTES
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({**ATTRS, "global_symbol": "peak"})
        numbers, out = T.arg("numbers", T.buffer((4 * size,), "uint8")), T.arg("out", T.buffer((4 * size // 4,), "int32"))
        tiles.configure(T.alloc_buffer((16,), "int32"))
        for number, tile in enumerate((tiles.a(0), tiles.a(1), tiles.b(0), tiles.b(1))):
            amx.load(tile, numbers[number * size], amx.ROW_BYTES)
        places = [(i, j) for i in range(2) for j in range(2)]
        for place in places:
            amx.zero(tiles.c(*place))
        with T.serial(T.int64(_STEPS // 10)):
            for i, j in places:
                amx.multiply(dot, tiles.c(i, j), tiles.a(i), tiles.b(j))
        for number, place in enumerate(places):
            amx.store(tiles.c(*place), out[number * size // 4], amx.ROW_BYTES)
        amx.release()
    # any bytes; for bfloat16 numbers from 1 to 2
    words = np.random.default_rng(0).integers(*((0x3F80, 0x4000) if kind == "bf16" else (0, 1 << 16)), 2 * size, np.uint16)
    run = _compiled(builder.get(), words.view(np.uint8), np.zeros(size, np.int32))
    return 2.0 * (_STEPS // 10) * len(places) * amx.ROWS * amx.ROWS * amx.step_elements(dot) / _best(run)


def _varied(words: Any, step: Any, lanes: int) -> Any:
    if isinstance(words, tuple):
        return tuple(_varied(word, step, lanes) for word in words)
    return T.bind(words + splat(T.Cast("int32", step), lanes))


@functools.cache
def bytes_per_second() -> float:
    """Bytes per second that all cores together read from memory."""
    target = host()
    lanes, parts = target.lanes(), 64
    rows = _MEMORY // (4 * lanes * parts)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({**ATTRS, "global_symbol": "peak"})
        x, out = T.arg("x", T.buffer((parts, rows, lanes), "float32")), T.arg("out", T.buffer((parts, lanes), "float32"))
        with T.parallel(T.int64(parts)) as part:
            acc, everything = Accumulators(4, 1, lanes), vector(T.int64(0), lanes)
            acc.fill()
            with T.serial(T.int64(rows // 4)) as row:
                for i in range(4):
                    acc.store(i, 0, acc.load(i, 0) + x[part, row * 4 + i, everything])
            T.buffer_store(out, acc.load(0, 0) + acc.load(1, 0) + acc.load(2, 0) + acc.load(3, 0), [part, everything])
    return _MEMORY / _best(_compiled(builder.get(), np.ones((parts, rows, lanes), np.float32), np.zeros((parts, lanes), np.float32)))


def _compiled(func: Any, *arrays: np.ndarray) -> Callable[[], object]:
    library, tensors = tvm.compile(func, target=tvm_target(host()), tir_pipeline=TIR_PIPELINE), [tvm.runtime.tensor(array) for array in arrays]
    return lambda: library["peak"](*tensors)


def _best(run: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(_TRIALS))
