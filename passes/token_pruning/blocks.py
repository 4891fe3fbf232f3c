"""The places where tokens can leave: attention blocks whose result joins a residual stream [B, N, C] along an axis of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.dialect import attention
from ...compiler.errors import Blocker
from ...compiler.tvm import Constant, relax
from .axes import Axis, Unfollowable, dims, follow, layouts, name_of, operands, same, shown

#: what relates the position of one token to that of another
_COMPARISONS = ("relax.less", "relax.less_equal", "relax.greater", "relax.greater_equal", "relax.tril", "relax.triu")
#: an additive mask of no more than this hides a key
_HIDDEN = -1e4


@dataclass(frozen=True)
class Block:
    """attention: the variable of the attention's result. joined: the variable of residual + attention [B, N, C]. tokens: N."""

    attention: Any
    joined: Any
    tokens: Any


def bindings(function: Any) -> list[Any]:
    """All bindings of a function in order."""
    return [binding for block in function.body.blocks for binding in block.bindings]


def find_blocks(function: Any, source: Any) -> tuple[list[Block], list[Blocker]]:
    """Blocks in the order of the program, and why other attention operators are none. source: variable name -> name of its source node."""
    steps = bindings(function)
    found: list[Block] = []
    reasons: list[Blocker] = []
    for place, binding in enumerate(steps):
        if name_of(getattr(binding, "value", None)) != attention.NAME:
            continue
        try:
            found.append(_block(steps, place))
        except Unfollowable as reason:
            reasons.append(Blocker(source(binding.var.name), "Attention", str(reason)))
    return found, reasons


def _block(steps: Sequence[Any], place: int) -> Block:
    call = steps[place].value
    attrs = attention.attrs_of(call)
    if max(attrs.before, attrs.after) >= 0:
        raise Unfollowable("its queries see a window of neighbouring keys, and tokens that leave would change who is whose neighbour")
    if attrs.causal or len(call.args) == 4 and _may_be_causal(steps, place, call.args[3]):
        raise Unfollowable(
            "it is causal, or its mask compares positions while running: every token of a decoder predicts its successor, so none can be dropped"
        )
    places = [layout.index("S") for layout in layouts(call)]
    tokens, keys = (dims(arg)[s] for arg, s in zip(call.args[:2], places, strict=False))
    if not same(tokens, keys):
        raise Unfollowable(f"its {shown(tokens)} queries look at {shown(keys)} keys: it is no self-attention")
    before = _ancestors(steps, place)
    trail = Trail({steps[place].var: {places[3]: Axis()}}, tokens)
    batch = Trail({steps[place].var: {0: Axis()}}, dims(call)[0])
    for binding in steps[place + 1 :]:
        axes = trail.step(binding)
        batch.step(binding)
        if axes is None or name_of(binding.value) != "relax.add":
            continue
        residual = next((arg for arg in binding.value.args if arg in before), None)
        if residual is None:
            continue
        shape = dims(binding.var)
        if len(shape) != 3 or list(axes) != [1] or not axes[1].plain or 0 not in batch.values.get(binding.var, {}):
            raise Unfollowable("its result joins the residual stream in a form other than [batch, tokens, channels]")
        _feeds(steps[:place], residual, call, places, tokens)
        return Block(steps[place].var, binding.var, tokens)
    raise Unfollowable(trail.reason or "its result is not added to a residual stream along the tokens")


def _may_be_causal(steps: Sequence[Any], place: int, mask: Any) -> bool:
    """A constant mask that hides whatever comes after a query, or one that is computed by comparing queries' positions with those of keys."""
    if isinstance(mask, Constant):
        values = mask.value.numpy()
        queries, keys = values.shape[-2:]
        hidden = ~values if values.dtype == bool else values <= _HIDDEN
        return queries == keys > 1 and bool(hidden[..., np.triu(np.ones((queries, keys), bool), 1)].all())
    before = _ancestors(steps[: place + 1], place, [mask])
    return any(binding.var in before and name_of(binding.value) in _COMPARISONS and _is_table(binding.var) for binding in steps[:place])


def _is_table(var: Any) -> bool:
    """More than one row and more than one column."""
    shape = dims(var)
    return len(shape) >= 2 and not same(shape[-1], 1) and not same(shape[-2], 1)


def _feeds(steps: Sequence[Any], residual: Any, call: Any, places: Sequence[int], tokens: Any) -> None:
    """Queries, keys and values are made from the residual stream, token by token."""
    trail = Trail({residual: {1: Axis()}}, tokens)
    for binding in steps:
        trail.step(binding)
    for name, arg, s in zip(("queries", "keys", "values"), call.args, places, strict=False):
        if s not in trail.values.get(arg, {}):
            raise Unfollowable(
                f"its {name} are not made token by token from the residual stream that it joins" + (f": {trail.reason}" if trail.reason else "")
            )


def _ancestors(steps: Sequence[Any], place: int, of: Sequence[Any] | None = None) -> set[Any]:
    """What the operands of a step, or the variables `of`, are computed from, themselves included."""
    wanted = set(operands(steps[place].value) if of is None else of)
    for binding in reversed(steps[:place]):
        if binding.var in wanted:
            value = binding.value
            if isinstance(value, relax.Call):
                wanted.update(arg for arg in operands(value) if not isinstance(arg, Constant))
            elif isinstance(value, relax.TupleGetItem):
                wanted.add(value.tuple_value)
            elif isinstance(value, relax.Var):
                wanted.add(value)
    return wanted


class Trail:
    """Follows an axis from where it is known through the bindings after it. reason: why it was lost the last time."""

    def __init__(self, values: dict[Any, dict[int, Axis]], tokens: Any):
        self.values, self.tokens, self.reason = values, tokens, ""
        self.tuples: dict[Any, list[dict[int, Axis]]] = {}

    def step(self, binding: Any) -> dict[int, Axis] | None:
        """The axes that the binding's variable holds; None where it holds none."""
        value = binding.value
        axes: dict[int, Axis] | None = None
        if isinstance(value, relax.Var):
            axes = self.values.get(value)
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value in self.tuples:
            axes = self.tuples[value.tuple_value][value.index]
        elif isinstance(value, relax.Call):
            tagged = [self.values.get(arg, {}) for arg in operands(value)]
            if any(tagged):
                try:
                    results = follow(value, tagged, self.tokens).results
                except Unfollowable as reason:
                    self.reason = f"the tokens cannot be followed through {name_of(value)}: {reason}"
                    return None
                axes = results[0]
                if len(results) > 1:
                    self.tuples[binding.var] = results
                    return None
        if axes:
            self.values[binding.var] = axes
        return axes or None
