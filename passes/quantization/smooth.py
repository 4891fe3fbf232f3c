"""SmoothQuant (Xiao et al., 2022): channels with large activations are divided by a factor, the weights that read them multiplied by it.

The factor of channel j is max|x_j|^a / max|w_j|^(1-a). It costs nothing where the division folds into what makes the tensor: the affine part of a normalisation, or the
weights of a product, through a ReLU, through the linear factor of a gate (x * silu(g)), and through views that keep the last dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.program import Program
from ...compiler.tvm import relax, tirx
from ..constants import with_constants
from ..products import VIEWS, Graph, Site, constant_value, operator
from .observe import Statistics

NORMS = ("relax.nn.layer_norm", "relax.nn.rms_norm")


@dataclass(frozen=True)
class Fold:
    """Constants to change so that a tensor comes out divided by a factor per channel: variable of the call -> {argument: how its array changes}."""

    changes: Mapping[Any, Mapping[int, Callable[[np.ndarray, np.ndarray], np.ndarray]]]


def _divide_last(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return (array / factor).astype(array.dtype)


def foldable(graph: Graph, var: Any) -> Fold | None:
    """How `var`, all of whose readers will be smoothed, can be divided along its last dim; None where nothing takes the factor up."""
    call = graph.defining(var)
    if call is None:
        return None
    name = operator(call)
    if name in NORMS:
        count = 2 if name == "relax.nn.layer_norm" else 1
        axes = [int(axis) % call.ty.ndim for axis in call.attrs.axes]
        affine = [constant_value(arg) for arg in call.args[1 : 1 + count]]
        if axes != [call.ty.ndim - 1] or any(value is None for value in affine):
            return None
        if name == "relax.nn.layer_norm" and not (call.attrs.scale and call.attrs.center):
            return None
        return Fold({var: {1 + index: _divide_last for index in range(count)}})
    if name == "relax.matmul" and (weight := constant_value(call.args[1])) is not None and weight.ndim == 2:
        return Fold({var: {1: _divide_last}})
    if name == "relax.add":
        for position in (0, 1):
            bias = constant_value(call.args[1 - position])
            if bias is not None and bias.shape and bias.shape[-1] == _last(call):
                inner = _through(graph, call.args[position])
                return None if inner is None else Fold({**inner.changes, var: {1 - position: _divide_last}})
    if name == "relax.nn.relu" or name in VIEWS and _last(call) == _last(call.args[0]):
        return _through(graph, call.args[0])
    if name == "relax.multiply":
        for position in (1, 0):
            if _last(call.args[position]) == _last(call) and (inner := _through(graph, call.args[position])) is not None:
                return inner
    return None


def _through(graph: Graph, var: Any) -> Fold | None:
    return foldable(graph, var) if isinstance(var, relax.Var) and graph.single_reader(var) is not None else None


def _last(expr: Any) -> int:
    shape = expr.ty.shape
    size = shape[-1] if shape is not None and len(shape) else None
    return int(size) if isinstance(size, tirx.IntImm) else -1


def factors(statistics: Statistics, sites: list[Site], strength: float) -> np.ndarray:
    """[K] factors, 1 for channels without activations or weights; their geometric mean is 1, so ranges stay comparable."""
    top = statistics.top.astype(np.float64)
    weight = np.max([np.abs(site.weight).max(axis=1) for site in sites], axis=0).astype(np.float64)
    used = (top > 0) & (weight > 0)
    factor = np.ones_like(top)
    factor[used] = top[used] ** strength / weight[used] ** (1 - strength)
    if used.any():
        factor[used] /= np.exp(np.log(factor[used]).mean())
    return np.clip(factor, 1e-3, 1e3).astype(np.float32)


def smooth(graph: Graph, statistics: Mapping[Any, Statistics], strength: float) -> tuple[Program, dict[Any, np.ndarray]]:
    """The smoothed program, and by operand variable (of the graph given) the factor it is divided by. statistics: by operand variable."""
    edits: dict[Any, dict[int, np.ndarray]] = {}
    done: dict[Any, np.ndarray] = {}
    by_source: dict[Any, list[Site]] = {}
    for site in graph.sites:
        by_source.setdefault(site.source, []).append(site)
    for source, sites in by_source.items():
        readers = list(graph.all_readers(source))
        if any(site.kind != "matmul" for site in sites) or len(readers) != len(sites) or "output" in readers:
            continue
        if any(_last(site.x) != _last(source) or _last(source) < 0 for site in sites):
            continue
        fold = foldable(graph, source)
        if fold is None:
            continue
        known = statistics[sites[0].x]
        factor = factors(known, sites, strength)
        for var, changes in fold.changes.items():
            call = graph.bindings[var]
            for index, change in changes.items():
                before = edits.get(var, {}).get(index)
                edits.setdefault(var, {})[index] = change(constant_value(call.args[index]) if before is None else before, factor)
        for site in sites:
            before = edits.get(site.var, {}).get(1)
            edits.setdefault(site.var, {})[1] = (site.weight if before is None else before) * factor[:, None]
            done[site.x] = factor
    return with_constants(graph.program, edits), done
