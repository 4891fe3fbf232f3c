"""The real-valued graph between a Relax program and an integer network: nodes that give streams, and views that say which element lies where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Real = Callable[..., np.ndarray]


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
    """An element-wise function of one number. tag: ("gain", g) for multiplication by g > 0, ("clip", low, high) for a clamp, None for any other."""

    apply: Callable[[np.ndarray], np.ndarray]
    tag: tuple[Any, ...] | None = None

    def then(self, outer: Function) -> Function:
        tag = None
        if self.tag and outer.tag and self.tag[0] == outer.tag[0]:
            if self.tag[0] == "gain":
                tag = ("gain", self.tag[1] * outer.tag[1])
            else:
                low, high = max(self.tag[1], outer.tag[1]), min(self.tag[2], outer.tag[2])
                tag = ("clip", low, high) if low <= high else None
        return Function(lambda x: outer.apply(self.apply(x)), tag)


@dataclass(eq=False)
class View:
    """A tensor of the program: element i of it is element index[i] of the node's stream, put through `function` where there is one.

    Reshapes, transposes, slices and broadcasts change `index` alone, by the same numpy operation that they are.
    """

    node: Node
    index: np.ndarray
    function: Function | None = None
    _own: Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape

    def rearranged(self, operation: Callable[[np.ndarray], np.ndarray]) -> View:
        settled = self.settled() if self.function is not None else self.node
        return View(settled, operation(self.index))

    def mapped(self, function: Function) -> View:
        return View(self.node, self.index, function if self.function is None else self.function.then(function))

    def settled(self) -> Node:
        """The node that gives this view's stream, the function applied."""
        if self.function is None:
            return self.node
        if self._own is None:
            self._own = Node("function", [self.node], self.node.size, self.function.apply, self.node.source, {"function": self.function})
        return self._own

    def same_elements(self, other: View) -> bool:
        return self.node is other.node and self.index.shape == other.index.shape and bool(np.array_equal(self.index, other.index))


def in_order(view: View, index: np.ndarray | None = None) -> Node:
    """A node whose stream holds the view's elements in row-major order (of `index`, the view's own by default)."""
    node = view.settled()
    order = (view.index if index is None else index).ravel()
    if order.size == node.size and np.array_equal(order, np.arange(node.size)):
        return node
    return Node("reorder", [node], order.size, lambda x: x[order], node.source, {"index": order})


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
