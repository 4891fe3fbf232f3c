"""The dataflow plan: every unit with its folding, every stream with its width and depth, and what it costs. Both emitters print from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...compiler.errors import UnsupportedModel
from . import cost
from .cost import Folding
from .network import Add, MatMul, MatVec, Network, Stage
from .parts import Part, Resources

#: share of a part's resources that a plan may take; the rest is left for routing and the shell around the kernel
BUDGET = 0.8
#: words of an ordinary stream: shift registers of this depth cost as much as shorter ones
DEPTH = 16


@dataclass(frozen=True)
class Edge:
    """A stream. lanes: elements per word, bits: of one element, count: elements per inference, depth: words it holds."""

    name: str
    lanes: int
    bits: int
    count: int
    depth: int


@dataclass(frozen=True)
class Unit:
    """kind: "stage", "convert" (word widths) or "fork" (one stream to several readers). stage, folding: of a "stage"."""

    name: str
    kind: str
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    cycles: int
    resources: Resources
    stage: Stage | None = None
    folding: Folding = Folding(1, 1)


@dataclass(frozen=True)
class DataflowPlan:
    """interval: clock cycles between two inferences, latency: cycles of one through the empty network. All numbers here are modelled."""

    network: Network
    part: Part
    units: tuple[Unit, ...]
    edges: tuple[Edge, ...]
    total: Resources
    interval: int
    latency: int
    notes: tuple[str, ...] = field(default=())

    def rows(self) -> list[dict[str, Any]]:
        """The printed plan, one row per unit."""
        return [_row(unit) for unit in self.units]

    def text(self) -> str:
        """The plan as a table, then the totals beside the part."""
        rows = self.rows()
        head = list(rows[0])
        cells = [head] + [[str(row[key]) for key in head] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
        have, need = self.part.resources.to_dict(), self.total.to_dict()
        lines += ["", f"{self.part.name} ({self.part.vendor}), modelled: " + ", ".join(f"{need[key]:g} of {have[key]:g} {key}" for key in need)]
        lines += [
            f"one inference every {self.interval} cycles, {self.latency} cycles through the empty network (modelled; HLS may schedule otherwise)"
        ]
        return "\n".join([*lines, *self.notes]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.part.name,
            "source": "modelled",
            "units": self.rows(),
            "streams": [{"name": e.name, "lanes": e.lanes, "bits": e.bits, "depth": e.depth} for e in self.edges],
            "total": self.total.to_dict(),
            "interval_cycles": self.interval,
            "latency_cycles": self.latency,
        }


def make(network: Network, part: Part, *, budget: float = BUDGET, interval: int | None = None) -> DataflowPlan:
    """The plan with the shortest interval within `budget` of the part, and of those the one with the fewest resources; `interval` (cycles) asks for no more
    speed than that. Raises UnsupportedModel naming what a part has too little of.
    """
    options = {stage.name: [_Option(stage, folding) for folding in cost.foldings(stage)] for stage in network.stages}
    limit = part.resources.scaled(budget)
    candidates = sorted({option.cycles for choices in options.values() for option in choices})
    candidates = [c for c in candidates if c >= max(min(o.cycles for o in choices) for choices in options.values())]
    if interval is not None:
        candidates = [c for c in candidates if c > interval][:0] + [max(interval, candidates[0])] + [c for c in candidates if c > interval]
    best = _choose(options, candidates[-1], limit)
    if best is None:
        raise UnsupportedModel(_too_small(options, part, limit))
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        chosen = _choose(options, candidates[middle], limit)
        if chosen is None:
            low = middle + 1
        else:
            best, high = chosen, middle
    plan = _assemble(network, part, best)
    if over := plan.total.over(part.resources):
        raise UnsupportedModel(_needs(over, plan.total, part))
    return plan


class _Option:
    def __init__(self, stage: Stage, folding: Folding):
        self.folding, self.cycles, self.resources = folding, cost.cycles(stage, folding), cost.resources(stage, folding)


_KEYS = ("dsp", "bram36", "lut", "ff")


def _choose(options: dict[str, list[_Option]], interval: int, limit: Resources) -> dict[str, Folding] | None:
    """One folding per stage, each at most `interval` cycles, with the least share of the part in total: a small integer program (HiGHS)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    items = [(name, option) for name, choices in options.items() for option in choices if option.cycles <= interval]
    names = list(options)
    if {name for name, _ in items} != set(names):
        return None
    need = np.array([[getattr(option.resources, key) for _, option in items] for key in _KEYS])
    have = np.array([getattr(limit, key) for key in _KEYS])
    once = np.array([[1.0 if item == name else 0.0 for item, _ in items] for name in names])
    constraints = [LinearConstraint(once, 1, 1), LinearConstraint(need / have[:, None], -np.inf, 1)]
    # word width breaks ties, so that equal costs give the narrower streams
    price = (need / have[:, None]).sum(axis=0) + [1e-9 * (option.folding.pe + option.folding.simd) for _, option in items]
    result = milp(price, integrality=np.ones(len(items)), bounds=Bounds(0, 1), constraints=constraints, options={"time_limit": 5.0})
    if result.x is None:
        return None
    return {name: option.folding for (name, option), picked in zip(items, result.x, strict=True) if picked > 0.5}


def _too_small(options: dict[str, list[_Option]], part: Part, limit: Resources) -> str:
    least = Resources(*(sum(min(getattr(o.resources, key) for o in choices) for choices in options.values()) for key in _KEYS))
    over = least.over(limit)
    if over:
        return _needs(over, least, part, limit)
    return f"{part.name} is too small: no folding fits all of its resources at once (at least {least.to_dict()}, of which it has {limit.to_dict()}); take a larger part"


def _needs(over: list[str], need: Resources, part: Part, limit: Resources | None = None) -> str:
    have = limit or part.resources
    parts = ", ".join(f"{getattr(need, key):,.0f} {key} needed at the smallest folding, {getattr(have, key):,.0f} available" for key in over)
    return f"{part.name} is too small for this network: {parts}; take a larger part (`tcompile targets`) or a smaller network"


def _assemble(network: Network, part: Part, chosen: dict[str, Folding]) -> DataflowPlan:
    """Units and streams from the foldings: word converters between unequal widths, forks where a result has several readers."""
    build = _Assembly(network, chosen)
    build.run()
    total = Resources()
    for unit in build.units:
        total = total + unit.resources
    for edge in build.edges:
        total = total + cost.fifo(edge.lanes * edge.bits, edge.depth)
    interval = max(unit.cycles for unit in build.units)
    return DataflowPlan(network, part, tuple(build.units), tuple(build.edges), total, interval, build.latency())


class _Assembly:
    def __init__(self, network: Network, chosen: dict[str, Folding]):
        self.network, self.chosen = network, chosen
        self.units: list[Unit] = []
        self.edges: list[Edge] = []
        self.stages = {stage.name: stage for stage in network.stages}
        self.readers: dict[str, list[tuple[str, int]]] = {}
        self.level = {"": 0}
        for stage in network.stages:
            for port, name in enumerate(stage.inputs):
                self.readers.setdefault(name, []).append((stage.name, port))
            self.level[stage.name] = 1 + max(self.level[name] for name in stage.inputs)
        self.into: dict[tuple[str, int], Edge] = {}

    def run(self) -> None:
        first = self.readers[""][0][0]
        count = int(np.prod(self.network.input.shape))
        self.deliver("", Edge("input", cost.lanes_in(self.stages[first], self.chosen[first]), 8, count, DEPTH))
        for stage in self.network.stages:
            folding = self.chosen[stage.name]
            inputs = tuple(self.into[stage.name, port] for port in range(len(stage.inputs)))
            last = stage is self.network.stages[-1]
            out = Edge("output" if last else stage.name + "_out", folding.pe, 32 if stage.raw else 8, stage.n_out, DEPTH)
            place = len(self.units)
            out = self.deliver(stage.name, out)
            unit = Unit(stage.name, "stage", inputs, (out,), cost.cycles(stage, folding), cost.resources(stage, folding), stage, folding)
            self.units.insert(place, unit)

    def deliver(self, name: str, edge: Edge) -> Edge:
        """Bring the stream that stage `name` gives to its readers; returns the stream as the stage writes it."""
        readers = self.readers.get(name, [])
        if len(readers) == 1:
            return self.connect(edge, readers[0])
        self.edges.append(edge)
        if readers:
            branches = [Edge(f"{edge.name}_{i}", edge.lanes, edge.bits, edge.count, DEPTH) for i in range(len(readers))]
            place = len(self.units)
            heads = tuple(self.connect(branch, reader) for branch, reader in zip(branches, readers, strict=True))
            words = edge.count // edge.lanes
            self.units.insert(place, Unit(f"{edge.name}_fork", "fork", (edge,), heads, words, Resources(lut=8 + 2 * len(readers), ff=4)))
        return edge

    def connect(self, edge: Edge, reader: tuple[str, int]) -> Edge:
        """`edge` to one reader, through converters where its words have another width; returns the stream as its writer sees it."""
        stage, port = self.stages[reader[0]], reader[1]
        lanes = cost.lanes_in(stage, self.chosen[stage.name])
        widths = [lanes] if lanes % edge.lanes == 0 or edge.lanes % lanes == 0 else [math.gcd(lanes, edge.lanes), lanes]
        steps = [edge]
        for i, width in enumerate(widths):
            if width != steps[-1].lanes:
                steps.append(Edge(f"{edge.name}_w{i}", width, edge.bits, edge.count, DEPTH))
        if self.late(stage, port):
            last = steps[-1]
            steps[-1] = Edge(last.name, last.lanes, last.bits, last.count, max(DEPTH, last.count // last.lanes))
        self.edges += [step for step in steps if step not in self.edges]
        for before, after in zip(steps, steps[1:], strict=False):
            wide = max(before.lanes, after.lanes)
            words = edge.count // min(before.lanes, after.lanes)
            self.units.append(Unit(f"{after.name}_convert", "convert", (before,), (after,), words, Resources(lut=20 + 8 * wide, ff=16 * wide)))
        self.into[reader] = steps[-1]
        return steps[0]

    def late(self, stage: Stage, port: int) -> bool:
        """True where a stage takes this operand only after much of its other one: the stream must hold the whole tensor, or the fork that both come
        from would block for ever.
        """
        if isinstance(stage, MatMul):
            return port == 0
        if isinstance(stage, Add):
            mine, other = self.level[stage.inputs[port]], self.level[stage.inputs[1 - port]]
            return mine < other or (mine == other and port == 0)
        return False

    def latency(self) -> int:
        """When the last result leaves, from when each unit gets its first and last word; a stream takes one cycle."""
        first, last = {"input": 0}, {"input": self.edge("input").count // self.edge("input").lanes}
        for unit in self.units:
            begin, end = (1 + max(times[edge.name] for edge in unit.inputs) for times in (first, last))
            head, rest = (1, 1) if unit.stage is None else (cost.first_output(unit.stage, unit.folding), cost.tail(unit.stage, unit.folding))
            for edge in unit.outputs:
                first[edge.name] = begin + head
                last[edge.name] = max(end + rest, begin + head + unit.cycles - 1)
        return last["output"]

    def edge(self, name: str) -> Edge:
        return next(edge for edge in self.edges if edge.name == name)


def _row(unit: Unit) -> dict[str, Any]:
    stage, folding = unit.stage, unit.folding
    pattern = stage.pattern if isinstance(stage, MatVec) else None
    numbers = f"u8 -> {'s32' if stage is not None and stage.raw else 'u8'}"
    if isinstance(stage, MatVec):
        numbers = f"u8 x s8 -> s{stage.acc_bits} -> {'s32' if stage.raw else 'u8'}"
    resources = unit.resources.to_dict()
    return {
        "unit": unit.name,
        "node": "" if stage is None else printable(stage.source),
        "PE": folding.pe if stage is not None else unit.outputs[0].lanes,
        "SIMD": folding.simd if stage is not None else unit.inputs[0].lanes,
        "II": 1,
        "cycles": unit.cycles,
        "FIFO": "/".join(str(edge.depth) for edge in unit.inputs),
        "numbers": numbers,
        "sparsity": "dense" if pattern is None else f"{pattern[0]}:{pattern[1]}",
        "DSP": resources["dsp"],
        "BRAM36": resources["bram36"],
        "LUT": round(resources["lut"]),
        "FF": round(resources["ff"]),
    }


def printable(text: str) -> str:
    """A model's name as it may stand in a comment or table: letters, digits and a few signs."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-:[]") else "_" for c in text)[:48]
