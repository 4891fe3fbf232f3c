"""Attention of sm_90a: numbers of 16 bits whose products go through TMA, wgmma and warp groups with a part each (include/attention_hopper.cuh).

The limit: 4 queries x keys x width operations a head (half of them when causal) at 4096 a cycle and SM, and an exponential per score at 16 a cycle. With heads of 128 products take twice as
long as exponentials; with heads of 64 both take the same, so that neither may wait for the other.

    block, for 128 (or 192) queries of a head after another:   # tc::attention_hopper; as many blocks as SMs
        warp group 0: queries by TMA; for 128 keys, from the last on: stage <- keys, stage <- values by TMA, as stages become empty
        the others, 64 rows each, in turns: for 128 keys:
            scores of these keys and results of the former ones by wgmma, asked for together; softmax of the scores meanwhile; results = results * old
            behind the last keys: results / sums, stored while the next queries' first scores, which were asked for with the last results, are made

Why these tiles: a thread has 64 scores, 32 words of probabilities and width / 2 results, 160 registers for heads of 128 of the 232 that it may have (two groups), 128 for heads of 64 of 160
(three groups). 128 queries read 64 KB of keys and values a step of 2048 cycles from L2, 32 bytes a cycle. Scores are read by nobody but the thread that has them: probabilities are
the A operand of the next product as they lie in registers, and rows of values are its k (the transposed B operand).

What this template refuses goes to attention.py: other GPUs, fp32, heads that are no multiple of 8, few queries, and what is predicted to be faster there.
"""

from __future__ import annotations

import math
from typing import Any

from ..base import Target
from . import attention
from .attention import Attention, place
from .gemm_hopper import TARGETS
from .kernel import Plan, Signature, Unsupported, ctype
from .printer import literal
from .schedule import attention_cycles
from .schedule_hopper import AttentionSchedule, attention_space
from .sizes import FIXED, Known

#: numbers whose rows begin at multiples of 16 bytes, where TMA can
_ALIGNED = 8
#: so many queries or fewer leave all warp groups but one without any
_FEW = 64


def kernel(call: Any, target: Target, policy: str, known: Known = FIXED) -> Plan:
    """As `attention.kernel`; raises Unsupported for what is left to that one."""
    if target.name not in TARGETS:
        raise Unsupported(f"no wgmma on {target.name}")
    this = Attention.of(call, policy)
    if this.attrs.logsum:
        raise Unsupported("logarithms of the sums are asked for")
    if this.group == 1:
        raise Unsupported("operands in fp32")
    if not all(isinstance(size, int) for size in (this.batch, this.queries, this.keys)):
        raise Unsupported("sizes known only at run time")
    if this.depth % _ALIGNED or this.width % _ALIGNED:
        raise Unsupported(f"heads of {this.depth} and {this.width}, no multiple of {_ALIGNED}")
    return _plan(this, best(this, target), target)


def best(this: Attention, target: Target) -> AttentionSchedule:
    """The schedule of least predicted time; raises Unsupported for few queries, and when attention.py's takes less."""
    if this.queries <= _FEW:
        raise Unsupported(f"{this.queries} queries")
    heads = this.heads * this.batch

    def cycles(schedule: AttentionSchedule) -> float:
        return schedule.cycles(this.queries, this.keys, heads, this.seen(schedule.queries, schedule.keys), target)

    found = min(attention_space(this.depth, this.width, target), key=cycles)
    sizes = (this.queries, this.keys, this.depth, this.width, heads)
    block = attention.keys_at_once(this)
    if attention_cycles(*sizes, block, this.seen(attention.QUERIES, block), target) <= cycles(found):
        raise Unsupported("the tiles of mma.sync are faster")
    return found


def _plan(this: Attention, schedule: AttentionSchedule, target: Target) -> Plan:
    attrs, signature = this.attrs, Signature((this.out,))
    out, share = signature.name(this.out), this.heads // this.own
    boxes = (schedule.queries, schedule.keys, schedule.keys)
    maps = [
        f"tc::MappedHeads<{str(layout == 'BSHD').lower()}>{{{signature.map(buffer, 'encode_heads', *_encoding(buffer, layout, box))}}}"
        for buffer, layout, box in zip(this.operands[:3], attrs.layouts, boxes, strict=False)
    ]
    # products are compared as they are, and their factor is part of the exponent's, where nothing else is done to them
    listed = this.lists(schedule.queries, schedule.keys)
    packings = () if listed is None else (listed.packing(this.operands[3]),)
    table = "" if listed is None else signature.name(packings[0].buffer)
    plain = attrs.scale > 0 and (listed is not None or len(this.operands) == 3 and (attrs.fill == -math.inf or not this.hides))
    if not plain:
        score = this.score(signature, listed, table)
    elif listed is not None:
        score = listed.score(table, "x", f" * {literal(1.0 / attrs.scale, 'float32')}")
    else:
        score = ([f"if ({this.hides}) return -INFINITY;"] if this.hides else []) + ["return x;"]
    unit = literal((attrs.scale if plain else 1.0) / math.log(2), "float32")
    tiles = math.ceil(this.queries / schedule.queries)
    base, stride = place(attrs.layouts[3], this.heads, this.queries, this.width)
    growing = this.causal or (this.window is not None and this.window[0] < 0 if listed is None else listed.growing)  # the last queries see most
    blocks = f"{schedule.queries}, {this.queries}, {this.heads}, {this.batch}, {_at_once(this, target)}, {str(growing).lower()}"
    flags = ", ".join(str(flag).lower() for flag in (attrs.safe, plain))
    seen, given = f"tc::EveryKey<T, {this.keys}, {str(this.causal).lower()}>()", "int batch, int head, int s, int t, float x"
    number = []
    if listed is not None:
        number = [f"const auto number = [](const B& block) {{ return {listed.number('block.batch', 'block.head', 'block.q0 / T::BQ')}; }};"]
        seen, given = f"tc::ListedKeys<decltype(number)>({table}, number)", f"{given}, int tile"
    elif this.window:
        seen, given = f"tc::WindowKeys<T, {this.keys}, {this.window[0]}, {this.window[1]}>()", f"{given}, int tile"
    numbers = f"{share}, {this.queries}, {this.keys}, {this.width}, {stride}, {flags}"
    lines = [
        f"using T = {schedule.source};",
        f"using B = tc::Blocks<{blocks}>;",
        *number,
        f"const auto to = [&](int batch, int head) {{ return tc::To<{ctype(this.out.ty.dtype)}>{{{out} + {base}}}; }};",
        f"tc::attention_hopper<tc::{this.policy}, T, B, {numbers}>({', '.join(maps)}, {unit}, to, {seen}, [&]({given}) {{",
        *(f"  {line}" for line in score),
        "});",
    ]
    made = signature.kernel(
        lines,
        grid=(min(tiles * this.heads * this.batch, target.cores), 1, 1),
        threads=schedule.threads,
        resident=1,
        shared_bytes=schedule.shared_bytes,
        turns=True,
        kind="attention hopper",
        workload=this.workload,
        schedule=str(schedule) + (", listed" if listed else ""),
    )
    return Plan(this.params, (made,), packings)


def _encoding(buffer: Any, layout: str, box: int) -> tuple[int, ...]:
    """Arguments of `encode_heads`: dims, in words of two numbers, and rows of a box."""
    *dims, columns = (int(dim) for dim in buffer.shape)
    return (*dims, columns // 2, *((1, box) if layout == "BHSD" else (box, 1)))


def _at_once(this: Attention, target: Target) -> int:
    """Heads whose keys and values fill half of L2 at most; a divisor of all."""
    heads, share = this.heads * this.batch, this.heads // this.own
    bytes_of_one = 2 * this.keys * (this.depth + this.width)
    fitting = [count for count in range(1, heads + 1) if heads % count == 0 and math.ceil(count / share) * bytes_of_one <= target.l2_bytes / 2]
    return max(fitting, default=1)
