"""1x1 convolution template: the GEMM of all output pixels [N * OH * OW, Ci] with the weights [Ci, Co]; a strided one reads every s-th pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from .conv_common import ConvWorkload, conv_workload, vector_lanes
from .dot import dot_for
from .emit import Rows, kernel, streams
from .gemm import Gemm, GemmWorkload, pack_gemm
from .gemm_blocked import emitter
from .gemm_emit import GemmOperands
from .gemm_schedules import GemmSchedule, suited
from .prefetch import panels_ahead, passed_once
from .short_sums import with_sums
from .template import Kernel
from .widen import activations


class ConvPointwise:
    """See the module; schedules are those of the GEMM."""

    name = "conv_pointwise"

    def workload(self, fused: Fused, constants: frozenset[int]) -> ConvWorkload:
        workload = conv_workload(fused, constants)
        if (workload.kh, workload.kw) != (1, 1) or any(workload.padding) or workload.groups > 1:
            raise Unfusable("not a plain 1x1 convolution")
        return with_sums(workload, fused, constants)

    def space(self, workload: ConvWorkload, target: Target) -> Sequence[GemmSchedule]:
        lanes = vector_lanes(max(workload.co, dot_for(workload.kind, target).min_lanes()), target)
        return [replace(s, lanes=lanes) for s in suited(gemm_of(workload), target) if s.nv == 1 or (s.nv - 1) * lanes < workload.co]

    def features(self, workload: ConvWorkload, schedule: GemmSchedule, target: Target) -> KernelFeatures:
        return Gemm().features(gemm_of(workload), schedule, target)

    def build(self, fused: Fused, workload: ConvWorkload, schedule: GemmSchedule, target: Target) -> Kernel:
        x, w = fused.inputs
        position = fused.param_index(w)
        assert position is not None
        nr, dot = schedule.nv * schedule.lanes, dot_for(workload.kind, target)
        packing = pack_gemm(position, workload.ci, workload.co, nr, dot)
        with kernel(fused, {position: packing.shape}, dot) as (builder, buffers):
            pixels = list(fused.output.shape[:3])
            flat = activations(x, buffers, dot, (product(x.shape),))
            address = pixel_reader(workload, x, pixels)
            operands = GemmOperands([], pixels, T.int64(workload.ci), T.int64(workload.co), flat, address, buffers[w], True, dot)
            ahead, once = panels_ahead(packing.shape, buffers[w], dot, target), passed_once(buffers[w], target)
            emitter(fused, buffers, schedule, operands, ahead, once, streams(fused, target)).emit()
        return Kernel(builder.get(), (packing,))


def gemm_of(workload: ConvWorkload) -> GemmWorkload:
    """The GEMM that a 1x1 convolution is."""
    sizes = (workload.n, workload.out_h, workload.out_w)
    known = [size for size in sizes if size is not None]
    rows = None
    if len(known) == 3:
        rows = known[0] * known[1] * known[2]
    return GemmWorkload(1, rows, workload.ci, workload.co, True, workload.epilogue, workload.kind)


def as_gemm(fused: Fused, constants: frozenset[int]) -> tuple[GemmWorkload, ConvWorkload | None]:
    """The GEMM that a product or a 1x1 convolution is, and the convolution if it is one."""
    if fused.core["op"] != "conv2d":
        return Gemm().workload(fused, constants), None
    convolution = ConvPointwise().workload(fused, constants)
    return gemm_of(convolution), convolution


def row_reader(convolution: ConvWorkload | None, x: Any, rows: list[Any], k: int) -> Callable[[Any], Callable[[Any], tuple[Any, ...]]]:
    """The same as `pixel_reader` for what `as_gemm` gives, of input numbered through."""
    return (lambda row: lambda at: (row * T.int64(k) + at,)) if convolution is None else pixel_reader(convolution, x, rows)


def pixel_reader(workload: ConvWorkload, x: Any, pixels: list[Any]) -> Callable[[Any], Callable[[Any], tuple[Any, ...]]]:
    """Row number of the GEMM -> (k -> index of the input element)."""
    channels = T.int64(workload.ci)
    if workload.strides == (1, 1):
        return lambda row: lambda k: (row * channels + k,)
    rows = Rows(pixels)

    def strided(row: Any) -> Callable[[Any], tuple[Any, ...]]:
        n, i, j = rows.indices(row)
        pixel = (n * x.shape[1] + i * T.int64(workload.strides[0])) * x.shape[2] + j * T.int64(workload.strides[1])
        start = T.bind(pixel * channels)
        return lambda k: (start + k,)

    return strided
