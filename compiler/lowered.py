"""Lowered: what the pipeline hands over once a program has become machine code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..targets.base import Target
from .program import DimRange, Provenance, TensorSpec

if TYPE_CHECKING:
    from .tvm import relax


@dataclass(frozen=True)
class Lowered:
    """An executable for one target and everything its artifact records.

    executable: its `main` takes (*inputs, weights) where weights is a tuple in the insertion order of `weights`. library: a shared library that the target has
    linked itself, in place of an executable (neither: the artifact is source text alone). recipe: the passes with their options.
    report: passes, kernels, memory plan, seconds; keys named `seconds` are measurements and stay out of the saved artifact, which must not
    differ between two compilations of the same model. sources: file name -> readable text of the emitted code.
    """

    executable: relax.VMExecutable | None
    weights: dict[str, np.ndarray]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    target: Target
    provenance: Provenance
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    library: bytes = b""
