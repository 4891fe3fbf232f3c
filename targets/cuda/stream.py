"""Products in equal shares (stream-K; Osama et al. 2023): as many blocks as the GPU holds at once each take as many steps of K, of however many tiles those are.

    block: for every tile of its share        # tc::gemm_stream in include/stream.cuh, tc::gemm_hopper_stream in include/stream_hopper.cuh
        sums <- its steps of the tile, as tc::gemm or tc::gemm_hopper makes them
        all steps: C = epilogue(sums)         some: parts <- sums
    a second kernel: C = epilogue(parts of a tile, added up in their order)

No atomics and no waiting: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...compiler.tvm import tirx
from .kernel import Kernel, Signature, ctype
from .product import THREADS
from .schedule import TileSchedule

if TYPE_CHECKING:
    from .gemm import Gemm


def kernels(product: Gemm, tile: TileSchedule) -> tuple[Kernel, ...]:
    """The product of known sizes in `tile.shares` shares, and what ends the tiles that several of them have."""
    parts = tirx.decl_buffer((tile.shares, 2, tile.bm, tile.bn), product.fused.accumulator.ty.dtype, "parts")
    written = (product.fused.output, *product.copies)
    sizes = f"T, {product.m}, {product.n}, {product.k_steps}, {tile.shares}"
    return _shares(product, tile, parts, written, sizes), _joined(product, tile, parts, written, sizes)


def _shares(product: Gemm, tile: TileSchedule, parts: tirx.Buffer, written: tuple[tirx.Buffer, ...], sizes: str) -> Kernel:
    signature = product.signature = Signature((*written, parts))
    operands, names, kinds = product.operands(tile, signature), [*map(signature.name, written)], [ctype(buffer.ty.dtype) for buffer in written]
    lines = [
        f"using T = {tile.source};",
        *operands,
        f"const tc::To<{', '.join(kinds)}> out{{{', '.join(names)}}};",
        f"tc::{product.streamed(sizes)}(a, b, out, {signature.name(parts)}, [&](int m, int n, {product.sum} sum) -> {kinds[0]} {{",
        *(f"  {line}" for line in product.epilogue()),
        "});",
    ]
    return signature.kernel(
        lines,
        grid=(tile.shares, 1, 1),
        threads=tile.threads,
        resident=product.resident(tile),
        shared_bytes=tile.shared_bytes,
        kind=product.kind,
        workload=product.workload(),
        schedule=str(tile),
    )


def _joined(product: Gemm, tile: TileSchedule, parts: tirx.Buffer, written: tuple[tirx.Buffer, ...], sizes: str) -> Kernel:
    signature = product.signature = Signature(written)
    result = ctype(written[0].ty.dtype)
    body = product.epilogue()
    lines = [
        f"using T = {tile.source};",
        f"tc::join_shares<{sizes}>({signature.name(parts)}, blockIdx.y + 1, blockIdx.x * {THREADS} + threadIdx.x, [&](int m, int n, {product.sum} sum) {{",
        f"  const {result} value = [&]() -> {result} {{",
        *(f"    {line}" for line in body),
        "  }();",
        *(f"  {signature.name(buffer)}[(size_t)m * {product.n} + n] = value;" for buffer in written),
        "});",
    ]
    return signature.kernel(
        lines,
        grid=(tile.bm * tile.bn // THREADS, tile.shares - 1, 1),
        threads=THREADS,
        shared_bytes=0,
        kind="sums",
        workload=f"sums {tile.shares} shares of {tile.bm}x{tile.bn}",
    )
