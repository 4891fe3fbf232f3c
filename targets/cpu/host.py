"""Detection of the host CPU: what the operating system really offers, which a hypervisor may have cut down from what the model name promises."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from ...compiler.errors import ToolchainError
from ..base import Target
from .machines import formats

#: /proc/cpuinfo flag -> LLVM feature, for all features that kernels ask for by name or that LLVM uses of its own accord in arithmetic and shuffles
FLAGS = {
    "sse4_2": "sse4.2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "avx_vnni": "avxvnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512vbmi": "avx512vbmi",
    "avx512ifma": "avx512ifma",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "gfni": "gfni",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
}
#: features of recent cores that kernels have no use for, switched off on a host that lacks them all the same
_FOLLOWERS = {
    "avx512_vp2intersect": "avx512vp2intersect",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "sha_ni": "sha",
    "movdiri": "movdiri",
    "movdir64b": "movdir64b",
    "pku": "pku",
    "rdpid": "rdpid",
    "wbnoinvd": "wbnoinvd",
    "sse4a": "sse4a",
}


#: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) on x86-64
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def cpuinfo() -> dict[str, str]:
    """First processor's entries of /proc/cpuinfo."""
    entries: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        entries[key.strip()] = value.strip()
    return entries


@cache
def _flags() -> frozenset[str]:
    """What processor and system offer this process. Tiles are asked for here: Linux keeps room for them only in processes that want them, and a kernel that uses them unasked ends the process."""
    flags = frozenset(cpuinfo().get("flags", "").split())
    if "amx_tile" in flags and ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) != 0:
        flags -= {flag for flag in flags if flag.startswith("amx_")}
    return flags


@cache
def host_features() -> frozenset[str]:
    """ISA features of this host in LLVM's spelling, limited to those of `FLAGS`. A process in which code with AMX runs has to have called this before."""
    flags = _flags()
    return frozenset(feature for flag, feature in FLAGS.items() if flag in flags)


def missing_features() -> list[str]:
    """Features to switch off (`-feature`) when LLVM compiles for the host's model name."""
    flags = _flags()
    return sorted(feature for flag, feature in (FLAGS | _FOLLOWERS).items() if flag not in flags)


def _cache_bytes(level: int, default: int) -> int:
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_text()) == level and (index / "type").read_text().strip() != "Instruction":
                text = (index / "size").read_text().strip()
                return int(text[:-1]) * {"K": 1024, "M": 1024 * 1024}[text[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return default


@cache
def host() -> Target:
    """The manifest of this machine; raises ToolchainError when it lacks AVX2 and FMA."""
    from ...compiler.tvm import tvm

    features = host_features()
    if not {"avx2", "fma"} <= features:
        raise ToolchainError(
            "this CPU lacks AVX2 and FMA, the least that tcompile's CPU kernels need; name another machine with --target cpu:NAME to cross compile"
        )
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features
    model = tvm.target.codegen.llvm_get_system_cpu()
    double_pumped = model == "znver4"  # executes a 512-bit FMA in two halves
    return Target(
        "cpu",
        "host",
        mcpu=model,
        features=features,
        vector_bits=512 if wide else 256,
        vector_registers=32 if wide else 16,
        cores=len(os.sched_getaffinity(0)),
        l1_bytes=_cache_bytes(1, 32 * 1024),
        l2_bytes=_cache_bytes(2, 512 * 1024),
        l3_bytes=_cache_bytes(3, 16 * 1024 * 1024),
        frequency_ghz=round(float(cpuinfo().get("cpu MHz", "2500")) / 1000, 1),
        fma_per_cycle=1.0 if wide and double_pumped else 2.0,
        formats=formats(features, model),
        disabled=tuple(missing_features()),
    )
