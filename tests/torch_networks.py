"""Network: a module of torch with the shapes that it is exported and run at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

VOCABULARY = 97


@dataclass(frozen=True)
class Network:
    """build: the module, in eval mode. inputs: shape of each argument of its forward(), with the names of its dynamic dims.

    dims: (smallest, largest) of each dynamic dim, and of what it is a multiple. runs: sizes at which it is run, the first is the one that it is exported at; a dim that a run
    leaves out keeps the size of the first. Arguments called "*mask" hold 0 and 1, "*ids" tokens, all others normally distributed numbers.
    """

    build: Callable[[], torch.nn.Module]
    inputs: dict[str, tuple[int | str, ...]]
    dims: dict[str, tuple[int, ...]]
    runs: list[dict[str, int]] = field(default_factory=list)

    def example(self, run: int = 0) -> dict[str, torch.Tensor]:
        """Values of the inputs for one of the runs."""
        generator = np.random.default_rng(run)
        sizes = {**self.runs[0], **self.runs[run]}
        return {name: _values(name, [sizes.get(dim, dim) for dim in shape], generator) for name, shape in self.inputs.items()}

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Every dynamic dim open over its range, as torch.export takes it."""
        dims = {name: _dim(name, *bounds) for name, bounds in self.dims.items()}
        return {name: {axis: dims[dim] for axis, dim in enumerate(shape) if dim in dims} for name, shape in self.inputs.items()}


def _dim(name: str, low: int, high: int, step: int = 1) -> Any:
    return torch.export.Dim(name, min=low, max=high) if step == 1 else step * torch.export.Dim(f"{name}_{step}", min=low // step, max=high // step)


class _Wide(TorchFunctionMode):
    """float64 wherever a module asks for float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def exact(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """What the module gives in float64."""
    module = copy.deepcopy(module).double()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Wide():
            return module(*(value.double() if value.is_floating_point() else value for value in inputs.values())).numpy()
    finally:
        torch.set_default_dtype(torch.float32)


def _values(name: str, shape: list[Any], generator: np.random.Generator) -> torch.Tensor:
    if name.endswith("ids"):
        return torch.from_numpy(generator.integers(3, VOCABULARY, shape))
    if name.endswith("mask"):
        lengths = generator.integers(1, shape[1] + 1, shape[0])
        lengths[0] = shape[1]
        return torch.from_numpy((np.arange(shape[1])[None, :] < lengths[:, None]).astype(np.int64))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
