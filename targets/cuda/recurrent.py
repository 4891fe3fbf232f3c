"""Recurrent layers: all steps of an LSTM, GRU or RNN in one kernel, `tcompile.recurrent`.

block (row of the batch, direction): its states in shared memory
    for step:
        sums <- state times weights, threads over (part of k, unit)                     # tc::state_products in include/recurrent.cuh
        threads over units: gates and the next states from x and the sums, in registers

Steps depend on each other, so the limit is the weights' bytes, once a step, over what one multiprocessor reads from the second-level cache. A GRU that resets the state before the
product has two products a step. The same equations as on the CPU (`targets/cpu/recurrent_cells.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...compiler.dialect.recurrent import Activation, RecurrentAttrs, attrs_of, operands_of
from ...compiler.tvm import tirx
from ..base import Target
from .kernel import Plan, Signature, Unsupported, ctype
from .printer import literal
from .sizes import require_fixed

#: units of a round of a block; threads of a block; k of a part at least
_UNITS, _THREADS, _PART = 512, 1024, 16


def kernel(call: Any, target: Target) -> Plan:
    """The kernel of a call of static shape; its parameters are the operands and the results. Raises Unsupported."""
    operands = operands_of(call)
    require_fixed(*(operand.ty for operand in operands.values()))
    if (dtype := str(operands["x"].ty.dtype)) not in ("float32", "float64"):
        raise Unsupported(f"recurrent layers in {dtype}")
    given = {name: tirx.decl_buffer([int(dim) for dim in operand.ty.shape], str(operand.ty.dtype), name) for name, operand in operands.items()}
    outs = [tirx.decl_buffer([int(dim) for dim in kind.shape], dtype, name) for kind, name in zip(call.ty.fields, ("y", "h", "c"), strict=False)]
    return Plan((*given.values(), *outs), (_Layer(attrs_of(call), given, outs, target).kernel(),))


class _Layer:
    """Prints the kernel of one layer."""

    def __init__(self, attrs: RecurrentAttrs, given: dict[str, Any], outs: list[Any], target: Target):
        self.attrs, self.given, self.outs, self.target = attrs, given, outs, target
        self.dtype = str(outs[0].ty.dtype)
        self.kind = ctype(self.dtype)
        self.signature = Signature(tuple(outs))
        self.size = int(given["weights"].shape[1])
        self.steps, self.batch = (int(given["x"].shape[attrs.x_order.index(letter)]) for letter in "TB")
        self.units = min(_UNITS, -(-self.size // 32) * 32)
        self.parts = max(1, min(_THREADS // self.units, self.size // _PART))
        #: the reset gate acts on the state, whose product comes second
        self.twice = attrs.kind == "gru" and not attrs.reset_after
        self.states = 2 if attrs.kind == "lstm" or self.twice else 1

    def kernel(self) -> Any:
        attrs, size, threads = self.attrs, self.size, self.units * self.parts
        shared = (self.states * size + self.parts * attrs.gates * size) * (8 if self.dtype == "float64" else 4)
        if shared > self.target.shared_bytes:
            raise Unsupported(f"{shared} bytes of shared memory for a state of {size}, {self.target.name} has {self.target.shared_bytes}")
        lines = [
            f"TC_SHARED({self.kind}, state);",
            f"{self.kind}* const other = state + {size};" if self.states == 2 else "",
            f"{self.kind}* const sums = state + {self.states * size};",
            f"const int b = blockIdx.x, d = blockIdx.y, start = (d * {self.batch} + b) * {size};",
            f"const int steps = {self._length()};",
            *self._over_units(self._load()),
            "for (int step = 0; step < steps; ++step) {",
            f"  const int time = {self._time()};",
            "  __syncthreads();",
            *(f"  {line}" for line in self._step()),
            "}",
            *self._over_units(
                [
                    f"for (int time = steps; time < {self.steps}; ++time) {self._y()} = 0;",
                    f"{self._name(self.outs[1])}[start + unit] = state[unit];",
                    *([f"{self._name(self.outs[2])}[start + unit] = other[unit];"] if attrs.kind == "lstm" else []),
                ]
            ),
        ]
        shape = f"{self.steps} steps of {self.batch} x {size}" + (f", {attrs.direction}" if attrs.direction != "forward" else "")
        return self.signature.kernel(
            [line for line in lines if line],
            grid=(self.batch, attrs.directions, 1),
            threads=threads,
            shared_bytes=shared,
            kind="recurrent",
            workload=f"{attrs.kind} {shape}",
            schedule=f"{self.units} units x {self.parts} parts of k",
        )

    def _name(self, buffer: Any) -> str:
        return self.signature.name(buffer)

    def _over_units(self, body: list[str]) -> list[str]:
        """A thread keeps the units that are its own: nobody else touches their states between two barriers."""
        return [f"for (int unit = threadIdx.x; unit < {self.size}; unit += {self.units * self.parts}) {{", *(f"  {line}" for line in body), "}"]

    def _length(self) -> str:
        if "lengths" not in self.given:
            return str(self.steps)
        self.signature.indexed = True
        return f"tc::steps_of({self._name(self.given['lengths'])}[b], {self.steps}, error, site)"

    def _time(self) -> str:
        last = {"forward": "step", "reverse": "steps - 1 - step"}
        return last.get(self.attrs.direction, "d ? steps - 1 - step : step")

    def _load(self) -> list[str]:
        lines = [f"state[unit] = {self._name(self.given['hidden'])}[start + unit];"]
        return lines + ([f"other[unit] = {self._name(self.given['cell'])}[start + unit];"] if self.attrs.kind == "lstm" else [])

    def _y(self) -> str:
        sizes = {"T": self.steps, "D": self.attrs.directions, "B": self.batch, "H": self.size}
        positions = {"T": "time", "D": "d", "B": "b", "H": "unit"}
        terms, stride = [], 1
        for letter in reversed(self.attrs.y_order):
            terms.append(f"{positions[letter]} * {stride}")
            stride *= sizes[letter]
        return f"{self._name(self.outs[0])}[{' + '.join(reversed(terms))}]"

    def _x(self, gate: int) -> str:
        row = f"time * {self.batch} + b" if self.attrs.x_order == "TB" else f"b * {self.steps} + time"
        gates = self.attrs.gates
        return f"{self._name(self.given['x'])}[(size_t)({row}) * {self.attrs.directions * gates * self.size} + (d * {gates} + {gate}) * {self.size} + unit]"

    def _products(self, first: int, count: int, state: str) -> list[str]:
        gates = self.attrs.gates
        weights = f"{self._name(self.given['weights'])} + (size_t)d * {self.size * gates * self.size}"
        sizes = f"{self.size}, {gates}, {first}, {count}, {self.units}, {self.parts}"
        return [f"tc::state_products<{sizes}>(sums, {state}, {weights});", "__syncthreads();"]

    def _sum(self, gate: int) -> str:
        return f"tc::state_product<{self.size}, {self.attrs.gates}, {self.parts}>(sums, {gate}, unit)"

    def _gate(self, gate: int) -> str:
        return f"{self._sum(gate)} + {self._x(gate)}"

    def _activate(self, number: int, value: str, clip: bool = True) -> str:
        if clip and math.isfinite(self.attrs.clip):
            limit = literal(self.attrs.clip, self.dtype)
            value = f"tc::max<{self.kind}>(tc::min<{self.kind}>({value}, {limit}), -{limit})"
        return f"[&]({self.kind} x) -> {self.kind} {{ return {activation(self.attrs.functions[number], self.dtype)}; }}({value})"

    def _step(self) -> list[str]:
        return {"rnn": self._rnn, "gru": self._gru, "lstm": self._lstm}[self.attrs.kind]()

    def _rnn(self) -> list[str]:
        return [
            *self._products(0, 1, "state"),
            *self._over_units([f"state[unit] = {self._y()} = {self._activate(0, self._gate(0))};"]),
        ]

    def _gru(self) -> list[str]:
        kind = self.kind
        update = f"const {kind} update = {self._activate(0, self._gate(0))};"
        reset = f"const {kind} reset = {self._activate(0, self._gate(1))};"
        mixed = f"state[unit] = {self._y()} = (1 - update) * {self._activate(1, 'inner')} + update * state[unit];"
        if self.twice:
            return [
                *self._products(0, 2, "state"),
                *self._over_units([reset, "other[unit] = reset * state[unit];"]),
                "__syncthreads();",
                *self._products(2, 1, "other"),
                *self._over_units([update, f"const {kind} inner = {self._gate(2)};", mixed]),
            ]
        bias = f" + {self._name(self.given['bias'])}[d * {self.size} + unit]" if "bias" in self.given else ""
        inner = f"const {kind} inner = {self._x(2)} + reset * ({self._sum(2)}{bias});"
        return [*self._products(0, 3, "state"), *self._over_units([update, reset, inner, mixed])]

    def _lstm(self) -> list[str]:
        kind, attrs = self.kind, self.attrs

        def peeped(gate: int, cell: str) -> str:
            if "peepholes" not in self.given:
                return self._gate(gate)
            return f"{self._gate(gate)} + {self._name(self.given['peepholes'])}[(d * 3 + {gate}) * {self.size} + unit] * {cell}"

        forget = "1 - enter" if attrs.coupled else self._activate(0, peeped(2, "before"))
        body = [
            f"const {kind} before = other[unit];",
            f"const {kind} enter = {self._activate(0, peeped(0, 'before'))};",
            f"const {kind} forget = {forget};",
            f"const {kind} cell = forget * before + enter * {self._activate(1, self._gate(3))};",
            "other[unit] = cell;",
            f"state[unit] = {self._y()} = {self._activate(0, peeped(1, 'cell'))} * {self._activate(2, 'cell', clip=False)};",
        ]
        return [*self._products(0, 4, "state"), *self._over_units(body)]


def activation(function: Activation, dtype: str) -> str:
    """An activation function of ONNX's recurrent operators on x, in C."""
    kind, suffix = ctype(dtype), "f" if dtype == "float32" else ""
    a, b = literal(function.alpha, dtype), literal(function.beta, dtype)
    table: dict[str, Callable[[], str]] = {
        "relu": lambda: f"tc::max<{kind}>(x, 0)",
        "tanh": lambda: f"tanh{suffix}(x)",
        "sigmoid": lambda: f"1 / (1 + exp{suffix}(-x))",
        "affine": lambda: f"{a} * x + {b}",
        "leakyrelu": lambda: f"x >= 0 ? x : {a} * x",
        "thresholdedrelu": lambda: f"x >= {a} ? x : 0",
        "scaledtanh": lambda: f"{a} * tanh{suffix}({b} * x)",
        "hardsigmoid": lambda: f"tc::min<{kind}>(tc::max<{kind}>({a} * x + {b}, 0), 1)",
        "elu": lambda: f"x >= 0 ? x : {a} * expm1{suffix}(x)",
        "softsign": lambda: f"x / (1 + fabs{suffix}(x))",
        "softplus": lambda: f"tc::max<{kind}>(x, 0) + log1p{suffix}(exp{suffix}(-fabs{suffix}(x)))",
    }
    return table[function.name]()
