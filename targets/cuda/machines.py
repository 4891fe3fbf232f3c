"""The GPUs that code can be compiled for, by compute capability; figures of the vendor's data sheets and of the CUDA programming guide."""

from __future__ import annotations

import ctypes

from ...compiler.element_types import FLOAT8
from ..base import Target

_KB, _MB = 1024, 1024 * 1024


def _gpu(name: str, *, cores: int, ghz: float, fma: float, gbs: float, l1: int, l2: int, shared: int, float8: bool = True) -> Target:
    """cores: SMs. fma: multiply-adds of tf32 by mma.sync per SM and cycle. l1, shared: KB of an SM, and the most of them that one block may have; l2: MB. float8: its tensor cores multiply
    float8_e4m3fn."""
    return Target(
        kind="cuda",
        name=name,
        vector_bits=32,
        cores=cores,
        l1_bytes=l1 * _KB,
        l2_bytes=l2 * _MB,
        l3_bytes=0,
        frequency_ghz=ghz,
        fma_per_cycle=fma,
        bandwidth_gbs=gbs,
        shared_bytes=shared * _KB,
        formats=frozenset({"float32", "tf32", "float16", "bfloat16", "int8"} | ({FLOAT8} if float8 else set())),
    )


MACHINES: dict[str, Target] = {
    target.name: target
    for target in (
        _gpu("sm_80", cores=108, ghz=1.41, fma=512.0, gbs=1555.0, l1=192, l2=40, shared=163, float8=False),  # A100 SXM
        _gpu("sm_86", cores=72, ghz=1.695, fma=256.0, gbs=600.0, l1=128, l2=6, shared=99, float8=False),  # A10
        _gpu("sm_89", cores=142, ghz=2.52, fma=256.0, gbs=864.0, l1=128, l2=96, shared=99),  # L40S
        _gpu("sm_90a", cores=132, ghz=1.755, fma=640.0, gbs=3352.0, l1=256, l2=50, shared=227),  # H100 SXM; mma.sync does half of what wgmma does
        _gpu(
            "sm_100a", cores=148, ghz=1.85, fma=512.0, gbs=8000.0, l1=256, l2=126, shared=227
        ),  # B200; its mma.sync has no published rate, sm_80's ranks the tiles
    )
}
#: sources alone: no code of theirs has been seen to run
EMIT_ONLY = frozenset({"sm_100a"})
DEFAULT = "sm_80"


def detected() -> str:
    """The name of this machine's first GPU among MACHINES; DEFAULT where there is none, or one that none of them runs on."""
    capability = _capability()
    return DEFAULT if capability is None else name_for(*capability) or DEFAULT


def name_for(major: int, minor: int) -> str | None:
    """The machine whose code runs on a GPU of this compute capability and knows most of it."""
    named = {name: (int(name[3:].rstrip("a")[:-1]), int(name[3:].rstrip("a")[-1])) for name in MACHINES if name not in EMIT_ONLY}
    fitting = [name for name, (a, b) in named.items() if a == major and (b == minor if name.endswith("a") else b <= minor)]
    return max(fitting, key=lambda name: named[name], default=None)


def _capability() -> tuple[int, int] | None:
    """By the driver, which loads in milliseconds, where torch would take seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(numbers, (75, 76), strict=True):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return numbers[0].value, numbers[1].value
