"""Time per kernel of a compiled program, call by call, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...compiler.linker import link
from ...compiler.tvm import relax, tvm
from ...compiler.tvm_control import entry
from ...compiler.tvm_runtime import load_library
from ..base import Target
from .build import executable

#: rounds that are timed, after one that is not
ROUNDS = 15


def profile(
    module: Any, target: Target, inputs: Sequence[np.ndarray], weights: Mapping[str, np.ndarray], kernels: frozenset[str]
) -> dict[str, float]:
    """Microseconds that each of `kernels` takes in one run, all of its calls together; medians over rounds.

    module: memory-planned, its weights lifted. The VM interprets `main` for this, which adds about a microsecond to every call.
    """
    machine = relax.VirtualMachine(load_library(link(executable(module, target, "bytecode"))), tvm.cpu())
    spent: dict[str, int] = {}
    started = 0

    def watch(_function: Any, name: str, before: bool, _result: Any, *_args: Any) -> None:
        nonlocal started
        if before:
            started = time.perf_counter_ns()
        elif name in kernels:
            spent[name] = spent.get(name, 0) + time.perf_counter_ns() - started

    machine.set_instrument(watch)
    main = entry(machine.module)
    arguments = [tvm.runtime.tensor(value) for value in inputs]
    lifted = tuple(tvm.runtime.tensor(value) for value in weights.values())
    rounds: list[dict[str, int]] = []
    for _ in range(ROUNDS + 1):
        spent.clear()
        main(*arguments, lifted)
        rounds.append(dict(spent))
    return {name: statistics.median(found.get(name, 0) for found in rounds[1:]) / 1e3 for name in rounds[-1]}
