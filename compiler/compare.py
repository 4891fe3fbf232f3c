"""The one definition of agreement between two results, used by `verify`, the tests and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: rtol, atol by dtype; integers are compared exactly
TOLERANCES = {"float16": (1e-2, 1e-2), "bfloat16": (1e-2, 1e-2)}
RTOL, ATOL = 1e-4, 1e-5


@dataclass(frozen=True)
class Agreement:
    """How far `ours` is from a reference. max_error: largest absolute difference divided by the reference's range; where: its index; reason: why not ok."""

    ok: bool
    max_error: float
    where: tuple[int, ...] = ()
    reason: str = ""


def agree(ours: np.ndarray, reference: np.ndarray, *, rtol: float | None = None, atol: float | None = None) -> Agreement:
    """Compare two arrays after dividing both by the reference's largest finite magnitude: |ours - reference| <= atol + rtol * |reference|.

    Tolerances left out follow the dtype. Shapes and dtypes must be equal, integers and booleans exactly; NaN agrees with NaN and infinity with the same infinity only.
    """
    ours, reference = np.asarray(ours), np.asarray(reference)
    if ours.shape != reference.shape or ours.dtype != reference.dtype:
        return Agreement(False, float("inf"), (), f"got {ours.dtype}{list(ours.shape)}, expected {reference.dtype}{list(reference.shape)}")
    if not ours.size:
        return Agreement(True, 0.0)
    if ours.dtype.kind in "biu":
        wrong = ours != reference
        if not wrong.any():
            return Agreement(True, 0.0)
        return Agreement(False, float("inf"), _index(wrong), f"{int(wrong.sum())} of {wrong.size} values differ")
    usual = TOLERANCES.get(ours.dtype.name, (RTOL, ATOL))
    rtol, atol = usual[0] if rtol is None else rtol, usual[1] if atol is None else atol
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(reference)
    special = ~finite & ~((ours == reference) | (np.isnan(ours) & np.isnan(reference))) | (finite & ~np.isfinite(ours))
    if special.any():
        place = _index(special)
        return Agreement(False, float("inf"), place, f"got {ours[place]} where the reference has {reference[place]}")
    scale = float(np.abs(reference[finite]).max(initial=0.0)) or 1.0
    difference = np.zeros(ours.shape)
    difference[finite] = np.abs(ours[finite] - reference[finite]) / scale
    allowed = np.full(ours.shape, atol)
    allowed[finite] += rtol * np.abs(reference[finite]) / scale
    place = _index(difference == difference.max())
    ok = bool((difference <= allowed).all())
    return Agreement(ok, float(difference.max()), place, "" if ok else f"got {ours[place]}, expected {reference[place]}")


def _index(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.argwhere(mask)[0])
