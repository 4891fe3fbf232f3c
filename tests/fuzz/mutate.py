"""Mutations of ONNX models: of their structure, which keeps the file readable, and of their bytes, which does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

_INTS = (0, 1, -1, 2, 3, -2, 7, 1 << 20, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e30, 1e-30, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "x", "NOTSET", "SAME_UPPER", "constant", "linear", "ä" * 40, "a b\n", "main", "i,j->", "...ij", "[*", "(((")
_TYPES = (*sorted(TensorProto.DataType.values()), 99, -1)

Mutation = Callable[[onnx.ModelProto, Random, Sequence[bytes]], object]


def mutate(content: bytes, random: Random, donors: Sequence[bytes]) -> bytes:
    """One to three mutations of a serialized model, or of its bytes. donors: further models, from which parts are taken."""
    if random.random() < 0.15:
        return _bytes(content, random)
    model = onnx.ModelProto.FromString(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(MUTATIONS)(model, random, donors)
    return model.SerializeToString(deterministic=True)


def _bytes(content: bytes, random: Random) -> bytes:
    """Truncated, with some bits flipped, or with a part repeated or removed."""
    data = bytearray(content)
    kind = random.randrange(4)
    if not data or kind == 0:
        return bytes(data[: random.randrange(len(data) + 1)])
    if kind == 1:
        for _ in range(random.choice((1, 1, 2, 5))):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(data)
    start = random.randrange(len(data))
    end = min(len(data), start + random.randrange(1, 64))
    return bytes(data[:end] + data[start:]) if kind == 2 else bytes(data[:start] + data[end:])


def _graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    found, waiting = [], [model.graph]
    while waiting:
        graph = waiting.pop()
        found.append(graph)
        for node in graph.node:
            waiting += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for graph in _graphs(model) for node in graph.node] + [node for function in model.functions for node in function.node]


def _names(model: onnx.ModelProto) -> list[str]:
    names = [name for node in _nodes(model) for name in (*node.input, *node.output)]
    return [*names, *(info.name for info in model.graph.input), *(tensor.name for tensor in model.graph.initializer), "", "nobody"]


def _infos(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [info for graph in _graphs(model) for info in (*graph.input, *graph.output, *graph.value_info)]


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    held = [attribute.t for node in _nodes(model) for attribute in node.attribute if attribute.HasField("t")]
    return [tensor for graph in _graphs(model) for tensor in graph.initializer] + held


def _operator(model: onnx.ModelProto, random: Random, donors: Sequence[bytes]) -> None:
    """Another operator, mostly one of a donor's."""
    other = _nodes(onnx.ModelProto.FromString(random.choice(donors)))
    for node in _some(_nodes(model), random):
        node.op_type = random.choice([entry.op_type for entry in other] or ["Identity"]) if random.random() < 0.9 else random.choice(_TEXTS)


def _domain(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    for node in _some(_nodes(model), random):
        node.domain = random.choice(("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "nobody"))


def _opset(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    for entry in _some(model.opset_import, random):
        entry.version = random.choice((*range(1, 28), 0, -1, 1 << 40))


def _inputs(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    """An input dropped, doubled, exchanged for another name, or left out."""
    for node in _some(_nodes(model), random):
        names = list(node.input)
        place, kind = random.randrange(len(names) + 1), random.randrange(4)
        if kind == 0 or place == len(names):
            names.insert(place, random.choice(_names(model)))
        elif kind == 1:
            del names[place]
        else:
            names[place] = "" if kind == 2 else random.choice(_names(model))
        del node.input[:]
        node.input.extend(names)


def _outputs(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    for node in _some(_nodes(model), random):
        names = list(node.output)
        if names and random.random() < 0.5:
            names[random.randrange(len(names))] = random.choice(_names(model))
        elif names and random.random() < 0.5:
            del names[random.randrange(len(names))]
        else:
            names.append(random.choice((*_names(model), "extra")))
        del node.output[:]
        node.output.extend(names)


def _attribute(model: onnx.ModelProto, random: Random, donors: Sequence[bytes]) -> None:
    """An attribute dropped, taken from a donor, or with another value or type."""
    candidates = [node for node in _nodes(model) if node.attribute] or _nodes(model)
    for node in _some(candidates, random):
        kind = random.randrange(5)
        if kind == 0 or not node.attribute:
            other = [entry for donor in _nodes(onnx.ModelProto.FromString(random.choice(donors))) for entry in donor.attribute]
            node.attribute.extend(random.sample(other, min(1, len(other))))
            continue
        place = random.randrange(len(node.attribute))
        attribute = node.attribute[place]
        if kind == 1:
            del node.attribute[place]
        elif kind == 2:
            attribute.type = random.choice(AttributeProto.AttributeType.values())  # pyright: ignore[reportAttributeAccessIssue]
        elif kind == 3:
            name = attribute.name
            value: Any = random.choice(
                (random.choice(_INTS), random.choice(_FLOATS), random.choice(_TEXTS), [random.choice(_INTS) for _ in range(random.randrange(1, 4))])
            )
            attribute.CopyFrom(onnx.helper.make_attribute(name, value))
        else:
            attribute.i, attribute.f, attribute.s = random.choice(_INTS), random.choice(_FLOATS), random.choice((b"", b"\xff\xfe", b"max", b"add"))
            if attribute.ints:
                attribute.ints[random.randrange(len(attribute.ints))] = random.choice(_INTS)
            if attribute.floats:
                attribute.floats[random.randrange(len(attribute.floats))] = random.choice(_FLOATS)


def _dims(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    """A dim of a declared shape: another size, a symbol, gone, or one more."""
    for info in _some([info for info in _infos(model) if info.type.HasField("tensor_type")], random):
        shape = info.type.tensor_type.shape
        if random.random() < 0.1:
            info.type.tensor_type.ClearField("shape")
        elif not shape.dim or random.random() < 0.15:
            shape.dim.add().dim_value = random.choice(_INTS)
        elif random.random() < 0.15:
            del shape.dim[random.randrange(len(shape.dim))]
        elif random.random() < 0.4:
            shape.dim[random.randrange(len(shape.dim))].dim_param = random.choice(("N", "M", "", "?", "main", "n+1", "ä b", "N"))
        else:
            shape.dim[random.randrange(len(shape.dim))].dim_value = random.choice(_INTS)


def _types(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    for info in _some([info for info in _infos(model) if info.type.HasField("tensor_type")], random):
        info.type.tensor_type.elem_type = random.choice(_TYPES)


def _kinds(model: onnx.ModelProto, random: Random, donors: Sequence[bytes]) -> None:
    """A declared type exchanged for a donor's, which may be a sequence or an optional."""
    other = _infos(onnx.ModelProto.FromString(random.choice(donors)))
    for info in _some(_infos(model), random):
        info.type.CopyFrom(random.choice(other).type) if other else info.ClearField("type")


def _tensor(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    """A stored tensor with another type, other dims, other contents, or with contents of another length."""
    for tensor in _some(_tensors(model), random):
        kind = random.randrange(5)
        if kind == 0:
            tensor.data_type = random.choice(_TYPES)
        elif kind == 1 and tensor.dims:
            tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_INTS)
        elif kind == 2:
            tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)] if random.random() < 0.5 else tensor.raw_data + b"\0\1\2"
        elif kind == 3:
            array = bytearray(tensor.raw_data)
            for _place in range(min(len(array), 8)):
                array[random.randrange(len(array))] = random.choice((0, 1, 127, 128, 255))
            tensor.raw_data = bytes(array)
            for values in (tensor.int64_data, tensor.int32_data):
                if values:
                    limit = (1 << 31) - 1 if values is tensor.int32_data else (1 << 63) - 1
                    values[random.randrange(len(values))] = max(-limit, min(limit, random.choice(_INTS)))
        else:
            tensor.data_location = TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = random.choice((("location", "../x"), ("location", "/etc/passwd"), ("offset", "-1"), ("length", "1e9"), ("", "")))


def _rename(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    """A name declared a second time, or exchanged."""
    graph = random.choice(_graphs(model))
    for entry in _some([*graph.input, *graph.output, *graph.initializer, *graph.value_info, *graph.node], random):
        entry.name = random.choice((*_names(model), *_TEXTS))


def _splice(model: onnx.ModelProto, random: Random, donors: Sequence[bytes]) -> None:
    """Nodes of a donor, with the names of this model; or a node doubled, dropped, or moved."""
    graph = random.choice(_graphs(model))
    kind = random.randrange(4)
    if kind == 0:
        for node in _nodes(onnx.ModelProto.FromString(random.choice(donors)))[:3]:
            fresh = graph.node.add()
            fresh.CopyFrom(node)
            for place in range(len(fresh.input)):
                fresh.input[place] = random.choice(_names(model))
            if graph.output and fresh.output and random.random() < 0.7:
                graph.output[0].name = fresh.output[0]
    elif graph.node and kind == 1:
        del graph.node[random.randrange(len(graph.node))]
    elif graph.node and kind == 2:
        graph.node.add().CopyFrom(random.choice(graph.node))
    else:
        nodes = list(graph.node)
        random.shuffle(nodes)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _subgraph(model: onnx.ModelProto, random: Random, donors: Sequence[bytes]) -> None:
    """A donor's graph as a branch, or a branch that holds the graph it is in."""
    branches = [attribute for node in _nodes(model) for attribute in node.attribute if attribute.HasField("g")]
    graph = (
        onnx.ModelProto.FromString(random.choice(donors)).graph
        if random.random() < 0.7
        else onnx.GraphProto.FromString(model.graph.SerializeToString())
    )
    if branches:
        random.choice(branches).g.CopyFrom(graph)
    else:
        for node in _some(_nodes(model), random):
            node.op_type = random.choice(("If", "Loop", "Scan", "SequenceMap"))
            node.attribute.append(onnx.helper.make_attribute(random.choice(("then_branch", "else_branch", "body")), graph))


def _function(model: onnx.ModelProto, random: Random, _: Sequence[bytes]) -> None:
    """A function whose body may call the function itself."""
    for node in _some(_nodes(model), random):
        domain, name = random.choice((node.domain, "local")), random.choice(("f", node.op_type))
        body = onnx.NodeProto.FromString(node.SerializeToString())
        function = model.functions.add(name=name, domain=domain)
        function.input.extend(node.input)
        function.output.extend(node.output)
        if random.random() < 0.3:
            body.op_type, body.domain = name, domain
        function.node.append(body)
        function.opset_import.extend(model.opset_import)
        function.opset_import.add(domain="local", version=1)
        node.op_type, node.domain = name, domain
        model.opset_import.add(domain="local", version=1)


def _some(entries: Any, random: Random) -> list[Any]:
    entries = list(entries)
    return [random.choice(entries)] if entries else []


MUTATIONS: tuple[Mutation, ...] = (
    _operator, _domain, _opset, _inputs, _inputs, _outputs, _attribute, _attribute, _attribute, _dims, _dims, _types, _kinds, _tensor, _tensor, _rename, _splice,
    _subgraph, _function,
)  # fmt: skip
