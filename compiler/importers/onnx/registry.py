"""Who converts what: converters to Relax, and evaluators of nodes whose inputs are all known at import."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .values import Host, Value

if TYPE_CHECKING:
    from .node import Node

Converter = Callable[["Node"], "Value | tuple[Value, ...]"]
Evaluator = Callable[["Node"], "Host | tuple[Host, ...] | None"]

#: (domain, operator) -> [(first opset with the converter's meaning, converter)], newest first
_CONVERTERS: dict[tuple[str, str], list[tuple[int, Converter]]] = {}
#: standard operator -> evaluator
_EVALUATORS: dict[str, Evaluator] = {}


def converter(*operators: str, since: int = 1, domain: str = "") -> Callable[[Converter], Converter]:
    """Register a converter for opsets from `since` on, up to the next registered one of the same operator.

    It returns the output's value, or a tuple with one value per output; Relax expressions are bound by the walk under the names of the outputs.
    """

    def register(function: Converter) -> Converter:
        for operator in operators:
            versions = _CONVERTERS.setdefault((domain, operator), [])
            versions.append((since, function))
            versions.sort(key=lambda entry: -entry[0])
        return function

    return register


def evaluator(*operators: str) -> Callable[[Evaluator], Evaluator]:
    """Register an evaluator: called first when all inputs are host values. None means that the tensor converter has to take the node."""

    def register(function: Evaluator) -> Evaluator:
        for operator in operators:
            _EVALUATORS[operator] = function
        return function

    return register


def find_converter(domain: str, operator: str, opset: int) -> Converter | None:
    return next((function for since, function in _CONVERTERS.get((domain, operator), ()) if since <= opset), None)


def find_evaluator(domain: str, operator: str) -> Evaluator | None:
    return _EVALUATORS.get(operator) if domain == "" else None


def oldest_opset(domain: str, operator: str) -> int | None:
    """The first opset an operator is converted from; None for an unknown operator."""
    versions = _CONVERTERS.get((domain, operator))
    return versions[-1][0] if versions else None
