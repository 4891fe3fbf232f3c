"""Recurrent layers of the CUDA target, run thread by thread on the CPU, against the operator's reference in float64."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from cuda_models import compiled, emulation, program_of, run, templates
from tcompile.compiler.compare import agree
from tcompile.compiler.dialect.recurrent import FUNCTIONS, GATES, Activation, recurrent, reference, spell
from tcompile.compiler.tvm import relax

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
RANDOM = np.random.default_rng(17)
USUAL = {"lstm": ["sigmoid", "tanh", "tanh"], "gru": ["sigmoid", "tanh"], "rnn": ["tanh"]}

#: kind, steps, batch, hidden size, operands beside the usual ones, attributes: one unit, primes, more units than a part of k has, all that a cell may have
LAYERS = [
    ("lstm", 3, 2, 7, (), {}),
    ("lstm", 4, 3, 37, ("peepholes", "lengths"), {"direction": "bidirectional", "coupled": True, "clip": 0.3, "x_order": "BT", "y_order": "BTDH"}),
    ("lstm", 1, 1, 1, (), {"activations": spell([Activation("hardsigmoid", 0.3, 0.4), Activation("softsign"), Activation("scaledtanh", 0.5, 2.0)])}),
    ("gru", 5, 3, 33, ("lengths",), {"direction": "reverse"}),
    ("gru", 2, 1, 65, ("bias",), {"reset_after": True, "direction": "bidirectional", "y_order": "TBDH", "activations": spell([Activation("softplus"), Activation("elu", 0.7)])}),
    ("rnn", 3, 5, 17, (), {"activations": spell([Activation("thresholdedrelu", 0.1)])}),
    ("rnn", 2, 1, 530, (), {"activations": spell([Activation("leakyrelu", 0.1)])}),
]  # fmt: skip


def operands(kind, steps, batch, size, more, attrs, dtype):
    directions, gates = 2 if attrs.get("direction") == "bidirectional" else 1, GATES[kind]
    lead = (batch, steps) if attrs.get("x_order") == "BT" else (steps, batch)
    shapes = {"x": (*lead, directions * gates * size), "weights": (directions, size, gates * size), "hidden": (directions, batch, size)}
    shapes |= {"cell": shapes["hidden"]} if kind == "lstm" else {}
    shapes |= {name: {"peepholes": (directions, 3, size), "bias": (directions, size), "lengths": (batch,)}[name] for name in more}
    made = {name: (RANDOM.standard_normal(shape) / 2).astype(dtype) for name, shape in shapes.items()}
    return made | ({"lengths": RANDOM.integers(0, steps + 1, batch)} if "lengths" in more else {})


def call(emit, values, kind, attrs):
    made = emit(recurrent(*values[:3], dict(zip(attrs.pop("names"), values[3:], strict=True)), kind=kind, **attrs))
    return [emit(relax.TupleGetItem(made, at)) for at in range(3 if kind == "lstm" else 2)]


def test_layers_of_awkward_sizes():
    inputs, cases = {}, []
    for number, (kind, steps, batch, size, more, attrs) in enumerate([*LAYERS, LAYERS[1]]):
        given = operands(kind, steps, batch, size, more, attrs, "float64" if number == len(LAYERS) else "float32")
        usual = spell([Activation(name) for name in USUAL[kind][: FUNCTIONS[kind]]])
        cases.append((given, kind, {"activations": usual} | attrs))
        inputs |= {f"{name}{number}": value for name, value in given.items()}

    def build(emit, *variables):
        results, rest = [], list(variables)
        for given, kind, attrs in cases:
            own, rest = rest[: len(given)], rest[len(given) :]
            results += call(emit, own, kind, attrs | {"names": list(given)[3:]})
        return results

    outputs, lowered = run(build, inputs)
    found = iter(outputs)
    for given, kind, attrs in cases:
        with np.errstate(over="ignore"):
            exact = reference(**given, kind=kind, **attrs, operands=" ".join(list(given)[3:]))
        for want, ours in zip(exact, found, strict=False):
            near = 2e-5 if ours.dtype == np.float32 else 1e-12  # of a layer's largest number: gates by softplus multiply what they are given
            agreement = agree(ours, want.astype(ours.dtype), rtol=near, atol=near)
            assert agreement.ok, (kind, attrs, agreement)
    assert set(templates(lowered)) == {"recurrent"}


def test_a_length_out_of_range_is_reported():
    given = operands("rnn", 3, 2, 4, ("lengths",), {}, "float32") | {"lengths": np.array([2, 4])}
    attrs = {"activations": spell([Activation("tanh")]), "names": ["lengths"]}
    model = emulation(compiled(program_of(lambda emit, *values: call(emit, values, "rnn", dict(attrs)), given)))
    model(*given.values())
    assert model.error
