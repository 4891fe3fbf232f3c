"""Attention of few queries per head over keys and values that are codes of 8 or 4 bits: the loops of `attention_few`, to which codes come as floats in registers.

    for keys in T / block:
        for j in block / lanes:
            floats[i] = float(codes of key j + i) - zero              # rows > 1: once for all of them, within L1
            scores[row][j] = scale of j * the sums across lanes
        for keys of the block: floats = (float(codes) - zero) * scale;  for row: acc[e] += scores[row][j] * floats[e]

4 bits: a vector of bytes is two of floats, the even dims and the odd ones, as in the kernel of bfloat16. Scales per tensor and per channel are outside (`passes/attention/quantized.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...autotune.cost_model import KernelFeatures
from ..base import Target
from ..common.fused import Fused, Unfusable, static
from .attention import AttentionWorkload
from .attention_codes_emit import CodesEmitter
from .attention_few import BLOCK, AttentionFew, FewSchedule
from .dot import F32
from .emit import kernel
from .ops_attention import sizes
from .template import Kernel


@dataclass(frozen=True)
class CodesWorkload(AttentionWorkload):
    """bits: of a key and of a value."""

    bits: tuple[int, int] = (8, 8)

    def __str__(self) -> str:
        return super().__str__().replace("attention ", f"attention int{self.bits[0]} int{self.bits[1]} ", 1)


class AttentionCodes:
    """See the module."""

    name = "attention_codes"

    def workload(self, fused: Fused, constants: frozenset[int]) -> CodesWorkload:
        about = fused.core
        if about["op"] != "attention_codes":
            raise Unfusable("not an attention over codes")
        dims = sizes(about, [buffer.shape for buffer in fused.inputs])
        batch, heads, kv_heads, queries, keys, depth, width = (static(getattr(dims, name)) for name in vars(dims))
        assert heads is not None and kv_heads is not None and depth is not None and width is not None
        bits = (int(about["k_bits"]), int(about["v_bits"]))
        return CodesWorkload(batch, heads, kv_heads, queries, keys, depth, width, about["mask"], False, False, bits=bits)

    def space(self, workload: CodesWorkload, target: Target) -> Sequence[FewSchedule]:
        parts = [8 // bits for bits in workload.bits]
        fits = [
            lanes
            for lanes in (16, 8, 4)
            if lanes <= target.lanes() and workload.depth % (parts[0] * lanes) == workload.width % (parts[1] * lanes) == 0
        ]
        return [FewSchedule(fits[0], min(workload.width // fits[0], 8), BLOCK)]

    def features(self, workload: CodesWorkload, schedule: FewSchedule, target: Target) -> KernelFeatures:
        floats = AttentionFew().features(workload, schedule, target)
        keys = float(workload.keys or 512) * (workload.batch or 1) * workload.kv_heads
        size = keys * (workload.depth * workload.bits[0] + workload.width * workload.bits[1]) / 8.0
        # per vector of codes: loaded and widened, made a float, and for two in a byte masked or shifted
        widened = keys * (workload.depth + workload.width) / schedule.lanes * 3.0 / target.fma_per_cycle
        return replace(floats, fma_cycles=floats.fma_cycles + widened, latency_cycles=floats.latency_cycles + widened, l2_bytes=size, l3_bytes=size)

    def build(self, fused: Fused, workload: CodesWorkload, schedule: FewSchedule, target: Target) -> Kernel:
        with kernel(fused, {}) as (builder, buffers):
            CodesEmitter(fused, buffers, schedule, F32, workload).emit()
        return Kernel(builder.get())  # pyright: ignore[reportArgumentType]
