"""The backend of `torch.compile(model, backend="tcompile")`: every graph that Dynamo captures is compiled by tcompile, never left to eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import Blocker, UnsupportedModel


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile one captured graph for inference.

    Parameters and buffers of the model become weights, read once: a later change of them is not seen. Where Dynamo leaves a size open, each size that
    comes is compiled when it first comes. options: "target" (default "cpu"), "threads", "seed", as `tcompile.compile` takes them. Raises
    UnsupportedModel when the graph cannot be compiled; there is no silent fall-back to eager.
    """
    if torch.is_grad_enabled() and any(_is_trained(value) for value in (*graph.parameters(), *example_inputs)):
        raise UnsupportedModel([Blocker("", "torch.compile", "tcompile compiles inference only: call the model under torch.no_grad()")])
    specialised = _Specialised(graph, options or {})
    specialised.prepare([_concrete(value) for value in example_inputs])
    return specialised


def _is_trained(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) and value.requires_grad


def _is_weight(value: Any) -> bool:
    """True for a parameter, or a buffer: Dynamo marks both as static, while the caller's tensors come new with every call."""
    return isinstance(value, torch.nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


def _concrete(value: Any) -> Any:
    """An example input with its symbolic sizes replaced by those of the example."""
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, torch.Tensor) and not _is_weight(value):
        return torch.zeros([int(size) for size in value.shape], dtype=value.dtype)
    return value


class _Specialised:
    """One captured graph and its compiled form for every combination of input sizes met so far."""

    def __init__(self, graph: torch.fx.GraphModule, options: dict[str, Any]):
        self.graph = graph.eval()
        self.options = options
        self.weights: dict[int, Any] = {}
        self.compiled: dict[tuple[Any, ...], Any] = {}
        output = next(iter(graph.graph.find_nodes(op="output"))).args[0]
        self.is_tensor = [isinstance(item, torch.fx.Node) for item in output]

    def prepare(self, arguments: list[Any]) -> None:
        """Remember which arguments are weights, and compile for the sizes of the others."""
        self.weights = {position: value for position, value in enumerate(arguments) if isinstance(value, torch.Tensor) and _is_weight(value)}
        self._compile(arguments)

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        compiled = self.compiled.get(self._sizes(arguments)) or self._compile(arguments)
        inputs = [value.detach().contiguous() for position, value in enumerate(arguments) if self._is_input(position, value)]
        results = compiled(*inputs)
        tensors = iter(results if isinstance(results, tuple) else (results,))
        return tuple(torch.as_tensor(next(tensors)) if is_tensor else None for is_tensor in self.is_tensor)

    def _is_input(self, position: int, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and position not in self.weights

    def _sizes(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            tuple(value.shape) if isinstance(value, torch.Tensor) else value
            for position, value in enumerate(arguments)
            if position not in self.weights
        )

    def _compile(self, arguments: Sequence[Any]) -> Any:
        from ..targets.base import Target
        from .api import compile_program
        from .importers.torch import import_torch
        from .options import CompileOptions

        fixed = {position: value for position, value in enumerate(arguments) if not self._is_input(position, value)} | self.weights
        examples = [value for position, value in enumerate(arguments) if self._is_input(position, value)]
        module = _Bound(self.graph, fixed, len(arguments)).eval()
        with torch._guards.tracing(None):  # Dynamo's own trace, still open around a backend, would lend its symbolic sizes to the export
            program = import_torch(module, example_inputs=examples)
        options = dict(self.options)
        compiled = compile_program(program, Target.parse(options.pop("target", "cpu")), CompileOptions(**options))
        self.compiled[self._sizes(arguments)] = compiled
        return compiled


class _Bound(torch.nn.Module):
    """The graph with its weights and numbers bound; forward() takes the remaining inputs in order."""

    def __init__(self, graph: torch.fx.GraphModule, fixed: dict[int, Any], count: int):
        super().__init__()
        self.graph = graph
        self.count = count
        self.numbers = {position: value for position, value in fixed.items() if not isinstance(value, torch.Tensor)}
        self.names = {position: f"argument_{position}" for position in fixed if position not in self.numbers}
        for position, name in self.names.items():
            self.register_buffer(name, fixed[position].detach())

    def forward(self, *inputs: torch.Tensor) -> Any:
        remaining = iter(inputs)
        values = [
            self.numbers[position] if position in self.numbers else getattr(self, self.names[position]) if position in self.names else next(remaining)
            for position in range(self.count)
        ]
        return tuple(item for item in self.graph(*values) if item is not None)
