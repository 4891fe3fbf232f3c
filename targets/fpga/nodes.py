"""The real-valued graph between a Relax program and an integer network: nodes that give streams, and views that say which element lies where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Real = Callable[..., np.ndarray]


class Refused(Exception):
    """An operator that no stage computes; the text says why."""


@dataclass(frozen=True)
class Quant:
    """real = scale * (q - zero) of a u8 stream."""

    scale: float
    zero: int

    @staticmethod
    def of_range(low: float, high: float) -> Quant:
        """The 256 levels over [low, high], 0 among them exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return Quant(scale, int(np.clip(round(-low / scale), 0, 255)))

    def level(self, real: float) -> int:
        """The level that a bound of a clamp falls on."""
        return int(np.clip(round(np.clip(real / self.scale, -1e6, 1e6)) + self.zero, 0, 255))


@dataclass(eq=False)
class Node:
    """One future stage. real: flat float streams of `inputs` -> flat float stream of `size` elements. params: what the kind needs (weights, shapes).
    clip: bounds that a following ReLU or Clip puts on the result.
    """

    kind: str
    inputs: list[Node]
    size: int
    real: Real
    source: str
    params: dict[str, Any] = field(default_factory=dict)
    clip: tuple[float, float] = (-np.inf, np.inf)

    def evaluate(self, *streams: np.ndarray) -> np.ndarray:
        return np.clip(self.real(*streams), *self.clip)


@dataclass(frozen=True)
class Function:
    """An element-wise function of one number. tag: ("affine", a, b) for a * x + b with a > 0, ("clip", low, high) for a clamp, ("round",), None for any other."""

    apply: Callable[[np.ndarray], np.ndarray]
    tag: tuple[Any, ...] | None = None

    @property
    def kind(self) -> str:
        return self.tag[0] if self.tag else ""

    @property
    def numbers(self) -> tuple[float, float]:
        assert self.tag is not None
        return self.tag[1], self.tag[2]


def affine(a: float, b: float) -> Function:
    return Function(lambda x: a * x + b, ("affine", a, b))


def clamp(low: float, high: float) -> Function:
    return Function(lambda x: np.clip(x, low, high), ("clip", low, high))


Functions = tuple[Function, ...]


def joined(functions: Functions, last: Function) -> Functions:
    """`last` after the others; neighbours that are both affine or both clamps become one, the identity vanishes."""
    if functions and functions[-1].kind == last.kind == "affine":
        (a, b), (c, d) = functions[-1].numbers, last.numbers
        # scale and reciprocal cancel up to rounding
        scale, offset = a * c, b * c + d
        near = abs(scale - 1) < 1e-6 and abs(offset) < 1e-6 * max(1.0, abs(d))
        return joined(functions[:-1], affine(1.0, 0.0) if near else affine(scale, offset))
    if last.tag == ("affine", 1.0, 0.0):
        return functions
    if functions and functions[-1].kind == last.kind == "clip":
        (a, b), (c, d) = functions[-1].numbers, last.numbers
        if max(a, c) <= min(b, d):
            return (*functions[:-1], clamp(max(a, c), min(b, d)))
    return (*functions, last)


def applied(functions: Functions, x: np.ndarray) -> np.ndarray:
    for function in functions:
        x = function.apply(x)
    return x


@dataclass(eq=False)
class View:
    """A tensor of the program: element i of it is element index[i] of the node's stream, put through `functions`.

    Reshapes, transposes, slices and broadcasts change `index` alone, by the same numpy operation that they are. Padding is index -1: the real value 0.
    """

    node: Node
    index: np.ndarray
    functions: Functions = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape

    def rearranged(self, operation: Callable[[np.ndarray], np.ndarray]) -> View:
        return View(self.node, operation(self.index), self.functions)

    def mapped(self, function: Function) -> View:
        return View(self.node, self.index, joined(self.functions, function))

    def settled(self) -> Node:
        """The node that gives this view's stream, the functions applied; the same one for the same functions."""
        if not self.functions:
            return self.node
        known = self.node.params.setdefault("settled", {})
        if self.functions not in known:
            only = self.functions[0] if len(self.functions) == 1 else Function(lambda x: applied(self.functions, x))
            known[self.functions] = Node("function", [self.node], self.node.size, only.apply, self.node.source, {"function": only})
        return known[self.functions]

    def same_elements(self, other: View) -> bool:
        return self.node is other.node and self.index.shape == other.index.shape and bool(np.array_equal(self.index, other.index))


def in_order(view: View, index: np.ndarray | None = None) -> Node:
    """A node whose stream holds the view's elements in row-major order (of `index`, the view's own by default)."""
    order = (view.index if index is None else index).ravel()
    if order.min(initial=0) < 0:
        raise Refused("its operand is padded; FPGA convolutions alone take padding")
    if not view.functions and view.node.kind == "linear":
        view, order = _columns(view.node, order)
    node = view.settled()
    if order.size == node.size and np.array_equal(order, np.arange(node.size)):
        return node
    return Node("reorder", [node], order.size, lambda x: x[order], node.source, {"index": order})


def _columns(node: Node, order: np.ndarray) -> tuple[View, np.ndarray]:
    """A product of which only some columns are read, as queries of one matrix for queries, keys and values: a product of those columns alone."""
    weights = node.params["weights"]
    n = len(weights)
    columns = np.unique(order % n)
    if len(columns) == n:
        return View(node, order), order
    known = node.params.setdefault("columns", {})
    key = columns.tobytes()
    if key not in known:
        p = node.params
        exact = None if p["exact"] is None else (p["exact"][0][columns], p["exact"][1][columns])
        known[key] = linear(node.inputs[0], weights[columns], p["bias"][columns], p["rows"], node.source, exact)
    order = order // n * len(columns) + np.searchsorted(columns, order % n)
    return View(known[key], order), order


def rows_of(view: View) -> tuple[Node, np.ndarray | None]:
    """(node, permutation) for an operator that reads rows [rows, K] whose K elements may come in any order that is the same in each row: element k of a
    row arrives as number permutation[k] of it; None for the natural order.
    """
    k = view.shape[-1]
    index = view.index.reshape(-1, k)
    if index.size == view.node.size:
        offsets = index - np.arange(len(index))[:, None] * k
        if (offsets == offsets[0]).all() and np.array_equal(np.sort(offsets[0]), np.arange(k)):
            return view.settled(), None if np.array_equal(offsets[0], np.arange(k)) else offsets[0]
    return in_order(view), None


def linear(source: Node, weights: np.ndarray, bias: np.ndarray, rows: int, name: str, exact: tuple[np.ndarray, np.ndarray] | None = None) -> Node:
    """y[r, n] = sum over k of x[r, k] weights[n, k] + bias[n]. exact: (int8 weights, scale [n]) of which `weights` is the product, when known."""
    weights, bias = weights.astype(np.float64), bias.astype(np.float64)
    n, k = weights.shape
    params = {"weights": weights, "bias": bias, "rows": rows, "exact": exact, "pinned": None}
    return Node("linear", [source], rows * n, lambda x: (x.reshape(rows, k) @ weights.T + bias).ravel(), name, params)
