"""The ONNX importer: a walk over the graph, one converter per operator, arithmetic on shapes done at import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from ...program import Program
from ...shapes import ShapeSpec
from . import ops  # noqa: F401  (fills the registry)
from .load import load
from .walk import build_program

__all__ = ["import_onnx"]


def import_onnx(source: str | Path | onnx.ModelProto, *, shapes: Mapping[str, ShapeSpec] | None = None) -> Program:
    """An ONNX file or ModelProto as a Program.

    shapes: per input, an int for a dim that becomes static, a DimRange for one that stays symbolic. Dims that are dynamic in the model and not mentioned
    stay symbolic and unbounded. Raises UsageError for a missing file or shapes that do not fit the model, UnsupportedModel with every blocker.
    """
    return build_program(load(source), shapes or {})
