"""GEMM and 1x1 convolution by AMX tiles: u8 x s8 -> int32 and bfloat16 -> float32 with constant weights, see amx_emit.py; float32 in so many terms of bfloat16, if asked for.

Rows are read in place where they are whole tiles of K, one after the other; otherwise they are gathered, zeros behind the last element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from . import amx, amx_schedules
from .amx_emit import AmxEmitter, InPlace
from .amx_gather import Gathered, Room, copy_run
from .amx_schedules import AmxSchedule
from .conv_common import ConvWorkload
from .conv_pointwise import as_gemm, pixel_reader
from .dot import BF16, BF16X2, BF16X3, VNNI, Dot, vector
from .emit import kernel
from .gemm import GemmWorkload, pack_gemm
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


@dataclass(frozen=True)
class GemmAmx:
    """See the module."""

    terms: int = 1

    @property
    def name(self) -> str:
        return named("gemm_amx", self.terms)

    def workload(self, fused: Fused, constants: frozenset[int]) -> AmxWorkload:
        gemm, convolution = as_gemm(fused, constants)
        if not gemm.packed:
            raise Unfusable("weights that are not constant")
        kind = tile_kind(gemm.kind, self.terms)
        return AmxWorkload(replace(gemm, kind=kind), None if convolution is None else replace(convolution, kind=kind))

    def space(self, workload: AmxWorkload, target: Target) -> Sequence[AmxSchedule]:
        gemm = workload.gemm
        if not amx.available(gemm.kind, target):
            raise Unfusable("no tiles on this machine")
        assert gemm.n is not None and gemm.k is not None
        dot = tile_dot(gemm.kind)
        return amx_schedules.space(gemm.m, gemm.n, amx.steps(gemm.k, dot) * amx.ROW_BYTES, not _in_place(workload, dot), target, dot.terms)

    def features(self, workload: AmxWorkload, schedule: AmxSchedule, target: Target) -> KernelFeatures:
        gemm, dot = workload.gemm, tile_dot(workload.gemm.kind)
        assert gemm.n is not None and gemm.k is not None
        gathering = 0.0 if _in_place(workload, dot) else 6.0 + copying(dot) * amx.steps(gemm.k, dot)
        return amx_schedules.features((gemm.m or _TYPICAL) * (gemm.batch or 1), gemm.k, gemm.n, schedule, dot, gathering, target)

    def build(self, fused: Fused, workload: AmxWorkload, schedule: AmxSchedule, target: Target) -> Kernel:
        gemm, (x, w) = workload.gemm, fused.inputs
        dot, position = tile_dot(gemm.kind), fused.param_index(w)
        assert position is not None and gemm.k is not None and gemm.n is not None
        packing = pack_tiles(position, gemm.k, gemm.n, schedule, dot)
        with kernel(fused, {position: packing.shape}, dot) as (builder, buffers):
            rows = list(fused.output.shape[:-1])
            if workload.convolution is not None:
                flat = T.decl_buffer((product(x.shape),), dot.operand, data=buffers[x].data)
                address = pixel_reader(workload.convolution, x, rows)
            else:
                flat = T.decl_buffer((product(x.shape[:-1]), x.shape[-1]), dot.operand, data=buffers[x].data)
                address = _row
            if _in_place(workload, dot):
                source = InPlace(lambda row, k: flat[address(row)(k)], gemm.k * dot.activation_bytes)
            else:
                source = _gathered(flat, address, gemm.k, dot)
            AmxEmitter(fused, buffers, schedule, rows, gemm.k, gemm.n, source, buffers[w], dot).emit()
        return Kernel(builder.get(), (packing,))


def named(family: str, terms: int) -> str:
    """The name of a template of a family for operands of so many terms."""
    return family if terms == 1 else f"{family}_bf16x{terms}"


def tile_kind(kind: str, terms: int) -> str:
    """The kind of products by tiles for operands of a kind (see `dot.dot_kind`) in so many terms; raises Unfusable where those are of another template."""
    if (kind == "f32") != (terms > 1):
        raise Unfusable("float32" if terms == 1 else "not float32")
    return kind.partition("/")[0] if terms == 1 else f"bf16x{terms}"  # whether sums fit 16 bits does not matter here


def tile_dot(kind: str) -> Dot:
    """How words of a kind are packed and summed."""
    return {dot.name: dot for dot in (BF16, BF16X2, BF16X3)}.get(kind, VNNI)


def copying(dot: Dot) -> float:
    """Cycles that copying the elements of a row of a tile takes."""
    return 2.0 if dot.terms == 1 else 10.0 * dot.terms - 6.0


def pack_tiles(position: int, k: int, n: int, schedule: AmxSchedule, dot: Dot, runs: int = 1) -> Packing:
    """The packing of constant weights [.., K, N] into panels whose words are whole tiles, the terms of a step behind each other. runs: parts of K, each of which is filled up with zeros to its
    share of `k`."""
    width, terms = amx.whole(k, dot), dot.terms
    packing = pack_gemm(position, terms * width, n, amx.ROWS * schedule.tiles.columns, dot)
    shape = width // amx.step_elements(dot), amx.step_elements(dot), n

    def pack(weight: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        padded = np.zeros((width, n), weight.dtype)
        rows = weight.reshape(runs, -1, n)
        padded[:k].reshape(runs, -1, n)[:, : rows.shape[1]] = rows
        if terms > 1:
            padded = np.stack([term.reshape(shape) for term in summands(padded, terms)], 1).reshape(terms * width, n)
        return packing.pack(padded)

    return Packing(position, packing.shape, pack, f"{packing.key}tiles{runs}")


def summands(weight: np.ndarray, terms: int) -> Iterator[np.ndarray]:
    """So many arrays of bfloat16 that add up to one of float32, the nearest one first; see `amx_gather.split`."""
    for _ in range(terms):
        term = weight.astype(ml_dtypes.bfloat16)
        yield term
        weight = weight - term.astype(np.float32)


def _in_place(workload: AmxWorkload, dot: Dot) -> bool:
    """Rows are whole tiles of what is multiplied and follow each other."""
    convolution = workload.convolution
    assert workload.gemm.k is not None
    return dot.terms == 1 and workload.gemm.k % amx.step_elements(dot) == 0 and (convolution is None or convolution.strides == (1, 1))


def _row(row: Any) -> Any:
    return lambda k: (row, k)


def _gathered(flat: Any, address: Any, k: int, dot: Dot) -> Gathered:
    width = amx.whole(k, dot)

    def gather(room: Room, slot: Any, row: Any) -> None:
        start = address(T.bind(row))

        def source(first: Any, lanes: int) -> Any:
            *lead, place = start(first)
            return flat[(*lead, vector(place, lanes))]

        copy_run(room, (slot,), T.int64(0), source, k)
        if width > k:
            copy_run(room, (slot,), T.int64(k), None, width - k)

    return Gathered(gather, width, dot)
