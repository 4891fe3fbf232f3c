"""Sparse tensors of a file become ordinary ones before anything else reads the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, SparseTensorProto, numpy_helper

from ...errors import Blocker, UnsupportedModel
from ..naming import ImpossibleTensor, check_size
from .graphs import nested_nodes, subgraphs
from .load import read_tensor
from .node import node_label
from .values import Refusal

#: of all sparse tensors of a model together, once they are dense: a few bytes in a file stand for any size
MOST_DENSE_BYTES = 1 << 28


def densify(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """The model with its sparse initializers, and the sparse values of its Constant nodes, as dense tensors; the very same model where it has none.

    folder: as for `load.read_tensor`. Raises UnsupportedModel for malformed ones, and where all of them need more than `MOST_DENSE_BYTES`.
    """
    if not any(graph.sparse_initializer for graph in _graphs(model)) and not any(_sparse_values(model)):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    room, blockers = MOST_DENSE_BYTES, []
    for graph in _graphs(changed):
        for tensor in graph.sparse_initializer:
            try:
                array = dense(tensor, folder, room)
            except Refusal as refusal:
                blockers.append(Blocker("", "", str(refusal)))
                continue
            room -= array.nbytes
            graph.initializer.append(numpy_helper.from_array(array, tensor.values.name))
        graph.ClearField("sparse_initializer")
    for node, attribute in _sparse_values(changed):
        try:
            array = dense(attribute.sparse_tensor, folder, room)
        except Refusal as refusal:
            blockers.append(Blocker(node_label(node), "ai.onnx::Constant", str(refusal)))
            continue
        room -= array.nbytes
        attribute.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(array, node.output[0] if node.output else "")))
    if blockers:
        raise UnsupportedModel(blockers)
    return changed


def dense(tensor: SparseTensorProto, folder: Path | None, most_bytes: int = MOST_DENSE_BYTES) -> np.ndarray:
    """The array, 0 where the tensor has no value. Raises Refusal for values or positions that do not fit its shape."""
    shape, name = tuple(tensor.dims), tensor.values.name
    values, places = read_tensor(tensor.values, folder), read_tensor(tensor.indices, folder)
    try:
        check_size(shape, values.dtype)
    except ImpossibleTensor as error:
        raise Refusal(f"sparse tensor '{name}': {error}") from None
    total, count = math.prod(shape), values.array.size
    if total * values.array.itemsize > most_bytes:
        raise Refusal(f"sparse tensors of more than {MOST_DENSE_BYTES} bytes are not supported; '{name}' has shape {list(shape)}")
    index = places.array
    if values.array.ndim != 1 or places.dtype != "int64" or index.shape not in ((count,), (count, len(shape))):
        found = f"values of shape {list(values.array.shape)} at {places.dtype} positions of shape {list(index.shape)}"
        raise Refusal(f"sparse tensor '{name}' of shape {list(shape)} is malformed: it has {found}")
    limits = np.array([total] if index.ndim == 1 else shape, np.int64)
    rows = index.reshape(count, len(limits))
    if (rows < 0).any() or (rows >= limits).any():
        raise Refusal(f"sparse tensor '{name}' has a position outside of its shape {list(shape)}")
    flat = rows[:, 0] if index.ndim == 1 else np.ravel_multi_index(tuple(rows.T), shape) if shape else np.zeros(count, np.int64)
    if (np.diff(flat) <= 0).any():
        raise Refusal(f"sparse tensor '{name}': positions must ascend, each given once")
    result = np.zeros(total, values.array.dtype)
    result[flat] = values.array
    return result.reshape(shape)


def _graphs(model: onnx.ModelProto) -> Iterator[GraphProto]:
    yield model.graph
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nested_nodes(nodes):
            yield from subgraphs(node)


def _sparse_values(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, AttributeProto]]:
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nested_nodes(nodes):
            if node.op_type == "Constant":
                yield from ((node, attribute) for attribute in node.attribute if attribute.type == AttributeProto.SPARSE_TENSOR)
