"""The attention kernel: `tcompile.attention` as one CUDA kernel of include/attention.cuh.

block (64 queries, head, batch): q in shared memory
    for 64 (or 32) keys, the next ones on their way:
        s = q k^T on tensor cores, scale and mask in registers; running maximum and sum; out = out * old + exp(s) v on tensor cores
    out / sum

Where that leaves most of the GPU idle (one query behind a long cache), blocks take parts of the keys, and a second kernel joins them in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...compiler.dialect.attention import AttentionAttrs, attrs_of, dims_of
from ...compiler.tvm import tirx
from ..base import Target
from .attention_lists import Lists, lists
from .gemm import vector
from .kernel import Kernel, Plan, Signature, Unsupported, ctype
from .printer import literal
from .schedule import open_part_of_keys, part_of_keys
from .sizes import FIXED, Known, blocks, shown, simplified, times

QUERIES, THREADS = 64, 128
#: number policies of operands that lie in memory as tensor cores take them, two in a word; others have the policy that was asked for
POLICIES = {"bfloat16": "Bf16x2", "float16": "Fp16x2"}
#: widest head: its outputs stay in registers
MAX_WIDTH = 128
#: farther than any key is from any query
_FAR = 2**30


def refusal(call: Any) -> str:
    """Why this kernel does not take the attention, or "" when it does."""
    attrs = attrs_of(call)
    shapes = [list(arg.ty.shape) for arg in call.args]
    if attrs.received:
        return "the attention that keys receive is asked for"
    types = {str(arg.ty.dtype) for arg in call.args[:3]}
    if len(types) > 1 or not types <= {*POLICIES, "float32"} or any(str(arg.ty.dtype) not in ("float32", "bool") for arg in call.args[3:]):
        return f"operands of {', '.join(str(arg.ty.dtype) for arg in call.args)}"
    dims = dims_of(*shapes[:3], attrs.layouts)
    if any(not isinstance(dim, tirx.IntImm) for dim in (dims.heads, dims.kv_heads, dims.depth, dims.width)):
        return "heads whose number or size is known only at run time"
    if types <= {*POLICIES} and (int(dims.depth) % 2 or int(dims.width) % 2):
        return "heads that fill no whole words"
    if max(int(dims.depth), int(dims.width)) > MAX_WIDTH:
        return f"heads wider than {MAX_WIDTH}"
    if any(isinstance(dim, tirx.IntImm) and int(dim) == 0 for shape in shapes for dim in shape):
        return "an operand without elements"
    return ""


@dataclass(frozen=True)
class Attention:
    """An attention that `refusal` has nothing against: q, k, v and the mask where there is one, the output, and sizes, of which `batch`, `queries` and `keys` may be open; heads of k and
    v: own. policy: of numbers, group: how many are in a word. logsum: the second output, None without one."""

    operands: tuple[Any, ...]
    out: Any
    attrs: AttentionAttrs
    policy: str
    batch: Any
    heads: int
    own: int
    queries: Any
    keys: Any
    depth: int
    width: int
    logsum: Any = None
    #: what it was made of, where its mask may be told by the values
    call: Any = None

    @staticmethod
    def of(call: Any, policy: str) -> Attention:
        """Raises Unsupported as `refusal` says."""
        if reason := refusal(call):
            raise Unsupported(reason)
        shapes, attrs = [[simplified(dim) for dim in arg.ty.shape] for arg in call.args], attrs_of(call)
        operands = [
            tirx.decl_buffer(shape, str(arg.ty.dtype), f"arg{position}") for position, (arg, shape) in enumerate(zip(call.args, shapes, strict=True))
        ]
        kinds = list(call.ty.fields) if attrs.logsum else [call.ty]
        out, *logsum = (tirx.decl_buffer([simplified(dim) for dim in kind.shape], str(kind.dtype), "out") for kind in kinds)
        dims = dims_of(*shapes[:3], attrs.layouts)
        sizes = (dims.batch, dims.heads, dims.kv_heads, dims.queries, dims.keys, dims.depth, dims.width)
        return Attention(tuple(operands), out, attrs, POLICIES.get(str(call.args[0].ty.dtype), policy), *sizes, *(logsum or [None]), call)

    @property
    def params(self) -> tuple[Any, ...]:
        return (*self.operands, self.out, *([] if self.logsum is None else [self.logsum]))

    @property
    def group(self) -> int:
        return 2 if self.policy in POLICIES.values() else 1

    @property
    def causal(self) -> bool:
        """Keys behind a query are hidden altogether, and no others are."""
        return self.attrs.causal and self.attrs.before < 0 and self.attrs.fill == -math.inf

    @property
    def window(self) -> tuple[int, int] | None:
        """(keys before a query, keys behind it) that it sees, -1 for all; None without a window, where what it hides counts, and in parts of the keys (`logsum`), which take them all."""
        attrs = self.attrs
        if self.causal or attrs.logsum or attrs.window == (None, None) or attrs.fill != -math.inf:
            return None
        before, after = (-1 if limit is None else min(limit, _FAR) for limit in attrs.window)
        return before, after

    @property
    def hides(self) -> str:
        """In C, whether `causal` or the window hides key t from query s; "" where they hide none."""
        before, after = self.attrs.window
        behind = [] if after is None else [f"t > s + {min(after, _FAR)}" if after else "t > s"]
        return " || ".join([*behind, *([] if before is None else [f"t + {min(before, _FAR)} < s"])])

    @property
    def workload(self) -> str:
        sizes = f"{shown(self.batch)}x{self.heads}({self.own})x{shown(self.queries)}x{shown(self.keys)}x{self.depth}"
        window = f" window {self.window[0]}+{self.window[1]}" if self.window else " causal" if self.attrs.causal else ""
        return f"attention {sizes} {self.policy}{window}" + (" logsum" if self.attrs.logsum else "")

    def lists(self, queries: int, keys: int) -> Lists | None:
        """Of blocks of so many queries and keys, where the mask is constant and hides some."""
        return None if self.call is None or self.attrs.logsum else lists(self.call, self.attrs, self.queries, self.keys, (queries, keys))

    def seen(self, queries: int, keys: int) -> list[int] | None:
        """How many steps of so many keys the blocks of so many queries take, of all heads; None where all take all. Sizes are known."""
        if (listed := self.lists(queries, keys)) is not None:
            return listed.steps(self.heads, self.batch)
        if not self.causal and not self.window:
            return None
        before, after = self.window or (-1, 0)
        steps = []
        for first in range(0, self.queries, queries):
            end = math.ceil((self.keys if after < 0 else min(self.keys, first + queries + after)) / keys)
            steps.append(end - (0 if before < 0 else min(max(first - before, 0) // keys, end - 1)))
        return steps * (self.heads * self.batch)

    def score(self, signature: Signature, listed: Lists | None = None, name: str = "") -> list[str]:
        """The body of (s, t, x) -> score, where `batch` and `head` are known; of (s, t, x, tile) with a window, or with lists, which are called `name`."""
        fill, operands, attrs = literal(self.attrs.fill, "float32"), self.operands, self.attrs
        lines = [f"const float score = x * {literal(attrs.scale, 'float32')};"]
        if listed is not None:
            return [*lines, *listed.score(name, "score")]
        hides = self.hides
        if hides:
            hides = f"tile >= 0 && ({hides})" if self.window else hides
            lines.append(
                f"if ({hides}) return {fill};"
                if len(operands) == 3 or str(operands[3].ty.dtype) == "bool"
                else f"const float seen = {hides} ? {fill} : score;"
            )
        if len(operands) == 3:
            return [*lines, "return score;"]
        shape = [1] * (4 - len(operands[3].shape)) + [simplified(dim) for dim in operands[3].shape]
        terms = []
        for axis, (dim, index) in enumerate(zip(shape, ("batch", "head", "s", "t"), strict=True)):
            if dim != 1:
                stride = times(shape[axis + 1 :])
                terms.append(index if stride == 1 else f"{index} * {signature.size(stride)}")
        mask = f"{signature.name(operands[3])}[{' + '.join(terms) or '0'}]"
        if str(operands[3].ty.dtype) == "bool":
            return [*lines, f"return {mask} ? score : {fill};"]
        return [*lines, f"return {'seen' if hides else 'score'} + {mask};"]


def place(layout: str, heads: int, rows: Any, columns: int, head: str = "head", size: Callable[[Any], str] = str) -> tuple[str, int]:
    """(start of a head in C, distance of its rows), in elements. size: C of a size."""
    if layout == "BHSD":
        return f"(size_t)(batch * {heads} + {head}) * {size(times([rows, columns]))}", columns
    return f"(size_t)batch * {size(times([rows, heads * columns]))} + {head} * {columns}", heads * columns


def keys_at_once(this: Attention) -> int:
    """Keys of a step."""
    return 64 if max(this.depth, this.width) <= 64 else 32


def kernel(call: Any, target: Target, policy: str, known: Known = FIXED) -> Plan:
    """The kernel; its parameters are q, k, v, the mask where there is one, and the output. known: of the symbols in the call's shapes. Raises Unsupported as `refusal` says."""
    this = Attention.of(call, policy)
    if (listed := this.lists(QUERIES, keys_at_once(this))) is not None:
        packing = listed.packing(this.operands[3])
        return Plan(this.params, (_product(this, this.out, 0, 1, target, listed, packing.buffer),), (packing,))
    tiles, steps = blocks(this.queries, QUERIES), blocks(this.keys, keys_at_once(this))
    return planned(this, times([tiles, this.heads, this.batch]), steps, lambda *parted: _product(this, *parted, target), target, known)


def planned(this: Attention, number: Any, steps: Any, product: Callable[[Any, Any, Any], Kernel], target: Target, known: Known) -> Plan:
    """All keys at once, or in parts where `number` blocks leave most of the GPU idle. product: (what it writes, steps of keys of a part, parts) -> its kernel.

    Logarithms of sums come from parts, of which there is one where all keys are taken at once.
    """

    def whole() -> tuple[Kernel, ...]:
        return (product(this.out, 0, 1),)

    def in_parts(part: Any, count: Any) -> tuple[Kernel, ...]:
        """Blocks take `part` steps of keys each, which makes `count` parts; then those are joined."""
        rows = times([this.batch, this.heads, this.queries])
        parts = tirx.decl_buffer((count, rows, this.width + 2), "float32", "parts")
        return product(parts, part, count), _joined(this, parts, count, rows)

    if this.causal or this.window:
        return Plan(this.params, whole() if this.logsum is None else in_parts(steps, 1))
    if isinstance(number, int) and isinstance(steps, int):
        part = part_of_keys(number, steps, target)
        return Plan(this.params, whole() if part == steps and this.logsum is None else in_parts(part, -(-steps // part)))
    part = open_part_of_keys(number, steps, target)
    count = simplified(tirx.floordiv(steps + part - 1, part))
    if this.logsum is not None:
        return Plan(this.params, in_parts(part, count))
    if all(sample <= 1 for sample in known.samples(count)):
        return Plan(this.params, whole())
    made = [(whole(), (count, 0, 1)), (in_parts(part, count), (count, 2, None))]
    return Plan(this.params, tuple(replace(each, when=when) for kernels, when in made for each in kernels))


def _product(this: Attention, written: Any, part: Any, count: Any, target: Target, listed: Lists | None = None, packed: Any = None) -> Kernel:
    """All keys, or `count` parts of `part` steps of them; or those of lists, which are in the buffer `packed`."""
    attrs, policy, signature, block = this.attrs, this.policy, Signature((written,)), keys_at_once(this)
    size, group = signature.size, this.group
    padded, wide = -(-this.depth // (16 * group)) * 16, -(-this.width // 16) * 16 // group
    shared = 4 * (QUERIES * (padded + 8) + 2 * block * (padded + 8 + wide + 4))
    if shared > target.shared_bytes:
        raise Unsupported(f"{shared} bytes of shared memory, {target.name} has {target.shared_bytes}")
    names = [signature.name(buffer) for buffer in this.operands[:3]]
    lines = [
        f"using T = tc::Heads<tc::{policy}, {this.depth}, {this.width}, {block}>;",
        f"const int head = blockIdx.y, shared_head = head / {this.heads // this.own}, batch = blockIdx.z;",
    ]
    own = (
        (this.queries, this.depth, this.heads, "head"),
        (this.keys, this.depth, this.own, "shared_head"),
        (this.keys, this.width, this.own, "shared_head"),
    )
    for side, name, layout, (length, columns, number, head) in zip("qkv", names, attrs.layouts, own, strict=False):
        base, stride = place(layout, number, length, columns, head, size)
        start = f"{name} + {base}" if group == 1 else f"tc::words({name} + {base})"
        if isinstance(length, int):
            lines.append(f"const tc::Rows<{length}, {columns // group}, {stride // group}> {side}{{{start}}};")
        else:
            lines.append(f"const tc::OpenRows {side}{{{start}, {size(length)}, {columns // group}, {stride // group}}};")
    base, stride = place(attrs.layouts[3], this.heads, this.queries, this.width, "head", size)
    tiles, several = blocks(this.queries, QUERIES), written is not this.out
    if several:
        rows, stride = times([this.batch, this.heads, this.queries]), this.width + 2
        base = f"(blockIdx.x / {size(tiles)} * {size(rows)} + (size_t)(batch * {this.heads} + head) * {size(this.queries)}) * {stride}"
    lines.append(f"const tc::To<{ctype(written.ty.dtype)}> to{{{signature.name(written)} + {base}}};")
    flags = f"{str(this.causal).lower()}, {str(attrs.safe).lower()}"
    vectors = f"{vector(this.depth // group)}, {vector(this.width // group)}"
    places = f"blockIdx.x % {size(tiles)} * T::BQ, blockIdx.x / {size(tiles)} * {size(part)}" if several else "blockIdx.x * T::BQ, 0"
    given, table = "int s, int t, float x", "" if packed is None else signature.name(packed)
    if listed or this.window:
        numbers, given = ", ".join(map(size, (this.queries, this.keys, stride))), f"{given}, int tile"
        before, after = this.window or (-1, -1)
        steps = f"tc::Window<T::BQ, T::BT, {before}, {after}>({size(this.keys)}, blockIdx.x * T::BQ)"
        if listed:
            steps = f"tc::BlockList({table}, {listed.number('batch', 'head', 'blockIdx.x')})"
        safe = str(attrs.safe).lower()
        call = f"tc::attention_steps<tc::{policy}, T, {this.width}, {safe}, false, {vectors}>(q, k, v, to, {numbers}, {steps}, blockIdx.x * T::BQ"
    elif all(isinstance(number, int) for number in (this.queries, this.keys, part)):
        numbers = f"{this.queries}, {this.keys}, {this.width}, {stride}, {flags}, {part}, {vectors}"
        call = f"tc::attention<tc::{policy}, T, {numbers}>(q, k, v, to, {places}"
    else:
        numbers = ", ".join(map(size, (this.queries, this.keys, stride, part)))
        call = f"tc::attention<tc::{policy}, T, {this.width}, {flags}, {str(several).lower()}, {vectors}>(q, k, v, to, {numbers}, {places}"
    lines.append(f"{call}, [&]({given}) {{")
    lines += [f"  {line}" for line in this.score(signature, listed, table)] + ["});"]
    return signature.kernel(
        lines,
        grid=(times([tiles, count]), this.heads, this.batch),
        threads=THREADS,
        resident=2,
        shared_bytes=shared,
        kind="attention",
        workload=this.workload,
        schedule=f"{QUERIES} queries x {block} keys, 4 warps"
        + (f", keys in {shown(count)} parts" if several else "")
        + (", listed" if listed else ""),
    )


def _joined(this: Attention, parts: Any, count: Any, rows: Any) -> Kernel:
    """The result from parts of the keys: a thread per element."""
    signature = Signature(this.params[len(this.operands) :])
    size, width, total = signature.size, this.width, times([rows, this.width])
    address = "place"
    if this.attrs.layouts[3] == "BSHD":
        outer, queries = size(times([this.heads, this.queries])), size(this.queries)
        address = f"((size_t)(row / {outer}) * {queries} + row % {queries}) * {this.heads * width} + row / {queries} % {this.heads} * {width} + e"
    safe = str(this.attrs.safe).lower()
    call = f"tc::joined<{count}, {width}, {safe}>(" if isinstance(count, int) else f"tc::joined<{width}, {safe}>("
    given = f"{signature.name(parts)} + (size_t)row * {width + 2}, " + ("" if isinstance(count, int) else f"{size(count)}, ")
    lines = [
        f"const int place = blockIdx.x * {THREADS} + threadIdx.x;",
        f"if (place >= {size(total)}) return;",
        f"const int row = place / {width}, e = place % {width};",
        f"{signature.name(this.out)}[{address}] = {call}{given}{size(rows)}, e);",
    ]
    if this.logsum is not None:
        values = f"{signature.name(parts)} + (size_t)row * {width + 2}, {size(count)}, {size(rows)}"
        lines.append(f"if (e == 0) {signature.name(this.logsum)}[row] = tc::joined_logsum<{width}>({values});")
    workload = f"sums {shown(count)} x {shown(total)} of attention"
    return signature.kernel(lines, grid=(blocks(total, THREADS), 1, 1), threads=THREADS, shared_bytes=0, kind="sums", workload=workload)
