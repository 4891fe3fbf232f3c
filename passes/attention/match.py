"""Proves that a softmax between two matrix products is an attention that one pass over the keys computes.

As a cascade of Einstein sums (Nayak et al., "FuseMax", 2024):

    P[.., s, t] = sum_d Q[.., s, d] K[.., t, d]        S = f(P)        W = softmax_t(S)        O[.., s, e] = sum_t W[.., s, t] V[.., t, e]

Three facts make a running maximum and sum over t enough, so that neither S nor W has to exist as a whole:
1. f maps every score by itself: P -> scale * P + M, or a constant where a mask hides it; whatever only regroups leading dims is no obstacle;
2. the softmax normalises over t, the very axis that the second product sums over;
3. nobody else reads S or W.
Everything else about Q, K and V is irrelevant to the proof. `match` walks from the softmax to both products and says which fact fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...compiler.tvm import is_constant, relax
from .graph import Graph, scalar, shape

#: operators that a walk may pass on its way to a product, to tell an attention that does not fuse from a softmax that is none
_POINTWISE = {
    "add", "subtract", "multiply", "divide", "where", "reshape", "astype", "maximum", "minimum", "clip", "tanh", "isnan", "negative",
    "power", "squeeze", "expand_dims", "broadcast_to", "nn.dropout", "exp", "sigmoid",
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One change of the scores: scaled by a number, a mask added, or replaced by `fill` where a mask is `hidden_where`. dims: shape of the scores at that place."""

    kind: str
    dims: tuple[Any, ...] = ()
    factor: float = 1.0
    mask: Any = None
    fill: float = 0.0
    hidden_where: bool = False


@dataclass(frozen=True)
class Site:
    """An attention in the graph: q, k and v with their last two dims [S, D], [D, T] and [T, E], what happens to the scores from the product on, and the result's variable."""

    q: Any
    k: Any
    v: Any
    out: Any
    dims: tuple[Any, ...]
    terms: tuple[Term, ...] = field(default=())
    safe: bool = False
    #: shapes that the scores have on their way, the product's first
    shapes: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class Miss:
    """A softmax between two products that is not fused."""

    reason: str


def match(graph: Graph, softmax: relax.VarBinding) -> Site | Miss | None:
    """The attention around a softmax; None when it is not between two matrix products."""
    call = softmax.value
    if _product_before(graph, call.args[0]) is None or not _product_after(graph, softmax.var):
        return None
    dims = shape(call)
    if dims is None or str(call.ty.dtype) != "float32":
        return Miss("scores of unknown shape" if dims is None else f"scores are {call.ty.dtype}, not float32")
    if int(call.attrs.axis) % len(dims) != len(dims) - 1:
        return Miss(f"the softmax runs over axis {int(call.attrs.axis)}, not over the last one, the keys")
    before = _scores(graph, call.args[0])
    if isinstance(before, Miss):
        return before
    after = _probabilities(graph, softmax.var)
    if isinstance(after, Miss):
        return after
    product, terms, shapes = before
    out, v, safe = after
    return Site(product.args[0], product.args[1], v, out, tuple(shape(product) or ()), tuple(terms), safe, tuple(shapes))


def _product_before(graph: Graph, expr: Any, depth: int = 12) -> relax.Call | None:
    call = graph.call(expr)
    if call is None or depth == 0:
        return None
    if graph.name(call) == "matmul":
        return None if is_constant(graph.root(call.args[1])) else call
    if graph.name(call) not in _POINTWISE:
        return None
    return next((found for arg in call.args if (found := _product_before(graph, arg, depth - 1)) is not None), None)


def _product_after(graph: Graph, var: Any, depth: int = 6) -> bool:
    for user in graph.uses(var) if depth else ():
        name = graph.name(user.value) if isinstance(user.value, relax.Call) else ""
        if name == "matmul" or (name in _POINTWISE and _product_after(graph, user.var, depth - 1)):
            return True
    return False


def _scores(graph: Graph, expr: Any) -> tuple[relax.Call, list[Term], list[tuple[Any, ...]]] | Miss:
    """From the softmax's operand back to the first product: (product, changes from the product on, shapes from the product on). Fact 1, and 3 for S."""
    terms: list[Term] = []
    shapes: list[tuple[Any, ...]] = []
    while True:
        call, dims = graph.call(expr), shape(expr)
        if call is None or dims is None:
            return Miss("scores of unknown shape or origin")
        var = graph.root(expr)
        if len({user.var for user in graph.uses(var)}) != 1 or graph.escapes(var):
            return Miss(f"the scores '{var.name}' are used elsewhere")
        name = graph.name(call)
        shapes.append(tuple(dims))
        if name == "matmul":
            return call, terms[::-1], shapes[::-1]
        step = _step(graph, call, name, dims)
        if isinstance(step, Miss):
            return step
        expr, term = step
        if term is not None:
            terms.append(term)


def _step(graph: Graph, call: relax.Call, name: str, dims: Sequence[Any]) -> tuple[Any, Term | None] | Miss:
    """One operator between product and softmax: (the scores it changes, how)."""
    place = tuple(dims)
    if name == "reshape":
        before = shape(call.args[0])
        if before is None or not graph.same_dims(before[-2:], dims[-2:]):
            return Miss("a reshape mixes queries and keys")
        return call.args[0], None
    operands = [graph.root(arg) for arg in call.args]
    carriers = [
        position for position, arg in enumerate(operands) if _product_before(graph, arg) is not None and graph.same_dims(shape(arg) or (), dims)
    ]
    if name in ("multiply", "divide"):
        for position in (0, 1) if name == "multiply" else (1,):
            factor = scalar(operands[position])
            if factor:
                return operands[1 - position], Term("scale", factor=factor if name == "multiply" else 1.0 / factor)
        return Miss(f"the scores are {'divided' if name == 'divide' else 'multiplied'} by a tensor")
    if len(carriers) != 1:
        return Miss(f"'{name}' on the way from the product to the softmax does not map every score by itself")
    scores = operands[carriers[0]]
    if name == "add":
        return scores, Term("add", place, mask=operands[1 - carriers[0]])
    if name == "where" and carriers[0] != 0:
        fill = scalar(operands[3 - carriers[0]])
        if fill is None:
            return Miss("masked scores are replaced by a tensor")
        return scores, Term("replace", place, mask=operands[0], fill=fill, hidden_where=carriers[0] == 2)
    return Miss(f"'{name}' between the product and the softmax has no place in a running softmax")


def _probabilities(graph: Graph, var: Any) -> tuple[Any, Any, bool] | Miss:
    """From the softmax to the second product: (its variable, v, whether rows without a score are zeros). Facts 2 and 3."""
    safe = False
    while True:
        if graph.escapes(var):
            return Miss("the probabilities are an output")
        uses = graph.uses(var)
        calls = {user.var: user.value for user in uses}
        names = sorted(graph.name(call) if isinstance(call, relax.Call) else "" for call in calls.values())
        if names == ["isnan", "where"]:
            # what exporters make of torch's safe softmax
            where = next(user for user in uses if graph.name(user.value) == "where")
            test = graph.call(where.value.args[0], "isnan")
            if test is None or scalar(graph.root(where.value.args[1])) != 0.0 or not graph.root(where.value.args[2]).same_as(graph.root(var)):
                return Miss("the probabilities are used by more than the second product")
            var, safe = where.var, True
            continue
        if len(calls) != 1:
            return Miss(f"the probabilities are used by {len(calls)} operators")
        (user,) = {user.var: user for user in uses}.values()
        before, after = shape(var), shape(user.value)
        if names == ["reshape"] and before and after and graph.same_dims(before[-2:], after[-2:]):
            var = user.var
            continue
        if names != ["matmul"] or not graph.root(user.value.args[0]).same_as(graph.root(var)):
            return Miss(f"'{names[0]}' reads the probabilities before the second product, or that does not sum over the keys")
        return user.var, user.value.args[1], safe
