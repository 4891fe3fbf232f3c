"""Tests that need a GPU: one that torch can use, of a kind that there is a target for, and nvcc."""

from __future__ import annotations

import pytest


def _target() -> tuple[str, str]:
    """(target of this machine's GPU, why there is none)."""
    try:
        import torch
    except ImportError:
        return "", "torch is not installed"
    if not torch.cuda.is_available():
        return "", f"torch {torch.__version__} finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    found = {8: "cuda:sm_80", 9: "cuda:sm_90a" if minor == 0 else ""}.get(major, "")
    return found, f"no target for compute capability {major}.{minor}"


@pytest.fixture(scope="session")
def gpu() -> str:
    """The target of this machine's GPU."""
    from tcompile.compiler.errors import ToolchainError
    from tcompile.targets.cuda import toolchain

    target, reason = _target()
    if not target:
        pytest.skip(reason)
    try:
        toolchain.find_nvcc()
    except ToolchainError as error:
        pytest.skip(str(error))
    return target
