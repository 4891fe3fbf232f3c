"""Running sums and products along an axis: a warp per row, 32 elements at a time."""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import tirx
from .kernel import Plan, Signature, Unsupported, summed
from .sizes import blocks, shown, simplified, times

OPERATORS = ("relax.cumsum", "relax.cumprod")
_WARPS = 4


def kernel(call: Any) -> Plan:
    """The kernel of a `relax.cumsum` or `relax.cumprod`; its parameters are the operand and the result. Raises Unsupported."""
    source, result = call.args[0].ty, call.ty
    if source.shape is None:
        raise Unsupported("sizes known only at run time")
    shape = [simplified(dim) for dim in source.shape]
    axis = call.attrs.axis
    shape, axis = ([times(shape)], 0) if axis is None else (shape, int(axis) % len(shape))
    length, stride = shape[axis], times(shape[axis + 1 :])
    rows = times([*shape[:axis], stride])
    given, out = tirx.decl_buffer(shape, str(source.dtype), "x"), tirx.decl_buffer(shape, str(result.dtype), "out")
    signature = Signature((out,))
    kind, read, write = summed(result.dtype), signature.name(given), signature.name(out)
    start, sign = ("0", "+") if call.op.name == "relax.cumsum" else ("1", "*")
    exclusive = bool(getattr(call.attrs, "exclusive", False))
    size = signature.size
    step = size(stride)
    lines = [
        f"const int place = blockIdx.x * {_WARPS} + threadIdx.x / 32, lane = threadIdx.x % 32;",
        f"const bool live = place < {size(rows)};",
        f"const int row = live ? place : 0, first = row / {step} * {size(times([length, stride]))} + row % {step};",
        f"{kind} carry = {start};",
        f"for (int k = 0; k < {size(length)}; k += 32) {{",
        f"  const bool inside = k + lane < {size(length)};",
        f"  {kind} sum = inside ? ({kind}){read}[first + (k + lane) * {step}] : ({kind}){start};",
        "#pragma unroll",
        "  for (int step = 1; step < 32; step *= 2) {",
        f"    const {kind} before = tc::shuffle(sum, lane - step);",
        f"    if (lane >= step) sum = before {sign} sum;",
        "  }",
    ]
    value = "sum"
    if exclusive:
        lines += [f"  const {kind} left = tc::shuffle(sum, lane - 1);", f"  const {kind} before_this = lane == 0 ? ({kind}){start} : left;"]
        value = "before_this"
    lines += [
        f"  if (live && inside) {write}[first + (k + lane) * {step}] = carry {sign} {value};",
        f"  carry = carry {sign} tc::shuffle(sum, 31);",
        "}",
    ]
    grid = blocks(rows, _WARPS)
    grid = max(1, grid) if isinstance(grid, int) else grid
    workload = f"scan {shown(rows)} x {shown(length)}"
    made = signature.kernel(lines, grid=(grid, 1, 1), threads=32 * _WARPS, shared_bytes=0, kind="scan", workload=workload)
    return Plan((given, out), (made,))
