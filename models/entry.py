"""Entry: one network of the zoo, with its inputs, dynamic dimensions, torch module and ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compiler.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

#: draws the values of one input: (generator, shape) -> array of that shape
Fill = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Dim:
    """A dynamic dimension: the size used by default, its smallest and largest size, and the step that every size is a multiple of."""

    default: int
    min: int = 1
    max: int = 64
    step: int = 1


BATCH = Dim(default=1, min=1, max=64)


@dataclass(frozen=True)
class Input:
    """One input. shape: ints, or names of the entry's dynamic dims."""

    name: str
    shape: tuple[int | str, ...]
    fill: Fill


@dataclass(frozen=True)
class Entry:
    """One network. Exactly one of `build` (a torch network) and `onnx_file` (an ONNX file that a package carries) is set.

    dims: every dynamic dim by name. build(**options): the module in eval mode, seeded; takes tensors in the order of `inputs` and returns a tensor or
    a tuple in the order of `outputs`; options make it smaller or choose the attention ("sdpa" | "eager"), see the builder. weights: "pretrained" |
    "random" | "trained" (here, see `mnist`). packages: the distributions that the network's values depend on.
    """

    name: str
    family: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    dims: Mapping[str, Dim]
    weights: str
    packages: tuple[str, ...]
    build: Callable[..., nn.Module] | None = None
    onnx_file: Callable[[], Path] | None = None
    notes: str = ""
    export_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dynamic_dims(self) -> dict[str, dict[int, str]]:
        """Which axes of which inputs are dynamic: {"input_ids": {0: "batch", 1: "seq"}}."""
        return {spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in self.inputs}

    def example_inputs(self, *, seed: int = 0, **dims: int) -> dict[str, np.ndarray]:
        """Seeded inputs by name, e.g. `example_inputs(batch=3, seq=77)`; UsageError for an unknown dim or a size out of range."""
        sizes = {name: dim.default for name, dim in self.dims.items()}
        for name, size in dims.items():
            dim = self.dims.get(name)
            if dim is None:
                raise UsageError(f"{self.name} has no dynamic dim '{name}': it has {', '.join(self.dims)}")
            if not dim.min <= size <= dim.max or size % dim.step:
                raise UsageError(f"{self.name}: {name}={size} is not a multiple of {dim.step} within {dim.min}..{dim.max}")
            sizes[name] = size
        generator = np.random.default_rng(seed)
        return {spec.name: spec.fill(generator, tuple(sizes.get(str(dim), dim) for dim in spec.shape)) for spec in self.inputs}  # pyright: ignore

    def torch_module(self, **options: Any) -> nn.Module | None:
        """The network in eval mode; None for those that exist only as ONNX. ToolchainError when a package is missing."""
        if self.build is None:
            return None
        return self.build(**options).eval()

    def onnx_path(self, cache: Path | None = None) -> Path:
        """The network as an ONNX file: the packaged one, or exported once into `cache` (default: the user's cache folder)."""
        if self.onnx_file is not None:
            return self.onnx_file()
        from .export import exported

        return exported(self, cache)
