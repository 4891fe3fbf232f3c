"""Recurrent layers: ONNX's LSTM, GRU and RNN against onnxruntime, the operator against its reference, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import tcompile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import HASWELL, widest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tcompile.compiler.dialect.recurrent import FUNCTIONS, GATES, Activation, recurrent, reference, spell
from tcompile.compiler.errors import UnsupportedModel
from tcompile.compiler.tvm import relax, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.generic import schedule as generic
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tcompile.targets.cpu.recurrent import own

ALL = ("b", "lens", "h0", "c0", "p")
TWO = {"direction": "bidirectional"}


def layer(op, steps, batch, inputs, hidden, given=("b",), computed=(), dynamic=False, element=np.float32, **attrs) -> tuple[ModelProto, dict]:
    """A model of one layer, and its inputs: x, states, lengths and those weights that `computed` names; `given` names the optional ones that are there."""
    rng = np.random.default_rng(steps + 10 * batch + 100 * hidden)
    directions, gates, last = 2 if attrs.get("direction") == "bidirectional" else 1, GATES[op.lower()], bool(attrs.get("layout"))
    x, state = [steps, batch, inputs], [directions, batch, hidden]
    if last:
        x, state = [batch, steps, inputs], [batch, directions, hidden]
    shapes = {"x": x, "w": [directions, gates * hidden, inputs], "r": [directions, gates * hidden, hidden], "b": [directions, 2 * gates * hidden]}
    shapes |= {"lens": [batch], "h0": state, "c0": state, "p": [directions, 3 * hidden]}
    names = ["x", "w", "r", *(name if name in given else "" for name in ALL[: 5 if op == "LSTM" else 3])]
    values = {name: (rng.standard_normal(shapes[name]) / 2).astype(element) for name in names if name}
    if "lens" in values:
        values["lens"] = rng.integers(1, steps + 1, batch).astype(np.int32)
    constant = [name for name in names if name in ("w", "r", "b", "p") and name not in computed]
    free = {"x": ["n", "m", inputs], "h0": [directions, "m", hidden], "c0": [directions, "m", hidden], "lens": ["m"]} if dynamic else {}
    results = ["y", "y_h", "y_c"][: 3 if op == "LSTM" else 2]
    code = helper.np_dtype_to_tensor_dtype(np.dtype(element))
    infos = [
        helper.make_tensor_value_info(name, TensorProto.INT32 if name == "lens" else code, free.get(name, shapes[name]))
        for name in values
        if name not in constant
    ]
    node = helper.make_node(op, names, results, name="layer", hidden_size=hidden, **attrs)
    outputs = [helper.make_tensor_value_info(name, code, None) for name in results]
    graph = helper.make_graph([node], "layer", infos, outputs, [numpy_helper.from_array(values[name], name) for name in constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model, {info.name: values[info.name] for info in infos}


def agree(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, tolerance, tolerance * max(1.0, float(np.abs(theirs).max(initial=0))))


def runtime(model, feeds):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


CASES = [
    (("LSTM", 5, 3, 4, 7), {}),
    (("LSTM", 1, 1, 3, 33), {"given": ALL, **TWO}),
    (("LSTM", 5, 13, 2, 16), {"given": ("b", "lens", "h0", "p"), "direction": "reverse", "input_forget": 1, "clip": 0.3}),
    (("LSTM", 4, 3, 1, 1), {"given": ("h0", "c0"), "computed": ("w", "r"), **TWO}),
    (("GRU", 5, 3, 4, 33), {"given": ALL, **TWO}),
    (("GRU", 5, 1, 4, 16), {"given": ALL, **TWO, "linear_before_reset": 1, "clip": 0.5}),
    (("GRU", 4, 5, 4, 7), {"given": ("b",), "computed": ("w", "r", "b"), "linear_before_reset": 1}),
    (("RNN", 5, 3, 4, 33), {"given": ("b", "h0", "lens"), "direction": "reverse"}),
    (("RNN", 3, 20, 4, 17), {"given": (), **TWO, "activations": ["Relu", "Sigmoid"]}),
    (
        ("LSTM", 3, 3, 2, 7),
        {"activations": ["HardSigmoid", "Softsign", "LeakyRelu"], "activation_alpha": [0.3, 0.1], "activation_beta": [0.4], "given": ("b", "p")},
    ),
    (
        ("GRU", 3, 2, 2, 5),
        {"activations": ["Sigmoid", "Affine", "HardSigmoid", "Softplus"], "activation_alpha": [0.5, 0.3], "activation_beta": [0.1, 0.4], **TWO},
    ),
    (("RNN", 3, 2, 2, 5), {"activations": ["ScaledTanh", "Elu"], "activation_alpha": [0.5, 0.7], "activation_beta": [1.5], **TWO}),
    (("RNN", 3, 2, 2, 5), {"activations": ["ThresholdedRelu"], "activation_alpha": [0.2]}),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("sizes", "options"), CASES, ids=[f"{'-'.join(map(str, sizes))}-{index}" for index, (sizes, _) in enumerate(CASES)])
def test_layers_match_onnxruntime(sizes, options):
    model, feeds = layer(*sizes, **options)
    agree(tcompile.compile(model)(*feeds.values()), runtime(model, feeds))


@pytest.mark.sweep
@pytest.mark.parametrize(("op", "steps", "batch"), [("LSTM", 5, 3), ("GRU", 1, 11)])
def test_steps_and_batch_may_be_known_at_run_time_only(op, steps, batch):
    model, feeds = layer(op, steps, batch, 4, 7, given=ALL, dynamic=True, **TWO)
    agree(tcompile.compile(model)(*feeds.values()), runtime(model, feeds))


def test_one_model_serves_all_sizes():
    model, feeds = layer("LSTM", 5, 3, 4, 19, given=("b", "h0", "c0"), dynamic=True, **TWO)
    compiled, session = tcompile.compile(model), onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    for steps, batch in ((1, 1), (7, 2), (2, 9), (4, 7)):
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((steps, batch, 4), (2, batch, 19), (2, batch, 19))]
        agree(compiled(*arrays), session.run(None, dict(zip(feeds, arrays, strict=True))))


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_layout_1_is_the_same_layer_with_the_batch_first(op):
    given = ("b", "h0", "c0", "lens")
    first, feeds = layer(op, 5, 3, 4, 7, given=given, layout=1, **TWO)
    second, _ = layer(op, 5, 3, 4, 7, given=given, **TWO)
    swapped = {name: array if name == "lens" else np.ascontiguousarray(array.swapaxes(0, 1)) for name, array in feeds.items()}
    del second.graph.initializer[:]
    second.graph.initializer.extend(first.graph.initializer)
    y, *states = runtime(second, swapped)
    agree(tcompile.compile(first)(*feeds.values()), [y.transpose(2, 0, 1, 3), *(state.swapaxes(0, 1) for state in states)])


@pytest.mark.parametrize(("element", "tolerance"), [(np.float64, 1e-12), (np.float16, 2e-3)])
def test_other_precisions(element, tolerance):
    model, feeds = layer("LSTM", 5, 3, 4, 7, given=ALL, element=element, **TWO)
    values = {**{tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}, **feeds}
    wide = {name: array.astype(np.float64) for name, array in values.items() if name != "lens"}
    bias = wide["b"].reshape(2, 2, 28).sum(1).reshape(56)
    expected = reference(
        np.einsum("tbi,dgi->tbdg", wide["x"], wide["w"]).reshape(5, 3, 56) + bias,
        wide["r"].transpose(0, 2, 1),
        wide["h0"],
        cell=wide["c0"],
        peepholes=wide["p"].reshape(2, 3, 7),
        lengths=values["lens"],
        kind="lstm",
        activations=spell([Activation("sigmoid"), Activation("tanh"), Activation("tanh")]),
        **TWO,
    )
    agree(tcompile.compile(model)(*feeds.values()), [part.astype(element) for part in expected], tolerance)


def test_a_length_beyond_the_steps_raises():
    model, feeds = layer("GRU", 5, 3, 4, 7, given=ALL)
    compiled = tcompile.compile(model)
    for bad in (6, -1):
        with pytest.raises(Exception, match=r"'layer' \(recurrent\): a length exceeds its axis"):
            compiled(*(np.array([1, bad, 2], np.int32) if name == "lens" else array for name, array in feeds.items()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activations": ["Mish"]}, "activation 'mish' is not supported"),
        ({"activations": ["Affine"]}, "runtimes differ"),
        ({"direction": "sideways"}, "direction 'sideways'"),
        ({"activations": ["Tanh", "Tanh", "Relu"]}, "3 activations, expected 1"),
    ],
)
def test_what_is_refused(options, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        tcompile.compile(layer("RNN", 2, 1, 3, 4, **options)[0])


def kernel_results(arrays, optional, target, **attrs):
    """The operator on arrays through its CPU kernel; the weights are constants."""
    builder, dtype = relax.BlockBuilder(), str(arrays[0].dtype)
    x, hidden = (relax.Var(name, relax.TensorType(array.shape, dtype)) for name, array in (("x", arrays[0]), ("hidden", arrays[2])))
    with builder.function("main", [x, hidden]):
        constants = {name: relax.const(array) for name, array in optional.items()}
        builder.emit_func_output(builder.emit(recurrent(x, relax.const(arrays[1]), hidden, constants, **attrs)))
    module = legalize(builder.get(), own(target))
    for variable, func in list(module.functions_items()):
        if variable.name_hint.startswith("recurrent"):
            module.update_func(variable, generic(func, target).func)
    machine = relax.VirtualMachine(relax.build(module, tvm_target(target), tir_pipeline=TIR_PIPELINE), tvm.cpu())
    return [part.numpy() for part in machine["main"](tvm.runtime.tensor(arrays[0]), tvm.runtime.tensor(arrays[2]))]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_kernel_matches_the_reference(data):
    """Any cell, sizes, order of dims and machine."""
    draw = data.draw
    cell, direction = draw(st.sampled_from(sorted(GATES))), draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    steps, batch, size = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    x_order, y_order = draw(st.sampled_from(["TB", "BT"])), draw(st.sampled_from(["TDBH", "TBDH", "BTDH"]))
    directions, rng = 2 if direction == "bidirectional" else 1, np.random.default_rng(size)

    def floats(*shape):
        return (rng.standard_normal(shape) / 2).astype(np.float32)

    lead = (steps, batch) if x_order == "TB" else (batch, steps)
    arrays = floats(*lead, directions * GATES[cell] * size), floats(directions, size, GATES[cell] * size), floats(directions, batch, size)
    optional = {"cell": floats(directions, batch, size)} if cell == "lstm" else {}
    if cell == "lstm" and draw(st.booleans()):
        optional["peepholes"] = floats(directions, 3, size)
    reset_after = cell == "gru" and draw(st.booleans())
    if reset_after and draw(st.booleans()):
        optional["bias"] = floats(directions, size)
    if draw(st.booleans()):
        optional["lengths"] = rng.integers(0, steps + 1, batch)
    names = ["sigmoid", "tanh", "tanh"] if cell == "lstm" else ["sigmoid", "tanh"][-FUNCTIONS[cell] :]
    attrs = {"direction": direction, "activations": spell([Activation(name) for name in names]), "reset_after": reset_after}
    attrs |= {"x_order": x_order, "y_order": y_order}
    target = draw(st.sampled_from([HASWELL, widest() or HASWELL]))
    found = kernel_results(arrays, optional, replace(target, cores=draw(st.sampled_from([1, 2, 8]))), kind=cell, **attrs)
    agree(found, [part.astype(np.float32) for part in reference(*arrays, **optional, kind=cell, **attrs)])


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_tiles_of_a_gru_keep_their_intermediate_states_apart(direction):
    """Two rounds a step, and tiles of rows beside each other: they do not divide the batch, which Hypothesis came upon."""
    rng, directions = np.random.default_rng(31), 2 if direction == "bidirectional" else 1
    shapes = (3, 6, directions * 93), (directions, 31, 93), (directions, 6, 31)
    arrays = [(rng.standard_normal(shape) / 2).astype(np.float32) for shape in shapes]
    attrs = {"direction": direction, "activations": spell([Activation("sigmoid"), Activation("tanh")]), "reset_after": False}
    attrs |= {"x_order": "TB", "y_order": "TDBH"}
    for cores in (1, 2):
        found = kernel_results(arrays, {}, replace(HASWELL, cores=cores), kind="gru", **attrs)
        agree(found, [part.astype(np.float32) for part in reference(*arrays, kind="gru", **attrs)])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_large_state_is_shared_among_threads(cell):
    """Blocks of one step in parallel: a batch of one, and a step above the threshold."""
    rng, size = np.random.default_rng(0), 450
    arrays = [
        (rng.standard_normal(shape) / 20).astype(np.float32) for shape in ((3, 1, GATES[cell] * size), (1, size, GATES[cell] * size), (1, 1, size))
    ]
    optional = {"cell": arrays[2]} if cell == "lstm" else {}
    names = ["sigmoid", "tanh", "tanh"][: FUNCTIONS[cell]]
    attrs = {"kind": cell, "activations": spell([Activation(name) for name in names])}
    found = kernel_results(arrays, optional, replace(Target.parse("cpu"), cores=4), **attrs)
    agree(found, [part.astype(np.float32) for part in reference(*arrays, **optional, **attrs)])
