"""Networks of the zoo for the fuzzer: whole, and pieces of a few nodes that compile as fast as a test of one operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

import onnx
from onnx import helper, numpy_helper
from tcompile.models.zoo import ZOO

#: small enough to be written and read for every mutant; their import takes at most half a second
WHOLE = ("ppocr-rec", "ppocr-det", "ppocr-cls", "magika", "mnist-vit", "mnist-cnn", "mnist-mlp")
#: those that pieces are cut from
CUT = (*WHOLE, "mobilenetv3-l", "minilm")
_LONGEST = 6
_PIECE_BYTES = 2 << 20


@cache
def networks() -> tuple[bytes, ...]:
    """The networks `WHOLE`, serialized. They are made where the zoo has not made them yet."""
    return tuple(ZOO[name].onnx_path().read_bytes() for name in WHOLE)


@cache
def _typed() -> tuple[onnx.ModelProto, ...]:
    return tuple(onnx.shape_inference.infer_shapes(onnx.load(ZOO[name].onnx_path()), data_prop=True) for name in CUT)


def piece(random: Random) -> bytes:
    """A network's model of up to six neighbouring nodes, with their weights; what they read from the rest of the network is an input."""
    while True:
        model = random.choice(_typed())
        size = random.randint(1, _LONGEST)
        nodes = [node for node in model.graph.node if node.op_type != "Constant"]
        start = random.randrange(len(nodes))
        content = cut(model, nodes[start : start + size]).SerializeToString(deterministic=True)
        if len(content) <= _PIECE_BYTES:
            return content


def cut(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """The nodes as a model of their own. model: without branches, its shapes inferred; outputs are the values that other nodes, or nobody, read."""
    graph = model.graph
    types = {info.name: info.type for info in (*graph.input, *graph.value_info, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            array = numpy_helper.to_array(node.attribute[0].t)
            constants[node.output[0]] = numpy_helper.from_array(array, node.output[0])
    made = {name for node in nodes for name in node.output if name}
    read = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in made))
    outside = {name for node in graph.node if made.isdisjoint(node.output) for name in node.input} | {info.name for info in graph.output}
    used = {name for node in nodes for name in node.input}
    results = [name for node in nodes for name in node.output if name and (name in outside or name not in used)]
    part = helper.make_graph(
        nodes,
        "piece",
        [helper.make_value_info(name, types[name]) for name in read if name not in constants],
        [helper.make_value_info(name, types[name]) for name in results],
        [constants[name] for name in read if name in constants],
    )
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
