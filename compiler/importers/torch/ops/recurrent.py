"""nn.LSTM, nn.GRU and nn.RNN: per layer, one matmul of the inputs and one `tcompile.recurrent`, where torch's own decomposition unrolls all steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx

from ....dialect.recurrent import GATES, Activation, recurrent, spell
from ....tvm import is_constant, relax

#: torch's gates in the dialect's order: of LSTMs torch has input, forget, cell, output; of GRUs reset, update, new
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def _converter(kind: str, *activations: str) -> Callable[[Any, fx.Node], relax.Expr]:
    """input: [T, B, I], or [B, T, I] with batch_first; states: [layers * D, B, H] -> (output [.., D * H], last states)."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x, states, params, biases, layers, dropout, train, bidirectional, batch_first = translator.value(node.args)
        if train and dropout:
            raise NotImplementedError("a recurrent layer with dropout: call .eval() before the export")
        dtype = str(x.ty.dtype)
        x, params, states = (_wide(translator, value) for value in (x, list(params), list(states) if kind == "lstm" else [states]))
        directions, per_layer = 1 + int(bidirectional), 4 if biases else 2
        arguments = {"kind": kind, "direction": "bidirectional" if bidirectional else "forward", "reset_after": kind == "gru"}
        arguments["activations"] = spell([Activation(name) for name in activations])
        arguments |= {"x_order": "BT", "y_order": "BTDH"} if batch_first else {"x_order": "TB", "y_order": "TBDH"}
        last: list[list[relax.Expr]] = []
        for layer in range(layers):
            own = [params[(layer * directions + d) * per_layer :][:per_layer] for d in range(directions)]
            first = [_rows(translator, state, layer * directions, directions) for state in states]
            y, *after = _layer(translator, kind, x, own, first, arguments)
            size = y.ty.shape[3]
            x = translator.emit(relax.op.reshape(y, [*list(y.ty.shape)[:2], directions * size]))
            last.append(after)
        joined = [of if len(of) > 1 else of[0] for of in ([after[at] for after in last] for at in range(len(states)))]
        results = [x, *(translator.emit(relax.op.concat(of, 0)) if isinstance(of, list) else of for of in joined)]
        return relax.Tuple([result if str(result.ty.dtype) == dtype else translator.emit(relax.op.astype(result, dtype)) for result in results])

    return convert


def _wide(translator: Any, value: Any) -> Any:
    """Half precisions as float32, in which a layer adds up and keeps its states."""
    if isinstance(value, list):
        return [_wide(translator, item) for item in value]
    if str(value.ty.dtype) in ("float32", "float64"):
        return value
    return _computed(
        translator.emit,
        [value],
        lambda arrays: arrays[0].astype("float32"),
        lambda them: translator.emit(relax.op.astype(them[0], "float32")),
        "float32",
    )


def _layer(
    translator: Any, kind: str, x: relax.Expr, params: Sequence[Sequence[relax.Expr]], states: list[relax.Expr], arguments: dict[str, Any]
) -> list[relax.Expr]:
    """y and the last states of one layer; params: of each direction weights of the inputs [G * H, I] and of the state [G * H, H], and their biases."""
    emit = translator.emit

    def gates(at: int) -> list[relax.Expr]:
        return [_reordered(translator, own[at], kind) for own in params]

    inputs = _computed(emit, gates(0), lambda arrays: np.concatenate(arrays).T, lambda them: emit(relax.op.permute_dims(_concat(emit, them), [1, 0])))
    weights = _computed(
        emit,
        gates(1),
        lambda arrays: np.stack(arrays).transpose(0, 2, 1),
        lambda them: emit(relax.op.permute_dims(emit(relax.op.stack(them, 0)), [0, 2, 1])),
    )
    sums, optional = emit(relax.op.matmul(x, inputs)), {"cell": states[1]} if kind == "lstm" else {}
    for at in range(2, len(params[0])):
        bias = gates(at)
        if at == 3 and kind == "gru":
            bias, optional["bias"] = _divided(translator, bias)
        sums = emit(relax.op.add(sums, _computed(emit, bias, np.concatenate, lambda them: _concat(emit, them))))
    results = emit(recurrent(sums, weights, states[0], optional, **arguments))
    return [emit(relax.TupleGetItem(results, at)) for at in range(1 + len(states))]


def _divided(translator: Any, biases: list[relax.Expr]) -> tuple[list[relax.Expr], relax.Expr]:
    """A GRU's recurrent biases, each [3 * H]: with zeros for the last gate, and those of the last gate, which the reset gate scales: [D, H]."""
    emit, size = translator.emit, int(biases[0].ty.shape[0]) // 3
    zeros = np.zeros(size, str(biases[0].ty.dtype))

    def without(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([arrays[0][: 2 * size], zeros])

    def cut(values: list[relax.Expr]) -> relax.Expr:
        return emit(relax.op.concat([_rows(translator, values[0], 0, 2 * size), relax.const(zeros)], 0))

    def last(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack([array[2 * size :] for array in arrays])

    def taken(values: list[relax.Expr]) -> relax.Expr:
        return emit(relax.op.stack([_rows(translator, value, 2 * size, size) for value in values], 0))

    return [_computed(emit, [value], without, cut) for value in biases], _computed(emit, biases, last, taken)


def _reordered(translator: Any, value: relax.Expr, kind: str) -> relax.Expr:
    """Rows of a weight or bias [G * H, ..] with the gates in the dialect's order."""
    order, size = _ORDER[kind], int(value.ty.shape[0]) // GATES[kind]
    if len(order) == 1:
        return value

    def array(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([arrays[0][gate * size : (gate + 1) * size] for gate in order])

    return _computed(
        translator.emit,
        [value],
        array,
        lambda them: translator.emit(relax.op.concat([_rows(translator, them[0], gate * size, size) for gate in order], 0)),
    )


def _computed(
    emit: Any,
    values: list[relax.Expr],
    fold: Callable[[list[np.ndarray]], np.ndarray],
    build: Callable[[list[relax.Expr]], relax.Expr],
    dtype: str = "",
) -> relax.Expr:
    """A rearrangement of constants, done at import, or of what the model computes (a weight norm), by operators."""
    if all(is_constant(value) for value in values):
        arrays = [value.value.numpy() for value in values]  # pyright: ignore[reportAttributeAccessIssue]
        return relax.const(np.ascontiguousarray(fold(arrays)), dtype or str(values[0].ty.dtype))
    return build(values)


def _concat(emit: Any, values: list[relax.Expr]) -> relax.Expr:
    return values[0] if len(values) == 1 else emit(relax.op.concat(values, 0))


def _rows(translator: Any, value: relax.Expr, first: int, count: int) -> relax.Expr:
    """value[first : first + count]."""
    if int(value.ty.shape[0]) == count:
        return value
    return translator.emit(relax.op.strided_slice(value, [0], [first], [first + count]))


CONVERTERS = {
    "lstm.input": _converter("lstm", "sigmoid", "tanh", "tanh"),
    "gru.input": _converter("gru", "sigmoid", "tanh"),
    "rnn_tanh.input": _converter("rnn", "tanh"),
    "rnn_relu.input": _converter("rnn", "relu"),
}
