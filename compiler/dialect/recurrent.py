"""`tcompile.recurrent`: an LSTM, GRU or plain recurrent layer over all its steps and directions, behind the product of the inputs with their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax, tirx

NAME = "tcompile.recurrent"
#: gates of a cell, in the order in which ONNX stores them
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
#: how many activation functions a cell has: LSTM gates, candidate and output; GRU gates and candidate; RNN
FUNCTIONS = {"lstm": 3, "gru": 2, "rnn": 1}
#: operands after x, weights and hidden that a call may leave out, in the order in which they follow
OPTIONAL = ("cell", "peepholes", "bias", "lengths")


@dataclass(frozen=True)
class Activation:
    """An activation function of ONNX's recurrent operators by its name in lower case; alpha and beta where it has them."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0


#: (alpha, beta) where a node gives none: those of the ONNX operator of that name; None: the function has no such parameter; NaN: it has no default that all agree on
DEFAULTS: Mapping[str, tuple[float | None, float | None]] = {
    "relu": (None, None),
    "tanh": (None, None),
    "sigmoid": (None, None),
    "affine": (math.nan, math.nan),
    "leakyrelu": (0.01, None),
    "thresholdedrelu": (math.nan, None),
    "scaledtanh": (math.nan, math.nan),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0, None),
    "softsign": (None, None),
    "softplus": (None, None),
}


@dataclass(frozen=True)
class RecurrentAttrs:
    """kind: "lstm", "gru" or "rnn". direction: "forward", "reverse" or "bidirectional". activations: the FUNCTIONS of the cell, the same in every direction, as
    `spell` writes them. clip: bound of what goes into the activation of a gate or candidate; the cell state is not bounded, as in onnxruntime. coupled: the forget gate of an LSTM is 1 - the input gate. reset_after: the reset gate of a GRU
    acts on the product with the hidden state, not on the state. x_order: "TB" or "BT". y_order: "TDBH", "TBDH" or "BTDH". operands: the names of OPTIONAL that are there.
    """

    kind: str
    direction: str = "forward"
    activations: str = ""
    clip: float = math.inf
    coupled: bool = False
    reset_after: bool = False
    x_order: str = "TB"
    y_order: str = "TDBH"
    operands: str = ""

    @property
    def gates(self) -> int:
        return GATES[self.kind]

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    @property
    def functions(self) -> list[Activation]:
        fields = [entry.split(":") for entry in self.activations.split()]
        return [Activation(name, float(alpha), float(beta)) for name, alpha, beta in fields]


def spell(functions: list[Activation]) -> str:
    """Activations as text."""
    return " ".join(f"{function.name}:{float(function.alpha)!r}:{float(function.beta)!r}" for function in functions)


def recurrent(x: relax.Expr, weights: relax.Expr, hidden: relax.Expr, optional: Mapping[str, relax.Expr] | None = None, **attrs: Any) -> relax.Call:
    """x: [T, B, D * G * H], the inputs times their weights, with all biases but the operand `bias`; weights: [D, H, G * H]; hidden: [D, B, H] ->
    (y, last hidden [D, B, H]), and the last cell [D, B, H] of an LSTM.

    T steps, batch B, D directions, G gates, hidden size H; all of one float dtype. Gates in ONNX's order: input, output, forget, cell of an LSTM, update, reset, hidden of
    a GRU. optional: `cell` [D, B, H] (an LSTM's, required), `peepholes` [D, 3, H] (input, output, forget), `bias` [D, H] (of a GRU with reset_after, added to the product
    that the reset gate scales), `lengths` [B] integers in 0..T: what lies behind gives y = 0 and leaves the states as they are; the other direction starts at the last
    step within. The equations are those of ONNX's LSTM, GRU and RNN. attrs: fields of RecurrentAttrs.
    """
    optional = optional or {}
    names = [name for name in OPTIONAL if name in optional]
    options = RecurrentAttrs(**attrs, operands=" ".join(names))
    return relax.Call(OPERATOR, [x, weights, hidden, *(optional[name] for name in names)], operator_attrs(**asdict(options)))


def attrs_of(call: Any) -> RecurrentAttrs:
    """The attributes of a call."""
    return RecurrentAttrs(**{name: type(default)(call.attrs[name]) for name, default in asdict(RecurrentAttrs("")).items()})


def operands_of(call: Any) -> dict[str, Any]:
    """The operands of a call by name."""
    return dict(zip(("x", "weights", "hidden", *attrs_of(call).operands.split()), call.args, strict=True))


def output_dims(attrs: RecurrentAttrs, steps: Any, batch: Any, hidden: Any) -> list[Any]:
    """The shape of y."""
    sizes = {"T": steps, "D": attrs.directions, "B": batch, "H": hidden}
    return [sizes[letter] for letter in attrs.y_order]


def _infer(builder: Any, call: Any) -> Any:
    attrs, operands = attrs_of(call), operands_of(call)
    if attrs.kind not in GATES or len(attrs.functions) != FUNCTIONS[attrs.kind] or (attrs.kind == "lstm") != ("cell" in operands):
        raise ValueError(f"{NAME}: a cell of kind '{attrs.kind}' with activations '{attrs.activations}' and operands '{attrs.operands}'")
    x, weights, hidden = (operands[name].ty for name in ("x", "weights", "hidden"))
    directions, gates = attrs.directions, attrs.gates
    depth = weights.shape[1]
    if x.ndim != 3 or weights.ndim != 3 or hidden.ndim != 3 or not isinstance(depth, tirx.IntImm):
        raise ValueError(f"{NAME}: expected x, weights and hidden state of three dims and a known hidden size, got {x}, {weights}, {hidden}")
    size = int(depth)
    batch = x.shape[attrs.x_order.index("B")]
    wanted = {
        "x": [*list(x.shape)[:2], directions * gates * size],
        "weights": [directions, size, gates * size],
        "hidden": [directions, batch, size],
        "cell": [directions, batch, size],
        "peepholes": [directions, 3, size],
        "bias": [directions, size],
        "lengths": [batch],
    }
    for name, operand in operands.items():
        have, want = list(operand.ty.shape), [tirx.IntImm("int64", dim) if isinstance(dim, int) else dim for dim in wanted[name]]
        differs = any(isinstance(a, tirx.IntImm) and isinstance(b, tirx.IntImm) and int(a) != int(b) for a, b in zip(have, want, strict=False))
        if len(have) != len(want) or differs:
            raise ValueError(f"{NAME}: {name} has shape {have}, expected {want}")
        if name != "lengths" and operand.ty.dtype != x.dtype:
            raise ValueError(f"{NAME}: {name} is {operand.ty.dtype}, x is {x.dtype}")
    state = relax.TensorType([directions, batch, size], x.dtype)
    y = relax.TensorType(output_dims(attrs, x.shape[attrs.x_order.index("T")], batch, size), x.dtype)
    return relax.TupleType([y, state, state] if attrs.kind == "lstm" else [y, state])


def _undefined(builder: Any, call: Any) -> relax.Expr:
    """A loop over time is not Relax operators: a target without a kernel finds the call as it is, and refuses it by its name."""
    return call


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def apply(function: Activation, x: np.ndarray) -> np.ndarray:
    """An activation in numpy."""
    a, b = function.alpha, function.beta
    table: dict[str, Callable[[], np.ndarray]] = {
        "relu": lambda: np.maximum(x, 0),
        "tanh": lambda: np.tanh(x),
        "sigmoid": lambda: _sigmoid(x),
        "affine": lambda: a * x + b,
        "leakyrelu": lambda: np.where(x >= 0, x, a * x),
        "thresholdedrelu": lambda: np.where(x >= a, x, 0),
        "scaledtanh": lambda: a * np.tanh(b * x),
        "hardsigmoid": lambda: np.clip(a * x + b, 0, 1),
        "elu": lambda: np.where(x >= 0, x, a * np.expm1(x)),
        "softsign": lambda: x / (1 + np.abs(x)),
        "softplus": lambda: np.logaddexp(0, x),
    }
    return table[function.name]()


def reference(x: np.ndarray, weights: np.ndarray, hidden: np.ndarray, **rest: Any) -> tuple[np.ndarray, ...]:
    """The operator in numpy, in float64: arguments and results as those of `recurrent`, optional operands by name."""
    optional = {name: rest.pop(name) for name in OPTIONAL if name in rest}
    attrs = RecurrentAttrs(**rest)
    x = x.astype(np.float64) if attrs.x_order == "TB" else x.swapaxes(0, 1).astype(np.float64)
    (steps, batch), size = x.shape[:2], weights.shape[1]
    x = x.reshape(steps, batch, attrs.directions, attrs.gates, size)
    y = np.zeros((steps, attrs.directions, batch, size))
    h = hidden.astype(np.float64)
    c = optional.get("cell", hidden).astype(np.float64)
    for d in range(attrs.directions):
        reverse = attrs.direction == "reverse" or d == 1
        for b in range(batch):
            length = int(optional["lengths"][b]) if "lengths" in optional else steps
            for step in range(length):
                time = length - 1 - step if reverse else step
                extra = {name: optional[name][d].astype(np.float64) for name in ("peepholes", "bias") if name in optional}
                h[d, b], c[d, b] = _step(attrs, x[time, b, d], weights[d].astype(np.float64).reshape(size, -1, size), h[d, b], c[d, b], **extra)
                y[time, d, b] = h[d, b]
    y = y.transpose(["TDBH".index(letter) for letter in attrs.y_order])
    return (y, h, c) if attrs.kind == "lstm" else (y, h)


def _step(attrs: RecurrentAttrs, x: np.ndarray, weights: np.ndarray, h: np.ndarray, c: np.ndarray, peepholes: Any = None, bias: Any = 0.0) -> Any:
    """x: [G, H], weights: [H, G, H], h and c: [H] -> the next h and c."""

    def activate(index: int, value: np.ndarray) -> np.ndarray:
        return apply(attrs.functions[index], np.clip(value, -attrs.clip, attrs.clip))

    sums = x + np.einsum("k,kgj->gj", h, weights)
    if attrs.kind == "rnn":
        return activate(0, sums[0]), c
    if attrs.kind == "gru":
        update, reset = activate(0, sums[0]), activate(0, sums[1])
        inner = reset * (h @ weights[:, 2] + bias) if attrs.reset_after else (reset * h) @ weights[:, 2]
        return (1 - update) * activate(1, x[2] + inner) + update * h, c
    p = np.zeros((3, h.size)) if peepholes is None else peepholes
    enter = activate(0, sums[0] + p[0] * c)
    forget = 1 - enter if attrs.coupled else activate(0, sums[2] + p[2] * c)
    c = forget * c + enter * activate(1, sums[3])
    return activate(0, sums[1] + p[1] * c) * apply(attrs.functions[2], c), c


OPERATOR = register_operator(NAME, ("x", "weights", "hidden", *OPTIONAL), _infer, _undefined)
