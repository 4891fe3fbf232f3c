"""Sizes, positions, axes and steps that models read while they run: what must not occur raises and names the node, in a process of its own; nothing crashes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tcompile
from isolated import run_isolated
from onnx import ModelProto, helper
from tcompile.compiler.errors import TcompileError

LOWEST, LARGEST = -(2**63), 2**63 - 1


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng([0, *shape]).standard_normal(shape).astype(np.float32)


def ints(*values: Any, dtype: str = "int64") -> np.ndarray:
    return np.array(values, dtype)


def one(value: float, dtype: str = "int64") -> np.ndarray:
    return np.array(value, dtype)


def cube(*values: int) -> np.ndarray:
    return ints(*values).reshape(1, 1, 2, 2)


DATA = np.arange(24, dtype="float32").reshape(4, 6)
ROPE = {"x": floats(1, 2, 3, 4), "cos": floats(5, 2), "sin": floats(5, 2)}
#: operator, good inputs, {input: bad value, ...} for each call, attributes and "domain"
CASES: list[tuple[str, dict[str, np.ndarray], list[dict[str, Any]], dict[str, Any]]] = [
    ("ArrayFeatureExtractor", {"d": DATA, "i": ints(0, 3)}, [{"i": ints(0, 6)}, {"i": ints(-7, 0)}], {"domain": "ai.onnx.ml"}),
    ("Slice", {"d": DATA, "s": ints(0, 1), "e": ints(3, 4), "a": ints(0, 1)}, [{"a": ints(0, 2)}, {"a": ints(0, -3)}, {"a": ints(1, -1)}], {}),
    ("Slice", {"d": DATA, "s": ints(0), "e": ints(3), "a": ints(0), "t": ints(1)}, [{"t": ints(0)}], {}),
    ("OneHot", {"i": ints(0, 2), "n": ints(3), "v": floats(2)}, [{"n": ints(-1)}, {"n": ints(2**62)}], {}),
    ("Compress", {"d": DATA, "c": np.array([True] * 4 + [False])}, [{"c": np.array([True] * 5)}], {"axis": 0}),
    ("TopK", {"d": DATA, "k": ints(2)}, [{"k": ints(7)}, {"k": ints(-1)}, {"k": ints(2**62)}], {}),
    ("Split", {"d": DATA, "s": ints(2, 2)}, [{"s": ints(1, 2)}, {"s": ints(5, -1)}, {"s": ints(2**62, 2**62)}], {}),
    ("Expand", {"d": floats(1, 6), "s": ints(4, 6)}, [{"s": ints(-1, 6)}, {"s": ints(4, 5)}, {"s": ints(2**40, 6)}], {}),
    ("Expand", {"d": floats(1), "s": ints(2, 2, 2)}, [{"s": ints(2**22, 2**22, 2**22)}, {"s": ints(10**9, 10**9, 10**9)}], {}),
    ("ConstantOfShape", {"s": ints(2, 2, 2)}, [{"s": ints(2**22, 2**22, 2**18 + 1)}, {"s": ints(2, -1, 2)}], {}),
    ("Tile", {"d": floats(2, 3, 1), "r": ints(2, 1, 2)}, [{"r": ints(2**22, 2**22, 2**22)}, {"r": ints(-1, -1, 1)}, {"r": ints(2**62, 4, 1)}], {}),
    ("Reshape", {"d": DATA, "s": ints(6, 4)}, [{"s": ints(*s)} for s in ((5, 5), (-1, -1), (-2, -12), (7, -1), (2**62, 4), (-1, LOWEST))], {}),
    ("Reshape", {"d": floats(1), "s": ints(1, 1)}, [{"s": ints(-1, -1)}, {"s": ints(-1, 0)}], {"allowzero": 1}),
    ("Reshape", {"d": floats(0), "s": ints(0, 1, 1, 1)}, [{"s": ints(*[1 << 16] * 4)}], {"allowzero": 1}),
    ("Reshape", {"d": floats(0, 3), "s": ints(0, 2)}, [{"s": ints(-1, 0)}, {"s": ints(0, -1)}], {"allowzero": 1}),
    ("Range", {"a": one(0), "l": one(4), "d": one(1)}, [{"d": one(0)}, {"l": one(2**62)}, {"a": one(LOWEST), "l": one(LARGEST)}], {}),
    (
        "Range",
        {"a": one(0, "float32"), "l": one(4, "float32"), "d": one(1, "float32")},
        [
            {"d": one(0, "float32")},
            {"l": one(np.inf, "float32")},
            {"l": one(np.nan, "float32")},
            {"d": one(np.nan, "float32")},
            {"d": one(1e-30, "float32")},
        ],
        {},
    ),
    ("Pad", {"d": DATA, "p": ints(0, 1, 1, 0)}, [{"p": ints(-5, 0, 0, 0)}, {"p": ints(2**62, 0, 2**62, 0)}], {}),
    ("TensorScatter", {"p": floats(2, 5, 3), "u": floats(2, 2, 3), "w": ints(0, 3)}, [{"w": ints(0, w)} for w in (4, -1, 2**62, LARGEST)], {}),
    (
        "MaxUnpool",
        {"x": floats(1, 1, 2, 2), "i": cube(5, 7, 13, 15)},
        [{"i": cube(i, 7, 13, 15)} for i in (16, -1)],
        {"kernel_shape": [2, 2], "strides": [2, 2]},
    ),
    ("RoiAlign", {"x": floats(2, 1, 4, 4), "r": floats(1, 4), "b": ints(1)}, [{"b": ints(2)}, {"b": ints(-3)}], {"sampling_ratio": 2}),
    (
        "RoiAlign",
        {"x": floats(1, 1, 4, 4), "r": ints([0, 0, 60, 4], dtype="float32"), "b": ints(0)},
        [{"r": ints(r, dtype="float32")} for r in ([0, 0, 5000, 4], [0, -1e9, 4, 4], [0, 0, 1e30, 1e30], [-np.inf, 0, np.inf, 4])],
        {"output_height": 2, "output_width": 2},
    ),
    (
        "MaxRoiPool",
        {"x": floats(2, 1, 4, 4), "r": np.ones((1, 5), "float32")},
        [{"r": np.full((1, 5), r, "float32")} for r in (2, 1e30, np.nan)],
        {"pooled_shape": [2, 2]},
    ),
    ("Resize", {"x": floats(1, 1, 4, 4), "": ints(), "-": ints(), "z": ints(1, 1, 8, 8)}, [{"z": ints(1, 1, z, 8)} for z in (-1, 2**40)], {}),
    ("Squeeze", {"d": floats(1, 4, 1), "a": ints(0)}, [{"a": ints(1)}, {"a": ints(3)}, {"a": ints(-4)}], {}),
    ("Unsqueeze", {"d": floats(4), "a": ints(0, 1)}, [{"a": ints(*a)} for a in ((0, 3), (0, -4), (0, 0), (1, -2), (0, 2**62))], {}),
    ("ReduceSum", {"d": DATA, "a": ints(0)}, [{"a": ints(2)}, {"a": ints(-3)}], {}),
    ("CumSum", {"d": DATA, "a": one(0)}, [{"a": one(2)}, {"a": one(-3)}], {}),
    (
        "RNN",
        {"x": floats(3, 2, 4), "w": floats(1, 3, 4), "r": floats(1, 3, 3), "": ints(), "l": ints(3, 2, dtype="int32")},
        [{"l": ints(n, 2, dtype="int32")} for n in (4, -1)],
        {"hidden_size": 3},
    ),
    (
        "Col2Im",
        {"x": floats(1, 5, 5), "s": ints(5, 5), "b": ints(1, 5)},
        [{"s": ints(-5, 5)}, {"s": ints(6, 5)}, {"b": ints(0, 5)}, {"b": ints(-1, -5)}],
        {},
    ),
    ("AffineGrid", {"t": floats(1, 2, 3), "s": ints(1, 1, 4, 4)}, [{"s": ints(1, 1, -4, 4)}, {"s": ints(2, 1, 4, 4)}], {}),
    ("RotaryEmbedding", ROPE | {"p": ints([0, 1, 2])}, [{"p": ints([0, 1, p])} for p in (5, -1, -6)], {}),
]


def model_of(operator: str, inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> ModelProto:
    """A graph of the one operator with every operand an input; names without letters stand for operands that are left out."""
    domain = attributes.get("domain", "")
    operands = [name if name.isalpha() else "" for name in inputs]
    options = {key: value for key, value in attributes.items() if key != "domain"}
    node = helper.make_node(operator, operands, ["y"], name=f"the {operator}", domain=domain, **options)
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
        if name.isalpha()
    ]
    kind = helper.np_dtype_to_tensor_dtype(next(iter(inputs.values())).dtype)
    if operator == "ConstantOfShape":
        kind = helper.np_dtype_to_tensor_dtype(np.dtype("float32"))
    elif operator == "OneHot":
        kind = helper.np_dtype_to_tensor_dtype(inputs["v"].dtype)
    outputs = [helper.make_empty_tensor_value_info("y")]
    if operator == "TopK":
        node.output.append("places")
    if operator == "Split":
        node.output.append("z")
        outputs.append(helper.make_empty_tensor_value_info("z"))
    for output in outputs:
        output.type.tensor_type.elem_type = kind
    opsets = [helper.make_opsetid("", 24), *([helper.make_opsetid(domain, 5)] if domain else [])]
    return helper.make_model(helper.make_graph([node], "g", declared, outputs), opset_imports=opsets)


def attempt(case: tuple[str, dict[str, np.ndarray], list[dict[str, Any]], dict[str, Any]]) -> list[str]:
    """What did not raise, or raised without the node's name."""
    operator, inputs, hostile, attributes = case
    compiled = tcompile.compile(model_of(operator, inputs, attributes))

    def feeds(changed: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: value for name, value in (inputs | changed).items() if name.isalpha()}

    compiled(**feeds({}))
    faults = []
    for changed in hostile:
        text = ", ".join(f"{name} = {value.tolist()}" for name, value in changed.items())
        try:
            compiled(**feeds(changed))
        except TcompileError as error:
            if operator not in str(error):
                faults.append(f"{operator}, {text}: {error}")
        else:
            faults.append(f"{operator}, {text}: nothing raised")
    return faults


@pytest.mark.networks
def test_what_must_not_occur_raises_and_names_the_node():
    # in an interpreter of its own, as threads that kernels have started do not survive a fork
    result = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=False)
    assert not result.returncode, result.stdout + result.stderr


def main() -> int:
    faults = []
    for case, outcome in run_isolated(CASES, attempt, seconds=60):
        faults += [f"{case[0]}: {outcome.fault}"] if outcome.fault else outcome.value
    print("\n".join(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
