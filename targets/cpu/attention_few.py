"""Attention of few queries per head, as in decoding: keys stand in the lanes of the scores, the head's dims in the lanes of the sums, and all queries of all heads that share keys and
values are rows of one task.

    for (b, kv head) in parallel:                          # rows = its heads of q x queries: keys and values come from memory once for all of them
        query[row][D] = scale * q
        for keys in T / block:
            for j in block / lanes:                        # `lanes` keys
                for row: for d in D / lanes: acc[i] += query[row][d] * k[j + i, d]       # one vector of d per key
                         scores[row][j] = the sums across lanes of all acc, key i in lane i
            top[row] = max;  scores = exp(scores - top);  total[row] += scores
            for row: acc[e] = out[row][e] * shrink[row];  for j: acc[e] += scores[row][j] * v[j, e]
        out /= total

bfloat16: a vector of words is two of floats, the even dims and the odd ones; queries are laid out like that, results put in order at the end. Products and sums are float32.
Lengths of keys may be symbolic. The kernel of many queries (`attention`) has queries in its lanes, so fills one of them where there is one query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...autotune.cost_model import KernelFeatures
from ...compiler.dialect.attention import FEW_QUERIES
from ..base import Target
from ..common.fused import Fused, Unfusable
from .attention import Attention, AttentionWorkload
from .attention_few_emit import FewEmitter
from .dot import F32
from .emit import kernel
from .template import Kernel

#: keys between two rescalings: their values, and the keys before them, fit L1 together, so that each row after the first finds them there
BLOCK = 64
#: keys assumed where they are known at run time only
_KEYS = 512
#: most rows of a task
_ROWS = 64


@dataclass(frozen=True)
class FewSchedule:
    """Vectors of `lanes` floats; `columns` of them are accumulators of the sums of a row; `block` keys between two rescalings, a multiple of lanes.

    A row at a time: tiles of several rows have fewer columns, so they read parts of cache lines, and come back for the rest.
    """

    lanes: int
    columns: int
    block: int


class AttentionFew:
    """See the module."""

    name = "attention_few"

    def workload(self, fused: Fused, constants: frozenset[int]) -> AttentionWorkload:
        workload = Attention().workload(fused, constants)
        if (
            workload.queries is None
            or workload.queries > FEW_QUERIES
            or workload.causal
            or fused.core.get("scores")
            or workload.received
            or max(workload.before, workload.after) >= 0
        ):
            raise Unfusable(f"not at most {FEW_QUERIES} queries that see every key")
        if workload.heads // workload.kv_heads * workload.queries > _ROWS:
            raise Unfusable(f"more than {_ROWS} rows for a head of keys and values")
        return workload

    def space(self, workload: AttentionWorkload, target: Target) -> Sequence[FewSchedule]:
        group = 1 if workload.kind == "f32" else 2
        fits = [
            lanes for lanes in (16, 8, 4) if lanes <= target.lanes() and workload.depth % (group * lanes) == workload.width % (group * lanes) == 0
        ]
        if not fits:
            raise Unfusable("heads that are not whole vectors")
        lanes = fits[0]
        columns = min(workload.width // lanes, 8)
        return [FewSchedule(lanes, columns, BLOCK)]

    def features(self, workload: AttentionWorkload, schedule: FewSchedule, target: Target) -> KernelFeatures:
        lanes, batch, keys = schedule.lanes, workload.batch or 1, float(workload.keys or _KEYS)
        count, heads = workload.heads // workload.kv_heads * (workload.queries or 1), batch * workload.kv_heads
        element = 4.0 if workload.kind == "f32" else 2.0
        dims = workload.depth + workload.width
        vectors = heads * keys * count
        products = vectors * dims / lanes
        # per vector of scores: adding up across lanes, the maximum, the exponential; per vector of bfloat16: two of floats; per block: the sums rescaled
        other = (
            vectors / lanes * (lanes + 16.0)
            + (0.0 if element == 4.0 else products)
            + vectors / schedule.block * (3.0 * workload.width / lanes + 40.0)
        )
        fma = (products + other) / target.fma_per_cycle
        # what one row leaves in L1 is there for the next
        again = 0.0 if count == 1 or element * schedule.block * dims < 0.75 * target.l1_bytes else heads * keys * element * dims * (count - 1)
        return KernelFeatures(
            flops=2.0 * vectors * dims,
            fma_cycles=fma,
            # keys and values are operands of the multiply-adds, which then take no slot more
            load_cycles=products * (0.5 / lanes + 0.5 / schedule.columns) / 2.0,
            latency_cycles=fma + vectors * max(0.0, 4.0 - schedule.columns / target.fma_per_cycle),
            l2_bytes=element * heads * keys * dims + again,
            l3_bytes=element * heads * keys * dims,
            tasks=heads,
        )

    def build(self, fused: Fused, workload: AttentionWorkload, schedule: FewSchedule, target: Target) -> Kernel:
        with kernel(fused, {}) as (builder, buffers):
            FewEmitter(fused, buffers, schedule, F32, workload).emit()
        return Kernel(builder.get())  # pyright: ignore[reportArgumentType]
