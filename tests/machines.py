"""The machines whose code the tests run: AVX2 everywhere, and the widest named machine that this host can execute."""

from __future__ import annotations

from typing import Any

import pytest
from tcompile.targets.base import Target
from tcompile.targets.cpu.host import host_features
from tcompile.targets.cpu.machines import MACHINES

HASWELL = MACHINES["haswell"]


def widest() -> Target | None:
    """The machine with most features among those with AVX512 that this host can execute; None without AVX512."""
    able = [machine for machine in MACHINES.values() if machine.vector_bits == 512 and machine.features <= host_features()]
    return max(able, key=lambda machine: (len(machine.features), machine.name), default=None)


def runnable() -> list[Any]:
    """Parameters for `@pytest.mark.parametrize("target", runnable())`."""
    wide = widest()
    missing = pytest.mark.skip(reason="this host has no AVX512: code for it can be compiled, not run")
    return [
        pytest.param(HASWELL, id="haswell"),
        pytest.param(wide, id="avx512" if wide is None else wide.name, marks=[missing] if wide is None else []),
    ]


def multiplying(dtype: str) -> Any:
    """The widest machine, if it multiplies such numbers faster than float32; else a parameter that is skipped."""
    wide = widest()
    if wide is not None and dtype in wide.formats:
        return pytest.param(wide, id=wide.name)
    return pytest.param(wide, id=dtype, marks=pytest.mark.skip(reason=f"this host has no instruction for {dtype} that tcompile would use"))


@pytest.fixture(params=runnable(), autouse=True)
def each_machine(request, monkeypatch):
    """For a module that imports it: every test runs with the module's TARGET set to each of these machines."""
    monkeypatch.setattr(request.module, "TARGET", request.param)
