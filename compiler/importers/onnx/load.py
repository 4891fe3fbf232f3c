"""Reading an ONNX file and its tensors; every way a file can be broken ends in one clear message."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, numpy_helper

from ...element_types import BOUNDS, numpy_dtype
from ...errors import UnsupportedModel, UsageError
from ..naming import ImpossibleTensor, check_size
from .values import Host, Refusal

#: messages inside of one another, as protobuf limits them when it reads a file
_DEEPEST = 100
#: ONNX element types that have a TVM counterpart
DTYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.FLOAT16: "float16",
    TensorProto.INT8: "int8",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.UINT16: "uint16",
    TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64",
    TensorProto.BOOL: "bool",
}
#: those that are only stored, by the names of ml_dtypes
STORAGE = {
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "uint4",
    TensorProto.INT2: "int2",
    TensorProto.UINT2: "uint2",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    TensorProto.FLOAT8E4M3FNUZ: "float8_e4m3fnuz",
    TensorProto.FLOAT8E5M2: "float8_e5m2",
    TensorProto.FLOAT8E5M2FNUZ: "float8_e5m2fnuz",
    TensorProto.FLOAT8E8M0: "float8_e8m0fnu",
    TensorProto.FLOAT4E2M1: "float4_e2m1fn",
}


@dataclass(frozen=True)
class Source:
    """A parsed model. label: file name for messages; folder: where its external data lies, None for a model given in memory."""

    model: onnx.ModelProto
    label: str
    folder: Path | None


def load(source: str | Path | onnx.ModelProto) -> Source:
    """Raises UsageError when there is no readable file, UnsupportedModel when it is not an ONNX model."""
    if isinstance(source, onnx.ModelProto):
        loaded = Source(source, source.graph.name or "ModelProto", None)
    else:
        path = Path(source)
        loaded = Source(_parse(_read(path), path), path.name, path.parent)
    graph = loaded.model.graph
    if not loaded.model.opset_import or not graph.output or not loaded.model.ir_version:
        missing = "opset imports" if not loaded.model.opset_import else "graph outputs" if not graph.output else "IR version"
        raise UnsupportedModel(f"'{loaded.label}' is not a complete ONNX model: it has no {missing}")
    _check_texts(loaded)
    return loaded


def _check_texts(source: Source) -> None:
    """Raises UnsupportedModel for names that are not UTF-8, which protobuf hands out as bytes, and for branches nested deeper than any file can hold."""
    waiting: list[tuple[Any, int]] = [(source.model, 0)]
    while waiting:
        message, depth = waiting.pop()
        if depth > _DEEPEST:
            raise UnsupportedModel(f"'{source.label}' nests its messages deeper than {_DEEPEST}")
        for descriptor, value in message.ListFields():
            if descriptor.type == descriptor.TYPE_STRING:
                for text in (value,) if isinstance(value, (str, bytes)) else value:
                    if isinstance(text, bytes):
                        raise UnsupportedModel(f"'{source.label}' is damaged: the {descriptor.name} {text[:40]!r} is not UTF-8 text")
            elif descriptor.type == descriptor.TYPE_MESSAGE:
                waiting += ((part, depth + 1) for part in ((value,) if isinstance(value, Message) else value))


def dtype_name(element_type: int) -> str:
    """TVM's name of an ONNX element type. Raises Refusal for types that cannot be compiled."""
    if element_type not in DTYPES:
        known = element_type in TensorProto.DataType.values()
        raise Refusal(f"element type {TensorProto.DataType.Name(element_type) if known else element_type} is not supported")
    return DTYPES[element_type]


def element_name(element_type: int) -> str:
    """The same, with the names of types that are only stored."""
    return STORAGE[element_type] if element_type in STORAGE else dtype_name(element_type)


def read_tensor(tensor: TensorProto, folder: Path | None) -> Host:
    """The tensor's elements; external ones are mapped, not read. Raises Refusal when they are missing, malformed or outside of the model's folder."""
    shape = tuple(tensor.dims)
    try:
        dtype = element_name(tensor.data_type)
        check_size(shape, dtype)
    except (Refusal, ImpossibleTensor) as error:
        raise Refusal(f"tensor '{tensor.name}': {error}") from None
    if tensor.data_location == TensorProto.EXTERNAL:
        array = _read_external(tensor, dtype, shape, folder)
    else:
        try:
            array = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, LookupError, MemoryError) as error:
            raise Refusal(f"tensor '{tensor.name}' is malformed: {error}") from error
        if array.shape != shape:
            raise Refusal(f"tensor '{tensor.name}' is malformed: it holds {array.size} elements, its shape is {list(shape)}")
    return Host(array, dtype, tensor.name)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"model file '{path}' does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"'{path}' is a directory; expected an ONNX file") from None
    except OSError as error:
        raise UsageError(f"model file '{path}' cannot be read: {error.strerror}") from None
    if not content:
        raise UnsupportedModel(f"model file '{path}' is empty; expected an ONNX model")
    return content


def _parse(content: bytes, path: Path) -> onnx.ModelProto:
    try:
        return onnx.ModelProto.FromString(content)
    except DecodeError:
        raise UnsupportedModel(f"'{path}' is not an ONNX model, or is truncated: its {len(content)} bytes cannot be parsed as a ModelProto") from None


def _read_external(tensor: TensorProto, dtype: str, shape: tuple[int, ...], folder: Path | None) -> np.ndarray:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _contained(entries.get("location", ""), tensor.name, folder)
    if dtype in BOUNDS or dtype == "float4_e2m1fn":
        raise Refusal(f"external data of tensor '{tensor.name}': packed elements of type {dtype} are supported inside of the model only")
    element = numpy_dtype(dtype)
    expected = math.prod(shape) * element.itemsize
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or expected)
    except ValueError:
        raise Refusal(f"external data of tensor '{tensor.name}': offset and length must be integers") from None
    size = path.stat().st_size
    if offset < 0 or length != expected or offset + length > size:
        raise Refusal(
            f"external data of tensor '{tensor.name}': bytes {offset}..{offset + length} of '{path.name}' ({size} bytes), expected {expected} for its shape"
        )
    if expected == 0:
        return np.zeros(shape, element)
    return np.memmap(path, element, "r", offset, shape) if shape else np.fromfile(path, element, 1, offset=offset).reshape(())


def _contained(location: str, name: str, folder: Path | None) -> Path:
    """The external file, which must be a plain file inside the model's folder, reached without links."""
    where = f"external data of tensor '{name}' ('{location}')"
    if folder is None:
        raise Refusal(f"{where}: a model given in memory has no folder; pass the path of the file instead")
    parts = Path(location.replace("\\", "/")).parts
    if not location or os.path.isabs(location) or location[1:2] == ":" or ".." in parts:
        raise Refusal(f"{where}: the location must be a relative path inside of the model's folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise Refusal(f"{where}: symbolic links are not followed")
    if not path.is_file():
        raise Refusal(f"{where}: the file does not exist")
    if path.stat().st_nlink > 1:
        raise Refusal(f"{where}: the file has further hard links, so it may lie outside of the model's folder")
    return path
