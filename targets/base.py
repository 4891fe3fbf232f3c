"""Target: the frozen manifest of a machine. Resolved once, by name; nothing downstream asks the host again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compiler.errors import UsageError


@dataclass(frozen=True)
class Target:
    """What code may assume about the machine it will run on.

    kind: "cpu" | "cuda" | "fpga". name: the model name after the colon ("haswell", "sm_90a"). features: ISA features in LLVM's spelling ("avx2",
    "fma", "avx512f", "avx512vnni"). cache sizes are bytes per core (L3: shared). frequency_ghz and fma_per_cycle (vector FMAs issued per core and
    cycle) give peak rates; bandwidth_gbs is DRAM bandwidth of one core. formats: number formats that products
    gain by (that a machine has an instruction for them is not enough), and ways to compute in them that were asked for ("bf16x3"). disabled: features of `mcpu` that this machine lacks all the same. On a GPU cores are its multiprocessors, bandwidth is the whole card's, and
    shared_bytes is the most shared memory that one block may have.
    """

    kind: str
    name: str
    mcpu: str = ""
    features: frozenset[str] = frozenset()
    vector_bits: int = 256
    vector_registers: int = 16
    cores: int = 1
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 1024 * 1024
    l3_bytes: int = 32 * 1024 * 1024
    frequency_ghz: float = 2.5
    fma_per_cycle: float = 2.0
    bandwidth_gbs: float = 18.0
    formats: frozenset[str] = frozenset({"float32"})
    disabled: tuple[str, ...] = ()
    shared_bytes: int = 0

    @property
    def text(self) -> str:
        """The spelling that `Target.parse` takes back."""
        return f"{self.kind}:{self.name}"

    def lanes(self, dtype: str = "float32") -> int:
        """Elements of `dtype` in one vector register."""
        return self.vector_bits // {"float32": 32, "int32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "float8_e4m3fn": 8}[dtype]

    def peak_gflops(self, dtype: str = "float32") -> float:
        """Multiply-add rate of one core in GFLOP/s (two operations each)."""
        return 2.0 * self.lanes(dtype) * self.fma_per_cycle * self.frequency_ghz

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        values = asdict(self)
        values["features"], values["formats"] = sorted(self.features), sorted(self.formats)
        return values

    @staticmethod
    def parse(text: str) -> Target:
        """`cpu` (this host), `cpu:NAME`, `cuda`, `cuda:NAME`; raises UsageError with the known names otherwise."""
        from . import registry

        kind, _, name = text.partition(":")
        backend = registry.BACKENDS.get(kind)
        if backend is None:
            raise UsageError(
                f"unknown target '{text}': expected one of {', '.join(sorted(registry.BACKENDS))}, optionally with ':NAME'; `tcompile targets` lists them"
            )
        return backend.resolve(name)
