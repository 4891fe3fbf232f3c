"""Masks: the changes of the scores on their way to the softmax as one operand of the fused operator, as small as it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...compiler.tvm import is_constant, relax, tirx
from .graph import Graph, equal, is_unit, less, scalar, shape
from .match import Miss, Term

#: at or below this a score counts as hidden: adding any finite score to it changes nothing, and its exponential is 0 beside any other
HIDDEN = -1e30

Emit = Callable[[Any], Any]
#: of truth values the same
AND = ("logical_and", "bitwise_and")


def combine(graph: Graph, emit: Emit, terms: Sequence[Term], home: Sequence[Any]) -> tuple[float, Any, float] | Miss:
    """(scale, mask or None, fill) with f(P) = scale * P + mask, or, for a boolean mask, P or `fill`. home: the shape [.., S, T] that masks are brought to.

    A replacement joins others as an addition of `fill`, which is the same when that is so low that a score beside it is lost in rounding.
    """
    scale, mask = 1.0, None
    pending: tuple[Any, float] | None = None  # a boolean mask that nothing has followed yet

    def settled(mask: Any, pending: tuple[Any, float] | None) -> Any:
        if pending is None:
            return mask
        seen, fill = pending
        return emit(relax.op.where(seen, relax.const(0.0, "float32") if mask is None else mask, relax.const(fill, "float32")))

    for term in terms:
        if pending is not None and pending[1] > HIDDEN:
            return Miss(f"scores are replaced by {pending[1]:g}, and changed again after that")
        if term.kind == "scale":
            mask, pending = settled(mask, pending), None
            scale *= term.factor
            mask = mask if mask is None else emit(relax.op.multiply(mask, relax.const(term.factor, "float32")))
            continue
        small = narrow(graph, emit, term.mask)
        own = _at_home(emit, small, term.dims, home)
        if own is None:
            return Miss("a mask's dims do not follow the regrouping of the scores")
        if term.kind == "add":
            mask, pending = settled(mask, pending), None
            mask = own if mask is None else emit(relax.op.add(mask, own))
            continue
        seen = emit(relax.op.logical_not(own)) if term.hidden_where else own
        if mask is None and pending is None:
            pending = (seen, term.fill)
        elif term.fill > HIDDEN:
            return Miss(f"scores that a mask has changed are replaced by {term.fill:g}")
        else:
            mask, pending = settled(mask, pending), (seen, term.fill)
    if pending is None:
        return scale, mask, -math.inf
    if mask is None and pending[1] != 0.0:
        return scale, pending[0], pending[1]
    if pending[1] > HIDDEN:
        return Miss(f"scores are replaced by {pending[1]:g}")
    return scale, settled(mask, pending), -math.inf


def narrow(graph: Graph, emit: Emit, mask: Any) -> Any:
    """A tensor that broadcasts to the same values, without the axes along which it repeats itself: a padding mask that an export spreads over all queries."""
    mask = graph.root(mask)
    if is_constant(mask):
        return _narrow_constant(mask)
    call = graph.call(mask)
    if call is None:
        return mask
    name = graph.name(call)
    if name == "broadcast_to":
        return narrow(graph, emit, call.args[0])
    if name in AND:
        a, b = (graph.root(arg) for arg in call.args)
        for one, other in ((a, b), (b, a)):
            if scalar(one) == 1.0:
                return narrow(graph, emit, other)
        return mask
    if name == "where" and all(scalar(graph.root(arg)) is not None for arg in call.args[1:]):
        condition = narrow(graph, emit, call.args[0])
        if condition is not graph.root(call.args[0]):
            return emit(relax.op.where(condition, *(relax.const(scalar(graph.root(arg)), str(arg.ty.dtype)) for arg in call.args[1:])))
    return mask


def _narrow_constant(mask: Any) -> Any:
    array = mask.value.numpy()
    for axis in range(array.ndim):
        first = array.take([0], axis=axis)
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return mask if array.shape == mask.value.numpy().shape else relax.const(np.ascontiguousarray(array), str(mask.ty.dtype))


def conjuncts(graph: Graph, mask: Any) -> list[Any]:
    """The masks all of which have to let a key be seen, of a boolean one."""
    call = graph.call(mask, *AND)
    return [graph.root(mask)] if call is None else [each for arg in call.args for each in conjuncts(graph, arg)]


def window_of(mask: Any, fill: float) -> tuple[int, int] | None:
    """(before, after) where a constant mask hides exactly the keys that are farther from a query than that, by so low a number that they count for nothing; None for other masks.

    Where a query has no key at all, only -inf counts for nothing. A mask of padding, the same for all queries, is none.
    """
    if not is_constant(mask):
        return None
    array = mask.value.numpy()
    if array.ndim < 2 or 1 in array.shape[-2:] or math.prod(array.shape[:-2]) != 1:
        return None
    array = array.reshape(array.shape[-2:])
    seen = array if array.dtype == bool else array > HIDDEN
    lowest = fill if array.dtype == bool else array.max(where=~seen, initial=-math.inf)
    if not lowest <= HIDDEN or (array.dtype != bool and array[seen].any()) or not seen.any():
        return None
    ahead = np.arange(seen.shape[1]) - np.arange(seen.shape[0])[:, None]
    before, after = int(-ahead.min(where=seen, initial=seen.shape[1])), int(ahead.max(where=seen, initial=-seen.shape[0]))
    exact = before >= 0 and after >= 0 and bool((seen == ((ahead >= -before) & (ahead <= after))).all())
    return (before, after) if exact and (lowest == -math.inf or bool(seen.any(axis=1).all())) else None


def _at_home(emit: Emit, mask: Any, dims: Sequence[Any], home: Sequence[Any]) -> Any:
    """A mask of scores with the shape `dims` as one of scores with the shape `home`, which are the same in other groups of leading dims; None if it cannot be."""
    own = shape(mask)
    if own is None or len(own) > len(dims):
        return None
    own = [tirx.const(1, "int64")] * (len(dims) - len(own)) + own
    groups = _groups(list(dims[:-2]), list(home[:-2]))
    if groups is None:
        return None
    wanted, target = list(own), []
    for mine, theirs in groups:
        part = [own[axis] for axis in mine]
        if all(is_unit(dim) for dim in part):
            target += [tirx.const(1, "int64")] * len(theirs)
            continue
        for axis in mine:
            wanted[axis] = dims[axis]
        target += [home[axis] for axis in theirs]
    target += own[-2:]
    if not all(str(a) == str(b) for a, b in zip(wanted, own, strict=True)):
        mask = emit(relax.op.broadcast_to(mask, wanted))
    if len(target) == len(shape(mask) or ()) and [str(dim) for dim in target] == [str(dim) for dim in wanted]:
        return mask
    if is_constant(mask):
        return relax.const(mask.value.numpy().reshape([int(dim) for dim in target]), str(mask.ty.dtype))
    return emit(relax.op.reshape(mask, target))


def _groups(ours: list[Any], theirs: list[Any]) -> list[tuple[list[int], list[int]]] | None:
    """Runs of axes of two shapes that have the same product, as short as they can be."""
    found = []
    i = j = 0
    while i < len(ours) or j < len(theirs):
        mine, other = [i] if i < len(ours) else [], [j] if j < len(theirs) else []
        i, j = i + len(mine), j + len(other)
        while not equal(_product(ours, mine), _product(theirs, other)):
            grow_ours = i < len(ours) and (j >= len(theirs) or len(ours) - i > len(theirs) - j or less(_product(ours, mine), _product(theirs, other)))
            if grow_ours:
                mine.append(i)
                i += 1
            elif j < len(theirs):
                other.append(j)
                j += 1
            else:
                return None
        found.append((mine, other))
    return found


def _product(dims: Sequence[Any], axes: Sequence[int]) -> Any:
    return math.prod((dims[axis] for axis in axes), start=tirx.const(1, "int64"))
