"""GEMM template: C[batch, M, N] = epilogue(A[batch, M, K] @ B), with B a weight [K, N] packed at compile time or a run-time operand packed per panel.

    for (mo, jo) in parallel:                # mc rows x one panel of NR = nv * lanes columns
        [run-time B: panel[K][NR] = B[:, jo]]
        for io in mc / mr:                   # one register tile: mr x nv accumulators
            for k in K:                      # and every few steps a line of B[:, jo + 1] is prefetched
                acc[i][v] += A[io*mr + i, k] * panel[k][v]      # nv loads of B, mr broadcasts of A, mr * nv FMAs
            C = epilogue(acc)

u8 x s8 -> int32 and bfloat16 -> float32 are the same nest over groups of k: K / 4 words of four codes, one `vpdpbusd` per accumulator and step (see dot.py). Weights of bfloat16 for float32 are
words of two, which a register tile widens once a step, or, where there are tiles enough, a task once for all of them.

The tile stays in registers, the panel of B in L1/L2, the mc rows of A in L2; where K is too long for that, K goes by blocks (gemm_blocked.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product, static
from .cache import conflict_bytes
from .dot import Dot, dot_for, dot_kind
from .emit import chunk_sizes, kernel, streams
from .gemm_blocked import emitter
from .gemm_emit import GemmOperands
from .gemm_schedules import GemmSchedule, suited
from .prefetch import panels_ahead, passed_once
from .short_sums import with_sums
from .template import Kernel, Packing
from .widen import activations, widening


@dataclass(frozen=True)
class GemmWorkload:
    """batch x M x K x N; None marks a size known only at run time. packed: B is a constant. kind: of the product, see `dot.dot_kind`."""

    batch: int | None
    m: int | None
    k: int | None
    n: int | None
    packed: bool
    epilogue: str
    kind: str = "f32"

    def __str__(self) -> str:
        kind = "" if self.kind == "f32" else f"{self.kind} "
        return f"gemm {kind}{self.batch}x{self.m}x{self.k}x{self.n}{' packed' if self.packed else ''}"


class Gemm:
    """See the module."""

    name = "gemm"

    def workload(self, fused: Fused, constants: frozenset[int]) -> GemmWorkload:
        if fused.core["op"] != "matmul":
            raise Unfusable("not a matmul")
        a, b = fused.inputs
        kind = dot_kind(fused.inputs, fused.accumulator)
        _, batch, rows = _split(fused)
        packed = len(b.shape) == 2 and fused.param_index(b) in constants
        if packed and (static(b.shape[0]) is None or static(b.shape[1]) is None):
            raise Unfusable("a constant of unknown size")
        if kind != "f32" and not packed:
            raise Unfusable("operands of fewer bits, and weights that are not constant")
        sizes = static(product(batch)), static(product(rows)), static(b.shape[-2]), static(b.shape[-1])
        return with_sums(GemmWorkload(*sizes, packed, fused.epilogue_text(), kind), fused, constants)

    def space(self, workload: GemmWorkload, target: Target) -> Sequence[GemmSchedule]:
        return suited(workload, target)

    def features(self, workload: GemmWorkload, schedule: GemmSchedule, target: Target) -> KernelFeatures:
        batch, m, k, n = (workload.batch or 1), (workload.m or 128), (workload.k or 128), (workload.n or 128)
        mr, nv, lanes = schedule.mr, schedule.nv, schedule.lanes
        dot = dot_for(workload.kind, target)
        words, size = dot.words(k), float(dot.activation_bytes)
        fma = load = latency = 0.0
        mc = schedule.mc or m
        tiles = chunk_sizes(m, mc, mr)
        wide, rest = divmod(n, nv * lanes)
        panels = wide + (rest > 0)
        # AVX512 reads a float and spreads it within the multiply-add; pairs of bytes are widened by a shuffle of its own
        broadcast = dot.group * (0.5 if target.vector_bits == 512 else 1.0) if dot.activation == "float32" else dot.broadcast_loads
        for rows, count in tiles.items():
            for vectors, columns in ((nv, wide), (-(-rest // lanes), 1)):
                if rows and vectors and count and columns:
                    steps = float(count * columns * words)
                    # widened words take as many ports as multiply-adds
                    busy = vectors * (rows * dot.instructions + 2.0 * dot.widens) / target.fma_per_cycle
                    fma += steps * busy
                    load += steps * (rows * broadcast + vectors * dot.parts) / 2.0
                    latency += steps * max(4.0, busy)
        chunks, groups = -(-m // mc), -(-panels // schedule.nc)
        weight_bytes = float(dot.weight_bytes * dot.group * words)
        panel_bytes = weight_bytes * nv * lanes
        a_bytes = size * mc * k
        l2 = batch * (chunks * panels * panel_bytes * (1 if panel_bytes < target.l1_bytes / 2 else -(-mc // mr)))
        a_passes = panels if a_bytes < target.l2_bytes / 2 else 0
        l2 += batch * a_passes * chunks * a_bytes * (1 if size * k * mr < target.l1_bytes / 2 else 2)
        l2 += sum(batch * panels * words * count * conflict_bytes(rows, int(size) * k, target) for rows, count in tiles.items())
        l3 = batch * chunks * weight_bytes * n + (0 if a_passes else batch * groups * chunks * a_bytes)
        dram = weight_bytes * n if workload.packed else 0.0
        return KernelFeatures(
            flops=2.0 * batch * m * k * n,
            fma_cycles=batch * fma + widening(batch * m * k, dot),
            load_cycles=batch * load,
            latency_cycles=batch * latency + widening(batch * m * k, dot),
            l2_bytes=l2,
            l3_bytes=l3,
            dram_bytes=dram,
            scalar_elements=batch * m * (n % lanes),
            tasks=batch * groups * chunks,
        )

    def build(self, fused: Fused, workload: GemmWorkload, schedule: GemmSchedule, target: Target) -> Kernel:
        nr, dot = schedule.nv * schedule.lanes, dot_for(workload.kind, target)
        position = fused.param_index(fused.inputs[1])
        packings: tuple[Packing, ...] = ()
        if workload.packed:
            assert position is not None and workload.k is not None and workload.n is not None
            packings = (pack_gemm(position, workload.k, workload.n, nr, dot),)
        with kernel(fused, {packing.param: packing.shape for packing in packings}, dot) as (builder, buffers):
            a, b = fused.inputs
            _, batch, rows = _split(fused)
            flat = activations(a, buffers, dot, (product([*batch, *rows]), a.shape[-1]))
            weights = buffers[b] if workload.packed else T.decl_buffer((product(batch), *b.shape[-2:]), "float32", data=buffers[b].data)
            operands = GemmOperands(batch, rows, b.shape[-2], b.shape[-1], flat, lambda row: lambda k: (row, k), weights, workload.packed, dot)
            ahead, once = (panels_ahead(packings[0].shape, weights, dot, target), passed_once(weights, target)) if packings else (None, None)
            emitter(fused, buffers, schedule, operands, ahead, once, streams(fused, target)).emit()
        return Kernel(builder.get(), packings)


def pack_panels(weight: np.ndarray, nr: int) -> np.ndarray:
    """[K, N] -> [ceil(N / nr), K, nr], zero filled."""
    k, n = weight.shape
    panels = -(-n // nr)
    padded = np.zeros((k, panels * nr), weight.dtype)
    padded[:, :n] = weight
    return np.ascontiguousarray(padded.reshape(k, panels, nr).transpose(1, 0, 2))


def pack_gemm(position: int, k: int, n: int, nr: int, dot: Dot) -> Packing:
    """The packing of constant weights [.., K, N] into panels of words."""

    def pack(weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(k, n)
        if not dot.grouped:
            return pack_panels(weight, nr)
        padded = np.zeros((dot.words(k) * dot.group, n), weight.dtype)
        padded[:k] = weight
        return np.ascontiguousarray(dot.pack_words(pack_panels(padded, nr).reshape(-1, dot.words(k), dot.group, nr)))

    return Packing(position, (-(-n // nr), dot.words(k), nr * dot.parts), pack, f"panels{nr}" if not dot.grouped else f"{dot.name}{nr}")


def _split(fused: Fused) -> tuple[Any, list[Any], list[Any]]:
    """(B, batch dims, row dims): with a 2-D B all leading dims of A are rows, otherwise A and B share the batch dims."""
    a, b = fused.inputs
    lead = list(a.shape[:-1])
    if len(b.shape) == 2:
        return b, [], lead
    batch = list(b.shape[:-2])
    if len(batch) != len(lead) - 1 or not all(x.same_as(y) or static(x) == static(y) is not None for x, y in zip(batch, lead, strict=False)):
        raise Unfusable("broadcast batch dims")
    return b, batch, lead[-1:]
