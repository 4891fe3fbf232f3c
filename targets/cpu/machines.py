"""CPU manifests by name, for cross compilation. Rates are the makers' published ones; only their ratios steer schedules."""

from __future__ import annotations

from ..base import Target

_V3 = frozenset({"sse4.2", "avx", "avx2", "fma", "f16c", "bmi", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _V4 | {"avx512vnni"}
_ICELAKE = _VNNI | {"avx512bitalg", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vpopcntdq", "gfni"}
_BF16 = _ICELAKE | {"avx512bf16"}
_AMX = _BF16 | {"amx-bf16", "amx-int8", "amx-tile", "avx512fp16", "avxvnni"}


#: cores that start a `vpdpbf16ps` of 512 bits every other cycle and two multiply-adds of float32 in each (Emerald Rapids: 84 and 170 GFLOP/s)
_SLOW_BF16 = ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d")


def formats(features: frozenset[str], mcpu: str) -> frozenset[str]:
    """Types of numbers that a machine multiplies faster than float32, and float32."""
    found = {"float32"} | ({"int8"} if features & {"avx512vnni", "avxvnni"} else set())
    fast = "amx-bf16" in features or ("avx512bf16" in features and mcpu not in _SLOW_BF16)
    return frozenset(found | ({"bfloat16"} if fast else set()))


def _avx2(name: str, mcpu: str | None = None, extra: frozenset[str] = frozenset(), l2: int = 512, ghz: float = 3.0) -> Target:
    return Target("cpu", name, mcpu or name, _V3 | extra, 256, 16, cores=4, l2_bytes=l2 * 1024, frequency_ghz=ghz)


def _avx512(name: str, features: frozenset[str], mcpu: str | None = None, l2: int = 1024, l1: int = 32, fma: float = 2.0, ghz: float = 2.8) -> Target:
    return Target(
        "cpu",
        name,
        mcpu or name,
        features,
        512,
        32,
        cores=8,
        l1_bytes=l1 * 1024,
        l2_bytes=l2 * 1024,
        frequency_ghz=ghz,
        fma_per_cycle=fma,
        formats=formats(features, mcpu or name),
    )


MACHINES: dict[str, Target] = {
    machine.name: machine
    for machine in (
        _avx2("haswell", l2=256),
        _avx2("skylake", l2=256),
        _avx2("znver2"),
        _avx2("znver3"),
        _avx2("alderlake", extra=frozenset({"avxvnni", "gfni"}), l2=1280),
        _avx2("x86-64-v3"),
        _avx512("skylake-avx512", _V4),
        _avx512("x86-64-v4", _V4),
        _avx512("cascadelake", _VNNI),
        _avx512("icelake-server", _ICELAKE, l1=48, l2=1280),
        _avx512("sapphirerapids", _AMX, l1=48, l2=2048),
        _avx512("znver4", _BF16, fma=1.0, ghz=3.5),
        _avx512("znver5", _BF16 | {"avxvnni"}, l1=48, ghz=3.7),
    )
}
