"""Cost features of the convolution templates: what their loop nests do to the FMA pipes, the load ports and the caches."""

from __future__ import annotations

from ...autotune.cost_model import KernelFeatures
from ..base import Target
from .cache import conflict_bytes
from .conv_common import ConvWorkload, row_tiles
from .dot import dot_for
from .emit import balanced
from .widen import widening


def direct_features(workload: ConvWorkload, pixels: int, nv: int, lanes: int, rows: int, target: Target) -> KernelFeatures:
    """Features of the direct template: tiles of at most `pixels` x nv vectors of `lanes`, `rows` output rows per task (0: all)."""
    n, out_h, out_w = workload.sizes()
    vectors = -(-workload.co_group // lanes)
    wide, rest = divmod(vectors, nv)
    panels = wide + (rest > 0)
    fma = load = latency = 0.0
    dot = dot_for(workload.kind, target)
    size, weight_size = float(dot.activation_bytes), float(dot.weight_bytes)
    folds = workload.dilation[1] == 1 and workload.groups == 1
    if workload.out_w is not None:
        tiles = [(run.pixels, run.count, [(taps.count, len(taps.pixels)) for taps in run.taps]) for run in row_tiles(workload, pixels)]
    else:
        tiles = [(size, 1, [(workload.kw, size)]) for _, size in balanced(out_w, pixels)]
    rows_of_taps = float(out_h * workload.kh)
    tile_count = 0
    for _, count, runs in tiles:
        tile_count += count
        for taps, live in runs:
            for columns, times in ((nv, wide), (rest, 1)):
                if columns and times:
                    words = dot.words(taps * workload.ci_group) if folds else taps * dot.words(workload.ci_group)
                    steps = rows_of_taps * words * count * times
                    busy = live * columns * dot.instructions / target.fma_per_cycle
                    fma += steps * busy
                    load += steps * (live * dot.broadcast_loads + columns * dot.parts) / 2.0
                    latency += steps * max(4.0, busy)
    repeats = n * workload.groups
    elements = n * out_h * workload.strides[0] * out_w * workload.strides[1] * workload.ci
    # loop set-up, the row's address arithmetic and the epilogue cost about this many cycles per tile
    overhead = 12.0 * repeats * panels * out_h * tile_count * (1 + workload.kh / 2)
    task_rows = min(rows or out_h, out_h)
    chunks = -(-out_h // task_rows)
    panel_bytes = weight_size * workload.kh * workload.kw * workload.ci_group * nv * lanes
    input_rows = task_rows * workload.strides[0] + workload.kh - 1
    input_bytes = size * input_rows * out_w * workload.strides[1] * workload.ci_group
    row_bytes = size * workload.kh * out_w * workload.strides[1] * workload.ci_group
    fits_l1 = panel_bytes + row_bytes < target.l1_bytes
    l2 = repeats * chunks * panels * (panel_bytes * (1 if panel_bytes < target.l1_bytes / 2 else task_rows * tile_count))
    l2 += repeats * chunks * panels * input_bytes * (1 if fits_l1 else min(workload.kh / workload.strides[0] + 1, 3))
    stride = int(size) * workload.strides[1] * workload.ci
    conflicts = sum(count * taps * conflict_bytes(size, stride, target) for size, count, runs in tiles for taps, _ in runs)
    l2 += repeats * panels * rows_of_taps * workload.ci_group / dot.group * conflicts
    weights = weight_size * workload.kh * workload.kw * workload.ci_group * workload.co
    in_l2 = input_bytes + panel_bytes < target.l2_bytes / 2
    l3 = repeats * chunks * input_bytes * (1 if in_l2 else panels) + n * weights * (1 if weights < target.l2_bytes / 2 else chunks)
    return KernelFeatures(
        flops=2.0 * n * out_h * out_w * workload.co * workload.kh * workload.kw * workload.ci_group,
        fma_cycles=repeats * fma + overhead + widening(elements, dot),
        load_cycles=repeats * load + overhead,
        latency_cycles=repeats * latency + overhead + widening(elements, dot),
        l2_bytes=l2,
        l3_bytes=l3,
        dram_bytes=weights,
        scalar_elements=0,
        tasks=n * chunks * workload.groups * panels,
    )


def winograd_features(
    workload: ConvWorkload, m: int, counts: tuple[int, int], strip: int, mr: int, nv: int, lanes: int, shared: bool, target: Target
) -> KernelFeatures:
    """Features of the Winograd template: `counts` tile rows and columns of F(m x m), strips of `strip` tile rows, register tiles of mr x nv vectors."""
    n = workload.n or 1
    rows, columns = counts
    positions = (m + 2) ** 2
    strips = -(-rows // strip)
    tiles = strip * columns
    panels = -(-workload.co // (nv * lanes))
    fma = load = latency = conflicts = 0.0
    for _, size in balanced(tiles, mr):
        steps = float(panels * positions * workload.ci)
        fma += steps * size * nv / target.fma_per_cycle
        load += steps * (size * (0.5 if target.vector_bits == 512 else 1.0) + nv) / 2.0
        latency += steps * max(4.0, size * nv / target.fma_per_cycle)
        conflicts += steps * conflict_bytes(size, 4 * workload.ci, target)
    # transforms, in vector operations: two passes of one-dimensional transforms, a load and a store per position, spills of what does not fit
    side = {2: 4.0, 4: 14.0}[m]
    ci_vectors, co_vectors = -(-workload.ci // lanes), -(-workload.co // lanes)
    before = ci_vectors * (2 * (m + 2) * side + 2.5 * positions)
    after = co_vectors * ((2 * m + 2) * side + 2.0 * positions + 3.0 * m * m)
    transform = tiles * (before + after) / target.fma_per_cycle * 0.75
    repeats = n * strips
    weights = 4.0 * positions * workload.ci * workload.co
    v_bytes, m_bytes = 4.0 * positions * tiles * workload.ci, 4.0 * positions * tiles * nv * lanes
    # the transformed input is read once per panel, in L2 where it fits; products are written and read
    near = v_bytes + m_bytes < target.l2_bytes * 0.75
    again = repeats * (v_bytes * (panels + 1) + 2.0 * m_bytes * panels)
    in_l2 = weights < target.l2_bytes / 2
    return KernelFeatures(
        flops=2.0 * n * (workload.out_h or 1) * (workload.out_w or 1) * workload.co * 9 * workload.ci,
        fma_cycles=repeats * (fma + transform),
        load_cycles=repeats * (load + transform / 2),
        latency_cycles=repeats * (latency + transform),
        l2_bytes=(again if near else 0.0) + repeats * (weights + conflicts),
        l3_bytes=(0.0 if near else again) + (0.0 if in_l2 else repeats * weights),
        dram_bytes=weights,
        tasks=n * (min(panels, rows) if shared else strips),
    )


def depthwise_features(workload: ConvWorkload, pixels: int, lanes: int, rows: int, channels_outer: bool, target: Target) -> KernelFeatures:
    """Features of the depthwise template: tiles of at most `pixels` x one vector of `lanes`, `rows` output rows per task (0: all)."""
    n, out_h, out_w = workload.sizes()
    dot = dot_for(workload.kind, target)
    size = float(dot.activation_bytes)
    # bytes are widened to int32 by the shuffle port
    widen = 2.0 if dot.grouped else 1.0
    vectors = -(-workload.ci // lanes)
    stride, dilation = workload.strides[1], workload.dilation[1]
    tiles = balanced(out_w, pixels)
    fma = load = latency = 0.0
    for _, count in tiles:
        columns = len({i * stride + tap * dilation for i in range(count) for tap in range(workload.kw)})
        busy = workload.kw * count * dot.instructions / target.fma_per_cycle
        fma += busy
        load += (columns * widen + workload.kw) / 2.0
        latency += max(4.0 * workload.kw, busy)
    repeats = float(n * out_h * vectors * workload.kh)
    overhead = 8.0 * n * out_h * vectors * len(tiles) * (1 + workload.kh / 2)
    chunks = -(-out_h // (rows or out_h))
    width = size * out_w * stride * workload.ci
    # rows of input that one output row needs: kept in L1 from tile to tile, or read again for each
    kept = size * workload.kh * (pixels * stride + workload.kw) * (lanes * 2 if channels_outer else workload.ci) < target.l1_bytes / 2
    halo = 1.0 if kept else (pixels + workload.kw) / pixels
    again = 1.0 if width * workload.kh < target.l1_bytes / 2 else workload.kh / workload.strides[0]
    l2 = n * out_h * workload.strides[0] * width * again * halo * (2 if channels_outer and width * workload.kh > target.l1_bytes else 1)
    weights = 4.0 * workload.kh * workload.kw * workload.ci
    l2 += 0 if channels_outer or weights < target.l1_bytes / 2 else n * out_h * len(tiles) * weights
    return KernelFeatures(
        flops=2.0 * n * out_h * out_w * workload.ci * workload.kh * workload.kw,
        fma_cycles=repeats * fma + overhead,
        load_cycles=repeats * load + overhead,
        latency_cycles=repeats * latency + overhead,
        l2_bytes=l2,
        l3_bytes=size * n * out_h * workload.strides[0] * out_w * stride * workload.ci * (1 + workload.kh / (rows or out_h)),
        dram_bytes=weights,
        tasks=n * chunks,
    )
