"""What a kernel costs, as a template describes it, and the interface that predicts time from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol


@dataclass(frozen=True)
class KernelFeatures:
    """Work of one kernel under one schedule, whole kernel, all cores together.

    flops: useful floating-point operations. fma_cycles: cycles of one core that the FMA pipes are busy, tile tails and padding included;
    load_cycles: the same for the load ports; latency_cycles: cycles bound by dependent FMA chains. l2_bytes, l3_bytes, dram_bytes: traffic into L1 from each level.
    scalar_elements: elements handled without vector code. tasks: independent pieces of the parallel loop (the largest first, equal sizes assumed).
    """

    flops: float = 0.0
    fma_cycles: float = 0.0
    load_cycles: float = 0.0
    latency_cycles: float = 0.0
    l2_bytes: float = 0.0
    l3_bytes: float = 0.0
    dram_bytes: float = 0.0
    scalar_elements: float = 0.0
    tasks: int = 1


@dataclass(frozen=True)
class Machine:
    """The rates a cost model needs. Frequencies in GHz, bandwidths in bytes per cycle of one core (DRAM: GB/s of one core), caches in bytes per core."""

    frequency_ghz: float
    cores: int
    dram_gbs: float
    l2_bytes_per_cycle: float = 24.0
    l3_bytes_per_cycle: float = 10.0
    launch_us: float = 2.0
    vector_bits: int = 256
    vector_registers: int = 16
    fma_per_cycle: float = 2.0
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 1024 * 1024


@dataclass(frozen=True)
class Candidate:
    """One way to compute one workload: a template's name, the workload and the schedule (both frozen dataclasses), the closed-form features.

    emit: makes the kernel (an object whose `func` is the PrimFunc); called once, when somebody asks for `kernel`: it costs ten milliseconds.
    """

    template: str
    workload: Any
    schedule: Any
    features: KernelFeatures
    emit: Callable[[], Any]

    @cached_property
    def kernel(self) -> Any:
        """The emitted kernel."""
        return self.emit()


@dataclass(frozen=True)
class Design:
    """One way to compute one workload on a target where space is as scarce as time: its kind, closed-form features by name (machine included), and what the target's own
    formulas say of each quantity (registers, shared_bytes; cycles, dsp, lut). Names and their order are part of a trained model's schema.
    """

    kind: str
    numbers: Mapping[str, float]
    modelled: Mapping[str, float]


class ResourceModel(Protocol):
    """Predicts what designs take, by the names of the quantities that `Design.modelled` has."""

    name: str

    def predict(self, designs: Sequence[Design]) -> list[dict[str, float]]: ...


class CostModel(Protocol):
    """Predicts latency. The analytic model is the first; a learned one takes its place behind the same call."""

    name: str

    def predict(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        """Predicted latency in microseconds of each candidate."""
        ...

    def shortlist(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        """The same from closed-form features alone: no kernel is emitted, so a whole space may be put in order."""
        ...

    def choose(self, candidates: Sequence[Candidate], machine: Machine) -> tuple[Candidate, float]:
        """The candidate to take, of all that all templates offer for one workload, and its predicted latency in microseconds."""
        ...


class AnalyticModel:
    """Roofline with overlap: the slowest of FMA pipes, load ports and FMA latency, plus the part of memory time that prefetching does not hide."""

    name = "analytic"

    #: share of cache traffic that runs beside arithmetic; from the packed-GEMM measurements in docs/performance.md
    overlap = 0.7

    def predict(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        return [self.latency_us(candidate.features, machine) for candidate in candidates]

    def shortlist(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        return self.predict(candidates, machine)

    def choose(self, candidates: Sequence[Candidate], machine: Machine) -> tuple[Candidate, float]:
        predicted = self.predict(candidates, machine)
        best = min(range(len(candidates)), key=predicted.__getitem__)
        return candidates[best], predicted[best]

    def latency_us(self, features: KernelFeatures, machine: Machine) -> float:
        """Latency of a kernel with these features."""
        # loads issue beside FMAs but share the front end: 4x3 tiles (7 loads for 12 FMAs) measure 12 % faster than 6x2 (8 loads)
        compute = max(features.fma_cycles, features.latency_cycles) + 0.3 * features.load_cycles + 4.0 * features.scalar_elements
        memory = features.l2_bytes / machine.l2_bytes_per_cycle + features.l3_bytes / machine.l3_bytes_per_cycle
        memory += features.dram_bytes / machine.dram_gbs * machine.frequency_ghz
        cycles = max(compute, memory) + (1.0 - self.overlap) * min(compute, memory)
        rounds = -(-features.tasks // machine.cores)
        parallel = features.tasks / (rounds * machine.cores)
        return cycles / (machine.frequency_ghz * 1e3) / (machine.cores * parallel) + (machine.launch_us if features.tasks > 1 else 0.0)
