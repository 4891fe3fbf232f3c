"""The FPGA backend as the registry sees it: names, manifests, lowering to an HLS project, and its C simulation as the runtime calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.errors import VerificationError
from ..base import Target
from . import parts

if TYPE_CHECKING:
    from ...compiler.lowered import Lowered
    from ...compiler.steps import Steps


def names() -> list[str]:
    """Parts that `fpga:NAME` takes."""
    return sorted(parts.PARTS)


def resolve(name: str) -> Target:
    """The manifest of a part, `xcu280` without a name. Peak rates are those of a nominal clock of 200 MHz."""
    part = parts.part(name or parts.DEFAULT)
    return Target("fpga", part.name, vector_bits=32, cores=1, frequency_ghz=0.2, fma_per_cycle=part.resources.dsp, formats=frozenset({"int8"}))


def having(target: Target, precision: str) -> Target:
    """The same: everything is in integers."""
    return target


def scope(target: Target) -> AbstractContextManager[Any]:
    return nullcontext()


def lower(steps: Steps) -> Lowered:
    """Integer network, dataflow plan, HLS project. UsageError without calibration data, UnsupportedModel for operators without a stage and for parts that
    are too small, VerificationError when the loss exceeds the limit.
    """
    from . import pipeline

    return pipeline.lower(steps)


def simulator(sources: Mapping[str, str], report: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """float input -> float output by C simulation of an artifact's project. Raises ToolchainError without g++."""
    from . import csim
    from .network import Port

    source, result = (_port(report["fpga"][key], Port) for key in ("input", "output"))
    simulation = csim.build(sources, int(np.prod(result.shape)))
    size = int(np.prod(source.shape))

    def run(array: np.ndarray) -> np.ndarray:
        levels = source.quantise(array).reshape(1, size)
        return result.dequantise(simulation(levels)[0])

    return run


def _port(entry: Mapping[str, Any], kind: Any) -> Any:
    scale = np.asarray(entry["scale"], np.float64)
    if not np.isfinite(scale).all():
        raise VerificationError("the artifact's report holds scales that are not finite; compile the model again")
    return kind(entry["name"], tuple(entry["shape"]), scale, int(entry["zero"]), bool(entry["raw"]))
