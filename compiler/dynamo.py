"""The backend of `torch.compile(model, backend="tcompile")`: every graph that Dynamo captures is compiled by tcompile, never left to eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .errors import Blocker, ToolchainError, UnsupportedModel

try:
    import torch
except ImportError as error:  # only torch itself loads this module, through the entry point
    raise ToolchainError("the torch.compile backend needs torch: run `pip install tcompile[torch]`") from error


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile one captured graph for inference on the host CPU.

    graph: parameters are its own or among its inputs; both become weights of the artifact, read once: a later change of them is not seen. A dynamic size comes
    as a number among the inputs: it is fixed at the example's, and Dynamo captures the graph again (it guards on it) when another comes.
    options: "target", "threads", "seed", as `tcompile.compile` takes them. Raises UnsupportedModel when the graph cannot be compiled; there is no
    silent fall-back to eager.
    """
    from ..targets.base import Target
    from .api import compile_program
    from .importers.torch import import_torch
    from .options import CompileOptions

    if torch.is_grad_enabled() and any(isinstance(value, torch.nn.Parameter) and value.requires_grad for value in _tensors(graph, example_inputs)):
        raise UnsupportedModel([Blocker("", "torch.compile", "tcompile compiles inference only: call the model under torch.no_grad()")])
    bound = _Bound(graph, example_inputs)
    program = import_torch(bound.eval(), example_inputs=bound.examples)
    chosen = dict(options or {})
    compiled = compile_program(program, Target.parse(chosen.pop("target", "cpu")), CompileOptions(**chosen))

    def run(*arguments: Any) -> tuple[Any, ...]:
        results = compiled(*(arguments[position].contiguous() for position in bound.positions))
        results = results if isinstance(results, tuple) else (results,)
        tensors = iter(value if isinstance(value, torch.Tensor) else torch.from_numpy(value) for value in results)
        return tuple(next(tensors) if is_tensor else None for is_tensor in bound.outputs)

    return run


def _tensors(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    return [*graph.parameters(), *example_inputs]


class _Bound(torch.nn.Module):
    """The graph with its weights and sizes bound: forward() takes the remaining inputs, plain tensors, at `positions` of the graph's inputs."""

    def __init__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]):
        super().__init__()
        self.graph = graph
        self.fixed = list(example_inputs)
        self.positions: list[int] = []
        self.examples: list[torch.Tensor] = []
        for position, value in enumerate(example_inputs):
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(f"weight_{position}", value)
            elif isinstance(value, torch.Tensor):
                self.positions.append(position)
                self.examples.append(torch.zeros([int(size) for size in value.shape], dtype=value.dtype))
            else:
                self.fixed[position] = int(value) if isinstance(value, torch.SymInt) else value
        node = next(iter(graph.graph.find_nodes(op="output")))
        self.outputs = [isinstance(argument, torch.fx.Node) for argument in node.args[0]]

    def forward(self, *inputs: torch.Tensor) -> Any:
        values = list(self.fixed)
        for position, value in zip(self.positions, inputs, strict=True):
            values[position] = value
        return self.graph(*values)
