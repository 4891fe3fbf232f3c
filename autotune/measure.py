"""Timing of compiled kernels as a network would run them: weights cold in L2, activations warm, candidates taking turns so that drift meets all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..compiler import threads as pool
from ..compiler.tvm_runtime import config_threadpool, from_dlpack

#: operands that a kernel reads as constants change from call to call, until this much memory has passed; L2 holds 1 MB of it, L3 what it does in a network
COLD_BYTES = 32 << 20
COLD_COPIES = 64
#: a turn repeats a short kernel until about this much time has passed
TURN_SECONDS = 1e-3
ALIGNMENT = 64


@dataclass(frozen=True)
class Operand:
    """One parameter of a kernel: shape, dtype, whether it is a constant of the network (so cold)."""

    shape: tuple[int, ...]
    dtype: str
    constant: bool = False

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Measurement:
    """Microseconds per call, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples)

    @property
    def min_us(self) -> float:
        return min(self.samples)


def steady(found: Sequence[Measurement]) -> list[float]:
    """Microseconds of contestants that took turns, on a machine whose speed changes from round to round: the median over rounds of the share of what was typical in the round, times the least
    of what was typical."""
    rounds = np.array([entry.samples for entry in found])
    typical = np.median(rounds, axis=0)
    return (np.median(rounds / typical, axis=1) * typical.min()).tolist()


class Memory:
    """A block of random numbers that operands are views of: what is in them does not matter for time, as long as nothing is denormal or infinite."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._block = np.empty(0, np.uint8)

    def views(self, operand: Operand, copies: int) -> list[np.ndarray]:
        """`copies` arrays of the operand's shape, side by side in the block."""
        step = -(-max(1, operand.size_bytes) // ALIGNMENT) * ALIGNMENT
        self._grow(step * copies)
        made = []
        for index in range(copies):
            raw = self._block[index * step : index * step + operand.size_bytes]
            made.append(raw.view(operand.dtype).reshape(operand.shape))
        return made

    def _grow(self, size: int) -> None:
        if size > self._block.nbytes:
            count = max(size, COLD_BYTES * 2) // 4 + ALIGNMENT
            values = np.random.default_rng(self._seed).random(count, np.float32) - np.float32(0.5)
            raw = values.view(np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            self._block = raw[start:]


@dataclass
class Contestant:
    """A compiled kernel and the argument lists that its calls take in turn."""

    function: Callable[..., object]
    arguments: list[tuple[object, ...]]
    output: np.ndarray
    position: int = 0

    def run(self, calls: int) -> float:
        """Seconds that `calls` calls take."""
        arguments = [self.arguments[(self.position + index) % len(self.arguments)] for index in range(calls)]
        self.position = (self.position + calls) % len(self.arguments)
        function = self.function
        start = time.perf_counter()
        for args in arguments:
            function(*args)
        return time.perf_counter() - start


def contestant(function: Callable[..., object], operands: Sequence[Operand], memory: Memory) -> Contestant:
    """Operands in the kernel's order, the last one its output. Constants come in as many copies as it takes to find them cold."""
    cold = max((operand.size_bytes for operand in operands if operand.constant), default=COLD_BYTES)
    copies = max(1, min(COLD_COPIES, COLD_BYTES // max(1, cold)))
    columns = []
    for operand in operands[:-1]:
        views = memory.views(operand, copies if operand.constant else 1)
        columns.append([from_dlpack(view) for view in views] * (1 if operand.constant else copies))
    output = aligned(operands[-1])
    columns.append([from_dlpack(output)] * copies)
    return Contestant(function, list(zip(*columns, strict=True)), output)


def bench(function: Callable[..., object], arguments: Sequence[np.ndarray], constant: Sequence[bool], output: np.ndarray) -> Contestant:
    """A kernel with its real arguments; those that are constants of the network are copied until they are cold. Arrays need not be aligned."""
    size = max((array.nbytes for array, fixed in zip(arguments, constant, strict=True) if fixed), default=COLD_BYTES)
    copies = max(1, min(COLD_COPIES, COLD_BYTES // max(1, size)))
    columns = []
    for array, fixed in zip(arguments, constant, strict=True):
        made = [from_dlpack(_copy(array)) for _ in range(copies if fixed else 1)]
        columns.append(made if fixed else made * copies)
    columns.append([from_dlpack(output)] * copies)
    return Contestant(function, list(zip(*columns, strict=True)), output)


def _copy(array: np.ndarray) -> np.ndarray:
    made = aligned(Operand(array.shape, str(array.dtype)))
    made[...] = array
    return made


def aligned(operand: Operand) -> np.ndarray:
    """An array for an output, at an address that vector stores like."""
    raw = np.zeros(operand.size_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + operand.size_bytes].view(operand.dtype).reshape(operand.shape)


def measure(contestants: Sequence[Contestant], *, threads: int, rounds: int = 7, seconds: float = TURN_SECONDS) -> list[Measurement]:
    """Time every contestant once per round, in rotating order, on the threads given; each turn begins with a call that is not counted."""
    pool.use(threads, config_threadpool)
    calls = []
    for entry in contestants:
        entry.run(1)
        calls.append(max(1, min(200, math.ceil(seconds / max(entry.run(1), 1e-7)))))
    samples: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    for turn in range(rounds):
        shift = turn * 7 % max(1, len(order))
        for index in order[shift:] + order[:shift]:
            contestants[index].run(1)
            samples[index].append(contestants[index].run(calls[index]) / calls[index] * 1e6)
    return [Measurement(tuple(values)) for values in samples]
