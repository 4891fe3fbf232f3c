"""Attention over codes: `tcompile.attention_quantized` as one CUDA kernel of include/attention_codes.cuh.

block (16 rows, head of keys, batch), rows = the queries of all heads that share keys and values: codes come from memory once for them
    for 128 codes' keys, 32 a warp, the next ones on their way:
        s = q (codes - zero)^T on tensor cores, in registers; scales, masks, running maximum and sum; out = out * old + (exp(s) scales) (codes - zero)
    what the warps have, joined

More rows: 64 a block, 16 a warp. Where blocks are few they take parts of the keys, as those of `attention` do.
"""

from __future__ import annotations

from typing import Any

from ...compiler.dialect.attention import AttentionAttrs
from ...compiler.dialect.attention_quantized import QuantizedAttrs, attrs_of, dims_of, optional_of
from ...compiler.tvm import tirx
from ..base import Target
from .attention import MAX_WIDTH, Attention, planned
from .gemm import vector
from .kernel import Kernel, Plan, Signature, Unsupported, ctype
from .sizes import FIXED, Known, blocks, shown, simplified, times
from .weight_only import PARTS

THREADS = 128


def refusal(call: Any) -> str:
    """Why this kernel does not take the attention, or "" when it does."""
    attrs, shapes = attrs_of(call), [list(arg.ty.shape) for arg in call.args]
    dims = dims_of(*shapes[:3], attrs)
    mask = optional_of(call).get("mask")
    if mask is not None and str(mask.ty.dtype) not in ("float32", "bool"):
        return f"a mask of {mask.ty.dtype}"
    if any(not isinstance(dim, tirx.IntImm) for dim in (dims.heads, dims.kv_heads, dims.depth, dims.width)):
        return "heads whose number or size is known only at run time"
    if max(int(dims.depth), int(dims.width)) > MAX_WIDTH:
        return f"heads wider than {MAX_WIDTH}"
    if int(dims.depth) * attrs.k_bits % 32 or int(dims.width) * attrs.v_bits % 32:
        return "heads whose codes fill no whole words"
    if any(isinstance(dim, tirx.IntImm) and int(dim) == 0 for shape in shapes for dim in shape):
        return "an operand without elements"
    for side, arg in zip("kv", call.args[1:3], strict=True):
        zero = getattr(attrs, f"{side}_zero") + (128 if str(arg.ty.dtype) == "int8" else 0)
        if not 0 <= zero < 1 << getattr(attrs, f"{side}_bits"):
            return "a zero point that is no code"
        if (zeros := optional_of(call).get(f"{side}_zeros")) is not None and str(zeros.ty.dtype) != str(arg.ty.dtype):
            return "zero points of another type than the codes"
    return ""


def kernel(call: Any, target: Target, policy: str, known: Known = FIXED) -> Plan:
    """The kernel; its parameters are the call's operands and the output. known: of the symbols in the call's shapes. Raises Unsupported as `refusal` says."""
    if reason := refusal(call):
        raise Unsupported(reason)
    attrs = attrs_of(call)
    shapes = [[simplified(dim) for dim in arg.ty.shape] for arg in call.args]
    operands = [
        tirx.decl_buffer(shape, str(arg.ty.dtype), f"arg{position}") for position, (arg, shape) in enumerate(zip(call.args, shapes, strict=True))
    ]
    optional = dict(zip(attrs.names, operands[3:], strict=True))
    out = tirx.decl_buffer([simplified(dim) for dim in call.ty.shape], "float32", "out")
    dims = dims_of(*shapes[:3], attrs)
    sizes = (dims.batch, dims.heads, dims.kv_heads, dims.queries, dims.keys, dims.depth, dims.width)
    masked = (*operands[:3], *([optional["mask"]] if "mask" in optional else []))
    this = Attention(masked, out, AttentionAttrs(**attrs.plain), policy, *(simplified(size) for size in sizes))
    rows = times([this.queries, this.heads // this.own])
    few = isinstance(rows, int) and rows <= 16
    at_once = 32 if few or max(this.depth, this.width) > 64 else 64
    tile, step = (16, 4 * at_once) if few else (64, at_once)

    def product(written: Any, part: Any, count: Any) -> Kernel:
        return _product(this, attrs, optional, rows, (tile, step, at_once), written, part, count, target)

    number = times([blocks(rows, tile), this.own, this.batch])
    plan = planned(this, number, blocks(this.keys, step), product, target, known)
    return Plan((*operands, out), plan.kernels)


def _product(
    this: Attention,
    attrs: QuantizedAttrs,
    optional: dict[str, Any],
    rows: Any,
    tiling: tuple[int, int, int],
    written: Any,
    part: Any,
    count: Any,
    target: Target,
) -> Kernel:
    """All keys, or `count` parts of `part` steps of them. tiling: rows of a block, keys of a step, and those of a warp."""
    signature, (tile, step, at_once) = Signature((written,)), tiling
    size, (parts, bf16) = signature.size, PARTS[this.policy]
    names, group, several = (
        [signature.name(buffer) for buffer in this.operands[:3]],
        this.heads // this.own,
        written is not this.out,
    )
    codes = [8 if bits == 4 else 4 for bits in (attrs.k_bits, attrs.v_bits)]  # in a word
    words = [this.depth // codes[0], this.width // codes[1]]
    steps, strips = -(-this.depth // (4 * codes[0])) * codes[0] // 4, -(-this.width // (8 * codes[1]))
    lines, floats = [], 2 * step * (_padded(steps * 16 // codes[0]) + strips * 8 + 4)
    for side, buffer, bits in zip("kv", this.operands[1:3], (attrs.k_bits, attrs.v_bits), strict=True):
        signed, scales = str(buffer.ty.dtype) == "int8", f"{side}_scales" in optional
        zero = -1 if f"{side}_zeros" in optional else getattr(attrs, f"{side}_zero") + (128 if signed else 0)
        lines.append(f"using {side.upper()}S = tc::Side<{bits}, {_flag(signed)}, {zero}, {_flag(scales)}>;")
        floats += 2 * step * scales
    shared = 4 * max(tile // 16 * steps * parts * 128 + floats, 0 if tile > 16 else 64 * (this.width + 2))
    if shared > target.shared_bytes:
        raise Unsupported(f"{shared} bytes of shared memory, {target.name} has {target.shared_bytes}")
    lines += [
        f"using T = tc::Cache<KS, VS, tc::Activations<{parts}, {_flag(bf16)}, false>, {this.depth}, {this.width}, {tile // 16}, {at_once}>;",
        "const int shared_head = blockIdx.y, batch = blockIdx.z;",
        f"const size_t line = ((size_t)batch * {this.heads} + shared_head * {group}) * {size(this.queries)};",
        f"const size_t tokens = ((size_t)batch * {this.own} + shared_head) * {size(this.keys)};",
    ]
    for side, name, columns in zip("kv", names[1:], words, strict=True):
        start = f"tc::words({name}) + tokens * {columns}"
        if isinstance(this.keys, int):
            lines.append(f"const tc::Rows<{this.keys}, {columns}, {columns}> {side}{{{start}}};")
        else:
            lines.append(f"const tc::OpenRows {side}{{{start}, {size(this.keys)}, {columns}, {columns}}};")
    given = []
    for name in ("k_scales", "v_scales", "k_zeros", "v_zeros"):
        kind = "const float*" if "scales" in name else "const unsigned char*"
        given.append(f"({kind}){signature.name(optional[name])} + tokens" if name in optional else "nullptr")
    lines.append(f"const tc::Tokens each{{{', '.join(given)}}};")
    tiles, stride = blocks(rows, tile), this.width
    start = "line"
    if several:
        stride = this.width + 2
        start = f"(blockIdx.x / {size(tiles)} * (size_t){size(times([this.batch, this.heads, this.queries]))} + line)"
    lines.append(f"const tc::To<{ctype(written.ty.dtype)}> to{{{signature.name(written)} + {start} * {stride}}};")
    flags = f"T, {_flag(this.attrs.safe)}, {_flag(several)}, {vector(words[0])}, {vector(words[1])}"
    places = f"blockIdx.x % {size(tiles)} * T::BQ, blockIdx.x / {size(tiles)} * {size(part)}" if several else "blockIdx.x * T::BQ, 0"
    numbers = f"{size(rows)}, {size(this.keys)}, {stride}, {size(part)}, {places}"
    lines.append(f"tc::attention_codes<{flags}>({names[0]} + line * {this.depth}, k, v, each, to, {numbers}, [&](int row, int t, float x) {{")
    head = f"const int head = shared_head * {group} + row / {size(this.queries)}, s = row % {size(this.queries)};"
    lines += [f"  {line}" for line in (head, *this.score(signature))] + ["});"]
    return signature.kernel(
        lines,
        grid=(times([tiles, count]), this.own, this.batch),
        threads=THREADS,
        resident=2,
        shared_bytes=shared,
        kind="attention codes",
        workload=f"{this.workload} int{attrs.k_bits} int{attrs.v_bits}" + (f" {attrs.given}" if attrs.given else ""),
        schedule=f"{tile} rows x {step} keys, 4 warps" + (f", keys in {shown(count)} parts" if several else ""),
    )


def _padded(words: int) -> int:
    """Words from one row of keys to the next."""
    return words if words % 8 == 4 else words + 4


def _flag(value: bool) -> str:
    return "true" if value else "false"
