"""The pass `quantize`: post-training quantization of products to int8 or fp8, or of the weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from ...compiler.element_types import FLOAT8
from ...compiler.errors import UsageError, VerificationError
from ...compiler.metrics import checked, drop
from ...compiler.program import Program
from ..base import Pass, PassContext
from ..observing import returning
from ..products import Graph, Site, analyze, is_static, operator, patches
from .formats import Covering, SlicedFloat8
from .fp8 import Fp8
from .integers import Integers
from .observe import KEPT, OBSERVERS, Statistics, chosen_range
from .rewrite import Quantizer, simulation
from .schemes import Scheme
from .smooth import smooth
from .weight_only import WEIGHT_ONLY, quantize_weights

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (Integers(), Fp8())}
FORMATS = (*SCHEMES, *WEIGHT_ONLY)
#: how formats are named to users
NAMES = "int8, fp8, w1 .. w8, w1a8 .. w8a8, w1fp8 .. w8fp8"
#: in place of an observer: scales are found while the model runs
DYNAMIC = "dynamic"
#: rows of an operand on which a layer's own error is measured
ERROR_ROWS = 256
#: samples on which single layers are tried
TRIED_SAMPLES = 4


@dataclass(frozen=True)
class Quantize(Pass):
    """Matrix products and convolutions by constant weights in few bits.

    format: "int8" (weights symmetric per output channel, activations u8, both observed on calibration data), "fp8" (both float8_e4m3fn, depthwise convolutions left in float32), or weights
    alone in groups of `group` along K: "w1" .. "w8", by their bits; "w4a8" or "w4fp8", of any bits, by activations of int8 or float8_e4m3fn with a scale per row, found while the model runs. observer: how the range of an activation is found, "minmax" | "percentile" | "mse"; for fp8 also "dynamic", which
    it is without calibration data: a scale per row of a matrix product, or image of a convolution, found while the model runs. smooth: 0 (off) .. 1, how much of the activations' spread moves
    into the weights (SmoothQuant). max_drop, metric: the loss up to which layers are quantized, those with the most loss first left in float32; None: the compilation's own
    limit. short_sums: whether scales of int8's weights are wide enough for sums of their products to fit 16 bits, in which CPUs without VNNI multiply twice as fast; at most a bit of
    the weights' eight, in the mean over a layer's channels, is given up for it; None: on such CPUs.
    skip: layers (node names) to leave in float32.
    """

    name: ClassVar[str] = "quantize"
    lossy: ClassVar[bool] = True
    flag: ClassVar[str] = "quantize"

    format: str = "int8"
    observer: str = "minmax"
    percentile: float = 99.99
    smooth: float = 0.0
    group: int = 32
    symmetric: bool = True
    short_sums: bool | None = None
    max_drop: float | None = None
    metric: str | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in ("none", *FORMATS):
            raise UsageError(f"quantize: unknown format '{self.format}', expected one of none, {NAMES}")
        if self.observer not in (*OBSERVERS, DYNAMIC):
            raise UsageError(f"quantize: unknown observer '{self.observer}', expected one of {', '.join((*OBSERVERS, DYNAMIC))}")
        if self.observer == DYNAMIC and self.format != "fp8":
            raise UsageError(f"quantize: observer {DYNAMIC} is for fp8, not for {self.format}")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"quantize: percentile must be above 50 and at most 100, not {self.percentile}")
        if not 0 <= self.smooth <= 1:
            raise UsageError(f"quantize: smooth must be within 0..1, not {self.smooth}")
        if self.group < 2 or self.group % 2:
            raise UsageError(f"quantize: group must be an even number of weights, not {self.group}")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise UsageError(f"quantize: max_drop must be a loss of at least 0, not {self.max_drop}")
        if self.metric is not None:
            checked(self.metric)
        object.__setattr__(self, "skip", tuple(self.skip))

    def run(self, program: Program, context: PassContext) -> Program:
        if self.format == "none":
            return program
        if self.format in WEIGHT_ONLY:
            self._note_activations(context)
            return quantize_weights(program, context, self.format, self.group, self.symmetric, self.skip)
        self._note_target(context)
        return _Products(self, self._scheme(context), program, context).run()

    def _scheme(self, context: PassContext) -> Scheme:
        if self.format != "int8":
            return SCHEMES[self.format]
        return Integers("int8" not in context.target.formats if self.short_sums is None else self.short_sums)

    def _note_target(self, context: PassContext) -> None:
        """UsageError where a target cannot compute in the format; a note where nothing is faster there."""
        target, own = context.target, {"int8": "int8", "fp8": FLOAT8}[self.format]
        if own in target.formats:
            return
        if target.kind != "cpu" and (self.format, target.kind) != ("fp8", "cuda"):
            other = "w8 or w4" if self.format == "int8" else "int8"
            raise UsageError(f"quantize: target {target.text} computes in {', '.join(sorted(target.formats))}, not in {self.format}; try {other}")
        if self.format == "fp8":
            rate = "bfloat16" if "bfloat16" in target.formats else "float32"
            context.note(
                f"target {target.text} has no instruction for fp8: its numbers are held in 16 bits, weights take half of the memory, products run at {rate}'s rate"
            )
        elif self.short_sums is False:
            context.note(f"target {target.text} has no VNNI: with short_sums, products would take about two thirds of their time")
        else:
            context.note(
                f"target {target.text} has no VNNI: weights have up to one bit less than eight, so that it multiplies exactly in less than half of float32's time; short_sums=False keeps it"
            )

    def _note_activations(self, context: PassContext) -> None:
        """The same of the activations beside weights in few bits."""
        (bits, dtype), target = WEIGHT_ONLY[self.format], context.target
        if dtype == "float32":
            return
        if target.kind not in ("cpu", "cuda"):
            formats = ", ".join(sorted(target.formats))
            raise UsageError(f"quantize: target {target.text} computes in {formats}, not by activations of {dtype}; try w{bits}")
        if dtype == FLOAT8:
            rate = "16-bit numbers" if target.kind == "cuda" else "float32"
            context.note(f"activations of {dtype} are held in 16 bits, and multiplied by integers at the rate of {rate}")


@dataclass
class _Products:
    """One run of a scheme."""

    options: Quantize
    scheme: Scheme
    program: Program
    context: PassContext
    generator: np.random.Generator = field(init=False)
    statistics: dict[Any, Statistics] = field(default_factory=dict)
    shapes: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    operands: dict[Any, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.context.seed)

    def run(self) -> Program:
        graph = analyze(self.program)
        sites = self._wanted(graph)
        if not sites:
            self.context.note("no product by constant weights was found")
            return self.program
        name, reference = self.options.format, []
        if self.context.calibration:
            reference = self._observe(graph, sites)
        elif name != "fp8" or self.options.observer not in ("minmax", DYNAMIC) or self.options.smooth:
            other = "observer minmax or dynamic, and smooth 0" if name == "fp8" else "w8 or w4"
            raise UsageError(
                f"quantize: {name} needs data to observe activations on: give --calibration DATA.npz (Python: calibration=...), or use {other}"
            )
        if self.options.smooth:
            graph, sites = self._smoothed(graph)
        if self._dynamic:  # scales of the very operand: a view may have other rows
            sites = [replace(site, source=site.x) for site in sites]
        ranges = self._ranges(sites)
        rows = {site.var: self._row(site, ranges[site.source]) for site in sites}
        chained = self._chained(graph, sites)
        limit = self.options.max_drop
        if limit is None and self.context.accuracy is not None:
            limit = self.context.accuracy.max_drop
        kept = sites
        if limit is not None:
            kept = self._within(graph, ranges, sites, chained, limit, reference, rows)
        names = {site.var for site in kept}
        for site in sites:
            rows[site.var]["runs in"] = name if site.var in names else "float32"
        self.context.table("quantized layers", list(rows.values()))
        self.context.matched(**{kind: sum(site.kind == kind for site in kept) for kind in ("matmul", "conv2d")}, fallback=len(sites) - len(kept))
        return Quantizer(graph, self.scheme, ranges, kept, self._chained(graph, kept)).apply()

    @property
    def _dynamic(self) -> bool:
        return self.options.observer == DYNAMIC or not self.context.calibration

    def _chained(self, graph: Graph, sites: Sequence[Site]) -> frozenset[Any]:
        return _chained(graph, sites) if self.scheme.chained else frozenset()

    def _wanted(self, graph: Graph) -> list[Site]:
        unknown = set(self.options.skip) - {site.name for site in graph.sites}
        if unknown:
            raise UsageError(f"quantize: skip names no layer {', '.join(sorted(unknown))}; there are {', '.join(site.name for site in graph.sites)}")
        # a depthwise convolution has one product per lane, which numbers of eight bits do not make faster
        return [site for site in graph.sites if site.name not in self.options.skip and not (site.depthwise and self.scheme.name == "fp8")]

    def _observe(self, graph: Graph, sites: Sequence[Site]) -> list[tuple[np.ndarray, ...]]:
        """Fill the statistics of every operand; the outputs on every sample."""
        wanted = list(dict.fromkeys(site.x for site in sites))
        outputs = len(self.program.outputs)
        call = self.context.executor(returning(self.program, wanted))
        samples = self.context.calibration
        reference = []
        kinds = {site.x: site.kind for site in sites}
        keep, rows = max(1024, KEPT // len(samples)), max(4, ERROR_ROWS // len(samples))
        for feeds in samples:
            values = call(feeds)
            reference.append(tuple(np.array(value) for value in values[:outputs]))
            for x, value in zip(wanted, values[outputs:], strict=True):
                flat = value.reshape(-1, value.shape[-1]) if kinds[x] == "matmul" else value.transpose(0, 2, 3, 1).reshape(-1, value.shape[1])
                found = Statistics.of(flat, keep, self.generator)
                self.statistics[x] = self.statistics[x].joined(found) if x in self.statistics else found
                self.shapes[x] = value.shape
            seen = dict(zip(wanted, values[outputs:], strict=True))
            for site in sites:
                self.operands.setdefault(site.var, []).append(patches(seen[site.x], site, rows, self.generator).astype(np.float32))
        return reference

    def _smoothed(self, graph: Graph) -> tuple[Graph, list[Site]]:
        """The graph after smoothing, what was observed carried over."""
        program, factors = smooth(graph, self.statistics, self.options.smooth)
        self.context.matched(smoothed=len(factors))
        if not factors:
            return graph, self._wanted(graph)
        after = analyze(program)
        statistics, shapes, operands = {}, {}, {}
        for old, new in zip(graph.sites, after.sites, strict=True):
            if old.x not in self.statistics:
                continue
            factor = factors.get(old.x)
            statistics[new.x] = self.statistics[old.x] if factor is None else self.statistics[old.x].scaled(1 / factor)
            shapes[new.x] = self.shapes[old.x]
            operands[new.var] = [rows if factor is None else rows / factor for rows in self.operands.get(old.var, [])]
        self.statistics, self.shapes, self.operands, self.program = statistics, shapes, operands, program
        return after, self._wanted(after)

    def _ranges(self, sites: Sequence[Site]) -> dict[Any, Covering]:
        if self._dynamic:
            images = {site.source for site in sites if site.kind == "conv2d"}
            return {site.source: SlicedFloat8((1, 2, 3) if site.source in images else (-1,)) for site in sites}
        seen: dict[Any, dict[Any, Statistics]] = {}
        for site in sites:
            seen.setdefault(site.source, {})[site.x] = self.statistics[site.x]
        return {
            source: chosen_range(self.options.observer, list(found.values()), self.options.percentile, self.scheme.covering)
            for source, found in seen.items()
        }

    def _row(self, site: Site, covering: Covering) -> dict[str, Any]:
        """A layer's own error on sampled rows of its operand, and the least time its multiply-adds take; without data, what it is."""
        row: dict[str, Any] = {"layer": site.name, "kind": site.kind, "weight": "x".join(str(size) for size in site.weight.shape)}
        scale = {"scale": _scale(covering), "zero": getattr(covering, "zero", 0)}
        if site.var not in self.operands:
            return {**row, **scale}
        x = np.concatenate(self.operands[site.var])
        exact = site.product(x, site.weight)
        codes: Any = covering.encode(x)
        ours = site.product(covering.decode(codes), self.scheme.weight(site).decode())
        power, noise = float(np.mean(exact**2)), float(np.mean((exact - ours) ** 2))
        ratio = 10 * math.log10(power / noise) if power and noise else math.inf if power else 0.0
        work = 2 * site.multiplications(self.shapes[site.x]) / 1e3
        target = self.context.target
        return {
            **row,
            "sqnr_db": round(min(ratio, 200.0), 2),
            "relative_error": round(math.sqrt(noise / power), 6) if power else 0.0,
            **scale,
            "fp32_bound_us": round(work / target.peak_gflops("float32") / target.cores, 2),
            f"{self.scheme.name}_bound_us": round(work / target.peak_gflops(self._rate(site)) / target.cores, 2),
        }

    def _rate(self, site: Site) -> str:
        """The type at whose rate a layer runs."""
        if self.scheme.name == "int8":
            return "float32" if site.depthwise else "int8"  # one product per lane and instruction is all that a depthwise convolution has
        return next((name for name in (FLOAT8, "bfloat16") if name in self.context.target.formats), "float32")

    def _within(
        self,
        graph: Graph,
        ranges: Mapping[Any, Covering],
        sites: list[Site],
        chained: frozenset[Any],
        limit: float,
        reference: list[tuple[np.ndarray, ...]],
        rows: Mapping[Any, dict[str, Any]],
    ) -> list[Site]:
        """The sites that stay in few bits so that the loss holds: those with the most loss, each tried alone, are left out, as few as a search by halves finds."""
        accuracy = self.context.measured()
        metric = self.options.metric or accuracy.metric
        call = self.context.executor(simulation(graph, self.scheme, ranges, sites, chained))
        samples = list(accuracy.calibration)

        def loss(on: set[Any], count: int = len(samples)) -> float:
            flags = {f"flag{index}": np.array([site.var in on]) for index, site in enumerate(sites)}
            found = drop(metric, [call({**feeds, **flags}) for feeds in samples[:count]], target[:count])
            return found if math.isfinite(found) else math.inf

        target = accuracy.reference if accuracy.original is not self.program else reference
        alone = {site.var: loss({site.var}, TRIED_SAMPLES) for site in sites}
        for site in sites:
            rows[site.var]["drop_alone"] = float(f"{alone[site.var]:.4g}")
        ranked = sorted(sites, key=lambda site: (-alone[site.var], rows[site.var]["sqnr_db"]))
        # a little below the limit: sums are rounded differently in few bits
        goal = limit * 0.98
        low, high = 0, len(ranked)
        while low < high:
            middle = (low + high) // 2
            if loss({site.var for site in ranked[middle:]}) <= goal:
                high = middle
            else:
                low = middle + 1
        if low == len(ranked):
            worst = "; ".join(f"{site.name} {alone[site.var]:.3g} ({rows[site.var]['sqnr_db']} dB)" for site in ranked[:5])
            raise VerificationError(
                f"quantize: no layer can run in {self.scheme.name} within max_drop {limit:g} ({metric}) on the calibration data; loss of the worst layers alone: {worst}. "
                "Allow more, try observer mse or percentile, or smooth 0.5"
            )
        out = {site.var for site in ranked[:low]}
        return [site for site in sites if site.var not in out]


def _scale(covering: Covering) -> float | str:
    """What the report says of it."""
    if isinstance(covering, SlicedFloat8):
        return "per row" if covering.axes == (-1,) else "per image"
    return float(f"{covering.scale:.6g}")


def _chained(graph: Graph, sites: Sequence[Site]) -> frozenset[Any]:
    """Sources between convolutions whose only other use is a residual addition behind a quantized convolution: it reads the codes too, a quarter of the bytes,
    and the source's floats are never written."""
    totals = {site.total for site in sites if site.kind == "conv2d"}
    inside = {site.var for site in sites}
    found = set()
    for source in {site.source for site in sites if site.kind == "conv2d"}:
        if source not in graph.bindings or not is_static(source.ty.shape or ()):
            continue
        others = [reader for reader in graph.readers.get(source, ()) if reader == "output" or reader not in inside]
        if others and all(_residual(graph, reader, source, totals) for reader in others):
            found.add(source)
    return frozenset(found)


def _residual(graph: Graph, reader: Any, source: Any, totals: set[Any]) -> bool:
    call = graph.bindings.get(reader) if reader != "output" else None
    return operator(call) == "relax.add" and any(not arg.same_as(source) and arg in totals for arg in call.args)
