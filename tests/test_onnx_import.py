"""The ONNX importer as a whole: shape arithmetic under dynamic dims, names, and every way a file or a request can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tcompile
from kernels import UNOPTIMIZED
from onnx import TensorProto, helper, numpy_helper
from onnx_models import small
from tcompile.compiler.errors import UnsupportedModel, UsageError
from tcompile.compiler.importers.onnx import import_onnx
from tcompile.compiler.program import DimRange, Program
from tcompile.compiler.shapes import parse_shape, parse_shape_flag
from tcompile.compiler.tvm import relax, tvm
from tcompile.passes.base import PassContext
from tcompile.targets.base import Target
from tcompile.targets.cpu.guards import guard

RNG = np.random.default_rng(7)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto], inputs: dict[str, list], outputs: list[str], constants: dict[str, np.ndarray] | None = None, opset: int = 17
) -> onnx.ModelProto:
    """inputs: name -> dims of a float tensor."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    return helper.make_model(helper.make_graph(nodes, "graph", infos, results, tensors), opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(program: Program, arrays: list[np.ndarray]) -> list[np.ndarray]:
    guarded = guard(program, PassContext(Target.parse("cpu:haswell")))  # makes negative indices positive
    module = relax.transform.DecomposeOpsForInference()(guarded.module)
    machine = relax.VirtualMachine(tvm.relax.build(module, target=UNOPTIMIZED), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(array) for array in arrays])
    return [result.numpy()] if hasattr(result, "numpy") else [part.numpy() for part in result]


def check(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], **options) -> Program:
    expected = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
    program = import_onnx(proto, **options)
    for result, reference in zip(run(program, [feeds[spec.name] for spec in program.inputs]), expected, strict=True):
        assert result.dtype == reference.dtype and result.shape == reference.shape
        np.testing.assert_allclose(result, reference, 1e-4, 1e-5)
    return program


X, IMAGE = floats(3, 5, 7), floats(2, 6, 7, 5)
ONE_INPUT = ["Abs", "Ceil", "Erf", "Exp", "Floor", "Neg", "Relu", "Round", "Sigmoid", "Sign", "Softplus", "Tanh", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "Softsign", "Reciprocal", "Identity", "GlobalAveragePool", "GlobalMaxPool", "Softmax", "LogSoftmax", "Transpose", "Flatten", "ReduceMean", "ReduceMax", "ReduceL2", "ReduceLogSumExp"]  # fmt: skip

#: operator, shapes of data inputs, constants (name order after the data), attributes
CASES = [
    ("Add", [X, floats(5, 7)], [], {}),
    ("Pow", [np.abs(X)], [np.array(1.7, np.float32)], {}),
    ("Max", [X, floats(7), X], [], {}),
    ("Clip", [X], [np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    ("PRelu", [IMAGE], [floats(6, 1, 1)], {}),
    ("MatMul", [floats(2, 3, 5), floats(2, 5, 7)], [], {}),
    ("MatMul", [X], [floats(7)], {}),
    ("Gemm", [floats(5, 3)], [floats(7, 5), floats(7)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Einsum", [floats(2, 3, 5, 4), floats(2, 3, 7, 4)], [], {"equation": "bhid,bhjd->bhij"}),
    ("Einsum", [floats(2, 3, 5)], [floats(5, 7, 3)], {"equation": "abc,cdb->da"}),
    ("Conv", [IMAGE], [floats(5, 6, 3, 3), floats(5)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("Conv", [IMAGE], [floats(6, 1, 3, 2)], {"group": 6, "dilations": [2, 1]}),
    ("Conv", [floats(2, 3, 11)], [floats(4, 3, 3)], {"auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", [IMAGE], [floats(6, 2, 3, 3)], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ("ConvTranspose", [IMAGE], [floats(6, 2, 3, 3), floats(4)], {"strides": [2, 1], "group": 2}),
    ("MaxPool", [IMAGE], [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [IMAGE], [], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    ("AveragePool", [IMAGE], [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("BatchNormalization", [IMAGE], [floats(6), floats(6), floats(6), np.abs(floats(6))], {}),
    ("LayerNormalization", [X], [floats(7), floats(7)], {}),
    ("InstanceNormalization", [IMAGE], [floats(6), floats(6)], {}),
    ("LpNormalization", [X], [], {"axis": 1, "p": 1}),
    ("Slice", [X], [np.array([-1, 1]), np.array([-9999, 2**31]), np.array([1, 2]), np.array([-2, 3])], {}),
    ("Tile", [floats(3, 5)], [np.array([2, 3])], {}),
    ("Pad", [IMAGE], [np.array([0, 0, -1, 2, 0, 0, 2, -1]), np.array(1.5, np.float32)], {}),
    ("DepthToSpace", [floats(2, 8, 3, 5)], [], {"blocksize": 2, "mode": "CRD"}),
    ("Gather", [X], [np.array([[-1, 0], [4, -5]])], {"axis": 1}),
    ("Gather", [X], [np.array(-1)], {"axis": 1}),
    ("ScatterND", [X], [np.array([[0, -1], [2, 3]]), floats(2, 7)], {}),
    ("CumSum", [X], [np.array(1)], {"reverse": 1, "exclusive": 1}),
    ("Trilu", [X], [np.array(-1)], {"upper": 0}),
]


@pytest.mark.sweep
@pytest.mark.parametrize("op", ONE_INPUT)
def test_one_input(op: str) -> None:
    check(model([helper.make_node(op, ["x"], ["y"])], {"x": [None, None, None]}, ["y"]), {"x": X})


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}{index}" for index, case in enumerate(CASES)])
def test_operator(case: tuple, dynamic: bool) -> None:
    op, data, constants, attributes = case
    feeds = {f"x{index}": array for index, array in enumerate(data)}
    known = {f"c{index}": array for index, array in enumerate(constants)}
    if dynamic and op == "ScatterND":
        pytest.skip("the updates are static, so the data has to be")
    shapes = {name: [f"d{size}" if dynamic else size for size in array.shape] for name, array in feeds.items()}
    check(model([helper.make_node(op, [*feeds, *known], ["y"], **attributes)], shapes, ["y"], known), feeds)


def test_shape_arithmetic_stays_symbolic() -> None:
    """Split into heads and back: the target shapes are computed by Shape, Gather, Mul, Div, Unsqueeze and Concat."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Gather", ["shape", "one"], ["length"]),
        helper.make_node("Mul", ["batch", "length"], ["rows"]),
        helper.make_node("Div", ["rows", "length"], ["again"]),
        helper.make_node("Unsqueeze", ["again", "zero_axis"], ["a"]),
        helper.make_node("Unsqueeze", ["length", "zero_axis"], ["b"]),
        helper.make_node("Concat", ["a", "b", "heads"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["split"]),
        helper.make_node("Reshape", ["split", "back"], ["merged"]),
        helper.make_node("Add", ["merged", "x"], ["y"]),
    ]
    constants = {"zero": np.array(0), "one": np.array(1), "zero_axis": np.array([0]), "heads": np.array([2, 3]), "back": np.array([0, 0, -1])}
    program = check(model(nodes, {"x": ["batch", "length", 6]}, ["y"], constants), {"x": floats(2, 5, 6)})
    assert program.outputs[0].shape == ("batch", "length", 6) and "match_cast" not in program.module.script()


def test_resize_by_a_ratio_of_shapes() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=2),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "two"], ["g"]),
        helper.make_node("Floor", ["g"], ["h"]),
        helper.make_node("Cast", ["h"], ["i"], to=TensorProto.INT64),
        helper.make_node("Shape", ["x"], ["front"], end=2),
        helper.make_node("Concat", ["front", "i"], ["sizes"], axis=0),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear"),
    ]
    check(model(nodes, {"x": ["n", 3, "h", "w"]}, ["y"], {"two": np.array([2.0, 3.0], np.float32)}), {"x": floats(1, 3, 5, 4)})


def test_positions_limit_the_length() -> None:
    """A slice of a table of 8 positions, added to the input: the length becomes bounded by 8, without any check at run time."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=1, end=2),
        helper.make_node("Slice", ["table", "zero", "n"], ["rows"]),
        helper.make_node("Add", ["x", "rows"], ["y"]),
    ]
    proto = model(nodes, {"x": ["b", "n", 3]}, ["y"], {"table": floats(8, 3), "zero": np.array([0])})
    program = check(proto, {"x": floats(2, 5, 3)})
    assert program.dims["n"] == DimRange(1, None, 8) and "match_cast" not in program.module.script()
    with pytest.raises(UsageError, match="only up to 8"):
        import_onnx(proto, shapes={"x": (2, DimRange(1, 4, 16), 3)})


def test_names_and_shared_constants() -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["layer/one:0"]), helper.make_node("Mul", ["layer/one:0", "w"], ["y"])]
    program = import_onnx(model(nodes, {"x": [2, 3]}, ["y"], {"w": floats(2, 3)}))
    bindings = program.main.body.blocks[0].bindings
    assert bindings[0].var.name == "layer_one_0_"  # no digit at the end, where passes put theirs
    assert bindings[0].value.args[1].same_as(bindings[1].value.args[1])


def test_unnamed_dims_are_distinct_and_named_ones_shared() -> None:
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [None, None]}, ["y"])
    assert import_onnx(proto).inputs[0].shape == ("x_dim0", "x_dim1")
    both = model([helper.make_node("Add", ["x", "z"], ["y"])], {"x": ["n", 3], "z": ["n", 3]}, ["y"])
    assert import_onnx(both, shapes={"x": (4, 3)}).inputs[1].shape == (4, 3)


def test_parse_shape() -> None:
    assert parse_shape_flag("x=1..8..32x128") == ("x", (DimRange(1, 8, 32), 128))
    assert parse_shape("1..32x3x1..") == (DimRange(1, None, 32), 3, DimRange(1, None, None))
    for text in ("x", "=3", "x=3x", "x=a", "x=4..2", "x=1...3"):
        with pytest.raises(UsageError, match="expected|must"):
            parse_shape_flag(text)


@pytest.mark.parametrize("shapes", [{"q": (1, 3)}, {"x": (1,)}, {"x": (1, 4)}], ids=["unknown input", "rank", "fixed dim"])
def test_wrong_shapes(shapes: dict) -> None:
    with pytest.raises(UsageError, match="input"):
        import_onnx(model([helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, ["y"]), shapes=shapes)


def test_all_blockers_at_once() -> None:
    nodes = [
        helper.make_node("ImageDecoder", ["x"], ["a"], name="first"),
        helper.make_node("Add", ["x", "x"], ["b"], name="second", domain="other.org"),
        helper.make_node("Relu", ["x"], ["c"], name="third", colour=3),
        helper.make_node("ImageDecoder", ["x"], ["unused"], name="dead"),
    ]
    proto = model(nodes, {"x": [2, 3]}, ["a", "b", "c"])
    proto.opset_import.append(helper.make_opsetid("other.org", 1))
    with pytest.raises(UnsupportedModel) as caught:
        import_onnx(proto)
    assert [(blocker.node, blocker.op) for blocker in caught.value.blockers] == [
        ("first", "ai.onnx::ImageDecoder"),
        ("second", "other.org::Add"),
        ("third", "ai.onnx::Relu"),
    ]


def test_blockers_of_the_walk_are_collected() -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["a"], name="first", axis=7),
        helper.make_node("MatMul", ["x", "x"], ["b"], name="second"),
        helper.make_node("Relu", ["a"], ["c"], name="after"),
    ]
    proto = model(nodes, {"x": [2, 3]}, ["b", "c"])
    with pytest.raises(UnsupportedModel) as caught:
        import_onnx(proto)
    assert {blocker.node for blocker in caught.value.blockers} == {"first", "second"}


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x08\x08\x12\x04"], ids=["empty", "text", "fragment"])
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel):
        import_onnx(path)


def test_truncated_missing_directory(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [9, 9]}, ["y"], {"w": floats(9, 9)}).SerializeToString()[:-40])
    with pytest.raises(UnsupportedModel, match="truncated"):
        import_onnx(path)
    with pytest.raises(UsageError, match="does not exist"):
        import_onnx(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="directory"):
        import_onnx(tmp_path)


def test_cycles_and_dangling_names() -> None:
    cycle = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    with pytest.raises(UnsupportedModel, match="cycle"):
        import_onnx(model(cycle, {"x": [3]}, ["b"]))
    with pytest.raises(UnsupportedModel, match="'nobody' is not defined"):
        import_onnx(model([helper.make_node("Add", ["x", "nobody"], ["y"])], {"x": [3]}, ["y"]))
    with pytest.raises(UnsupportedModel, match="opset 99"):
        import_onnx(model([helper.make_node("Relu", ["x"], ["y"])], {"x": [3]}, ["y"], opset=99))


def external_model(folder: Path, location: str, *, length: int = 36, offset: int = 0) -> Path:
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [3, 3]}, ["y"], {"w": np.zeros((3, 3), np.float32)})
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data(tmp_path: Path) -> None:
    weights = floats(3, 3)
    (tmp_path / "w.bin").write_bytes(b"1234" + weights.tobytes())
    program = import_onnx(external_model(tmp_path, "w.bin", offset=4))
    x = floats(3, 3)
    np.testing.assert_array_equal(run(program, [x])[0], x + weights)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../w.bin", "relative"),
        ("/etc/hostname", "relative"),
        ("none.bin", "does not exist"),
        ("link.bin", "links"),
        ("hard.bin", "hard links"),
        ("short.bin", "bytes 0..36"),
    ],
)
def test_external_data_is_contained(tmp_path: Path, location: str, reason: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(36))
    (folder / "short.bin").write_bytes(bytes(30))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "hard.bin").hardlink_to(tmp_path / "w.bin")
    with pytest.raises(UnsupportedModel, match=reason):
        import_onnx(external_model(folder, location))


def test_bodies_are_shown_as_the_node_they_came_from():
    """Inner names of a standard operator's body mean nothing to anyone; those of the model's own functions stand behind the call's."""
    crop = helper.make_node("CenterCropPad", ["x", "s"], ["y"], name="the crop")
    assert set(import_onnx(small([crop], {"x": ["N", 4], "s": ([2], TensorProto.INT64)}, ["y"])).origins.values()) == {"the crop"}
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    body = [helper.make_node("Relu", ["a"], ["t"], name="first"), helper.make_node("Neg", ["t"], ["b"])]
    calling = small([helper.make_node("f", ["x"], ["y"], domain="local", name="call")], {"x": [2]}, ["y"])
    calling.opset_import.append(imports[1])
    calling.functions.append(helper.make_function("local", "f", ["a"], ["b"], body, imports))
    assert set(import_onnx(calling).origins.values()) == {"call/first__1", "call/Neg"}  # a number of the inliner's


def test_both_spellings_of_the_standard_domain():
    """Defaults of attributes and types are those of the standard under either."""
    x = np.linspace(-2, 2, 5, dtype="float16")
    for domain in ("", "ai.onnx"):
        model = small([helper.make_node("LeakyRelu", ["x"], ["y"], domain=domain)], {"x": ([5], TensorProto.FLOAT16)}, [("y", TensorProto.FLOAT16)])
        np.testing.assert_array_equal(tcompile.compile(model)(x), np.where(x < 0, np.float32(0.01) * x, x).astype("float16"))
