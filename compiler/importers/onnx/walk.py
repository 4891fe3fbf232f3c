"""The graph walk: every live node, in order, through its evaluator or converter into one Relax dataflow block."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from ...element_types import CARRIERS
from ...errors import Blocker, UnsupportedModel
from ...program import Program, Provenance, TensorSpec
from ...shapes import ShapeSpec
from ...tvm import relax, tvm
from ..naming import ImpossibleTensor, NamingBuilder
from . import precision
from .definitions import standard
from .graphs import initializer_names, nested_nodes, read_names
from .inputs import declare_inputs
from .load import Source, read_tensor
from .node import Node, identifier, node_label
from .prepare import inline_functions, list_blockers, live_nodes, opset_versions
from .registry import find_converter, find_evaluator
from .sparse import densify
from .storage import to_carrier
from .subgraph import Blocked, Subgraph, unavailable
from .symbolic import DimArithmetic
from .types import check_node
from .values import Absent, Host, Poison, RangeLearned, Refusal, Sequence, Stored, Value

#: how often a walk may start anew with a range of a dim learned
MOST_RESTARTS = 16
#: nodes that are walked at most, besides four walks of each node in the file: bodies of loops are walked several times
MOST_REPEATS = 16 * 1024


def build_program(source: Source, shapes: Mapping[str, ShapeSpec]) -> Program:
    """Raises UsageError where `shapes` does not fit the model, UnsupportedModel with every blocker found."""
    opset_versions(source.model)
    model = inline_functions(densify(source.model, source.folder))
    limits: dict[str, int] = {}
    last = ""
    for _ in range(MOST_RESTARTS):
        try:
            return _Walk(source, model, shapes, limits).run()
        except RangeLearned as learned:
            limits[learned.symbol], last = learned.limit, str(learned)
    raise UnsupportedModel(f"the ranges of its dims follow from its operators in more than {MOST_RESTARTS} steps ({last}): give ranges (--shape)")


class _Walk:
    def __init__(self, source: Source, model: onnx.ModelProto, shapes: Mapping[str, ShapeSpec], limits: Mapping[str, int]):
        self.source, self.model = source, model
        self.versions = opset_versions(model)
        self.dims = DimArithmetic()
        self.inputs = declare_inputs(model.graph, shapes, self.dims, limits)
        self.builder = NamingBuilder()
        self.blockers: list[Blocker] = []
        self.walked, self.most = 0, MOST_REPEATS + 4 * sum(1 for _ in nested_nodes(model.graph.node))
        #: graph output -> its type, where that is a storage type
        self.carried: dict[str, str] = {}

    def run(self) -> Program:
        graph = self.model.graph
        known = set(self.inputs.variables) | initializer_names(graph)
        nodes = live_nodes(graph, known)
        self._stop_if_blocked(list_blockers(nodes, self.versions))
        with self.builder.function("main", list(self.inputs.variables.values())):
            with self.builder.dataflow():
                results = self._walk(graph, nodes, self._inputs())
                outputs = [self._output(value, info) for value, info in zip(results, graph.output, strict=True)]
                self._stop_if_blocked([])
                result = self._emit_outputs(outputs)
            self.builder.emit_func_output(result)
        module = self.builder.get()
        relax.analysis.well_formed(module)
        specs = tuple(self._output_spec(value, info.name) for value, info in zip(outputs, graph.output, strict=True))
        producer = " ".join(filter(None, (self.model.producer_name, self.model.producer_version)))
        provenance = Provenance(self.source.label, "onnx", str(self.versions.get("", "")), producer)
        return Program(module, tuple(self.inputs.specs), specs, provenance, self.inputs.ranges, self.builder.origins)

    def _inputs(self) -> dict[str, Value]:
        carried = {spec.name: spec.dtype for spec in self.inputs.specs if spec.carrier is not None}
        return {name: Stored(value, carried[name]) if name in carried else value for name, value in self.inputs.variables.items()}

    def _emit_outputs(self, outputs: list[relax.Expr]) -> relax.Var:
        if len(outputs) > 1:
            return self.builder.emit_output(relax.Tuple(outputs))
        return self.builder.emit_output(outputs[0], getattr(outputs[0], "name", ""))

    def _stop_if_blocked(self, found: list[Blocker]) -> None:
        self.blockers += found
        if self.blockers:
            raise UnsupportedModel(self.blockers)

    def _walk(self, graph: onnx.GraphProto, nodes: list[onnx.NodeProto], values: dict[str, Value]) -> list[Value]:
        """The values of the graph's outputs; `values` holds what is defined around it and is extended."""
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for name in {name for node in nodes for name in read_names(node)} | {output.name for output in graph.output}:
            if name in tensors:
                values[name] = self._initializer(tensors[name])
        self._nodes(nodes, values)
        return [values[output.name] for output in graph.output]

    def _nodes(self, nodes: list[onnx.NodeProto], values: dict[str, Value]) -> None:
        for proto in nodes:
            self.walked += 1
            if self.walked > self.most:
                raise UnsupportedModel(
                    [Blocker(node_label(proto), proto.op_type, f"loops are nested so that their bodies make more than {self.most} nodes")]
                )
            results = self._convert(proto, values)
            values.update((name, result) for name, result in zip(proto.output, results, strict=False) if name)

    def _initializer(self, tensor: onnx.TensorProto) -> Value:
        try:
            return read_tensor(tensor, self.source.folder)
        except Refusal as refusal:
            self.blockers.append(Blocker("", "", str(refusal)))
            return Poison()

    def _convert(self, proto: onnx.NodeProto, values: dict[str, Value]) -> tuple[Value, ...]:
        inputs = [values[name] if name else None for name in proto.input]
        if any(isinstance(value, Poison) for value in inputs):
            return tuple(Poison() for _ in proto.output)
        domain = standard(proto.domain)
        node = Node(proto, self.versions[domain], inputs, self.builder, self.dims, lambda graph: self._subgraph(graph, values))
        outer, self.builder.node = self.builder.node, node.label
        try:
            results = self._results(node, domain)
            if len(results) < sum(1 for name in proto.output if name):
                raise Refusal(f"output '{proto.output[len(results)]}' is not supported")
            return tuple(self._bind(result, name) for result, name in zip(results, proto.output, strict=False))
        except Blocked:
            return tuple(Poison() for _ in proto.output)
        except Refusal as refusal:
            reason = str(refusal)
        except ImpossibleTensor as error:
            reason = str(error)
        except MemoryError:
            reason = "its constants do not fit into memory"
        except (ValueError, TypeError, LookupError, ArithmeticError, tvm.error.InternalError) as error:  # e.g. of TVM's type inference
            reason = f"inconsistent with its inputs: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
        finally:
            self.builder.node = outer
        self.blockers.append(Blocker(node.label, f"{domain or 'ai.onnx'}::{node.op}", reason))
        return tuple(Poison() for _ in proto.output)

    def _results(self, node: Node, domain: str) -> tuple[Value, ...]:
        check_node(node)
        evaluate = find_evaluator(domain, node.op, node.opset)
        result: Value | tuple[Value, ...] | None = None
        if evaluate is not None and all(value is None or isinstance(value, Host) and value.dtype not in CARRIERS for value in node.inputs):
            result = evaluate(node)
        if result is None:
            convert = find_converter(domain, node.op, node.opset)
            if convert is None:
                raise Refusal("operator is supported only where its inputs follow from constants and input shapes")
            result = precision.convert(node, convert, domain)
        return result if isinstance(result, tuple) else (result,)

    def _bind(self, value: Value, name: str) -> Value:
        """A variable named after the source's output, unless the value is bound already."""
        if not name or isinstance(value, (Host, Stored, Sequence, Absent, Poison, relax.Var)):
            return value
        return self.builder.emit(value, name_hint=identifier(name))

    def _subgraph(self, graph: onnx.GraphProto, outer: dict[str, Value]) -> Subgraph:
        """A graph of a node's attribute: its names are its own, the outer ones are visible."""
        return Subgraph(graph, outer, self.versions, self._initializer, self._nodes, self.blockers)

    def _output(self, value: Value, info: onnx.ValueInfoProto) -> relax.Expr:
        """An output as a bound variable; a placeholder when something it needs was refused (the walk ends with the blockers then)."""
        if isinstance(value, Poison):
            return relax.const(0)
        if isinstance(value, (Host, Stored)) and value.dtype in CARRIERS:
            self.carried[info.name] = value.dtype
            value = to_carrier(value)
        node = Node(onnx.NodeProto(op_type="graph output", name=info.name, output=[info.name]), 1, [value], self.builder, self.dims, unavailable)
        try:
            tensor = node.tensor(0)
            node.shape(tensor)
            return tensor if isinstance(tensor, relax.Var) else node.emit(tensor)
        except Refusal as refusal:
            self.blockers.append(Blocker(info.name, "graph output", str(refusal)))
            return relax.const(0)

    def _output_spec(self, value: relax.Expr, name: str) -> TensorSpec:
        shape = self.dims.shape(value.ty.shape.values)
        return TensorSpec(
            name,
            tuple(dim if isinstance(dim, int) else str(dim) for dim in shape),
            self.carried.get(name, str(value.ty.dtype)),
            CARRIERS.get(self.carried.get(name, "")),
        )
