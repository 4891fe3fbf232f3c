"""The kernels of a program that have a choice: what each may be computed by, and benches that build, run and compare the candidates on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import Candidate, Machine
from ...autotune.measure import COLD_BYTES, Operand
from ...compiler.tvm import relax, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, analyze, static
from .candidates import compile_kernels, offers
from .lower import own_dims, simplify_shapes, templates
from .sparse_sites import constant_arguments, split_sites
from .sparse_weights import Constants
from .template import machine


@dataclass(frozen=True)
class Task:
    """One fused function: its candidates, what its parameters are, how often the network calls it.

    operands: of the fused function, the output last. values: the constants of the first call site, by position.
    """

    name: str
    fused: Fused
    target: Target
    calls: int
    candidates: list[Candidate]
    operands: tuple[Operand, ...]
    values: dict[int, np.ndarray]

    @property
    def workload(self) -> str:
        """Key in the tuning database: everything about the computation that a schedule's time depends on."""
        return workload_key(self.candidates)

    @property
    def machine(self) -> Machine:
        return machine(self.target)

    def inputs(self, seed: int) -> list[np.ndarray]:
        """Arrays for all operands but the output: the network's own constants, random activations."""
        random = np.random.default_rng(seed)
        return [self.values[index] if index in self.values else _random(random, operand) for index, operand in enumerate(self.operands[:-1])]

    def arguments(self, candidate: Candidate, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The inputs as this candidate's kernel takes them: constants packed."""
        args: list[Any] = list(inputs)
        for packing in candidate.kernel.packings:
            packed = packing.pack(args[packing.param])
            args[packing.param] = list(packed) if isinstance(packed, tuple) else [packed]
        return list(itertools.chain.from_iterable(arg if isinstance(arg, list) else [arg] for arg in args))

    def constant_mask(self, candidate: Candidate) -> list[bool]:
        """Which of `arguments` are constants of the network."""
        packed = {packing.param: packing for packing in candidate.kernel.packings}
        mask = []
        for index in range(len(self.operands) - 1):
            count = 1
            if index in packed:
                made = packed[index].pack(self.values[index])
                count = len(made) if isinstance(made, tuple) else 1
            mask += [index in self.values] * count
        return mask

    def compile(self, candidate: Candidate) -> Any:
        """Machine code of a candidate: a function of the arguments and the output."""
        return compile_kernels({"kernel": candidate.kernel}, self.target)["kernel"]


def workload_key(candidates: Sequence[Candidate]) -> str:
    """The workloads of all templates that compete, in a fixed order."""
    return "; ".join(sorted({f"{candidate.template} {candidate.workload!r}" for candidate in candidates}))


def tasks(module: Any, target: Target) -> list[Task]:
    """The tasks of a module in which epilogues are fused, those that take most predicted time first. Functions with run-time sizes are left out."""
    module = split_sites(module)
    constants = constant_arguments(module["main"])
    calls = _calls(module["main"])
    known = templates()
    found = []
    for variable, func in sorted(module.functions_items(), key=lambda item: item[0].name_hint):
        if not isinstance(func, tirx.PrimFunc) or not _static(func):
            continue
        name = variable.name_hint
        held = constants.get(name, Constants())
        try:
            fused = analyze(own_dims(simplify_shapes(func)))
        except Unfusable:
            continue
        offered = offers(fused, held, known, target)
        if offered.candidates:
            operands = tuple(
                Operand(tuple(int(dim) for dim in param.shape), str(param.ty.dtype), position in held) for position, param in enumerate(func.params)
            )
            values = {position: held.values[position][0] for position in held}
            found.append(Task(name, fused, target, calls.get(name, 0), offered.candidates, operands, values))
    return found


def fused_module(steps: Any) -> Any:
    """The module of a program whose graph passes have run, legalized and with epilogues fused: where the kernels' choices begin."""
    from .pipeline import fuse

    fuse(steps)
    return steps.program.module


def with_cores(target: Target, threads: int) -> Target:
    """The manifest for kernels that run on so many threads."""
    return replace(target, cores=threads)


def copies_in_cold_memory(arrays: Sequence[np.ndarray], mask: Sequence[bool], limit: int = 64) -> list[list[np.ndarray]]:
    """Argument lists whose constants lie at different places, as many as it takes to push them out of L2; activations stay where they are."""
    size = max((array.nbytes for array, constant in zip(arrays, mask, strict=True) if constant), default=COLD_BYTES)
    count = max(1, min(limit, COLD_BYTES // max(1, size)))
    made = [list(arrays)]
    for _ in range(count - 1):
        made.append([_aligned(array) if constant else array for array, constant in zip(arrays, mask, strict=True)])
    return made


def _aligned(array: np.ndarray) -> np.ndarray:
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    made = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def _random(random: np.random.Generator, operand: Operand) -> np.ndarray:
    dtype = np.dtype(operand.dtype)
    if dtype.kind == "f":
        return _aligned(random.standard_normal(operand.shape).astype(dtype))
    if dtype.kind == "b":
        return _aligned(random.integers(0, 2, operand.shape).astype(dtype))
    return _aligned(random.integers(0, 127, operand.shape).astype(dtype))


def _static(func: tirx.PrimFunc) -> bool:
    return all(hasattr(param, "shape") and all(static(dim) is not None for dim in param.shape) for param in func.params)


def _calls(main: Any) -> dict[str, int]:
    found: dict[str, int] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir":
            found[expr.args[0].name_hint] = found.get(expr.args[0].name_hint, 0) + 1

    relax.analysis.post_order_visit(main, visit)
    return found
