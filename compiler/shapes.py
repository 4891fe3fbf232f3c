"""The shape option: `--shape x=1..8..32x128` on the command line, `shapes={"x": "1..8..32x128"}` in Python.

A dim is written as a plain number (fixed), `min..max`, `min..opt..max`, or `min..` (no upper bound); dims are joined by `x`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .errors import UsageError
from .program import DimRange

#: one entry per dim: an int is fixed, a DimRange stays symbolic
ShapeSpec = tuple[int | DimRange, ...]

_EXAMPLE = "for example 'input=1..8..32x3x224x224' (min..opt..max) or 'input=1x3x224x224'"
_DIM = re.compile(r"(\d+)(?:(\.\.)(\d+)?(?:\.\.(\d+)?)?)?")


def parse_shape(text: str) -> ShapeSpec:
    """`"1..8..32x128"` -> `(DimRange(1, 8, 32), 128)`; the empty text is the scalar shape. Raises UsageError for malformed text."""
    if not text.strip():
        return ()
    return tuple(_parse_dim(part.strip(), text) for part in text.split("x"))


def parse_shape_flag(text: str) -> tuple[str, ShapeSpec]:
    """`"x=1..8..32x128"` -> `("x", (DimRange(1, 8, 32), 128))`. The name ends at the last `=`. Raises UsageError for malformed text."""
    name, separator, shape = text.rpartition("=")
    if not separator or not name.strip():
        raise UsageError(f"malformed shape '{text}': expected NAME=DIMxDIMx..., {_EXAMPLE}")
    return name.strip(), parse_shape(shape)


def normalize_shapes(shapes: Mapping[str, str | Sequence[int | DimRange]] | None) -> dict[str, ShapeSpec]:
    """The `shapes` argument of the Python API with every value as a ShapeSpec. Raises UsageError for malformed text or dims."""
    return {
        name: parse_shape(spec) if isinstance(spec, str) else tuple(_check_dim(dim, name) for dim in spec) for name, spec in (shapes or {}).items()
    }


def _parse_dim(part: str, text: str) -> int | DimRange:
    match = _DIM.fullmatch(part)
    if match is None:
        raise UsageError(f"malformed shape '{text}': '{part}' is not a dim; expected a number, min..max or min..opt..max, {_EXAMPLE}")
    first, ranged, second, third = match.groups()
    if ranged is None:
        return int(first)
    two_part = part.count("..") == 1
    opt, high = (None, second) if two_part else (second, third)
    low, middle, top = int(first), None if opt is None else int(opt), None if high is None else int(high)
    ordered = [value for value in (low, middle, top) if value is not None]
    if ordered != sorted(ordered):
        raise UsageError(f"malformed shape '{text}': '{part}' must have min <= opt <= max, {_EXAMPLE}")
    return low if low == top else DimRange(low, middle, top)


def _check_dim(dim: int | DimRange, name: str) -> int | DimRange:
    if isinstance(dim, DimRange):
        return dim
    if isinstance(dim, bool) or not hasattr(dim, "__index__") or int(dim) < 0:
        raise UsageError(f"shape of input '{name}': {dim!r} is not a dim; expected an int >= 0 or a DimRange, {_EXAMPLE}")
    return int(dim)
