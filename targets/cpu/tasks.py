"""The kernels of a program that have a choice: what each may be computed by, and benches that build, run and compare the candidates on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import Candidate, Machine
from ...autotune.measure import Operand, aligned
from ...autotune.tuner import workload_key
from ...compiler.tvm import relax, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, analyze, static
from .candidates import compile_kernels, offers
from .host import cpuinfo
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

    def output(self) -> np.ndarray:
        """An array for the result."""
        return aligned(self.operands[-1])

    def arguments(self, candidate: Candidate, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[bool]]:
        """The inputs as this candidate's kernel takes them, constants packed, and which of them are constants of the network."""
        packings = {packing.param: packing for packing in candidate.kernel.packings}
        args: list[np.ndarray] = []
        constant: list[bool] = []
        for index, array in enumerate(inputs):
            packed = packings[index].pack(array) if index in packings else array
            made = list(packed) if isinstance(packed, tuple) else [packed]
            args += made
            constant += [index in self.values] * len(made)
        return args, constant

    def compile(self, candidate: Candidate) -> Callable[..., object]:
        """Machine code of a candidate: a function of the arguments and the output."""
        return compile_kernels({"kernel": candidate.kernel}, self.target)["kernel"]


def tasks(module: Any, target: Target) -> list[Task]:
    """The tasks of a module in which epilogues are fused, those that take most predicted time first. Functions with run-time sizes are left out."""
    module = split_sites(module)
    constants = constant_arguments(module)
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


def hardware(target: Target) -> str:
    """The machine that measurements for a target come from, as the tuning database names it."""
    model = cpuinfo().get("model name", "") if target.name.startswith("host") else target.name
    return f"{model or target.mcpu}, {target.mcpu}, {target.vector_bits}-bit vectors, {target.l2_bytes // 1024} KB L2"


def _random(random: np.random.Generator, operand: Operand) -> np.ndarray:
    dtype = np.dtype(operand.dtype)
    if dtype.kind == "f":
        return random.standard_normal(operand.shape).astype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, operand.shape).astype(dtype)
    return random.integers(0, 127, operand.shape).astype(dtype)


def _static(func: tirx.PrimFunc) -> bool:
    return all(hasattr(param, "shape") and all(static(dim) is not None for dim in param.shape) for param in func.params)


def _calls(main: Any) -> dict[str, int]:
    found: dict[str, int] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir":
            found[expr.args[0].name_hint] = found.get(expr.args[0].name_hint, 0) + 1

    relax.analysis.post_order_visit(main, visit)
    return found
