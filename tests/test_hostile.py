"""Files made to break the importer: each ends as a refusal with one clear message, or compiles, and neither memory nor time runs away."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_models
import pytest
import tcompile
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper
from tcompile.compiler.api import import_model
from tcompile.compiler.importers.onnx.ops import control

small = onnx_models.small


def node(op: str, inputs: list[str], outputs: list[str], **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=f"{op} node", **attributes)


def refused(model, *words: str) -> None:
    """As a file and in memory alike."""
    with pytest.raises(tcompile.UnsupportedModel) as caught:
        import_model(model)
    text = str(caught.value)
    assert all(word in text for word in words), text


def relu() -> ModelProto:
    return small([node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"])


def stored(**fields) -> ModelProto:
    """x + a stored tensor with these fields."""
    model = small([node("Add", ["x", "w"], ["y"])], {"x": [2]}, ["y"])
    model.graph.initializer.add(name="w", **({"data_type": TensorProto.FLOAT, "dims": [2]} | fields))
    return model


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"raw_data": b"\0" * 7}, "malformed"),
        ({"raw_data": b"\0" * 12}, "malformed"),
        ({"float_data": [1.0]}, "malformed"),
        ({}, "malformed"),
        ({"dims": [1 << 60]}, "at most"),
        ({"dims": [1 << 32, 1 << 32]}, "at most"),
        ({"dims": [-1], "float_data": [1.0, 2.0]}, "cannot exist"),
        ({"dims": [2, -1], "float_data": [1.0, 2.0]}, "cannot exist"),
        ({"data_type": 99, "raw_data": b"\0" * 8}, "element type 99"),
        ({"data_type": 0, "raw_data": b"\0" * 8}, "element type"),
        ({"data_type": TensorProto.STRING, "string_data": [b"a", b"b"]}, "STRING"),
    ],
)
def test_stored_tensors(fields, word):
    refused(stored(**fields), "w", word)


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "-4"},
        {"offset": "4"},
        {"offset": str(1 << 62)},
        {"offset": "x"},
        {"length": "4"},
        {"length": "-8"},
        {"length": str(1 << 62)},
        {"location": ""},
        {"location": "."},
        {"location": "hard.bin"},
        {"location": "folder"},
        {"location": "a/../../x.bin"},
        {"location": "C:\\x.bin"},
        {"location": "linked/x.bin"},
        {"dims": [1 << 32, 1 << 32]},
        {"dims": [1 << 30]},
    ],
    ids=str,
)
def test_external_data(tmp_path, entries):
    (tmp_path / "x.bin").write_bytes(b"\0" * 8)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.bin").write_bytes(b"\0" * 8)
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "original.bin").write_bytes(b"\0" * 8)
    os.link(tmp_path / "original.bin", tmp_path / "hard.bin")
    entries = {"location": "x.bin"} | entries
    model = stored(data_location=TensorProto.EXTERNAL, dims=entries.pop("dims", [2]))
    for key, value in entries.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    onnx.save(model, tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "'w'")


def test_external_data_as_it_should_be(tmp_path):
    (tmp_path / "x.bin").write_bytes(np.array([0, 3, 4], "float32").tobytes())
    model = stored(data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "x.bin", "offset": "4", "length": "8"}.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    onnx.save(model, tmp_path / "model.onnx")
    np.testing.assert_array_equal(tcompile.compile(tmp_path / "model.onnx")(x=np.array([1, 1], "float32")), [4, 5])


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ConstantOfShape", ["huge"], ["y"])],
        [node("Expand", ["one", "huge"], ["y"])],
        [node("Tile", ["one", "huge"], ["y"])],
        [node("Range", ["zero", "far", "step"], ["y"])],
        [node("ConstantOfShape", ["negative"], ["y"])],
        [node("Pad", ["one", "pads"], ["y"])],
        [node("OneHot", ["zero", "far", "values"], ["y"])],
        [node("Reshape", ["one", "huge"], ["y"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_sizes_are_bounded_before_anything_is_allocated(nodes):
    constants = {
        "huge": np.array([1 << 40, 1 << 20]),
        "one": np.ones((1, 1), "int64"),
        "zero": np.array(0),
        "far": np.array(1 << 60),
        "step": np.array(1),
        "negative": np.array([3, -2]),
        "pads": np.array([0, 0, 1 << 50, 1 << 20]),
        "values": np.array([0, 1]),
    }
    refused(small(nodes, {}, [("y", TensorProto.INT64)], constants), nodes[0].op_type)


def test_shapes_computed_at_run_time_have_few_dims():
    """Not as many dims as a data tensor has elements."""
    model = small([node("Reshape", ["x", "s"], ["y"])], {"x": [6], "s": ([200, 500], TensorProto.INT64)}, ["y"])
    refused(model, "100000 sizes")


def test_graphs_that_are_none():
    def graph(*nodes, outputs=("y",)):
        return small(nodes, {"x": [2]}, list(outputs))

    refused(graph(node("Add", ["x", "y"], ["y"])), "cycle")
    refused(graph(node("Relu", ["b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["a"], ["y"])), "cycle")
    refused(graph(node("Relu", ["nobody"], ["y"])), "'nobody'", "not defined")
    refused(graph(node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])), "defined already")
    refused(graph(node("Relu", ["x"], ["x"])), "defined already")
    refused(graph(node("Relu", ["x"], ["y"]), outputs=("y", "z")), "'z'")
    refused(graph(node("Relu", [""], ["y"])), "missing")
    refused(graph(node("Relu", ["x", "x"], ["y"])), "2 inputs")
    refused(graph(node("Add", ["x"], ["y"])), "1 input")
    refused(graph(node("", ["x"], ["y"])), "no such operator")
    refused(graph(node("Relu", ["x"], ["y", "z"])), "2 outputs")
    for field, word in (("input", "graph input"), ("initializer", "initializer")):
        model = small([node("Add", ["x", "w"], ["y"])], {"x": [2]}, ["y"], {"w": np.ones(2, "float32")})
        getattr(model.graph, field).add().CopyFrom(getattr(model.graph, field)[0])
        refused(model, word, "defined already")


def test_attributes_of_the_wrong_kind():
    refused(small([node("Softmax", ["x"], ["y"], axis="1")], {"x": [2]}, ["y"]), "axis", "STRING instead of INT")
    refused(small([node("Einsum", ["x"], ["y"])], {"x": [2]}, ["y"]), "equation", "missing")
    refused(small([node("Relu", ["x"], ["y"], colour=1)], {"x": [2]}, ["y"]), "colour")
    model = small([node("Softmax", ["x"], ["y"], axis=0)], {"x": [2]}, ["y"])
    for kind in (0, AttributeProto.GRAPH, AttributeProto.TENSOR):
        model.graph.node[0].attribute[0].type = kind
        refused(model, "axis")


@pytest.mark.parametrize("dims", [[-5], [1 << 62], [1 << 40, 1 << 40], ["a" * 3000], ["main"], ["1;2"], ["é"]], ids=str)
def test_odd_dims_of_inputs(dims):
    model = small([node("Relu", ["x"], ["y"])], {"x": dims}, ["y"])
    if isinstance(dims[0], str) or dims[0] < 0:
        import_model(model)  # a symbol under whatever name; negative dims mean "unknown" to exporters
    else:
        refused(model, "'x'")


def test_declared_shapes_that_lie_do_not_count():
    model = relu()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [7, 7]))
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.INT64, [1 << 60]))
    np.testing.assert_array_equal(tcompile.compile(model)(x=np.array([-1, 2], "float32")), [0, 2])


def recursive(*bodies: list[onnx.NodeProto], call: str = "f0") -> ModelProto:
    model = small([helper.make_node(call, ["x"], ["y"], domain="local")], {"x": [2]}, ["y"])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    model.opset_import.append(imports[1])
    model.functions.extend(helper.make_function("local", f"f{at}", ["a"], ["b"], nodes, imports) for at, nodes in enumerate(bodies))
    return model


def call(function: str, source: str = "a", result: str = "b") -> onnx.NodeProto:
    return helper.make_node(function, [source], [result], domain="local")


def test_recursive_functions():
    refused(recursive([call("f0")]), "'f0'", "calls itself")
    refused(recursive([call("f1")], [call("f2")], [call("f0")]), "calls itself")


def test_functions_that_double_at_every_level():
    """Thirty small functions, a thousand million nodes."""
    bodies = [[call(f"f{level + 1}", "a", "m"), call(f"f{level + 1}", "m", "b")] for level in range(30)]
    refused(recursive(*bodies, [helper.make_node("Relu", ["a"], ["b"])]), "nodes", "inlined")


def test_functions_that_multiply_bytes():
    """A constant of a megabyte, four thousand times."""
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.zeros(1 << 18, "float32")))
    last = [constant, helper.make_node("Shape", ["w"], ["s"]), helper.make_node("Reshape", ["a", "s"], ["b"])]
    bodies = [[call(f"f{level + 1}", "a", "m"), call(f"f{level + 1}", "m", "b")] for level in range(12)]
    refused(recursive(*bodies, last), "bytes", "inlined")


def nested(levels: int) -> ModelProto:
    """Branches inside of branches, the innermost of which computes y."""
    model = small([], {"x": [2]}, ["y"], {"c": np.array(True)})
    graph = model.graph
    for _ in range(levels):
        fresh = graph.node.add(op_type="If", name="If node", input=["c"], output=["y"])
        graph.output.add(name="y") if graph is not model.graph else None
        fresh.attribute.add(name="else_branch", type=AttributeProto.GRAPH).g.CopyFrom(relu().graph)
        fresh.attribute[0].g.ClearField("input")
        graph = fresh.attribute.add(name="then_branch", type=AttributeProto.GRAPH).g
    graph.node.add(op_type="Relu", input=["x"], output=["y"])
    graph.output.add(name="y")
    return model


def test_nested_branches(tmp_path):
    """As deep as protobuf reads a file, deeper in memory, and deeper in a file."""
    import_model(nested(25))
    refused(nested(200), "deep")
    content = b""
    for _ in range(200):
        for tag in (0x32, 0x2A, 0x0A):  # AttributeProto.g of NodeProto.attribute of GraphProto.node
            length, size = len(content), b""
            while length > 127:
                size, length = size + bytes([length & 127 | 128]), length >> 7
            content = bytes([tag]) + size + bytes([length]) + content
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + content)
    refused(tmp_path / "deep.onnx", "cannot be parsed")


def test_functions_and_branches_inside_of_one_another():
    """Each level is allowed, all of them together are not."""

    def level(at: int, branches: int) -> list[onnx.NodeProto]:
        inner = call(f"f{at + 1}", "a", "r0")
        for depth in range(branches):
            then = helper.make_graph([inner], "then", [], [helper.make_empty_tensor_value_info(f"r{depth}")])
            other = helper.make_graph([helper.make_node("Neg", ["a"], ["n"])], "else", [], [helper.make_empty_tensor_value_info("n")])
            inner = helper.make_node("If", ["c"], [f"r{depth + 1}"], then_branch=then, else_branch=other)
        truth = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
        return [truth, inner, helper.make_node("Identity", [f"r{branches}"], ["b"])]

    def model(levels: int, branches: int) -> ModelProto:
        return recursive(*(level(at, branches) for at in range(levels)), [helper.make_node("Relu", ["a"], ["b"])])

    import_model(model(3, 2))
    refused(model(90, 1), "functions cannot be replaced")
    refused(model(90, 20), "functions cannot be replaced")
    refused(recursive(*([call(f"f{at + 1}")] for at in range(1000)), [helper.make_node("Relu", ["a"], ["b"])]), "functions cannot be replaced")


def loops(levels: int, operator: onnx.NodeProto, trips: int | None = None) -> ModelProto:
    """Loops inside of loops, the innermost of which applies `operator` to s and gives r. trips: of each; None where it is input n."""

    def graph(level: int) -> onnx.GraphProto:
        source, result = ("s", "r") if level == levels else (f"s{level}", f"r{level}")
        names = [(f"i{level}", TensorProto.INT64, []), (f"c{level}", TensorProto.BOOL, []), (source, TensorProto.FLOAT, None)]
        inner = operator if level == levels else loop(level + 1, source, result)
        keep = helper.make_node("Identity", [f"c{level}"], [f"k{level}"])
        outputs = [helper.make_tensor_value_info(f"k{level}", TensorProto.BOOL, []), helper.make_tensor_value_info(result, TensorProto.FLOAT, None)]
        return helper.make_graph([inner, keep], "body", [helper.make_tensor_value_info(*name) for name in names], outputs)

    def loop(level: int, source: str, result: str) -> onnx.NodeProto:
        return helper.make_node("Loop", ["n", "", source], [result], name=f"loop {level}", body=graph(level))

    inputs = {"x": [2]} | ({} if trips else {"n": ([], TensorProto.INT64)})
    return small([loop(1, "x", "y")], inputs, ["y"], {"n": np.array(trips)} if trips else {})


def test_nested_loops(monkeypatch):
    """Trips multiply, and a loop whose tensors grow is walked anew: the work does neither."""
    negate, double = helper.make_node("Neg", ["s"], ["r"]), helper.make_node("Concat", ["s", "s"], ["r"], axis=0)
    x = np.array([1, 2], "float32")
    assert len(import_model(loops(6, negate, trips=10)).main.body.blocks[0].bindings) < 10_000
    monkeypatch.setattr(control, "UNROLL_LIMIT_OF_ALL", 20)  # the outer one is unrolled, the inner ones are not
    np.testing.assert_array_equal(tcompile.compile(loops(3, negate, trips=3))(x=x), -x)
    np.testing.assert_array_equal(tcompile.compile(loops(2, double))(x=x, n=np.array(2)), np.tile(x, 16))
    assert len(import_model(loops(20, double)).module.functions) == 21


def test_ranges_that_follow_from_the_model():
    """`min(n, limit)` met with n: a bound where n is a dim of an input, a check where it is computed. Every bound costs a walk."""

    def clipped(source: str, *limits: int) -> list[onnx.NodeProto]:
        parts = [helper.make_node("Slice", [source, "zero", f"limit{at}", "zero"], [f"part{at}"]) for at in range(len(limits))]
        sums = [helper.make_node("Add", [f"part{at}", source], [f"sum{at}"]) for at in range(len(limits))]
        first, *rest = (f"sum{at}" for at in range(len(limits)))
        totals = [f"total{at}" for at in range(len(rest) - 1)] + ["y"]
        adds = [helper.make_node("Add", [left, right], [out]) for left, right, out in zip([first, *totals], rest, totals, strict=False)]
        return [*parts, *sums, *(adds or [helper.make_node("Identity", [first], ["y"])])]

    def constants(*limits: int) -> dict[str, np.ndarray]:
        return {"zero": np.array([0])} | {f"limit{at}": np.array([limit]) for at, limit in enumerate(limits)}

    limits = range(891, 901)
    assert (
        import_model(small(clipped("x", *limits), {"x": ["N"]}, ["y"], constants(*limits))).dims["N"].max == 891
    )  # learned from the last to the first
    limits = range(801, 901)
    endless = small(clipped("x", *limits), {"x": ["N"]}, ["y"], constants(*limits))
    refused(endless, "'N'", "--shape")
    import_model(endless, shapes={"x": "1..8..700"})
    computed = [helper.make_node("NonZero", ["x"], ["places"]), helper.make_node("Squeeze", ["places", "zero"], ["row"]), *clipped("row", 5)]
    compiled = tcompile.compile(small(computed, {"x": ["N"]}, [("y", TensorProto.INT64)], constants(5)))
    np.testing.assert_array_equal(compiled(x=np.array([1, 0, 1], "float32")), [0, 4])
    with pytest.raises(tcompile.TcompileError, match="dim 0"):
        compiled(x=np.ones(6, "float32"))


def test_operands_of_types_that_do_not_go_together():
    """What an operator calls by one type is of one type; a truth value is no number to clip."""
    compare = node("Equal", ["x", "x"], ["same"])
    refused(small([compare, node("Clip", ["same", "x"], ["y"])], {"x": []}, ["y"]), "Clip", "bool and float32")
    refused(small([compare, node("Add", ["x", "same"], ["y"])], {"x": [2]}, ["y"]), "Add", "float32 and bool")
    refused(small([node("Concat", ["x", "i"], ["y"], axis=0)], {"x": [2], "i": ([2], TensorProto.INT64)}, ["y"]), "Concat", "float32 and int64")
    refused(small([node("Where", ["same", "x", "n"], ["y"]), compare], {"x": [2]}, ["y"], {"n": np.array(1)}), "Where", "float32 and int64")
    import_model(small([node("Gather", ["x", "i"], ["y"])], {"x": [2], "i": ([2], TensorProto.INT64)}, ["y"]))


def test_types_that_an_operator_does_not_have():
    refused(small([node("LRN", ["x"], ["y"], size=3)], {"x": ([1, 5, 2, 2], TensorProto.INT8)}, ["y"]), "LRN", "int8")
    refused(small([node("Not", ["x"], ["y"])], {"x": [2]}, ["y"]), "Not", "float32")


@pytest.mark.parametrize(
    "attributes", [{"kernel_shape": [2, -1]}, {"kernel_shape": [2, 0]}, {"strides": [0, 1]}, {"strides": [1, -1]}, {"dilations": [0, 1]}], ids=str
)
def test_windows_of_no_extent(attributes):
    pool = node("AveragePool", ["x"], ["y"], **({"kernel_shape": [2, 2]} | attributes))
    refused(small([pool], {"x": [1, 2, 5, 5]}, ["y"], opset=22), "AveragePool node", next(iter(attributes)))


def test_a_region_of_two_dims():
    crop = node("Resize", ["x", "roi", "", "sizes"], ["y"], coordinate_transformation_mode="tf_crop_and_resize", mode="linear", axes=[3, 2])
    refused(small([crop], {"x": [1, 1, 4, 4], "roi": [4, 1]}, ["y"], {"sizes": np.array([3, 3])}), "Resize", "2 dims")


def test_counts_are_bounded():
    refused(small([node("Relu", ["x"], ["y"])], {"x": [1] * 65}, ["y"]), "65 dims")
    refused(small([node("Unsqueeze", ["x", "axes"], ["y"])], {"x": [2]}, ["y"], {"axes": np.arange(64)}), "65 dims")
    refused(small([node("Concat", ["x"] * 5000, ["y"], axis=0)], {"x": [2]}, ["y"]), "5000 inputs")
    parts = [f"part{at}" for at in range(5000)]
    refused(small([node("Split", ["x"], parts, axis=0, num_outputs=5000), node("Relu", [parts[0]], ["y"])], {"x": [5000]}, ["y"]), "5000 outputs")


@pytest.mark.parametrize("start", [[], [node("Gather", ["shape", "first"], ["n"]), node("ReduceSum", ["shape"], ["sum"])]], ids=["power", "sums"])
def test_sizes_are_short_expressions(start):
    """n * n, squared seventy times; and the same of a sum of two sizes."""
    names = ["sum" if start else "shape", *(f"power{at}" for at in range(70))]
    squares = [helper.make_node("Mul", [value, value], [result]) for value, result in zip(names, names[1:], strict=False)]
    nodes = [node("Shape", ["x"], ["shape"]), *start, *squares, node("Expand", ["x", names[-1]], ["y"])]
    refused(small(nodes, {"x": ["N", "M"] if start else ["N"]}, ["y"], {"first": np.array([0])}), "Mul", "symbols", "products")


def test_names_that_are_not_text(tmp_path):
    content = relu().SerializeToString()
    damaged = content.replace(b"Relu node", b"Relu \xff\xfe\xfd\xfc")
    assert damaged != content
    (tmp_path / "damaged.onnx").write_bytes(damaged)
    refused(tmp_path / "damaged.onnx", "damaged.onnx")


def test_a_long_chain_and_many_names():
    count = 3000
    nodes = [helper.make_node("Relu", [f"v{at}" if at else "x"], [f"v{at + 1}" if at + 1 < count else "y"]) for at in range(count)]
    import_model(small(nodes[::-1], {"x": [2]}, ["y"]))


def test_opsets():
    for version in (0, -1, 1 << 40):
        model = relu()
        model.opset_import[0].version = version
        refused(model, "opset")
    model = relu()
    del model.opset_import[:]
    refused(model, "opset")
