"""Recurrent layers: LSTM, GRU, RNN. The inputs of all steps meet their weights in one matmul; the steps are one `tcompile.recurrent`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ....dialect.recurrent import DEFAULTS, FUNCTIONS, GATES, Activation, recurrent, spell
from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal

_USUAL = {"lstm": ["Sigmoid", "Tanh", "Tanh"], "gru": ["Sigmoid", "Tanh"], "rnn": ["Tanh"]}
_DIRECTIONS = ("forward", "reverse", "bidirectional")

#: an operand: its elements when they are known at import, so that weights are rearranged there
Operand = np.ndarray | relax.Expr


@converter("LSTM", "GRU", "RNN", since=7)
def recurrent_layer(node: Node) -> tuple[relax.Expr, ...]:
    """Y, Y_h and an LSTM's Y_c. Two directions with different activations are two layers, their results joined."""
    layer = _Layer(node)
    if layer.directions == 1 or layer.functions[0] == layer.functions[1]:
        return layer.emit(range(layer.directions))
    forward, backward = layer.emit([0]), layer.emit([1])
    axes = [2, 1, 1] if layer.batch_first else [1, 0, 0]
    return tuple(node.emit(relax.op.concat(list(pair), axis)) for *pair, axis in zip(forward, backward, axes, strict=False))


class _Layer:
    """The node's attributes and its operands, checked against each other."""

    def __init__(self, node: Node):
        self.node, self.cell = node, node.op.lower()
        self.direction = node.attr("direction", "forward")
        if self.direction not in _DIRECTIONS:
            raise Refusal(f"direction '{self.direction}' is none of {', '.join(_DIRECTIONS)}")
        self.directions = 2 if self.direction == "bidirectional" else 1
        self.batch_first = bool(node.attr("layout", 0))
        self.dtype = node.dtype(node.tensor(0))
        if self.dtype not in ("float32", "float64", "float16", "bfloat16"):
            raise Refusal(f"element type {self.dtype} is not supported")
        #: sums and states of the half precisions are float32
        self.wide = "float64" if self.dtype == "float64" else "float32"
        self.x = self.operand(0)
        dims = self.shape(self.x)
        if len(dims) != 3:
            raise Refusal(f"X must have three dims, has {len(dims)}")
        self.batch = dims[0 if self.batch_first else 1]
        self.gates = GATES[self.cell]
        self.size = node.static(self.shape(self.operand(2))[-1:], "the hidden size")[0]
        self.check(1, [self.directions, self.gates * self.size, dims[2]], "W")
        self.check(2, [self.directions, self.gates * self.size, self.size], "R")
        if self.size < 1 or node.attr("hidden_size", self.size) != self.size:
            raise Refusal(f"hidden_size {node.attr('hidden_size', self.size)} differs from that of R, {self.size}")
        self.functions = self._functions()

    def check(self, index: int, dims: list[Dim], name: str) -> None:
        have = self.shape(self.operand(index))
        if len(have) != len(dims) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(have, dims, strict=True)):
            raise Refusal(f"{name} has the shape {have}, expected {dims}")

    def _functions(self) -> list[list[Activation]]:
        """The activations of each direction. Parameters are handed out in order to the functions that have them."""
        node, count = self.node, FUNCTIONS[self.cell]
        names = [name.decode() if isinstance(name, bytes) else name for name in node.attr("activations") or _USUAL[self.cell] * self.directions]
        if self.cell == "rnn" and self.directions == 1 and len(names) == 2:
            names = names[:1]  # the default is written for two directions
        if len(names) != count * self.directions:
            raise Refusal(f"{len(names)} activations, expected {count * self.directions}")
        alphas, betas = iter(node.attr("activation_alpha") or ()), iter(node.attr("activation_beta") or ())
        found = []
        for name in (name.lower() for name in names):
            if name not in DEFAULTS:
                raise Refusal(f"activation '{name}' is not supported")
            alpha, beta = (None if default is None else next(given, default) for default, given in zip(DEFAULTS[name], (alphas, betas), strict=True))
            if any(value is not None and math.isnan(value) for value in (alpha, beta)):
                raise Refusal(f"activation '{name}' without activation_alpha and activation_beta: runtimes differ in the defaults")
            found.append(Activation(name, alpha or 0.0, beta or 0.0))
        return [found[start : start + count] for start in range(0, len(found), count)]

    # operands

    def operand(self, index: int) -> Operand:
        value = self.node.maybe_host(index)
        if value is not None and not value.symbolic:
            return value.array.astype(self.wide)
        tensor = self.node.tensor(index)
        return tensor if self.node.dtype(tensor) == self.wide else self.node.emit(relax.op.astype(tensor, self.wide))

    def shape(self, value: Operand) -> list[Dim]:
        return list(value.shape) if isinstance(value, np.ndarray) else self.node.shape(value)

    def expr(self, value: Operand) -> relax.Expr:
        return self.node.array(value, self.wide) if isinstance(value, np.ndarray) else value

    def permute(self, value: Operand, axes: list[int]) -> Operand:
        return value.transpose(axes) if isinstance(value, np.ndarray) else self.node.emit(relax.op.permute_dims(value, axes))

    def reshape(self, value: Operand, dims: Iterable[Dim]) -> Operand:
        return value.reshape(list(dims)) if isinstance(value, np.ndarray) else self.node.reshape(value, dims)

    def part(self, value: Operand, axis: int, first: int, last: int) -> Operand:
        """value[first:last] along an axis."""
        size = self.shape(value)[axis]
        if (first, last) == (0, size):
            return value
        if isinstance(value, np.ndarray):
            return value[(slice(None),) * axis + (slice(first, last),)]
        return self.node.emit(relax.op.strided_slice(value, [axis], [first], [last]))

    def of_directions(self, index: int, which: list[int]) -> Operand:
        return self.part(self.operand(index), 0, which[0], which[-1] + 1)

    # results

    def emit(self, directions: Iterable[int]) -> tuple[relax.Expr, ...]:
        node, which = self.node, list(directions)
        count, width = len(which), self.gates * self.size
        reset_after = self.cell == "gru" and bool(node.attr("linear_before_reset", 0))
        inputs = self.permute(self.reshape(self.of_directions(1, which), [count * width, self.shape(self.operand(1))[2]]), [1, 0])
        x = node.emit(relax.op.matmul(self.expr(self.x), self.expr(inputs)))
        optional: dict[str, relax.Expr] = {}
        if node.has(3):
            bias, after = self._biases(which, reset_after)
            x = node.emit(relax.op.add(x, self.expr(bias)))
            if after is not None:
                optional["bias"] = self.expr(after)
        hidden = self._state(5, which)
        if self.cell == "lstm":
            optional["cell"] = self._state(6, which)
            if node.has(7):
                self.check(7, [self.directions, 3 * self.size], "P")
                optional["peepholes"] = self.expr(self.reshape(self.of_directions(7, which), [count, 3, self.size]))
        if node.has(4):
            lengths = node.tensor(4)
            if node.rank(lengths) != 1:
                raise Refusal(f"sequence_lens must have one dim, has {node.rank(lengths)}")
            optional["lengths"] = node.cast_shape(lengths, [self.batch])
        call = recurrent(
            x,
            self.expr(self.permute(self.of_directions(2, which), [0, 2, 1])),
            hidden,
            optional,
            kind=self.cell,
            direction=self.direction if count == self.directions else _DIRECTIONS[which[0]],
            activations=spell(self.functions[which[0]]),
            clip=float(node.attr("clip", math.inf)),
            coupled=bool(node.attr("input_forget", 0)),
            reset_after=reset_after,
            x_order="BT" if self.batch_first else "TB",
            y_order="BTDH" if self.batch_first else "TDBH",
        )
        results = node.emit(call)
        found = [node.emit(relax.TupleGetItem(results, index)) for index in range(3 if self.cell == "lstm" else 2)]
        if self.batch_first:
            found[1:] = [node.emit(relax.op.permute_dims(state, [1, 0, 2])) for state in found[1:]]
        return tuple(value if self.wide == self.dtype else node.emit(relax.op.astype(value, self.dtype)) for value in found)

    def _biases(self, which: list[int], reset_after: bool) -> tuple[Operand, Operand | None]:
        """What is added to the products of the inputs, and the bias of a GRU's recurrent product where the reset gate scales that."""
        self.check(3, [self.directions, 2 * self.gates * self.size], "B")
        both = self.reshape(self.of_directions(3, which), [len(which), 2, self.gates, self.size])
        inputs, after = self.part(both, 1, 0, 1), None
        recurrent_part = self.part(both, 1, 1, 2)
        if reset_after:
            after = self.reshape(self.part(recurrent_part, 2, 2, 3), [len(which), self.size])
            kept = np.array([True, True, False]).reshape(1, 1, 3, 1)
            if isinstance(recurrent_part, np.ndarray):
                recurrent_part = np.where(kept, recurrent_part, 0)
            else:
                recurrent_part = self.node.emit(relax.op.where(relax.const(kept), recurrent_part, self.node.scalar(0.0, self.wide)))
        if isinstance(inputs, np.ndarray) and isinstance(recurrent_part, np.ndarray):
            total: Operand = inputs + recurrent_part
        else:
            total = self.node.emit(relax.op.add(self.expr(inputs), self.expr(recurrent_part)))
        return self.reshape(total, [len(which) * self.gates * self.size]), after

    def _state(self, index: int, which: list[int]) -> relax.Expr:
        """An initial state as [D, B, H]; zeros where there is none."""
        shape = [len(which), self.batch, self.size]
        if not self.node.has(index):
            if isinstance(self.batch, int):
                return self.expr(np.zeros([len(which), self.batch, self.size], self.wide))
            return self.node.emit(relax.op.zeros(shape, self.wide))
        value = self.operand(index)
        if len(self.shape(value)) != 3:
            raise Refusal(f"an initial state must have three dims, has {len(self.shape(value))}")
        value = self.permute(value, [1, 0, 2]) if self.batch_first else value
        return self.node.cast_shape(self.expr(self.part(value, 0, which[0], which[-1] + 1)), shape)
