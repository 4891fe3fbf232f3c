"""ONNX control flow, against onnxruntime."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import tcompile
from onnx import TensorProto, helper, numpy_helper
from onnx_models import small
from tcompile.compiler.errors import TcompileError, UnsupportedModel
from tcompile.compiler.importers.onnx import import_onnx

RNG = np.random.default_rng(5)
node = helper.make_node
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def graph(nodes, inputs: dict, outputs: dict, constants: dict[str, np.ndarray] | None = None) -> onnx.GraphProto:
    """inputs, outputs: name -> element type, or (element type, dims); integers and booleans are scalars"""

    def infos(types):
        specs = {name: kind if isinstance(kind, tuple) else (kind, None if kind == FLOAT else []) for name, kind in types.items()}
        return [helper.make_tensor_value_info(name, *spec) for name, spec in specs.items()]

    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    return helper.make_graph(nodes, "inner", infos(inputs), infos(outputs), tensors)


def against_onnxruntime(model, *feeds: np.ndarray, tolerance: float = 1e-5):
    names = [info.name for info in model.graph.input]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, dict(zip(names, feeds, strict=True)))
    compiled = tcompile.compile(model)
    same(compiled, expected, *feeds, tolerance=tolerance)
    return compiled


def same(compiled, expected, *feeds: np.ndarray, tolerance: float = 1e-5) -> None:
    found = compiled(*feeds)
    for want, have in zip(expected, found if isinstance(found, tuple) else (found,), strict=True):
        assert have.dtype == want.dtype and have.shape == want.shape
        np.testing.assert_allclose(have, want, tolerance, 1e-6)


def accumulate(reads_weight: str = "w") -> onnx.GraphProto:
    """state * w + x -> state, and twice the state as what is collected"""
    nodes = [
        node("Mul", ["state", reads_weight], ["scaled"]),
        node("Add", ["scaled", "slice"], ["next"]),
        node("Add", ["next", "next"], ["twice"]),
    ]
    return graph(nodes, {"state": FLOAT, "slice": FLOAT}, {"next": FLOAT, "twice": FLOAT})


@pytest.mark.sweep
@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize(("axis", "out_axis"), [(0, 0), (1, -1), (-1, 1)])
def test_scan(axis, out_axis, backward):
    scan = node(
        "Scan", ["start", "x"], ["last", "all"], body=accumulate(), num_scan_inputs=1, scan_input_axes=[axis], scan_input_directions=[backward],
        scan_output_axes=[out_axis], scan_output_directions=[1 - backward],
    )  # fmt: skip
    x = floats(3, 5, 2)
    start = floats(*np.delete(x.shape, axis))
    model = small([scan], {"start": list(start.shape), "x": list(x.shape)}, ["last", "all"], {"w": np.float32(0.5)})
    against_onnxruntime(model, start, x)


def test_scan_of_opset_8():
    scan = node("Scan", ["", "start", "x"], ["last", "all"], body=accumulate(), num_scan_inputs=1, directions=[1])
    model = small([scan], {"start": [3, 2], "x": [3, 5, 2]}, ["last", "all"], {"w": np.float32(0.5)}, opset=8)
    against_onnxruntime(model, floats(3, 2), floats(3, 5, 2))


def counting(condition: str) -> onnx.GraphProto:
    """state + iteration, until `condition` (a name inside) says no"""
    nodes = [
        node("Cast", ["i"], ["step"], to=FLOAT),
        node("Add", ["state", "step"], ["next"]),
        node("Less", ["i", "limit"], ["go_on"]),
        node("Identity", [condition], ["again"]),
        node("Identity", ["next"], ["seen"]),
    ]
    return graph(nodes, {"i": INT64, "going": BOOL, "state": FLOAT}, {"again": BOOL, "next": FLOAT, "seen": (FLOAT, [3])}, {"limit": np.int64(3)})


@pytest.mark.parametrize(("trips", "condition"), [(5, "going"), (5, "go_on"), (2, "go_on"), (0, "going"), (None, "go_on")])
@pytest.mark.parametrize("first", [True, False, None])
def test_a_loop_known_at_import(trips, condition, first):
    if first is None and trips is None:
        pytest.skip("onnxruntime wants one of the two")
    loop = node("Loop", ["" if trips is None else "trips", "" if first is None else "first", "x"], ["last", "all"], body=counting(condition))
    model = small([loop], {"x": [3]}, ["last", "all"], {"trips": np.int64(trips or 0), "first": np.array(bool(first))})
    against_onnxruntime(model, floats(3))


def test_a_weight_that_only_an_inner_graph_reads():
    branch = graph([node("MatMul", ["x", "outer"], ["a"]), node("Add", ["a", "own"], ["b"])], {}, {"b": FLOAT}, {"own": floats(4)})
    other = graph([node("Neg", ["x"], ["c"])], {}, {"c": FLOAT})
    model = small(
        [node("If", ["yes"], ["y"], then_branch=branch, else_branch=other)], {"x": [3, 2]}, ["y"], {"yes": np.array(True), "outer": floats(2, 4)}
    )
    against_onnxruntime(model, floats(3, 2))


def test_a_name_with_two_meanings_is_refused():
    inner = graph([node("Neg", ["x"], ["b"])], {}, {"b": FLOAT}, {"w": floats(3)})
    inner.node.append(node("Add", ["b", "w"], ["c"]))
    inner.output[0].name = "c"
    model = small(
        [node("Add", ["x", "w"], ["z"]), node("If", ["yes"], ["y0"], then_branch=inner, else_branch=inner), node("Add", ["y0", "z"], ["y"])],
        {"x": [3]}, ["y"], {"yes": np.array(True), "w": floats(3)},
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="'w' has one meaning inside of a subgraph and another around it"):
        import_onnx(model)


def chosen(then, other, condition_of: str = "x"):
    """If the sum of `condition_of` is positive"""
    return [
        node("ReduceSum", [condition_of], ["total"], keepdims=0),
        node("Greater", ["total", "null"], ["positive"]),
        node("If", ["positive"], ["y0"], then_branch=then, else_branch=other),
        node("Mul", ["y0", "two"], ["y"]),
    ]


NUMBERS = {"null": np.float32(0), "two": np.float32(2)}


def test_a_branch_chosen_by_data():
    inner = graph([node("MatMul", ["x", "w"], ["deep"]), node("Add", ["deep", "own"], ["sum"])], {}, {"sum": FLOAT}, {"own": floats(5)})
    shallow = graph([node("MatMul", ["x", "w"], ["flat"]), node("Relu", ["flat"], ["cut"])], {}, {"cut": FLOAT})
    nested = graph(
        [
            node("ReduceMax", ["x"], ["most"], keepdims=0),
            node("Greater", ["most", "two"], ["large"]),
            node("If", ["large"], ["n"], then_branch=inner, else_branch=shallow),
        ],
        {},
        {"n": FLOAT},
    )
    plain = graph([node("MatMul", ["x", "w"], ["p"])], {}, {"p": FLOAT})
    model = small(chosen(nested, plain), {"x": ["n", 3]}, ["y"], {**NUMBERS, "w": floats(3, 5)})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = tcompile.compile(model)
    for x in (floats(4, 3), abs(floats(1, 3)), 9 + floats(7, 3), -abs(floats(2, 3))):
        same(compiled, session.run(None, {"x": x}), x)


def test_branches_of_different_shapes():
    wide = graph([node("Concat", ["x", "x"], ["c"], axis=0)], {}, {"c": FLOAT})
    other = graph([node("Identity", ["x"], ["same"])], {}, {"same": FLOAT})
    model = small(chosen(wide, other), {"x": ["n", 3]}, ["y"], NUMBERS)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = tcompile.compile(model)
    for x in (abs(floats(4, 3)), -abs(floats(4, 3))):
        same(compiled, session.run(None, {"x": x}), x)


def test_a_branch_that_needs_only_a_size():
    sizes = graph([node("Shape", ["x"], ["s"]), node("Cast", ["s"], ["f"], to=FLOAT)], {}, {"f": FLOAT})
    other = graph([node("Identity", ["pair"], ["same"])], {}, {"same": FLOAT})
    model = small(chosen(sizes, other, "flag"), {"flag": [1], "x": ["n", 3]}, ["y"], {**NUMBERS, "pair": floats(2)})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = tcompile.compile(model)
    for flag in (1, -1):
        feeds = np.full(1, flag, np.float32), floats(5, 3)
        same(compiled, session.run(None, dict(zip(("flag", "x"), feeds, strict=True))), *feeds)


def test_branches_of_different_ranks_are_refused():
    other = graph([node("ReduceSum", ["x"], ["r"], keepdims=0)], {}, {"r": FLOAT})
    model = small(chosen(graph([node("Neg", ["x"], ["m"])], {}, {"m": FLOAT}), other), {"x": [2, 3]}, ["y"], NUMBERS)
    with pytest.raises(UnsupportedModel, match="its branches give float32 of rank 2 and float32 of rank 0"):
        import_onnx(model)


def dynamic_loop(body: onnx.GraphProto, opset: int = 18) -> onnx.ModelProto:
    loop = node("Loop", ["trips", "first", "x"], ["last", "all"], body=body)
    return small([loop], {"trips": ([], INT64), "first": ([], BOOL), "x": [3]}, ["last", "all"], opset=opset)


def test_a_loop_with_trips_and_condition_from_data():
    model = dynamic_loop(counting("go_on"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = tcompile.compile(model)
    x = floats(3)
    for trips, first in ((5, True), (2, True), (0, True), (5, False), (1, True)):
        feeds = (np.array(trips, np.int64), np.array(first), x)
        same(compiled, session.run(None, dict(zip(("trips", "first", "x"), feeds, strict=True))), *feeds)


def test_a_growing_tensor_and_weights_in_the_body(tmp_path):
    nodes = [
        node("MatMul", ["grown", "w"], ["product"]),
        node("Tanh", ["product"], ["seen_rows"]),
        node("ReduceMean", ["seen_rows"], ["row"], axes=[0], keepdims=1),
        node("Concat", ["grown", "row"], ["longer"], axis=0),
        node("ReduceSum", ["longer"], ["seen"], keepdims=0),
        node("Identity", ["going"], ["again"]),
    ]
    body = graph(nodes, {"i": INT64, "going": BOOL, "grown": FLOAT}, {"again": BOOL, "longer": FLOAT, "seen": (FLOAT, [])})
    loop = node("Loop", ["trips", "", "x"], ["last", "all"], body=body)
    model = small([loop, node("Abs", ["last"], ["y"])], {"trips": ([], INT64), "x": ["n", 4]}, ["y", "all"], {"w": floats(4, 4)}, opset=17)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = tcompile.compile(model)
    loaded = tcompile.load(compiled.save(tmp_path / "grown.tcm"))
    for trips, rows in ((7, 2), (0, 3), (1, 1)):
        feeds = np.array(trips, np.int64), floats(rows, 4)
        expected = session.run(None, dict(zip(("trips", "x"), feeds, strict=True)))
        same(compiled, expected, *feeds)
        same(loaded, expected, *feeds)
    call = "import sys, numpy as np, tcompile; print(tcompile.load(sys.argv[1])(np.array(3, np.int64), np.ones((2, 4), np.float32))[0].sum())"
    fresh = subprocess.run([sys.executable, "-c", call, str(tmp_path / "grown.tcm")], capture_output=True, text=True, check=True)
    assert float(fresh.stdout) == pytest.approx(float(compiled(np.array(3, np.int64), np.ones((2, 4), np.float32))[0].sum()), rel=1e-5)


def test_thousands_of_iterations_and_threads_at_once():
    model = dynamic_loop(counting("going"))
    compiled = tcompile.compile(model)
    feeds = np.array(5000, np.int64), np.array(True), np.zeros(3, np.float32)
    last, everything = compiled(*feeds)
    assert everything.shape == (5000, 3) and (last == 5000 * 4999 / 2).all() and (everything[-1] == last).all()
    with ThreadPoolExecutor(4) as pool:
        for trips, (last, everything) in zip(range(8), pool.map(lambda n: compiled(np.array(n, np.int64), *feeds[1:]), range(8)), strict=True):
            assert everything.shape == (trips, 3) and (last == trips * (trips - 1) / 2).all()


@pytest.mark.parametrize("backward", [0, 1])
def test_a_scan_of_a_length_known_at_run_time(backward):
    scan = node(
        "Scan", ["start", "x"], ["last", "all"], body=accumulate(), num_scan_inputs=1, scan_input_axes=[1], scan_input_directions=[backward],
        scan_output_axes=[1], scan_output_directions=[1 - backward],
    )  # fmt: skip
    model = small([scan], {"start": [3, 2], "x": [3, "n", 2]}, ["last", "all"], {"w": np.float32(0.5)})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = tcompile.compile(model)
    for length in (1, 5):
        feeds = floats(3, 2), floats(3, length, 2)
        same(compiled, session.run(None, dict(zip(("start", "x"), feeds, strict=True))), *feeds)


def test_an_error_inside_of_a_loop_names_the_node():
    body = graph(
        [node("Gather", ["state", "i"], ["one"]), node("Add", ["state", "one"], ["next"]), node("Identity", ["going"], ["again"])],
        {"i": INT64, "going": BOOL, "state": FLOAT},
        {"again": BOOL, "next": FLOAT},
    )
    body.node[0].name = "picker"
    model = small([node("Loop", ["trips", "", "x"], ["y"], body=body)], {"trips": ([], INT64), "x": [3]}, ["y"])
    compiled = tcompile.compile(model)
    compiled(np.array(3, np.int64), floats(3))
    with pytest.raises(TcompileError, match=r"node 'picker'.*an index lies outside"):
        compiled(np.array(4, np.int64), floats(3))


def test_a_loop_can_be_interrupted(tmp_path):
    """At any moment, the exception of the caller's own handler, time after time; a handler that returns stops nothing."""
    tcompile.compile(dynamic_loop(counting("going"))).save(tmp_path / "loop.tcm")
    code = """
        import random, signal, threading
        import numpy as np, tcompile

        class Enough(BaseException): pass
        def stop(*_): raise Enough
        def send(number, seconds):
            timer = threading.Timer(seconds, signal.raise_signal, [number])
            timer.start()
            return timer

        seen = []
        loop = tcompile.load("loop.tcm")
        feeds = np.array(1 << 40), np.array(True), np.zeros(3, np.float32)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored, and so do its children
        signal.signal(signal.SIGUSR1, stop)
        signal.signal(signal.SIGUSR2, lambda *_: seen.append(True))
        for count in range(60):
            quiet = send(signal.SIGUSR2, random.random() * 0.01)
            try:
                timer = send(signal.SIGINT if count % 2 else signal.SIGUSR1, 0.01 + random.random() * 0.03)
                loop(*feeds)
            except KeyboardInterrupt:
                assert count % 2
            except Enough:
                assert not count % 2
            quiet.join()
        assert len(seen) == 60 and signal.getsignal(signal.SIGUSR1) is stop
        assert loop(np.array(2), *feeds[1:])[1].shape == (2, 3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]


def test_an_interruption_while_handlers_change_leaves_the_callers_own(monkeypatch):
    """Whichever change of a handler a signal meets, before the model runs or behind it."""
    from tcompile.compiler.tvm_control import _Signals

    change = signal.signal
    own = {number: change(number, lambda *_: None) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        before = {number: signal.getsignal(number) for number in signal.valid_signals()}
        changes = 2 * sum(map(callable, before.values()))
        for meets in range(1, changes + 1):
            count = iter(range(1, 1000))

            def interrupted(number, handler, count=count, meets=meets):
                change(number, handler)
                if next(count) == meets:
                    raise KeyboardInterrupt

            monkeypatch.setattr(signal, "signal", interrupted)
            with pytest.raises(KeyboardInterrupt), _Signals():
                pass
            assert {number: signal.getsignal(number) for number in before} == before
    finally:
        monkeypatch.setattr(signal, "signal", change)
        for number, handler in own.items():
            change(number, handler)


def test_other_targets_refuse():
    with pytest.raises(UnsupportedModel, match="control flow that is decided while the model runs is for CPUs"):
        tcompile.compile(dynamic_loop(counting("going")), target="cuda:sm_90a")
