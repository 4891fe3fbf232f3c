"""The pass `sparsify`: zeroes the weights that matter least. A sparse weight stays an ordinary constant; targets find the zeros when they choose kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...compiler.errors import UsageError
from ...compiler.program import Program
from ...compiler.tvm import relax, tirx
from ..base import Pass, PassContext
from ..constants import with_constants
from ..observing import returning
from ..products import VIEWS, Graph, Site, analyze
from .allocation import LEVELS, ROWS, Layer, allocate, predicted_us
from .patterns import Pattern, parse

CRITERIA, ALLOCATIONS = ("magnitude", "wanda"), ("uniform", "latency")
#: what may stand between the last product and an output of the model
_HEAD = ("relax.nn.softmax", "relax.nn.log_softmax", "relax.nn.relu", "relax.sigmoid", "relax.tanh", "relax.astype", *VIEWS)


@dataclass(frozen=True)
class Sparsify(Pass):
    """Matrix products by constant weights lose a share of them.

    pattern: see `patterns.parse` ("block:0.8", "unstructured:0.9", "2:4"); a level of 0 is the identity. criterion: "magnitude", or "wanda" (magnitude times the norm
    of the input channel on calibration data, compared within each output where the pattern is unstructured; Sun et al., 2023). allocation: "uniform", or "latency": a level per
    layer so that the predicted time is that of the uniform level, or `latency_us`, with the least saliency lost. skip: layers (node names) to leave alone.
    last: also the layers whose result is the model's output (classifiers lose most). Embeddings, normalizations and convolutions, which have no sparse kernel, stay as they are.
    """

    name: ClassVar[str] = "sparsify"
    lossy: ClassVar[bool] = True
    flag: ClassVar[str] = "sparsity"

    pattern: str | float = "block:0.8"
    criterion: str = "magnitude"
    allocation: str = "uniform"
    latency_us: float | None = None
    skip: tuple[str, ...] = ()
    last: bool = False

    def __post_init__(self) -> None:
        pattern = parse(self.pattern)
        if self.criterion not in CRITERIA:
            raise UsageError(f"sparsify: unknown criterion '{self.criterion}', expected one of {', '.join(CRITERIA)}")
        if self.allocation not in ALLOCATIONS:
            raise UsageError(f"sparsify: unknown allocation '{self.allocation}', expected one of {', '.join(ALLOCATIONS)}")
        if pattern.fixed and self.allocation == "latency":
            raise UsageError(f'sparsify: {pattern} fixes the level of every layer; use allocation = "uniform", or another pattern')
        if self.latency_us is not None and (self.allocation != "latency" or not self.latency_us > 0):
            raise UsageError('sparsify: latency_us is a positive number of microseconds, for allocation = "latency"')
        object.__setattr__(self, "skip", tuple(self.skip))

    def run(self, program: Program, context: PassContext) -> Program:
        pattern = parse(self.pattern)
        if pattern.level == 0:
            return program
        graph = analyze(program)
        sites = self._wanted(graph, context)
        if not sites:
            context.note("no product by constant weights was found")
            return program
        norms = self._norms(program, sites, context) if self.criterion == "wanda" else {}
        scores = {site.var: _scores(site, norms.get(site.var)) for site in sites}
        levels = self._levels(sites, scores, pattern, context)
        edits, rows = {}, []
        for site, level in zip(sites, levels, strict=True):
            keep = pattern.mask(scores[site.var], level, per_output=self.criterion == "wanda")
            pruned = np.where(keep, site.weight, np.float32(0))
            edits[site.var] = {1: pruned}
            rows.append(_row(site, pruned, scores[site.var], keep, pattern, context))
        context.table("sparse layers", rows)
        zeros = sum(int(np.count_nonzero(weights[1] == 0)) for weights in edits.values())
        context.note(
            f"{zeros / sum(weights[1].size for weights in edits.values()):.3f} of the weights of {len(sites)} layers are zero ({pattern}, {self.criterion})"
        )
        context.matched(layers=len(sites))
        return with_constants(program, edits)

    def _wanted(self, graph: Graph, context: PassContext) -> list[Site]:
        products = [site for site in graph.sites if site.kind == "matmul"]
        if unknown := set(self.skip) - {site.name for site in products}:
            names = ", ".join(site.name for site in products)
            raise UsageError(f"sparsify: skip names no layer {', '.join(sorted(unknown))}; there are {names}")
        heads = set() if self.last else _heads(graph)
        wanted = [site for site in products if site.name not in self.skip and site.var not in heads]
        context.matched(classifiers_left=sum(site.var in heads for site in products), convolutions_left=len(graph.sites) - len(products))
        return wanted

    def _norms(self, program: Program, sites: Sequence[Site], context: PassContext) -> dict[Any, np.ndarray]:
        """[K] root mean square of every input channel over all calibration data, by site."""
        context.measured()
        wanted = list(dict.fromkeys(site.x for site in sites))
        call = context.executor(returning(program, wanted))
        squares: dict[Any, np.ndarray] = {}
        count: dict[Any, int] = {}
        for feeds in context.calibration:
            for x, value in zip(wanted, call(feeds)[len(program.outputs) :], strict=True):
                rows = np.asarray(value, np.float64).reshape(-1, value.shape[-1])
                squares[x] = squares.get(x, 0.0) + np.square(rows).sum(axis=0)
                count[x] = count.get(x, 0) + len(rows)
        norms = {site.var: np.sqrt(squares[site.x] / count[site.x]).astype(np.float32) for site in sites}
        if not all(np.isfinite(norm).all() for norm in norms.values()):
            raise UsageError(
                'sparsify: the model gives NaN or infinity on the calibration data; take such samples out, or use criterion = "magnitude"'
            )
        return norms

    def _levels(self, sites: Sequence[Site], scores: Mapping[Any, np.ndarray], pattern: Pattern, context: PassContext) -> list[float]:
        if self.allocation == "uniform":
            return [pattern.level] * len(sites)
        layers = []
        for site in sites:
            mine = scores[site.var]
            lost = [_lost(mine, pattern.mask(mine, level, per_output=self.criterion == "wanda")) for level in LEVELS]
            layers.append(Layer(_rows(site), *mine.shape, tuple(lost)))
        levels = allocate(layers, pattern, context.target, self.latency_us)
        total = sum(predicted_us(layer, pattern, level, context.target) for layer, level in zip(layers, levels, strict=True))
        context.note(f"levels {min(levels):g} to {max(levels):g} for a predicted {total:.0f} us of these layers' products")
        return levels


def _scores(site: Site, norm: np.ndarray | None) -> np.ndarray:
    """[K, N]: what each weight is worth."""
    magnitude = np.abs(site.weight)
    return magnitude if norm is None else magnitude * norm[:, None]


def _lost(scores: np.ndarray, keep: np.ndarray) -> float:
    """Share of the squared saliency that goes."""
    total = float(np.square(scores, dtype=np.float64).sum())
    return float(np.square(scores[~keep], dtype=np.float64).sum()) / total if total else 0.0


def _rows(site: Site) -> int:
    """M of the product; a stand-in where a dim is known at run time only."""
    rows = 1
    for dim in list(site.x.ty.shape)[:-1]:
        rows *= int(dim) if isinstance(dim, tirx.IntImm) else ROWS
    return rows


def _row(site: Site, after: np.ndarray, scores: np.ndarray, keep: np.ndarray, pattern: Pattern, context: PassContext) -> dict[str, Any]:
    norm = float(np.linalg.norm(site.weight))
    layer, level = Layer(_rows(site), *site.weight.shape), 1 - np.count_nonzero(after) / after.size
    return {
        "layer": site.name,
        "weight": "x".join(str(size) for size in site.weight.shape),
        "zeros": round(level, 4),
        "norm_lost": round(float(np.linalg.norm(site.weight - after)) / norm, 4) if norm else 0.0,
        "saliency_lost": round(_lost(scores, keep), 4),
        "dense_us": round(predicted_us(layer, pattern, 0.0, context.target), 1),
        "sparse_us": round(predicted_us(layer, pattern, level, context.target), 1),
    }


def _heads(graph: Graph) -> set[Any]:
    """The products that reach an output of the model through nothing but a bias, an activation or a view."""
    found: set[Any] = set()
    pending = [var for var, readers in graph.readers.items() if "output" in readers]
    products = {site.total: site for site in graph.sites} | {site.var: site for site in graph.sites}
    while pending:
        var = pending.pop()
        if var in products:
            found.add(products[var].var)
            continue
        value = graph.bindings.get(var)
        if isinstance(value, relax.Tuple):
            pending += [item for item in value.fields if isinstance(item, relax.Var)]
        elif (call := graph.defining(var, *_HEAD)) is not None and isinstance(call.args[0], relax.Var):
            pending.append(call.args[0])
        elif isinstance(value, relax.Var):
            pending.append(value)
    return found
