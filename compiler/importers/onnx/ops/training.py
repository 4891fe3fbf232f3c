"""One step of an optimizer, from the preview training domain, and what draws random numbers or derivatives, which is refused."""

from __future__ import annotations

from typing import Any

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..values import Refusal, Value

DOMAIN = "ai.onnx.preview.training"


class _Formula:
    """Element-wise arithmetic of a node on bound values and numbers; an operand alone takes the other's type."""

    def __init__(self, node: Node, value: relax.Expr):
        self.node, self.value = node, value

    def _with(self, make: Any, other: _Formula | float, swap: bool = False) -> _Formula:
        node = self.node
        right = other.value if isinstance(other, _Formula) else node.scalar(other, node.dtype(self.value))
        left, right = (right, self.value) if swap else (self.value, right)
        return _Formula(node, node.emit(make(*node.align(left, right))))

    def __add__(self, other: _Formula | float) -> _Formula:
        return self._with(relax.op.add, other)

    def __mul__(self, other: _Formula | float) -> _Formula:
        return self._with(relax.op.multiply, other)

    def __sub__(self, other: _Formula | float) -> _Formula:
        return self._with(relax.op.subtract, other)

    def __rsub__(self, other: float) -> _Formula:
        return self._with(relax.op.subtract, other, True)

    def __truediv__(self, other: _Formula | float) -> _Formula:
        return self._with(relax.op.divide, other)

    def to_the_power(self) -> Any:
        """number -> number ** self"""
        return lambda number: self._with(relax.op.power, number, True)

    def sqrt(self) -> _Formula:
        return _Formula(self.node, self.node.emit(relax.op.sqrt(self.value)))


def _operands(node: Node, kinds: int) -> tuple[relax.Expr, relax.Expr, list[list[_Formula]]]:
    """The learning rate, the number of steps before this one, and per optimized tensor its `kinds` operands."""
    values = [node.tensor(index) for index in range(len(node.inputs))]
    count, rest = divmod(len(values) - 2, kinds)
    if rest or count < 1:
        raise Refusal(f"{len(values) - 2} tensors are not {kinds} for each that is optimized")
    return values[0], values[1], [[_Formula(node, values[2 + kind * count + index]) for kind in range(kinds)] for index in range(count)]


def _as(node: Node, value: relax.Expr, like: _Formula) -> _Formula:
    dtype = node.dtype(like.value)
    return _Formula(node, value if node.dtype(value) == dtype else node.emit(relax.op.astype(value, dtype)))


def _after_the_first(node: Node, steps: _Formula, later: _Formula, first: _Formula) -> _Formula:
    """`later` where T > 0, else `first`."""
    condition = node.emit(relax.op.greater(steps.value, node.scalar(0, node.dtype(steps.value))))
    return _Formula(node, node.emit(relax.op.where(*node.align(condition, later.value, first.value))))


def _in_order(results: list[tuple[_Formula, ...]]) -> tuple[relax.Expr, ...]:
    """All new values, then all new states of each kind."""
    return tuple(formula.value for kind in zip(*results, strict=True) for formula in kind)


@converter("Adagrad", domain=DOMAIN)
def adagrad(node: Node) -> tuple[relax.Expr, ...]:
    """Duchi, Hazan and Singer, JMLR 12 (2011), as ONNX defines it."""
    rate, steps, tensors = _operands(node, 3)
    results = []
    for x, gradient, squares in tensors:
        slowed = _as(node, rate, x) / (_as(node, steps, x) * node.attr("decay_factor") + 1)
        gradient = x * node.attr("norm_coefficient") + gradient
        squares = squares + gradient * gradient
        results.append((x - slowed * gradient / (squares.sqrt() + node.attr("epsilon")), squares))
    return _in_order(results)


@converter("Adam", domain=DOMAIN)
def adam(node: Node) -> tuple[relax.Expr, ...]:
    """Kingma and Ba, ICLR 2015, as ONNX defines it."""
    alpha, beta = node.attr("alpha"), node.attr("beta")
    rate, steps, tensors = _operands(node, 4)
    results = []
    for x, gradient, mean, squares in tensors:
        gradient = x * node.attr("norm_coefficient") + gradient
        mean = mean * alpha + gradient * (1 - alpha)
        squares = squares * beta + gradient * gradient * (1 - beta)
        power, plain = _as(node, steps, x).to_the_power(), _as(node, rate, x)
        corrected = plain * (1 - power(beta)).sqrt() / (1 - power(alpha))
        adjusted = _after_the_first(node, _as(node, steps, x), corrected, plain)
        moved = x - adjusted * mean / (squares.sqrt() + node.attr("epsilon"))
        results.append((moved * (1 - node.attr("norm_coefficient_post")), mean, squares))
    return _in_order(results)


@converter("Momentum", domain=DOMAIN)
def momentum(node: Node) -> tuple[relax.Expr, ...]:
    alpha, beta, mode = (node.attr(name) for name in ("alpha", "beta", "mode"))
    if mode not in ("standard", "nesterov"):
        raise Refusal(f"mode '{mode}'")
    rate, steps, tensors = _operands(node, 3)
    results = []
    for x, gradient, velocity in tensors:
        gradient = x * node.attr("norm_coefficient") + gradient
        velocity = velocity * alpha + _after_the_first(node, _as(node, steps, x), gradient * beta, gradient)
        direction = gradient + velocity * alpha if mode == "nesterov" else velocity
        results.append((x - _as(node, rate, x) * direction, velocity))
    return _in_order(results)


@converter("Gradient", domain=DOMAIN)
def gradient(node: Node) -> Value:
    raise Refusal("programs are compiled for inference: derivatives must be nodes of the graph")


@converter("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
def random(node: Node) -> Value:
    raise Refusal("it draws random numbers: the standard does not say which, so no two runtimes agree; make them an input of the model")
