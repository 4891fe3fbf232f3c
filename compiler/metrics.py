"""How far a changed model is from the original: one number per metric, 0 for no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .errors import UsageError

#: outputs of one call of a model
Outputs = Sequence[np.ndarray]


def cosine(ours: np.ndarray, reference: np.ndarray) -> float:
    """1 - mean cosine similarity over the samples (rows of the first axis); two zero rows agree."""
    a, b = (values.reshape(len(values) if values.ndim else 1, -1).astype(np.float64) for values in (ours, reference))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    similar = np.where(norms > 0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0), np.all(a == b, axis=1))
    return float(1.0 - similar.mean())


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    norm = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / norm if norm else float(bool(np.any(a)))


def top1(ours: np.ndarray, reference: np.ndarray) -> float:
    """Share of rows (last axis) whose largest entry is another one."""
    if not ours.ndim:
        return float(ours != reference)
    return float(np.mean(ours.argmax(axis=-1) != reference.argmax(axis=-1)))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"cosine": cosine, "relative": relative, "top1": top1}


def checked(name: str) -> str:
    """`name` when it is a metric (UsageError)."""
    if name not in METRICS:
        raise UsageError(f"unknown metric '{name}': expected one of {', '.join(METRICS)}")
    return name


def drop(name: str, ours: Sequence[Outputs], reference: Sequence[Outputs]) -> float:
    """The metric over calls: mean over the calls of the worst floating-point output. NaN where shapes differ or a result is not finite."""
    metric = METRICS[checked(name)]
    values = []
    for mine, theirs in zip(ours, reference, strict=True):
        pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(mine, theirs, strict=True) if np.asarray(b).dtype.kind == "f" and np.asarray(b).size]
        if not all(a.shape == b.shape and np.isfinite(a).all() for a, b in pairs):
            return float("nan")
        values.append(max((metric(a, b) for a, b in pairs), default=0.0))
    return float(np.mean(values)) if values else float("nan")
