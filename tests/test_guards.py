"""What bad data would do at run time: read out of bounds, trap, hang. It raises instead, names the node, and leaves the model usable."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tcompile
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tcompile.compiler.api import import_model
from tcompile.passes.base import PassContext
from tcompile.passes.canonicalize import Canonicalize
from tcompile.targets.base import Target
from tcompile.targets.cpu.guards import guard

onnxruntime = pytest.importorskip("onnxruntime")

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.uint8): TensorProto.UINT8,
}


def one_node(op: str, feeds: dict[str, np.ndarray], constants: dict[str, np.ndarray] | None = None, shapes=None, **attributes) -> ModelProto:
    """A model of one node named `<op> node` whose inputs are `feeds` and then `constants`; shapes: input -> shape, where not that of its feed."""
    constants = constants or {}
    node = helper.make_node(op, [*feeds, *constants], ["y"], name=f"{op} node", **attributes)
    inputs = [helper.make_tensor_value_info(name, TYPES[value.dtype], (shapes or {}).get(name, value.shape)) for name, value in feeds.items()]
    out = next(iter((feeds | constants).values())).dtype
    graph = helper.make_graph(
        [node], "one", inputs, [helper.make_tensor_value_info("y", TYPES[out], None)], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def ints(*values, dtype="int64"):
    return np.array(values, dtype)


DATA = np.arange(24, dtype="float32").reshape(4, 6)
ONES = np.ones((2, 6), "float32")
#: operator, good inputs, the same with bad values, attributes
CASES = [
    ("Gather", {"d": DATA, "i": ints(0, -1, 3, -4)}, [{"i": ints(0, 0, 0, 4)}, {"i": ints(-5, 0, 0, 0)}, {"i": ints(0, 2**62, 0, 0)}], {}),
    (
        "Gather",
        {"d": DATA, "i": ints(0, -6, dtype="int32")},
        [{"i": ints(0, 6, dtype="int32")}, {"i": ints(-(2**31), 0, dtype="int32")}],
        {"axis": 1},
    ),
    ("Gather", {"d": DATA, "i": np.array(2)}, [{"i": np.array(4)}], {}),
    ("GatherElements", {"d": DATA, "i": ints([0, -1, 3], [1, -4, 2])}, [{"i": ints([0, -1, 4], [1, 2, 2])}], {"axis": 0}),
    (
        "GatherND",
        {"d": DATA, "i": ints([0, -1], [-4, 5])},
        [{"i": ints([0, 6], [0, 0])}, {"i": ints([4, 0], [0, 0])}, {"i": ints([0, -7], [0, 0])}],
        {},
    ),
    ("GatherND", {"d": DATA, "i": ints([0], [-1], [1], [5])}, [{"i": ints([0], [6], [0], [0])}], {"batch_dims": 1}),
    ("ScatterElements", {"d": DATA, "i": ints([0, -1], [1, 5]), "u": ONES[:, :2].copy()}, [{"i": ints([0, 6], [0, 0])}], {"axis": 1}),
    ("ScatterND", {"d": DATA, "i": ints([0], [-1]), "u": ONES}, [{"i": ints([0], [4])}, {"i": ints([-5], [0])}], {}),
    (
        "ReverseSequence",
        {"d": DATA, "n": ints(4, 1, 2, 3, 1, 4)},
        [{"n": ints(5, 1, 1, 1, 1, 1)}, {"n": ints(-1, 1, 1, 1, 1, 1)}],
        {"time_axis": 0, "batch_axis": 1},
    ),
    ("Div", {"a": ints(7, -7, 5), "b": ints(-2, 2, -1)}, [{"b": ints(1, 0, 1)}], {}),
    ("Div", {"a": ints(7, 8, dtype="uint8"), "b": ints(2, 3, dtype="uint8")}, [{"b": ints(1, 0, dtype="uint8")}], {}),
    ("Mod", {"a": ints(7, -7, 5, dtype="int32"), "b": ints(-2, 2, -1, dtype="int32")}, [{"b": ints(1, 1, 0, dtype="int32")}], {}),
    ("Mod", {"a": ints(7, -7, 5), "b": ints(-2, 2, -1)}, [{"b": ints(1, 1, 0)}], {"fmod": 1}),
]


@pytest.mark.parametrize(("op", "feeds", "bad", "attributes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_raises_and_stays_usable(op, feeds, bad, attributes):
    proto = one_node(op, feeds, **attributes)
    model = tcompile.compile(proto)
    (want,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)
    for wrong in bad:
        np.testing.assert_array_equal(model(**feeds), want)
        with pytest.raises(tcompile.TcompileError, match=f"while running: node '{op} node'"):
            model(**(feeds | wrong))
    np.testing.assert_array_equal(model(**feeds), want)


@pytest.mark.parametrize("value", [-(2**31), -(2**63)])
def test_the_lowest_integer_by_minus_one(value):
    """The division instruction traps on it, and takes onnxruntime with it."""
    dtype = "int32" if value == -(2**31) else "int64"
    feeds = {"a": ints(value, value, 9, dtype=dtype), "b": ints(-1, 1, -1, dtype=dtype)}
    np.testing.assert_array_equal(tcompile.compile(one_node("Mod", feeds))(**feeds), [0, 0, 0])
    np.testing.assert_array_equal(tcompile.compile(one_node("Div", feeds))(**feeds), ints(value, value, -9, dtype=dtype))


def test_torch_operators():
    import torch

    class Indexing(torch.nn.Module):
        def forward(self, x, i, d):
            return x[i, i], torch.floor_divide(i, d), torch.remainder(i, d), x.gather(1, i[:, None])

    x, i, d = torch.arange(20.0).reshape(4, 5), torch.tensor([0, 3, 1, 2]), torch.tensor([2, -3, -1, 4])
    model = tcompile.compile(Indexing().eval(), example_inputs=(x, i, d))
    for ours, want in zip(model(x, i, d), Indexing()(x, i, d), strict=True):
        assert torch.equal(ours, want)
    for bad in ((x, i + 1, d), (x, i - 9, d), (x, i, d * 0)):
        with pytest.raises(tcompile.TcompileError, match="while running: node"):
            model(*bad)
    lowest = torch.full((4,), -(2**63))
    (quotient,) = (tcompile.compile(_Quotient().eval(), example_inputs=(i, d))(lowest, torch.tensor([-1, -1, 1, 2])),)
    assert quotient.tolist() == [-(2**63), -(2**63), -(2**63), -(2**62)]


def _Quotient():
    import torch

    class Quotient(torch.nn.Module):
        def forward(self, a, b):
            return torch.floor_divide(a, b)

    return Quotient()


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_dynamic_sizes(rows):
    feeds = {"d": np.arange(rows * 6, dtype="float32").reshape(rows, 6), "i": ints(0, -1, rows - 1, -rows)}
    for op, indices in (("Gather", feeds["i"]), ("GatherND", feeds["i"][:, None]), ("GatherElements", np.tile(feeds["i"][:, None], 6))):
        proto = one_node(op, feeds | {"i": indices}, shapes={"d": ["n", 6], "i": ["m", *indices.shape[1:]]})
        model = tcompile.compile(proto)
        (want,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds | {"i": indices})
        np.testing.assert_array_equal(model(feeds["d"], indices), want)
        for wrong in (indices + rows, indices - 2 * rows):
            with pytest.raises(tcompile.TcompileError, match="outside of its dim"):
                model(feeds["d"], wrong)


def test_what_is_known_to_be_right_is_not_checked():
    for op, feeds, constants in (
        ("Gather", {"d": DATA}, {"i": ints(0, -1)}),
        ("ScatterND", {"d": DATA}, {"i": ints([0], [1]), "u": ONES}),
        ("Div", {"a": ints(4, 5)}, {"b": ints(2, -3)}),
        ("Div", {"a": DATA}, {"b": DATA}),
    ):
        context = PassContext(Target.parse("cpu:haswell"))
        program = Canonicalize().run(import_model(one_node(op, feeds, constants)), context)
        context.report.matches.clear()
        assert guard(program, context) is program and context.report.matches == {}


def test_one_check_serves_readers_of_the_same_indices():
    nodes = [helper.make_node("Gather", [table, "i"], [f"y_{table}"]) for table in ("s", "t", "u")]
    tables = [numpy_helper.from_array(np.zeros((size, 3), "float32"), name) for name, size in (("s", 5), ("t", 5), ("u", 7))]
    outputs = [helper.make_tensor_value_info(f"y_{table}", TensorProto.FLOAT, [2, 3]) for table in ("s", "t", "u")]
    graph = helper.make_graph(nodes, "three", [helper.make_tensor_value_info("i", TensorProto.INT64, [2])], outputs, tables)
    program = import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    context = PassContext(Target.parse("cpu:haswell"))
    guard(program, context)
    assert context.report.matches == {"take": 2}


def test_hostile_node_names_and_threads(tmp_path):
    """In a process of its own with several workers: nothing but an exception comes out, in every thread."""
    feeds = {"d": DATA, "i": ints(0, 1)}
    proto = one_node("Gather", feeds)
    proto.graph.node[0].name = "a\n'b' %s {} \\ \"c\" é"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    code = f"""
        import threading, numpy as np, tcompile
        model = tcompile.compile({str(tmp_path / "m.onnx")!r})
        data = np.arange(24, dtype="float32").reshape(4, 6)
        messages, wrong = [], []
        def work(seed):
            for turn in range(200):
                bad = (turn + seed) % 2
                try:
                    y = model(data, np.array([0, 4 if bad else 3]))
                    wrong.append(bad or not (y[1] == data[3]).all())
                except tcompile.TcompileError as error:
                    wrong.append(not bad)
                    messages.append(str(error))
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
        print(len(messages), sum(wrong), *set(messages))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.startswith("400 0 ") and "a?'b' %s {}" in done.stdout, done.stderr
