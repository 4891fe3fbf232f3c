"""From a Relax program of floats to nodes and views: one rule per operator, and every operator without one reported at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...compiler.errors import Blocker, UnsupportedModel
from ...compiler.program import Program
from ...compiler.tvm import is_constant, relax, tvm
from .nodes import Node, Refused, View, affine, in_order, linear, rows_of

#: a rule gets the call, its operands (views, arrays, or None for anything else) and the name of the source node
Rule = Callable[["Walk", Any, list[Any], str], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if name.startswith("tcompile.") else f"relax.{name}"] = function
        return function

    return register


class Walk:
    """The bindings of `main`, in order. input: the node of the one input; output: the view of the one output."""

    def __init__(self, program: Program):
        self.program = program
        self.values: dict[Any, Any] = {}
        self.blockers: list[Blocker] = []
        main = program.main
        if len(program.inputs) != 1 or len(program.outputs) != 1:
            raise UnsupportedModel(f"FPGA networks have one input and one output; this model has {len(program.inputs)} and {len(program.outputs)}")
        spec = program.inputs[0]
        if any(isinstance(dim, str) for dim in spec.shape):
            raise UnsupportedModel(
                f"FPGA networks have fixed shapes; '{spec}' has open dims: fix them, for example with --shape {spec.name}={_fixed(spec)}"
            )
        if spec.dtype != "float32":
            raise UnsupportedModel(f"FPGA networks take float32 inputs, which are quantised; '{spec}' is {spec.dtype}")
        size = int(np.prod(spec.shape))
        self.input = Node("input", [], size, lambda x: x, spec.name)
        self.values[main.params[0]] = View(self.input, np.arange(size).reshape([int(dim) for dim in spec.shape]))
        for block in main.body.blocks:
            for binding in block.bindings:
                self._bind(binding)
        result = self._value(main.body.body)
        if isinstance(result, tuple):
            result = result[0]
        if self.blockers:
            raise UnsupportedModel(self.blockers)
        if not isinstance(result, View):
            raise UnsupportedModel("the output does not depend on the input; there is nothing to compute on an FPGA")
        self.output_shape = result.shape
        try:
            node = in_order(result)
        except Refused as error:
            raise UnsupportedModel(f"the output: {error}") from error
        if node.kind == "input":
            node = Node("function", [node], node.size, lambda x: x, "", {"function": affine(1.0, 0.0)})
        self.output = node
        self.nodes = _live(self.output)
        self.output = _fuse_clips(self.nodes, self.output)
        self.nodes = _live(self.output)

    def _bind(self, binding: Any) -> None:
        expr = binding.value
        if not isinstance(expr, relax.Call):
            self.values[binding.var] = self._value(expr)
            return
        op = expr.op.name if isinstance(expr.op, tvm.ir.Op) else str(expr.op)
        source = self.program.node(binding.var.name)
        operands = [self._value(arg) for arg in expr.args]
        self.values[binding.var] = None
        try:
            if op not in RULES:
                raise Refused("no FPGA stage computes this operator")
            if any(operand is None and isinstance(arg, relax.Var) for operand, arg in zip(operands, expr.args, strict=True)):
                return  # made by something that was refused already
            self.values[binding.var] = RULES[op](self, expr, operands, source)
        except Refused as error:
            self.blockers.append(Blocker(source, op, str(error)))

    def _value(self, expr: Any) -> Any:
        if is_constant(expr):
            return np.asarray(expr.value.numpy())
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(item) for item in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            fields = self._value(expr.tuple_value)
            return None if fields is None else fields[expr.index]
        if isinstance(expr, relax.Var):
            return self.values.get(expr)
        return None


def _fixed(spec: Any) -> str:
    return "x".join("1" if isinstance(dim, str) else str(dim) for dim in spec.shape)


def _live(output: Node) -> list[Node]:
    """Every node that `output` needs, each after its inputs."""
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(output, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((source, False) for source in reversed(node.inputs))
    return order


def _fuse_clips(nodes: list[Node], output: Node) -> Node:
    """A clamp that alone reads a stage which rounds its sums moves into that stage's limits; returns the output afterwards."""
    readers: dict[int, list[Node]] = {}
    for node in nodes:
        for source in node.inputs:
            readers.setdefault(id(source), []).append(node)
    replaced: dict[int, Node] = {}
    for node in nodes:
        node.inputs = [replaced.get(id(source), source) for source in node.inputs]
        if node.kind != "function" or node.params["function"].kind != "clip":
            continue
        source = node.inputs[0]
        if source.kind in ("linear", "add", "matmul", "average") and len(readers[id(source)]) == 1 and not source.params.get("pinned"):
            low, high = node.params["function"].numbers
            source.clip = (max(low, source.clip[0]), min(high, source.clip[1]))
            source.params["pinned"] = node.params.get("pinned")
            replaced[id(node)] = source
    return replaced.get(id(output), output)


def per_channel(array: np.ndarray, view: View) -> np.ndarray | None:
    """A constant [N] in stream order when `array`, broadcast to the view, depends on the last dim of a linear node's stream alone."""
    if view.functions or view.node.kind != "linear" or view.index.size != view.node.size:
        return None
    try:
        whole = np.broadcast_to(array, view.shape)
    except ValueError:
        return None
    flat = np.empty(view.node.size)
    flat[view.index.ravel()] = whole.ravel()
    rows = flat.reshape(-1, view.node.params["weights"].shape[0])
    return rows[0] if (rows == rows[0]).all() else None


def lower_to_nodes(program: Program) -> Walk:
    """The nodes of a program. Raises UnsupportedModel with every operator that has no stage."""
    from . import rules, rules_codes, rules_elementwise  # noqa: F401  registers them

    return Walk(program)


__all__ = ["RULES", "Refused", "Walk", "in_order", "linear", "lower_to_nodes", "per_channel", "rows_of", "rule"]
