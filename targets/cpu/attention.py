"""Attention template: out = softmax(scale q k^T, masked) v in one pass over k and v, with a running maximum and sum and no tensor of scores.

    for (b, h, queries) in parallel:                       # nv vectors of queries
        panel[D][queries] = scale * q^T
        for keys in T / block:                             # from the first to the last that `causal` and the window leave these queries
            for j in block / mr:                           # mr x nv accumulators: keys down, queries across
                for d in D: acc[j][queries] += k[j, d] * panel[d][queries]
                p[j][queries] = masked acc;  top = max(top, acc)
            shrink = exp(old top - top);  total *= shrink
            p = exp(p - top);  total += p                  # element-wise: a query stays in its lane
            for (i, e) in tiles: acc[i][e] = out[i][e] * shrink[i];  for j: acc[i][e] += p[j][i] * v[j, e]
        out /= total

Where rows of other heads lie between those of a head, their addresses fall into few sets of the caches and no hardware prefetcher follows them: rows are prefetched while the tiles
before them are computed, and a task may have several tiles of queries (`group`), which share a copy of each block of v.

bfloat16: the products are over words of two d, and of two keys (see `dot`); p is rounded pair by pair, the pairs of v are put together once per block.

With the queries in the lanes neither k nor v is transposed, and the softmax needs no sum across lanes. Running maximum and sum: Milakov and Gimelshein, "Online
normalizer calculation for softmax" (2018); the order of the loops: Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...autotune.cost_model import KernelFeatures
from ..base import Target
from ..common.fused import Fused, Unfusable, static
from .attention_emit import AttentionEmitter
from .attention_views import rows_apart
from .dot import F32, dot_for
from .emit import balanced, balanced_sizes, kernel
from .ops_attention import sizes
from .template import Kernel

#: sizes assumed for what is known at run time only
_GUESS = {"batch": 1, "queries": 128, "keys": 128}

#: cycles of an exponential of a vector of float32
_EXP = 8.0
#: tiles of queries that a task has
_GROUPS = (1, 4, 12)


@dataclass(frozen=True)
class AttentionWorkload:
    """Sizes (None: known at run time only) and what happens to the scores. apart: rows of other heads lie between those of k or of v."""

    batch: int | None
    heads: int
    kv_heads: int
    queries: int | None
    keys: int | None
    depth: int
    width: int
    mask: str
    causal: bool
    received: bool
    kind: str = "f32"
    logsum: bool = False
    before: int = -1
    after: int = -1
    apart: bool = False

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        extra = f"{' causal' if self.causal else ''}{f' mask {self.mask}' if self.mask != 'none' else ''}{' received' if self.received else ''}"
        extra += f"{' logsum' if self.logsum else ''}{' apart' if self.apart else ''}"
        extra += f" window {self.before}+{0 if self.causal else self.after}" if max(self.before, self.after) >= 0 else ""
        return f"attention {'' if self.kind == 'f32' else f'{self.kind} '}{self.batch}x{heads}x{self.queries}x{self.keys}x{self.depth}x{self.width}{extra}"


@dataclass(frozen=True)
class AttentionSchedule:
    """nv vectors of `lanes` queries at a time; tiles of mr keys for the scores, of rows queries x columns vectors for the output; `block` keys between two rescalings.
    group: such tiles of queries a task has; several share a copy of the values of every block."""

    nv: int
    lanes: int
    mr: int
    rows: int
    columns: int
    block: int
    group: int = 1


class Attention:
    """See the module."""

    name = "attention"

    def workload(self, fused: Fused, constants: frozenset[int]) -> AttentionWorkload:
        if fused.core["op"] != "attention":
            raise Unfusable("not an attention")
        dims = sizes(fused.core, [buffer.shape for buffer in fused.inputs])
        heads, kv_heads, depth, width = (static(dim) for dim in (dims.heads, dims.kv_heads, dims.depth, dims.width))
        if heads is None or kv_heads is None or depth is None or width is None:
            raise Unfusable("heads or widths known at run time only")
        return AttentionWorkload(
            static(dims.batch),
            heads,
            kv_heads,
            static(dims.queries),
            static(dims.keys),
            depth,
            width,
            fused.core["mask"],
            fused.core["causal"],
            fused.core["received"],
            fused.core.get("scores") or ("f32" if str(fused.inputs[0].ty.dtype) == "float32" else "bf16"),
            fused.core["logsum"],
            fused.core["before"],
            fused.core["after"],
            rows_apart(fused),
        )

    def space(self, workload: AttentionWorkload, target: Target) -> Sequence[AttentionSchedule]:
        lanes, registers, dot = target.lanes(), target.vector_registers, dot_for(workload.kind, target)
        if dot.name == "madd":  # words of 16 bits, made for weights that are packed
            return []
        vectors = None if workload.queries is None else -(-workload.queries // lanes)
        wide = -(-workload.width // lanes)
        found = []
        for nv in (1, 2, 3, 4):
            if vectors is not None and nv > vectors:
                continue
            mr = min((registers - nv - 1 - dot.scratch) // nv, 8)
            for columns in sorted({min(wide, size) for size in (1, 2, 3, 4)}):
                if columns == 1 < wide:
                    continue
                rows = min((registers - columns - 1) // columns, 8, nv * lanes)
                for block, group in itertools.product((64, 128, 256), _GROUPS if workload.apart else (1,)):
                    usual = block == 64 or workload.keys is None or block < 2 * workload.keys
                    if usual and (group == 1 or vectors is None or group <= -(-vectors // nv)):
                        found.append(AttentionSchedule(nv, lanes, mr, rows, columns, block, group))
        return found

    def features(self, workload: AttentionWorkload, schedule: AttentionSchedule, target: Target) -> KernelFeatures:
        batch, queries, keys = (getattr(workload, name) or guess for name, guess in _GUESS.items())
        heads, depth, width, lanes, nv = batch * workload.heads, workload.depth, workload.width, schedule.lanes, schedule.nv
        tiles = [size for _, size in balanced(-(-queries // lanes), nv)]
        wide = -(-width // lanes)
        seen = keys / 2 if workload.causal and queries > nv * lanes else keys
        if max(workload.before, workload.after) >= 0:
            most = [min(keys, each) if each >= 0 else keys / 2 for each in (workload.before, 0 if workload.causal else workload.after)]
            seen = min(float(keys), sum(most) + nv * lanes)
        dot = dot_for(workload.kind, target)
        mix = F32 if dot.accumulator == "int32" else dot
        # words of one number or several: of the scores, and of the products by values
        words, group = depth / dot.group, mix.group
        rates = [target.fma_per_cycle / each.instructions for each in (dot, mix)]
        broadcasts = [each.broadcast_loads if each.grouped else 0.5 for each in (dot, mix)]
        # v is passed once for every tile of rows: from the second-level cache where a block is more than the first level holds, or falls into few of its sets
        copied = schedule.group > 1 or group > 1 or width % lanes > 0
        near = 4.0 * schedule.block * (nv + wide) * lanes < 0.75 * target.l1_bytes and (copied or not workload.apart)
        row_bytes = dot.activation_bytes * depth + mix.activation_bytes * width
        held = row_bytes * seen < (0.25 if workload.apart else 0.75) * target.l2_bytes
        blocks = -(-seen // schedule.block)
        fma = load = latency = l2 = l3 = 0.0
        for size in tiles:
            scores = seen * words * (2 if workload.received else 1)
            fma += scores * size / rates[0]
            load += scores * (broadcasts[0] + size / schedule.mr) / 2.0
            latency += scores / schedule.mr * max(4.0, schedule.mr * size / rates[0]) + seen / schedule.mr * 12.0
            shapes = itertools.product(balanced_sizes(size * lanes, schedule.rows).items(), balanced_sizes(wide, schedule.columns).items())
            for (rows, many), (columns, times) in shapes:
                products = seen / group * many * times
                fma += products * rows * columns / rates[1]
                load += products * (broadcasts[1] * rows + columns) / 2.0
                # a tile fills and drains the pipes once a block
                latency += products * max(4.0, rows * columns / rates[1]) + many * times * blocks * 12.0
                # lines of 64 bytes, of which an odd vector uses half
                l2 += 0.0 if near else products * -(-columns * lanes // 16) * 64.0
            # the exponential, and the rescaling of the output between blocks
            other = seen * size * (_EXP if group == 1 else 1.5 * _EXP) + blocks * size * lanes * wide * 2.0
            fma, latency = fma + other, latency + other  # one after the other
            load += seen * size * 4.0 + depth * size * lanes * 2.0
            own = seen / schedule.group * wide if copied else 0.0
            load += own * group
            traffic = row_bytes * seen
            l2 += traffic if held else 0.0
            l3 += 0.0 if held else traffic / schedule.group
        return KernelFeatures(
            flops=2.0 * heads * queries * seen * (depth + width),
            fma_cycles=heads * fma,
            load_cycles=heads * load,
            latency_cycles=heads * latency,
            l2_bytes=heads * l2,
            l3_bytes=heads * (l3 + row_bytes * (queries + keys)),
            tasks=heads * -(-len(tiles) // schedule.group),
        )

    def build(self, fused: Fused, workload: AttentionWorkload, schedule: AttentionSchedule, target: Target) -> Kernel:
        dot = dot_for(workload.kind, target)
        with kernel(fused, {}, dot) as (builder, buffers):
            AttentionEmitter(fused, buffers, schedule, dot).emit()
        return Kernel(builder.get())  # pyright: ignore[reportArgumentType]
