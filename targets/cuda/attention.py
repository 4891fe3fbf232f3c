"""The attention kernel: `tcompile.attention` as one CUDA kernel of include/attention.cuh.

block (64 queries, head, batch): q in shared memory
    for 64 (or 32) keys, the next ones on their way:
        s = q k^T on tensor cores, scale and mask in registers; running maximum and sum; out = out * old + exp(s) v on tensor cores
    out / sum

Where that leaves most of the GPU idle (one query behind a long cache), blocks take parts of the keys, and a second kernel joins them in their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...compiler.dialect.attention import AttentionAttrs, attrs_of, dims_of
from ...compiler.tvm import tirx
from ..base import Target
from .gemm import vector
from .kernel import Kernel, Plan, Signature, Unsupported, ctype
from .printer import literal
from .schedule import part_of_keys

QUERIES, THREADS = 64, 128
#: number policies of operands that lie in memory as tensor cores take them, two in a word; others have the policy that was asked for
POLICIES = {"bfloat16": "Bf16x2", "float16": "Fp16x2"}
#: widest head: its outputs stay in registers
MAX_WIDTH = 128


def refusal(call: Any) -> str:
    """Why this kernel does not take the attention, or "" when it does."""
    attrs = attrs_of(call)
    shapes = [list(arg.ty.shape) for arg in call.args]
    if attrs.received:
        return "the attention that keys receive is asked for"
    if any(not isinstance(dim, tirx.IntImm) for shape in shapes for dim in shape):
        return "sizes known only at run time"
    types = {str(arg.ty.dtype) for arg in call.args[:3]}
    if len(types) > 1 or not types <= {*POLICIES, "float32"} or any(str(arg.ty.dtype) not in ("float32", "bool") for arg in call.args[3:]):
        return f"operands of {', '.join(str(arg.ty.dtype) for arg in call.args)}"
    dims = dims_of(*shapes[:3], attrs.layouts)
    if types <= {*POLICIES} and (int(dims.depth) % 2 or int(dims.width) % 2):
        return "heads that fill no whole words"
    if max(int(dims.depth), int(dims.width)) > MAX_WIDTH:
        return f"heads wider than {MAX_WIDTH}"
    if min(int(dim) for shape in shapes for dim in shape) == 0:
        return "an operand without elements"
    return ""


@dataclass(frozen=True)
class Attention:
    """An attention that `refusal` has nothing against: q, k, v and the mask where there is one, the output, and sizes; heads of k and v: own. policy: of numbers, group: how many are in a word."""

    operands: tuple[Any, ...]
    out: Any
    attrs: AttentionAttrs
    policy: str
    batch: int
    heads: int
    own: int
    queries: int
    keys: int
    depth: int
    width: int

    @staticmethod
    def of(call: Any, policy: str) -> Attention:
        """Raises Unsupported as `refusal` says."""
        if reason := refusal(call):
            raise Unsupported(reason)
        shapes, attrs = [[int(dim) for dim in arg.ty.shape] for arg in call.args], attrs_of(call)
        operands = [
            tirx.decl_buffer(shape, str(arg.ty.dtype), f"arg{position}") for position, (arg, shape) in enumerate(zip(call.args, shapes, strict=True))
        ]
        out = tirx.decl_buffer([int(dim) for dim in call.ty.shape], str(call.ty.dtype), "out")
        dims = dims_of(*shapes[:3], attrs.layouts)
        sizes = (dims.batch, dims.heads, dims.kv_heads, dims.queries, dims.keys, dims.depth, dims.width)
        return Attention(tuple(operands), out, attrs, POLICIES.get(str(call.args[0].ty.dtype), policy), *sizes)

    @property
    def params(self) -> tuple[Any, ...]:
        return (*self.operands, self.out)

    @property
    def group(self) -> int:
        return 2 if self.policy in POLICIES.values() else 1

    @property
    def causal(self) -> bool:
        """Keys behind a query are hidden altogether."""
        return self.attrs.causal and self.attrs.fill == -math.inf

    @property
    def workload(self) -> str:
        sizes = f"{self.batch}x{self.heads}({self.own})x{self.queries}x{self.keys}x{self.depth}"
        return f"attention {sizes} {self.policy}" + (" causal" if self.attrs.causal else "")

    def score(self, signature: Signature) -> list[str]:
        """The body of (s, t, x) -> score, where `batch` and `head` are known."""
        fill, operands, attrs = literal(self.attrs.fill, "float32"), self.operands, self.attrs
        lines = [f"const float score = x * {literal(attrs.scale, 'float32')};"]
        if attrs.causal:
            lines.append(
                f"if (t > s) return {fill};"
                if len(operands) == 3 or str(operands[3].ty.dtype) == "bool"
                else f"const float seen = t > s ? {fill} : score;"
            )
        if len(operands) == 3:
            return [*lines, "return score;"]
        shape, domain = [int(dim) for dim in operands[3].shape], (self.batch, self.heads, self.queries, self.keys)
        terms, stride = [], 1
        for dim, index, _ in reversed(list(zip([1] * (4 - len(shape)) + shape, ("batch", "head", "s", "t"), domain, strict=True))):
            if dim != 1:
                terms.append(f"{index} * {stride}" if stride > 1 else index)
            stride *= dim
        mask = f"{signature.name(operands[3])}[{' + '.join(reversed(terms)) or '0'}]"
        if str(operands[3].ty.dtype) == "bool":
            return [*lines, f"return {mask} ? score : {fill};"]
        return [*lines, f"return {'seen' if attrs.causal else 'score'} + {mask};"]


def place(layout: str, heads: int, rows: int, columns: int, head: str = "head") -> tuple[str, int]:
    """(start of a head in C, distance of its rows), in elements."""
    if layout == "BHSD":
        return f"(size_t)(batch * {heads} + {head}) * {rows * columns}", columns
    return f"(size_t)batch * {rows * heads * columns} + {head} * {columns}", heads * columns


def keys_at_once(this: Attention) -> int:
    """Keys of a step."""
    return 64 if max(this.depth, this.width) <= 64 else 32


def kernel(call: Any, target: Target, policy: str) -> Plan:
    """The kernel; its parameters are q, k, v, the mask where there is one, and the output. Raises Unsupported as `refusal` says."""
    this = Attention.of(call, policy)
    batch, heads, own, queries, keys, depth, width = this.batch, this.heads, this.own, this.queries, this.keys, this.depth, this.width
    block, group = keys_at_once(this), this.group
    padded, wide = -(-depth // (16 * group)) * 16, -(-width // 16) * 16 // group
    shared = 4 * (QUERIES * (padded + 8) + 2 * block * (padded + 8 + wide + 4))
    if shared > target.shared_bytes:
        raise Unsupported(f"{shared} bytes of shared memory, {target.name} has {target.shared_bytes}")
    tiles, steps = -(-queries // QUERIES), -(-keys // block)
    part = steps if this.causal else part_of_keys(tiles * heads * batch, steps, target)
    count, rows = -(-steps // part), batch * heads * queries
    written = this.out if count == 1 else tirx.decl_buffer((count, rows, width + 2), "float32", "parts")
    signature = Signature((written,))
    names = [signature.name(buffer) for buffer in this.operands[:3]]
    lines = [
        f"using T = tc::Heads<tc::{this.policy}, {depth}, {width}, {block}>;",
        f"const int head = blockIdx.y, shared_head = head / {heads // own}, batch = blockIdx.z;",
    ]
    sizes = ((queries, depth, heads, "head"), (keys, depth, own, "shared_head"), (keys, width, own, "shared_head"))
    for side, name, layout, (length, columns, number, head) in zip("qkv", names, this.attrs.layouts, sizes, strict=False):
        base, stride = place(layout, number, length, columns, head)
        start = f"{name} + {base}" if group == 1 else f"tc::words({name} + {base})"
        lines.append(f"const tc::Rows<{length}, {columns // group}, {stride // group}> {side}{{{start}}};")
    base, stride = place(this.attrs.layouts[3], heads, queries, width)
    if count > 1:
        base, stride = f"(blockIdx.x / {tiles} * {rows} + (size_t)(batch * {heads} + head) * {queries}) * {width + 2}", width + 2
    lines.append(f"const tc::To<{ctype(written.ty.dtype)}> to{{{signature.name(written)} + {base}}};")
    flags = f"{str(this.causal).lower()}, {str(this.attrs.safe).lower()}, {part if count > 1 else 0}"
    numbers = f"{queries}, {keys}, {width}, {stride}, {flags}, {vector(depth // group)}, {vector(width // group)}"
    places = "blockIdx.x * T::BQ, 0" if count == 1 else f"blockIdx.x % {tiles} * T::BQ, blockIdx.x / {tiles} * {part}"
    lines.append(f"tc::attention<tc::{this.policy}, T, {numbers}>(q, k, v, to, {places}, [&](int s, int t, float x) {{")
    lines += [f"  {line}" for line in this.score(signature)] + ["});"]
    product = signature.kernel(
        lines,
        grid=(tiles * count, heads, batch),
        threads=THREADS,
        resident=2,
        shared_bytes=shared,
        kind="attention",
        workload=this.workload,
        schedule=f"{QUERIES} queries x {block} keys, 4 warps" + (f", keys in {count} parts" if count > 1 else ""),
    )
    return Plan(this.params, (product,) if count == 1 else (product, _joined(written, this)))


def _joined(parts: Any, this: Attention) -> Kernel:
    """The result from parts of the keys: a thread per element."""
    batch, heads, queries, width, out = this.batch, this.heads, this.queries, this.width, this.out
    count, rows, total = int(parts.shape[0]), int(parts.shape[1]), batch * heads * queries * width
    signature = Signature((out,))
    address = "place"
    if this.attrs.layouts[3] == "BSHD":
        address = f"((size_t)(row / {heads * queries}) * {queries} + row % {queries}) * {heads * width} + row / {queries} % {heads} * {width} + e"
    lines = [
        f"const int place = blockIdx.x * {THREADS} + threadIdx.x;",
        f"if (place >= {total}) return;",
        f"const int row = place / {width}, e = place % {width};",
        f"{signature.name(out)}[{address}] = tc::joined<{count}, {width}, {str(this.attrs.safe).lower()}>"
        f"({signature.name(parts)} + (size_t)row * {width + 2}, {rows}, e);",
    ]
    return signature.kernel(
        lines, grid=(-(-total // THREADS), 1, 1), threads=THREADS, shared_bytes=0, kind="sums", workload=f"sums {count} x {total} of attention"
    )
