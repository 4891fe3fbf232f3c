"""The equations of the cells that `recurrent` runs, on vectors of hidden units, and their activation functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from ...compiler.dialect.recurrent import Activation, RecurrentAttrs
from ...compiler.tvm import T, tirx

if TYPE_CHECKING:
    from .recurrent import RecurrentKernel

#: the gates that one round over the blocks multiplies, and whether by the hidden state or by what the round before left
Round = tuple[tuple[int, ...], bool]


def activation(function: Activation, x: Any, constant: Callable[[float], Any]) -> Any:
    """An activation function of ONNX's recurrent operators on a vector x."""
    a, b, zero, one = constant(function.alpha), constant(function.beta), constant(0.0), constant(1.0)
    table: dict[str, Callable[[], Any]] = {
        "relu": lambda: T.max(x, zero),
        "tanh": lambda: tirx.tanh(x),
        "sigmoid": lambda: tirx.sigmoid(x),
        "affine": lambda: a * x + b,
        "leakyrelu": lambda: tirx.Select(x >= zero, x, a * x),
        "thresholdedrelu": lambda: tirx.Select(x >= a, x, zero),
        "scaledtanh": lambda: a * tirx.tanh(b * x),
        "hardsigmoid": lambda: T.min(T.max(a * x + b, zero), one),
        "elu": lambda: tirx.Select(x >= zero, x, a * (tirx.exp(x) - one)),
        "softsign": lambda: x / (one + T.fabs(x)),
        "softplus": lambda: T.max(x, zero) + tirx.log(one + tirx.exp(zero - T.fabs(x))),
    }
    return table[function.name]()


class _Cell:
    """One row's block at one step. `run` gives the next states (hidden, and cell of an LSTM), or None after a round that only prepares the next."""

    def __init__(self, kernel: RecurrentKernel, d: Any, b: Any, place: Any, now: Any, x: Callable[[int], Any], sums: Callable[[int], Any]):
        self.kernel, self.d, self.b, self.place, self.now = kernel, d, b, place, now
        self.x, self.sums = x, sums

    def state(self, index: int) -> Any:
        return self.kernel.states[index][self.now, self.d, self.b, self.place]

    def gate(self, gate: int) -> Any:
        return self.sums(gate) + self.x(gate)


class Plain(_Cell):
    """h' = f(x + R h)."""

    @staticmethod
    def rounds(attrs: RecurrentAttrs) -> list[Round]:
        return [((0,), True)]

    def run(self, number: int) -> list[Any]:
        return [self.kernel.activate(0, self.gate(0))]


class Gru(_Cell):
    """h' = (1 - z) g(...) + z h with update gate z; the reset gate scales the state or, with reset_after, its product with the weights."""

    UPDATE: ClassVar[int] = 0
    RESET: ClassVar[int] = 1
    HIDDEN: ClassVar[int] = 2

    @staticmethod
    def rounds(attrs: RecurrentAttrs) -> list[Round]:
        return [((0, 1, 2), True)] if attrs.reset_after else [((0, 1), True), ((2,), False)]

    def run(self, number: int) -> list[Any] | None:
        kernel, where = self.kernel, [self.d, self.b, self.place]
        if number == 1:
            return self._mixed(kernel.between[0][tuple(where)], self.gate(self.HIDDEN))
        update, reset = kernel.activate(0, self.gate(self.UPDATE)), kernel.activate(0, self.gate(self.RESET))
        if not kernel.attrs.reset_after:
            T.buffer_store(kernel.between[0], update, where)
            T.buffer_store(kernel.between[1], reset * self.state(0), where)
            return None
        inner = self.sums(self.HIDDEN)
        if "bias" in kernel.optional:
            inner = inner + kernel.optional["bias"][self.d, self.place]
        return self._mixed(update, self.x(self.HIDDEN) + reset * inner)

    def _mixed(self, update: Any, value: Any) -> list[Any]:
        candidate = self.kernel.activate(1, value)
        return [self.kernel.name((self.kernel.constant(1.0) - update) * candidate + update * self.state(0))]


class Lstm(_Cell):
    """c' = f c + i g(...), h' = o h(c'); peepholes let the gates see the cell, the output gate the new one."""

    INPUT: ClassVar[int] = 0
    OUTPUT: ClassVar[int] = 1
    FORGET: ClassVar[int] = 2
    CELL: ClassVar[int] = 3

    @staticmethod
    def rounds(attrs: RecurrentAttrs) -> list[Round]:
        return [((0, 1, 2, 3), True)]

    def run(self, number: int) -> list[Any]:
        kernel, before = self.kernel, self.state(1)
        enter = kernel.activate(0, self._peeped(self.INPUT, before))
        forget = kernel.constant(1.0) - enter if kernel.attrs.coupled else kernel.activate(0, self._peeped(self.FORGET, before))
        after = kernel.name(forget * before + enter * kernel.activate(1, self.gate(self.CELL)))
        leave = kernel.activate(0, self._peeped(self.OUTPUT, after))
        return [kernel.name(leave * kernel.activate(2, after, clip=False)), after]

    def _peeped(self, gate: int, cell: Any) -> Any:
        value = self.gate(gate)
        if "peepholes" not in self.kernel.optional:
            return value
        return value + self.kernel.optional["peepholes"][self.d, T.int64(gate), self.place] * cell


CELLS = {"lstm": Lstm, "gru": Gru, "rnn": Plain}
