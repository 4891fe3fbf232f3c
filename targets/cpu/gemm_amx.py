"""GEMM and 1x1 convolution by AMX tiles: u8 x s8 -> int32 and bfloat16 -> float32 with constant weights, see amx_emit.py.

Rows are read in place where they are whole tiles of K, one after the other; otherwise they are gathered, zeros behind the last element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from . import amx, amx_schedules
from .amx_emit import AmxEmitter, InPlace
from .amx_gather import Gathered, copy_run
from .amx_schedules import AmxSchedule
from .conv_common import ConvWorkload
from .conv_pointwise import ConvPointwise, gemm_of, pixel_reader
from .dot import BF16, VNNI, Dot, vector
from .emit import kernel
from .gemm import Gemm, GemmWorkload, pack_gemm
from .template import Kernel, Packing

#: rows that are typical where they are known only at run time
_TYPICAL = 128


@dataclass(frozen=True)
class AmxWorkload:
    """A GEMM; convolution: what it is, if it is a 1x1 convolution."""

    gemm: GemmWorkload
    convolution: ConvWorkload | None = None

    def __str__(self) -> str:
        return str(self.convolution or self.gemm)


class GemmAmx:
    """See the module."""

    name = "gemm_amx"

    def workload(self, fused: Fused, constants: frozenset[int]) -> AmxWorkload:
        convolution = ConvPointwise().workload(fused, constants) if fused.core["op"] == "conv2d" else None
        gemm = Gemm().workload(fused, constants) if convolution is None else gemm_of(convolution)
        if gemm.kind == "f32" or not gemm.packed:
            raise Unfusable("float32, or weights that are not constant")
        kind = gemm.kind.partition("/")[0]  # whether sums fit 16 bits does not matter here
        return AmxWorkload(replace(gemm, kind=kind), None if convolution is None else replace(convolution, kind=kind))

    def space(self, workload: AmxWorkload, target: Target) -> Sequence[AmxSchedule]:
        gemm = workload.gemm
        if not amx.available(gemm.kind, target):
            raise Unfusable("no tiles on this machine")
        assert gemm.n is not None and gemm.k is not None
        dot = tile_dot(gemm.kind)
        return amx_schedules.space(gemm.m, gemm.n, amx.steps(gemm.k, dot) * amx.ROW_BYTES, not _in_place(workload, dot), target)

    def features(self, workload: AmxWorkload, schedule: AmxSchedule, target: Target) -> KernelFeatures:
        gemm, dot = workload.gemm, tile_dot(workload.gemm.kind)
        assert gemm.n is not None and gemm.k is not None
        gathering = 0.0 if _in_place(workload, dot) else 6.0 + 2.0 * amx.steps(gemm.k, dot)
        return amx_schedules.features((gemm.m or _TYPICAL) * (gemm.batch or 1), gemm.k, gemm.n, schedule, dot, gathering, target)

    def build(self, fused: Fused, workload: AmxWorkload, schedule: AmxSchedule, target: Target) -> Kernel:
        gemm, (x, w) = workload.gemm, fused.inputs
        dot, position = tile_dot(gemm.kind), fused.param_index(w)
        assert position is not None and gemm.k is not None and gemm.n is not None
        packing = pack_tiles(position, gemm.k, gemm.n, schedule, dot)
        with kernel(fused, {position: packing.shape}, dot) as (builder, buffers):
            rows = list(fused.output.shape[:-1])
            if workload.convolution is not None:
                flat = T.decl_buffer((product(x.shape),), dot.activation, data=buffers[x].data)
                address = pixel_reader(workload.convolution, x, rows)
            else:
                flat = T.decl_buffer((product(x.shape[:-1]), x.shape[-1]), dot.activation, data=buffers[x].data)
                address = _row
            if _in_place(workload, dot):
                source = InPlace(lambda row, k: flat[address(row)(k)], gemm.k * dot.activation_bytes)
            else:
                source = _gathered(flat, address, gemm.k, dot)
            AmxEmitter(fused, buffers, schedule, rows, gemm.k, gemm.n, source, buffers[w], dot).emit()
        return Kernel(builder.get(), (packing,))


def tile_dot(kind: str) -> Dot:
    """How words of a kind are packed and summed."""
    return BF16 if kind == "bf16" else VNNI


def pack_tiles(position: int, k: int, n: int, schedule: AmxSchedule, dot: Dot) -> Packing:
    """The packing of constant weights [.., K, N] into panels whose words are whole tiles."""
    width = amx.whole(k, dot)
    packing = pack_gemm(position, width, n, amx.ROWS * schedule.tiles.columns, dot)

    def pack(weight: Any) -> Any:
        padded = np.zeros((width, n), weight.dtype)
        padded[:k] = weight.reshape(k, n)
        return packing.pack(padded)

    return Packing(position, packing.shape, pack, f"{packing.key}tiles")


def _in_place(workload: AmxWorkload, dot: Dot) -> bool:
    """Rows are whole tiles and follow each other."""
    convolution = workload.convolution
    assert workload.gemm.k is not None
    return workload.gemm.k % amx.step_elements(dot) == 0 and (convolution is None or convolution.strides == (1, 1))


def _row(row: Any) -> Any:
    return lambda k: (row, k)


def _gathered(flat: Any, address: Any, k: int, dot: Dot) -> Gathered:
    width = amx.whole(k, dot)

    def gather(target: Any, slot: Any, row: Any) -> None:
        start = address(T.bind(row))

        def source(first: Any, lanes: int) -> Any:
            *lead, place = start(first)
            return flat[(*lead, vector(place, lanes))]

        copy_run(target, (slot,), T.int64(0), source, k, dot)
        if width > k:
            copy_run(target, (slot,), T.int64(k), None, width - k, dot)

    return Gathered(gather, width, dot)
