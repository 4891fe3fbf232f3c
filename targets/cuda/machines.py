"""The GPUs that code can be compiled for, by compute capability; figures of the vendor's data sheets."""

from __future__ import annotations

from ..base import Target

#: cores are SMs, fma_per_cycle those of tf32 tensor cores by mma.sync per SM and cycle (half of wgmma's on sm_90a), shared_bytes the most that one block may have
MACHINES: dict[str, Target] = {
    "sm_80": Target(  # A100 SXM
        kind="cuda",
        name="sm_80",
        vector_bits=32,
        cores=108,
        l1_bytes=192 * 1024,
        l2_bytes=40 * 1024 * 1024,
        l3_bytes=0,
        frequency_ghz=1.41,
        fma_per_cycle=512.0,
        bandwidth_gbs=1555.0,
        shared_bytes=163 * 1024,
        formats=frozenset({"float32", "tf32", "float16", "bfloat16"}),
    ),
    "sm_90a": Target(  # H100 SXM
        kind="cuda",
        name="sm_90a",
        vector_bits=32,
        cores=132,
        l1_bytes=256 * 1024,
        l2_bytes=50 * 1024 * 1024,
        l3_bytes=0,
        frequency_ghz=1.755,
        fma_per_cycle=640.0,
        bandwidth_gbs=3352.0,
        shared_bytes=227 * 1024,
        formats=frozenset({"float32", "tf32", "float16", "bfloat16"}),
    ),
}
DEFAULT = "sm_80"
