"""Control flow: a branch whose condition is known at import is walked in place."""

from __future__ import annotations

from ..node import Node
from ..registry import converter
from ..values import Value


@converter("If")
def choose(node: Node) -> tuple[Value, ...]:
    condition = bool(node.constant(0).reshape(()))
    return tuple(node.subgraph(node.attr("then_branch" if condition else "else_branch")))
