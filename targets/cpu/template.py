"""Kernel template: (workload, schedule) -> TIR. The interface that GEMM, convolution and the others fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...autotune.cost_model import KernelFeatures, Machine
from ...compiler.tvm import tirx
from ..base import Target
from ..common.fused import Fused


@dataclass(frozen=True)
class Packing:
    """A constant parameter that the kernel wants in another layout: position among the parameters, new shape, and the function that packs it.

    Where `pack` returns several arrays, the kernel has as many parameters in the place of the one.
    """

    param: int
    shape: tuple[int, ...]
    pack: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]]
    key: str


@dataclass(frozen=True)
class Kernel:
    """A scheduled PrimFunc: same parameters as the fused one, but for `packings`."""

    func: tirx.PrimFunc
    packings: tuple[Packing, ...] = ()


class KernelTemplate(Protocol):
    """One family of kernels.

    `workload` reads a fused function (raises Unfusable when it is not for this template); `constants` are the parameter positions that are constant at every
    call site, so may be packed. `space` lists the legal schedules (or raises Unfusable where this machine has none), `features` describes the cost of one, `build` emits it.
    """

    @property
    def name(self) -> str: ...

    def workload(self, fused: Fused, constants: frozenset[int]) -> Any: ...

    def space(self, workload: Any, target: Target) -> Sequence[Any]: ...

    def features(self, workload: Any, schedule: Any, target: Target) -> KernelFeatures: ...

    def build(self, fused: Fused, workload: Any, schedule: Any, target: Target) -> Kernel: ...


def machine(target: Target) -> Machine:
    """The rates of a CPU target in the cost model's terms."""
    return Machine(
        frequency_ghz=target.frequency_ghz,
        cores=target.cores,
        dram_gbs=target.bandwidth_gbs,
        vector_bits=target.vector_bits,
        vector_registers=target.vector_registers,
        fma_per_cycle=target.fma_per_cycle,
        l1_bytes=target.l1_bytes,
        l2_bytes=target.l2_bytes,
    )
