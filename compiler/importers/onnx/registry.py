"""Who converts what: converters to Relax, and evaluators of nodes whose inputs are all known at import."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .values import Host, Value

if TYPE_CHECKING:
    from .node import Node

Converter = Callable[["Node"], "Value | tuple[Value, ...]"]
StorageConverter = Callable[["Node"], "Value | None"]
Evaluator = Callable[["Node"], "Host | tuple[Host, ...] | None"]

#: (domain, operator) -> [(first opset with the converter's meaning, converter)], newest first
_CONVERTERS: dict[tuple[str, str], list[tuple[int, Converter]]] = {}
#: standard operator -> (first opset with the evaluator's meaning, evaluator)
_EVALUATORS: dict[str, tuple[int, Evaluator]] = {}
#: standard operator -> converter that is called first
_STORAGE_CONVERTERS: dict[str, StorageConverter] = {}


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


def evaluator(*operators: str, since: int = 1) -> Callable[[Evaluator], Evaluator]:
    """Register an evaluator for opsets from `since` on: called first when all inputs are host values.

    None means that the tensor converter has to take the node.
    """

    def register(function: Evaluator) -> Evaluator:
        for operator in operators:
            _EVALUATORS[operator] = (since, function)
        return function

    return register


def storage_converter(*operators: str) -> Callable[[StorageConverter], StorageConverter]:
    """Register a converter that is called first, and sees storage types as they are. None means that the ordinary converter has to take the node."""

    def register(function: StorageConverter) -> StorageConverter:
        for operator in operators:
            _STORAGE_CONVERTERS[operator] = function
        return function

    return register


def find_storage_converter(domain: str, operator: str) -> StorageConverter | None:
    return _STORAGE_CONVERTERS.get(operator) if domain == "" else None


def find_converter(domain: str, operator: str, opset: int) -> Converter | None:
    return next((function for since, function in _CONVERTERS.get((domain, operator), ()) if since <= opset), None)


def find_evaluator(domain: str, operator: str, opset: int) -> Evaluator | None:
    since, function = _EVALUATORS.get(operator, (1, None))
    return function if domain == "" and since <= opset else None


def oldest_opset(domain: str, operator: str) -> int | None:
    """The first opset an operator is converted from; None for an unknown operator."""
    versions = _CONVERTERS.get((domain, operator))
    return versions[-1][0] if versions else None


def operators() -> list[tuple[str, str]]:
    """(domain, operator) of everything that has a converter, or a value at import."""
    return sorted({*_CONVERTERS, *(("", operator) for operator in _EVALUATORS)})
