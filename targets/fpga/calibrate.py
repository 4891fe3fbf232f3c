"""From real-valued nodes to an integer network: ranges observed on calibration data, weights rounded, every scale made a multiplier and a shift."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ...compiler.errors import Blocker, UnsupportedModel, UsageError
from . import integer
from .graph import Walk
from .network import Add, LayerNorm, MatMul, MatVec, Network, Pool, Port, Reorder, Requant, Softmax, Stage, Table, Window
from .nodes import Node, Quant

#: N:M patterns that are looked for in weights, the sparsest first
PATTERNS = ((1, 8), (1, 4), (2, 8), (2, 4), (1, 2))


def observe(walk: Walk, samples: Iterable[np.ndarray]) -> tuple[dict[int, tuple[float, float]], list[np.ndarray]]:
    """(id of a node -> (min, max) over all samples, the real outputs). Raises UsageError for samples that are not finite or when there is none."""
    ranges: dict[int, tuple[float, float]] = {}
    outputs = []
    for sample in samples:
        if not np.isfinite(sample).all():
            raise UsageError("calibration data holds NaN or infinity; ranges cannot be taken from it")
        values: dict[int, np.ndarray] = {}
        for node in walk.nodes:
            if node is walk.input:
                value = np.asarray(sample, np.float64).ravel()
            else:
                value = node.evaluate(*(values[id(source)] for source in node.inputs))
            values[id(node)] = value
            low, high = ranges.get(id(node), (np.inf, -np.inf))
            ranges[id(node)] = min(low, float(value.min())), max(high, float(value.max()))
        outputs.append(values[id(walk.output)])
    if not outputs:
        raise UsageError("FPGA networks take their ranges from calibration data: give --calibration DATA.npz (Python: calibration=...)")
    for node in walk.nodes:
        if not np.isfinite(ranges[id(node)]).all():
            raise UnsupportedModel([Blocker(node.source, node.kind, "its values are not finite on the calibration data")])
    return ranges, outputs


def find_pattern(weights: np.ndarray) -> tuple[int, int] | None:
    """The sparsest N:M pattern that integer weights [N, K] follow along K, None for none."""
    n, k = weights.shape
    for keep, of in PATTERNS:
        if k % of == 0 and ((weights.reshape(n, k // of, of) != 0).sum(axis=2) <= keep).all():
            return keep, of
    return None


class _Build:
    def __init__(self, walk: Walk, ranges: dict[int, tuple[float, float]]):
        self.walk, self.ranges = walk, ranges
        self.names: dict[int, str] = {id(walk.input): ""}
        self.quants: dict[int, Quant] = {id(walk.input): self.observed(walk.input)}
        self.stages: list[Stage] = []
        self.blockers: list[Blocker] = []
        #: scale of the raw output per channel, when the last stage gives its sums
        self.raw_scale: np.ndarray | None = None

    def network(self, name: str, in_shape: tuple[int, ...]) -> Network:
        for node in self.walk.nodes:
            if node is not self.walk.input:
                try:
                    BUILD[node.kind](self, node)
                except ValueError as error:
                    self.blockers.append(Blocker(node.source, node.kind, str(error)))
        if self.blockers:
            raise UnsupportedModel(self.blockers)
        spec_in, spec_out = self.walk.program.inputs[0], self.walk.program.outputs[0]
        quant = self.quants[id(self.walk.input)]
        source = Port(spec_in.name, in_shape, np.float64(quant.scale), quant.zero)
        if not self.stages:
            raise UnsupportedModel("nothing is computed between input and output")
        if self.raw_scale is not None:
            result = Port(spec_out.name, self.walk.output_shape, self.raw_scale, 0, raw=True)
        else:
            last = self.quants[id(self.walk.output)]
            result = Port(spec_out.name, self.walk.output_shape, np.float64(last.scale), last.zero)
        if self.names[id(self.walk.output)] != self.stages[-1].name:
            raise UnsupportedModel("the output is a mere view of an earlier result")
        return Network(identifier(name), tuple(self.stages), source, result)

    def emit(self, node: Node, kind: str, quant: Quant | None, make: Callable[..., Stage], *arguments: Any) -> None:
        name = f"s{len(self.stages)}_{kind}"
        self.stages.append(make(name, tuple(self.names[id(source)] for source in node.inputs), node.source, *arguments))
        self.names[id(node)] = name
        if quant is not None:
            self.quants[id(node)] = quant

    def quant(self, node: Node) -> Quant:
        return self.quants[id(node)]

    def observed(self, node: Node) -> Quant:
        """What the program itself rounds the node's values to, or else the range of the calibration data."""
        return node.params.get("pinned") or Quant.of_range(*self.ranges[id(node)])

    def requant(self, node: Node, scale: np.ndarray | float, quant: Quant) -> Requant:
        """From sums with `scale` to the levels of `quant`, the node's clamp in the limits."""
        multiplier, shift = integer.fixed_point(np.asarray(scale) / quant.scale)
        return Requant(multiplier, shift, quant.zero, quant.level(node.clip[0]), quant.level(node.clip[1]))


def _linear(build: _Build, node: Node) -> None:
    p, x = node.params, build.quant(node.inputs[0])
    if p["exact"] is not None:
        weights, scale = p["exact"]
    else:
        scale = np.abs(p["weights"]).max(axis=1) / 127
        # a channel of tiny weights keeps enough bits of its multiplier, which shares the stage's shift
        scale = np.maximum(scale, max(float(scale.max()) / 256, 1e-12))
        weights = np.rint(p["weights"] / scale[:, None]).astype(np.int8)
    sums = scale * x.scale
    bias = np.rint(p["bias"] / sums) - x.zero * weights.astype(np.int64).sum(axis=1)
    if np.abs(bias).max() >= 1 << 31:
        raise ValueError("a bias does not fit 32 bits at the scale of its sums")
    pattern = find_pattern(weights)
    if node is build.walk.output and node.clip == (-np.inf, np.inf):
        build.raw_scale = sums
        requant = None
    else:
        requant = build.requant(node, sums, build.observed(node))
    build.emit(node, "linear", build.observed(node), MatVec, p["rows"], weights, bias.astype(np.int64), requant, pattern)
    if build.stages[-1].acc_bits > 32:  # type: ignore[attr-defined]
        raise ValueError(f"sums of {p['weights'].shape[1]} products do not fit 32 bits")


def _window(build: _Build, node: Node) -> None:
    p, x = node.params, build.quant(node.inputs[0])
    build.emit(node, "window", x, Window, *p["image"], p["kernel"], p["stride"], p["pads"], x.zero)


def _maxpool(build: _Build, node: Node) -> None:
    p = node.params
    build.emit(node, "maxpool", build.quant(node.inputs[0]), Pool, *p["image"], p["kernel"], p["stride"], p["pads"])


def _average(build: _Build, node: Node) -> None:
    p, x, quant = node.params, build.quant(node.inputs[0]), build.observed(node)
    count = p["kernel"][0] * p["kernel"][1]
    requant = build.requant(node, x.scale / count, quant)
    build.emit(node, "average", quant, Pool, *p["image"], p["kernel"], p["stride"], p["pads"], requant, -count * x.zero)


def _add(build: _Build, node: Node) -> None:
    a, b = (build.quant(source) for source in node.inputs)
    quant = build.observed(node)
    multipliers, shift = integer.fixed_point(np.array([a.scale, b.scale]) / quant.scale)
    low, high = (quant.level(bound) for bound in node.clip)
    build.emit(node, "add", quant, Add, node.size, (a.zero, b.zero), tuple(multipliers.tolist()), shift, quant.zero, low, high)


def _function(build: _Build, node: Node) -> None:
    source, function = node.inputs[0], node.params["function"]
    x = build.quant(source)
    if function.kind == "affine" and build.names[id(source)] and node is not build.walk.output and not node.params.get("pinned"):
        scale, offset = function.numbers
        zero = x.zero - offset / (scale * x.scale)
        if zero == round(zero) and 0 <= zero <= 255:  # another scale for the same levels
            build.names[id(node)] = build.names[id(source)]
            build.quants[id(node)] = Quant(x.scale * scale, int(zero))
            return
    with np.errstate(all="ignore"):
        real = function.apply((np.arange(256) - x.zero) * x.scale)
    quant = build.observed(node)
    # levels that the data never reached may lie outside of the function's domain
    real = np.nan_to_num(real, nan=0.0, posinf=np.inf, neginf=-np.inf)
    values = np.clip(np.rint(np.clip(real / quant.scale, -1e6, 1e6)) + quant.zero, 0, 255).astype(np.int64)
    build.emit(node, "table", quant, Table, node.size, values)


def _reorder(build: _Build, node: Node) -> None:
    build.emit(node, "reorder", build.quant(node.inputs[0]), Reorder, node.inputs[0].size, node.params["index"])


def _matmul(build: _Build, node: Node) -> None:
    a, b = (build.quant(source) for source in node.inputs)
    p, quant = node.params, build.observed(node)
    requant = build.requant(node, a.scale * b.scale, quant)
    build.emit(node, "matmul", quant, MatMul, p["batch"], p["m"], p["n"], p["k"], (a.zero, b.zero), requant)
    if build.stages[-1].acc_bits > 32:  # type: ignore[attr-defined]
        raise ValueError(f"sums of {p['k']} products do not fit 32 bits")


def _softmax(build: _Build, node: Node) -> None:
    length = node.params["length"]
    table = integer.exp_table(build.quant(node.inputs[0]).scale)
    build.emit(node, "softmax", Quant(1 / 255, 0), Softmax, node.size // length, length, table)


def _layer_norm(build: _Build, node: Node) -> None:
    p, x, quant = node.params, build.quant(node.inputs[0]), build.observed(node)
    d = len(p["gamma"])
    scale = np.abs(p["gamma"]).max() / quant.scale / (1 << integer.NORM_BITS)
    if scale == 0:
        raise ValueError("layer norm with gamma 0 everywhere")
    # gamma is signed: one bit less than an unsigned multiplier
    _, shift = integer.fixed_point(np.array(scale), integer.MULTIPLIER_BITS - 1)
    gamma = np.rint(np.ldexp(p["gamma"] / quant.scale / (1 << integer.NORM_BITS), shift)).astype(np.int64)
    beta = np.rint(np.ldexp(p["beta"] / quant.scale, shift)).astype(np.int64)
    epsilon = max(1, round(p["epsilon"] * d * d / x.scale**2))
    if (d * d * 255 * 255 + epsilon).bit_length() > 52 or np.abs(beta).max() >= 1 << 40:
        raise ValueError("layer norm needs more than the 52 bits that its stage has")
    build.emit(node, "norm", quant, LayerNorm, node.size // d, gamma, beta, epsilon, shift, quant.zero)


BUILD: dict[str, Callable[[_Build, Node], None]] = {
    "linear": _linear,
    "window": _window,
    "maxpool": _maxpool,
    "average": _average,
    "add": _add,
    "function": _function,
    "reorder": _reorder,
    "matmul": _matmul,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
}


def identifier(name: str) -> str:
    """A C, Tcl and Verilog identifier from any text."""
    clean = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()[:32]
    return f"tc_{clean}" if clean else "tc_network"


def quantise(walk: Walk, samples: Iterable[np.ndarray], name: str) -> tuple[Network, dict[str, float]]:
    """The integer network and its measured difference to the real-valued one on the samples: mean cosine, largest error over the output's range,
    share of samples whose largest element along the last dim is the same.
    """
    samples = list(samples)
    ranges, real = observe(walk, samples)
    network = _Build(walk, ranges).network(name, walk.values[walk.program.main.params[0]].shape)
    ours = [network(sample).ravel().astype(np.float64) for sample in samples]
    return network, difference(ours, real, walk.output_shape[-1] if walk.output_shape else 1)


def difference(ours: list[np.ndarray], real: list[np.ndarray], last: int) -> dict[str, float]:
    """See `quantise`."""
    a, b = np.stack(ours), np.stack(real)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(norms > 0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1), 1.0)
    spread = float(b.max() - b.min()) or 1.0
    same = a.reshape(-1, last).argmax(axis=1) == b.reshape(-1, last).argmax(axis=1)
    return {"cosine": float(cosine.mean()), "max_error": float(np.abs(a - b).max() / spread), "same_largest": float(same.mean())}
