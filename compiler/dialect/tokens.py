"""Operators on the tokens of a batch, whose results are in range by construction, so that no target has to check the indices they make:

`tcompile.select_tokens`    which tokens to keep, by score
`tcompile.match_tokens`     which tokens to keep and where the others go, by likeness (ToMe)
`tcompile.take_tokens`      those tokens of a tensor

How many stay is part of the operator: `kept_count`. Token 0, the class token, always stays, and those that stay keep their order.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax, te, tirx, tvm


def kept_count(tokens: Any, keep: Fraction, halves: bool = False) -> Any:
    """ceil(keep * tokens), an int or an expression. halves: not less than half and the class token, all that one bipartite matching can merge."""
    if isinstance(tokens, tirx.IntImm):
        tokens = int(tokens)
    if isinstance(tokens, int):
        count = -(-tokens * keep.numerator // keep.denominator)
        return max(count, tokens // 2 + 1) if halves else count
    count = tvm.sym.Analyzer().simplify(tirx.floordiv(tokens * keep.numerator + (keep.denominator - 1), tirx.IntImm("int64", keep.denominator)))
    return tirx.max(count, tirx.floordiv(tokens, tirx.IntImm("int64", 2)) + 1) if halves else count


def select_tokens(scores: relax.Expr, keep: Fraction) -> relax.Call:
    """scores: [B, N] -> [B, kept_count(N)] int64, ascending: token 0 and those with the highest scores, the earlier one where two are equal."""
    return relax.Call(SELECT, [scores], _ratio(keep))


def match_tokens(metric: relax.Expr, keep: Fraction, seen: relax.Expr | None = None) -> relax.Call:
    """metric: [B, N, D], seen: [B, N] float32, 0 for tokens that a mask hides -> (indices [B, K] int64 ascending, destination [B, N] int64), K = kept_count(N, halves=True).

    Bipartite soft matching (Bolya et al., Token Merging, ICLR 2023): every even token looks for the odd token of highest cosine similarity; the N - K even ones
    with the best match go there. destination: the token that each one ends up in, itself for those that stay. Hidden even tokens leave first and go nowhere
    (destination: themselves); nobody goes to a hidden one.
    """
    return relax.Call(MATCH, [metric] if seen is None else [metric, seen], _ratio(keep))


def take_tokens(x: relax.Expr, indices: relax.Expr, axis: int) -> relax.Call:
    """x: [B or 1, ..., N at `axis`, ...], indices: [B, K] in 0..N-1 -> [B, ..., K, ...]. The indices are not checked: give it those of the operators above."""
    return relax.Call(TAKE, [x, indices], operator_attrs(axis=axis))


def _ratio(keep: Fraction) -> Any:
    return operator_attrs(numerator=keep.numerator, denominator=keep.denominator)


def _keep(call: Any) -> Fraction:
    return Fraction(int(call.attrs["numerator"]), int(call.attrs["denominator"]))


def _infer_select(builder: Any, call: Any) -> Any:
    batch, tokens = call.args[0].ty.shape
    return relax.TensorType([batch, kept_count(tokens, _keep(call))], "int64")


def _infer_match(builder: Any, call: Any) -> Any:
    batch, tokens, _ = call.args[0].ty.shape
    return relax.TupleType([relax.TensorType([batch, kept_count(tokens, _keep(call), True)], "int64"), relax.TensorType([batch, tokens], "int64")])


def _infer_take(builder: Any, call: Any) -> Any:
    shape, (batch, kept), axis = list(call.args[0].ty.shape), call.args[1].ty.shape, int(call.attrs["axis"])
    if not 0 < axis < len(shape):
        raise ValueError(f"tcompile.take_tokens: axis {axis} of a tensor with {len(shape)} dims")
    return relax.TensorType([batch, *shape[1:axis], kept, *shape[axis + 1 :]], call.args[0].ty.dtype)


def _int(value: Any) -> Any:
    return tirx.Cast("int32", value)


def _ranks(scores: Any) -> Any:
    """[B, N] int32: how many tokens come before this one by score; token 0 is first, NaN is beaten by none but token 0."""

    def rank(b: Any, i: Any) -> Any:
        j = te.reduce_axis((0, scores.shape[1]), "j")
        before = tirx.Or(scores[b, j] > scores[b, i], tirx.And(scores[b, j] == scores[b, i], j < i))
        return te.sum(_int(tirx.And(i > 0, tirx.Or(before, j == 0))), axis=j)

    return te.compute(scores.shape, rank, name="rank")


def _counted(kept: Any) -> Any:
    """[B, N] 0 or 1 -> [B, N] int32: how many are kept up to this token, itself included."""

    def count(b: Any, i: Any) -> Any:
        j = te.reduce_axis((0, kept.shape[1]), "j")
        return te.sum(tirx.Select(j <= i, kept[b, j], tirx.IntImm("int32", 0)), axis=j)

    return te.compute(kept.shape, count, name="counted")


def _indices(counted: Any, kept: Any) -> Any:
    """[B, kept] int64: the token at which the count passes k. At least `kept` tokens are kept, so each exists, and all differ."""

    def index(b: Any, k: Any) -> Any:
        j = te.reduce_axis((0, counted.shape[1]), "j")
        return te.sum(_int(counted[b, j] <= _int(k)), axis=j)

    return te.compute((counted.shape[0], kept), index, name="index")


def _compacted(builder: Any, kept: Any, count: Any) -> Any:
    """Indices [B, count] of the ones in kept: [B, N] int32."""
    counted = builder.emit_te(_counted, kept, primfunc_name_hint="count_tokens")
    found = builder.emit_te(_indices, counted, count, primfunc_name_hint="token_indices")
    return builder.call_te(
        lambda x: te.compute(x.shape, lambda b, k: tirx.Cast("int64", x[b, k]), name="index64"), found, primfunc_name_hint="token_indices"
    )


def _kept(builder: Any, scores: Any, count: Any) -> Any:
    """[B, N] int32: 1 for the `count` tokens that stay, and for those with a score of NaN."""
    ranks = builder.emit_te(_ranks, scores, primfunc_name_hint="rank_tokens")

    def kept(ranks: Any, count: Any) -> Any:
        return te.compute(ranks.shape, lambda b, i: _int(ranks[b, i] < _int(count)), name="kept")

    return builder.emit_te(kept, ranks, count, primfunc_name_hint="kept_tokens")


def _legalize_select(builder: Any, call: Any) -> Any:
    count = call.ty.shape[1]
    return _compacted(builder, _kept(builder, call.args[0], count), count)


def _stay(x: Any) -> Any:
    """[B, N, N] similarities -> [B, N] how much a token wants to stay: 3 for odd ones and token 0, for others minus the best similarity to an odd one."""

    def value(b: Any, i: Any) -> Any:
        j = te.reduce_axis((0, x.shape[2]), "j")
        merges = tirx.And(tirx.And(i > 0, tirx.floormod(i, 2) == 0), tirx.floormod(j, 2) == 1)
        return te.min(tirx.Select(merges, -x[b, i, j], tirx.FloatImm(str(x.dtype), 3.0)), axis=j)

    return te.compute(x.shape[:2], value, name="stay")


def _partner(x: Any, stay: Any) -> Any:
    """[B, N] int32: the first odd token with that best similarity, N where there is none."""

    def value(b: Any, i: Any) -> Any:
        j = te.reduce_axis((0, x.shape[2]), "j")
        return te.min(tirx.Select(tirx.And(tirx.floormod(j, 2) == 1, -x[b, i, j] <= stay[b, i]), _int(j), _int(x.shape[2])), axis=j)

    return te.compute(stay.shape, value, name="partner")


def _destination(kept: Any, partner: Any, *seen: Any) -> Any:
    """[B, N] int64: where each token ends up."""
    tokens = _int(kept.shape[1])

    def value(b: Any, i: Any) -> Any:
        goes = tirx.And(kept[b, i] == 0, partner[b, i] < tokens)
        if seen:
            goes = tirx.And(goes, seen[0][b, i] > 0.5)
        return tirx.Cast("int64", tirx.Select(goes, partner[b, i], _int(i)))

    return te.compute(kept.shape, value, name="destination")


def _legalize_match(builder: Any, call: Any) -> Any:
    op, emit, metric = relax.op, builder.emit, call.args[0]
    length = emit(op.sqrt(emit(op.sum(emit(op.multiply(metric, metric)), axis=-1, keepdims=True))))
    unit = emit(op.divide(metric, emit(op.maximum(length, relax.const(np.float32(1e-12), "float32")))))
    scores = emit(op.matmul(unit, emit(op.permute_dims(unit, [0, 2, 1]))))
    if len(call.args) == 2:
        batch, tokens = call.args[1].ty.shape
        row, column = (emit(op.reshape(call.args[1], shape)) for shape in ([batch, tokens, 1], [batch, 1, tokens]))
        half = relax.const(np.float32(0.5), "float32")
        # a hidden token agrees with all (2), a visible one with no hidden one (-3: it would rather stay)
        scores = emit(op.where(emit(op.greater(column, half)), scores, relax.const(np.float32(-3), "float32")))
        scores = emit(op.where(emit(op.greater(row, half)), scores, relax.const(np.float32(2), "float32")))
    stay = builder.emit_te(_stay, scores, primfunc_name_hint="match_tokens")
    partner = builder.emit_te(_partner, scores, stay, primfunc_name_hint="match_tokens")
    count = call.ty.fields[0].shape[1]
    kept = _kept(builder, stay, count)
    destination = builder.emit_te(_destination, kept, partner, *call.args[1:], primfunc_name_hint="destination")
    return relax.Tuple([emit(_compacted(builder, kept, count)), destination])


def _legalize_take(builder: Any, call: Any) -> Any:
    axis = int(call.attrs["axis"])

    def take(x: Any, indices: Any) -> Any:
        single = isinstance(x.shape[0], tirx.IntImm) and int(x.shape[0]) == 1

        def value(b: Any, *rest: Any) -> Any:
            return x[(0 if single else b, *rest[: axis - 1], indices[b, rest[axis - 1]], *rest[axis:])]

        return te.compute([indices.shape[0], *x.shape[1:axis], indices.shape[1], *x.shape[axis + 1 :]], value, name="take_tokens")

    return builder.call_te(take, *call.args, primfunc_name_hint="take_tokens")


def select_reference(scores: np.ndarray, keep: Fraction) -> np.ndarray:
    """`select_tokens` in numpy."""
    order = np.argsort(-scores[:, 1:], axis=1, kind="stable") + 1
    count = kept_count(scores.shape[1], keep)
    return np.sort(np.concatenate([np.zeros((len(scores), 1), np.int64), order[:, : count - 1]], 1), axis=1)


def match_reference(metric: np.ndarray, keep: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """`match_tokens` in numpy."""
    tokens = metric.shape[1]
    unit = metric / np.maximum(np.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    scores = unit[:, 2::2] @ unit[:, 1::2].transpose(0, 2, 1)
    destination = np.tile(np.arange(tokens), (len(metric), 1))
    for row, score in enumerate(scores):
        best = score.max(1, initial=-3.0)
        for even in np.argsort(-best[::-1], kind="stable")[: tokens - kept_count(tokens, keep, True)]:
            even = len(best) - 1 - even
            destination[row, 2 * even + 2] = 2 * score[even].argmax() + 1
    indices = [np.flatnonzero(row == np.arange(tokens)) for row in destination]
    return np.stack(indices), destination


SELECT = register_operator("tcompile.select_tokens", ("scores",), _infer_select, _legalize_select)
MATCH = register_operator("tcompile.match_tokens", ("metric", "seen"), _infer_match, _legalize_match)
TAKE = register_operator("tcompile.take_tokens", ("x", "indices"), _infer_take, _legalize_take)
