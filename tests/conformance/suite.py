"""The tests that the onnx package generates, with the operators and types of each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
#: element types that the fair part leaves out, besides strings
_EXOTIC = ("FLOAT8", "FLOAT4", "INT4", "UINT4", "INT2", "UINT2")


@dataclass(frozen=True)
class Case:
    """One test of the suite. data_sets: pairs of inputs and expected outputs; rtol and atol are the suite's own."""

    name: str
    kind: str
    rtol: float
    atol: float
    source: Any

    @property
    def model(self) -> onnx.ModelProto:
        return self.source.model if self.source.model is not None else onnx.load(Path(self.source.model_dir) / "model.onnx")

    @property
    def dynamic_model(self) -> onnx.ModelProto:
        """The model with every input dim above 1 open, each on its own, and without any other shape."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        initialized = {tensor.name for tensor in model.graph.initializer}
        for info in model.graph.input:
            if info.name not in initialized and info.type.WhichOneof("value") == "tensor_type":
                for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                    if dim.dim_value > 1:
                        dim.dim_param = f"{info.name}_{axis}"
        del model.graph.value_info[:]
        for info in model.graph.output:
            if info.type.WhichOneof("value") == "tensor_type":
                info.type.tensor_type.ClearField("shape")
        return model

    def data_sets(self) -> list[tuple[list[Any], list[Any]]]:
        if self.source.data_sets is not None:
            return [([_plain(value) for value in inputs], [_plain(value) for value in outputs]) for inputs, outputs in self.source.data_sets]
        graph = self.model.graph
        return [
            (_read(folder, "input", graph.input), _read(folder, "output", graph.output))
            for folder in sorted(Path(self.source.model_dir).glob("test_data_set_*"))
        ]

    @property
    def opset(self) -> int:
        """Version of the standard operators; 0 where there are none."""
        return max((entry.version for entry in self.model.opset_import if entry.domain == ""), default=0)

    @property
    def types(self) -> set[str]:
        """The element types of inputs and outputs that are tensors, as onnx names them."""
        infos = [*self.model.graph.input, *self.model.graph.output]
        kinds = {info.type.tensor_type.elem_type for info in infos if info.type.WhichOneof("value") == "tensor_type"}
        return {onnx.TensorProto.DataType.Name(kind).lower() for kind in kinds}

    @property
    def fair(self) -> bool:
        """A model of standard operators up to opset 26 in types that compilers have, and not the expansion of another test's operator."""
        return 0 < self.opset <= 26 and "_expanded" not in self.name and not _exotic(self.model)


@cache
def cases() -> tuple[Case, ...]:
    """All tests, in the suite's order. Generating them takes some seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows that tests provoke
        return tuple(Case(test.name, kind, test.rtol, test.atol, test) for kind in KINDS for test in load_model_tests(kind=kind))


def _exotic(model: onnx.ModelProto) -> bool:
    types: set[int] = {tensor.data_type for tensor in model.graph.initializer}
    tensors: Iterable[onnx.ValueInfoProto] = [*model.graph.input, *model.graph.output]
    types |= {info.type.tensor_type.elem_type for info in tensors if info.type.WhichOneof("value") == "tensor_type"}
    names = {onnx.TensorProto.DataType.Name(kind) for kind in types}
    return any(name == "STRING" or name.startswith(_EXOTIC) for name in names)


def _plain(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _read(folder: Path, what: str, infos: Iterable[onnx.ValueInfoProto]) -> list[Any]:
    return [_value(folder / f"{what}_{index}.pb", info) for index, info in enumerate(infos) if (folder / f"{what}_{index}.pb").exists()]


def _value(path: Path, info: onnx.ValueInfoProto) -> Any:
    kind = info.type.WhichOneof("value")
    if kind == "tensor_type":
        return numpy_helper.to_array(onnx.load_tensor(path))
    if kind == "sequence_type":
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(path.read_bytes())
        return numpy_helper.to_list(sequence)
    optional = onnx.OptionalProto()
    optional.ParseFromString(path.read_bytes())
    return numpy_helper.to_optional(optional)


def close(case: Case, expected: Any, found: Any) -> str:
    """Empty when an output agrees in type, shape and values; else what differs. Tolerances are those of onnx's own runner: bfloat16 has two units in the last place."""
    expected = np.asarray(expected)
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"{found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
    if expected.dtype.kind in "OSU":
        return "" if np.array_equal(expected, found) else "other strings"
    wide = [value.astype(np.complex128 if value.dtype.kind == "c" else np.float64) for value in (expected, found)]
    try:
        rtol = max(case.rtol, 2**-6) if expected.dtype.name == "bfloat16" else case.rtol
        np.testing.assert_allclose(wide[1], wide[0], rtol=rtol, atol=case.atol)
    except AssertionError:
        with np.errstate(all="ignore"):
            return f"values differ by up to {np.nanmax(np.abs(wide[1] - wide[0]), initial=0):.3g}"
    return ""
