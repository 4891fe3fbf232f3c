"""Attention (opset 23 and later): the dialect's operator, or Relax operators where intermediate scores are changed or given out."""

from __future__ import annotations

import math

import numpy as np

from ....dialect.attention import attention
from ....tvm import relax
from ..load import dtype_name
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal

_SWAPPED = [0, 2, 1, 3]


@converter("Attention", since=23)
def standard_attention(node: Node) -> tuple[relax.Expr, ...]:
    """q [B, H, S, D], k [B, Hk, T, D], v [B, Hk, T, E], or with heads packed into the last of three dims; results: out, present k and v, scores.

    A query that no key may be seen by gives zeros. Boolean masks, `is_causal`, the window and `nonpad_kv_seqlen` all hide keys; a float mask is added.
    """
    q, k, v = (node.tensor(index) for index in range(3))
    packed = node.rank(q) == 3
    if packed:
        q = _heads(node, q, node.attr("q_num_heads"))
        k, v = (_heads(node, value, node.attr("kv_num_heads")) for value in (k, v))
    past: Dim = 0
    if node.has(4) != node.has(5):
        raise Refusal("past_key and past_value must be given together")
    if node.has(4):
        if node.has(6):
            raise Refusal("nonpad_kv_seqlen cannot be combined with past_key and past_value")
        past = node.shape(node.tensor(4))[2]
        k, v = (node.emit(relax.op.concat([_same_but(node, node.tensor(index), new, 2), new], 2)) for index, new in ((4, k), (5, v)))
    k, v = _consistent(node, q, k, v)
    bias, allowed = _mask(node, q, k), _allowed(node, q, k, past)
    precision = node.attr("softmax_precision")
    scores_wanted = len(node.proto.output) > 3 and bool(node.proto.output[3])
    plain = node.attr("softcap", 0.0) == 0 and not scores_wanted and (precision is None or dtype_name(precision) == node.dtype(q))
    if plain:
        out, scores = _by_dialect(node, q, k, v, bias, allowed), None
    else:
        out, scores = _by_steps(node, q, k, v, bias, allowed)
    if packed:
        batch, heads, length, width = node.shape(out)
        out = node.reshape(node.emit(relax.op.permute_dims(out, _SWAPPED)), [batch, length, node.dims.product([heads, width])])
    return (out, k, v) if scores is None else (out, k, v, scores)


def _heads(node: Node, value: relax.Expr, heads: int | None) -> relax.Expr:
    """[B, S, H * D] -> [B, H, S, D]"""
    if not heads:
        raise Refusal("q_num_heads and kv_num_heads are needed for operands of three dims")
    batch, length, width = node.shape(value)
    if isinstance(width, int) and width % heads:
        raise Refusal(f"{width} channels are not divisible by {heads} heads")
    return node.emit(relax.op.permute_dims(node.reshape(value, [batch, length, heads, node.dims.floor_divide(width, heads)]), _SWAPPED))


def _same_but(node: Node, value: relax.Expr, like: relax.Expr, axis: int) -> relax.Expr:
    """`value`, whose dims but `axis` are those of `like`; what cannot be proven is checked at run time."""
    have = node.shape(value)
    return _checked(
        node, value, [size if position == axis else other for position, (size, other) in enumerate(zip(have, node.shape(like), strict=True))]
    )


def _checked(node: Node, value: relax.Expr, wanted: list[Dim]) -> relax.Expr:
    have = node.shape(value)
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(have, wanted, strict=True)):
        raise Refusal(f"an operand of shape {have} should have shape {wanted}")
    if all(node.dims.equal(a, b) for a, b in zip(have, wanted, strict=True)):
        return value
    return node.cast_shape(value, [a if node.dims.equal(a, b) else b for a, b in zip(have, wanted, strict=True)])


def _consistent(node: Node, q: relax.Expr, k: relax.Expr, v: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    """k and v with the batch and depth of q, v with the heads and length of k."""
    batch, heads, _, depth = node.shape(q)
    kv_heads, length = node.shape(k)[1:3]
    node.static([heads, kv_heads, depth], "the numbers of heads and the head size")
    if heads % kv_heads:  # pyright: ignore[reportOperatorIssue]
        raise Refusal(f"{heads} heads of q cannot share {kv_heads} heads of k")
    return _checked(node, k, [batch, kv_heads, length, depth]), _checked(node, v, [batch, kv_heads, length, node.shape(v)[3]])


def _mask(node: Node, q: relax.Expr, k: relax.Expr) -> relax.Expr | None:
    """The mask with four dims that broadcast to the scores; where it has fewer keys, the others are hidden."""
    if not node.has(3):
        return None
    mask = node.tensor(3)
    shape, keys = node.shape(mask), node.shape(k)[2]
    if not 1 <= len(shape) <= 4:
        raise Refusal(f"a mask of rank {len(shape)}")
    mask = node.reshape(mask, [1] * (4 - len(shape)) + shape)
    shape = node.shape(mask)
    if isinstance(shape[3], int) and isinstance(keys, int) and shape[3] < keys:
        dtype = node.dtype(mask)
        hidden = node.scalar(False if dtype == "bool" else -math.inf, dtype)
        rest = node.emit(relax.op.broadcast_to(hidden, [*shape[:3], keys - shape[3]]))
        mask = node.emit(relax.op.concat([mask, rest], 3))
    wanted = [*node.shape(q)[:3], keys]
    return _checked(node, mask, [1 if isinstance(size, int) and size == 1 else want for size, want in zip(node.shape(mask), wanted, strict=True)])


def _allowed(node: Node, q: relax.Expr, k: relax.Expr, past: Dim) -> list[relax.Expr]:
    """Which keys `is_causal`, the window and `nonpad_kv_seqlen` leave visible: bool [1 or B, 1, 1 or S, T]; a key must be visible in all of them.

    Query i is at position i + offset: behind the past keys, or at the end of the valid keys of its sample.
    """
    batch, _, queries, _ = node.shape(q)
    keys = node.shape(k)[2]
    column = places(node, keys, [1, 1, 1, keys])
    parts: list[relax.Expr] = []
    position = places(node, queries, [1, 1, queries, 1])
    if node.has(6):
        counts = node.tensor(6)
        counts = counts if node.dtype(counts) == "int64" else node.emit(relax.op.astype(counts, "int64"))
        counts = node.reshape(_checked(node, counts, [batch]), [batch, 1, 1, 1])
        parts.append(node.emit(relax.op.less(column, counts)))
        offset = node.emit(relax.op.subtract(counts, size_tensor(node, queries)))
        position = node.emit(relax.op.add(position, offset))
    elif not (isinstance(past, int) and past == 0):
        position = node.emit(relax.op.add(position, size_tensor(node, past)))
    left, right = node.attr("left_window_size", -1), node.attr("right_window_size", -1)
    if min(left, right) < -1:
        raise Refusal(f"a window of {left} to the left and {right} to the right; sizes are -1 or more")
    if node.attr("is_causal", 0):
        right = 0
    if right >= 0:
        parts.append(node.emit(relax.op.less_equal(column, _moved(node, position, right))))
    if left >= 0:
        parts.append(node.emit(relax.op.greater_equal(column, _moved(node, position, -left))))
    return parts


def _hide(node: Node, bias: relax.Expr, allowed: list[relax.Expr]) -> relax.Expr:
    """The bias, -inf where any of the conditions fails."""
    hidden = node.scalar(-math.inf, node.dtype(bias))
    for condition in allowed:
        bias = node.emit(relax.op.where(*node.align(condition, bias, hidden)))
    return bias


def places(node: Node, size: Dim, shape: list[Dim]) -> relax.Expr:
    """0, 1, .. as int64 in a shape with that many elements."""
    return node.reshape(node.emit(relax.op.arange(0, size, 1, "int64")), shape)


def size_tensor(node: Node, size: Dim) -> relax.Expr:
    """A dim as an int64 scalar."""
    if isinstance(size, int):
        return node.scalar(size, "int64")
    return node.reshape(node.emit(relax.op.shape_to_tensor(relax.ShapeExpr([size]))), [])


def _moved(node: Node, position: relax.Expr, distance: int) -> relax.Expr:
    return node.emit(relax.op.add(position, node.scalar(distance, "int64"))) if distance else position


def _scale(node: Node, q: relax.Expr) -> float:
    scale = node.attr("scale")
    return 1 / math.sqrt(node.static(node.shape(q)[3:], "the head size")[0]) if scale is None else scale


def _by_dialect(node: Node, q: relax.Expr, k: relax.Expr, v: relax.Expr, mask: relax.Expr | None, allowed: list[relax.Expr]) -> relax.Expr:
    aligned = not node.has(4) and not node.has(6)  # queries and keys begin at the same position
    if allowed and not aligned:
        dtype = node.dtype(q)
        if mask is not None and node.dtype(mask) == "bool":
            mask = node.emit(relax.op.where(mask, node.scalar(0, dtype), node.scalar(-math.inf, dtype)))
        mask = _hide(node, node.array(np.zeros((1, 1, 1, 1)), dtype) if mask is None else mask, allowed)
    window = {}
    if aligned:
        window = {
            "causal": bool(node.attr("is_causal", 0)),
            "before": node.attr("left_window_size", -1),
            "after": node.attr("right_window_size", -1),
        }
    return node.emit(attention(q, k, v, mask, scale=_scale(node, q), **window))


def _by_steps(
    node: Node, q: relax.Expr, k: relax.Expr, v: relax.Expr, mask: relax.Expr | None, allowed: list[relax.Expr]
) -> tuple[relax.Expr, relax.Expr]:
    """The result and the scores at the stage that qk_matmul_output_mode names; q and k are scaled by a root each, as the standard does."""
    op, emit, dtype = relax.op, node.emit, node.dtype(q)
    root = node.scalar(np.sqrt(_scale(node, q)), dtype)
    heads = node.shape(q)[1]
    k, v = (_repeated(node, value, heads) for value in (k, v))
    stages = [emit(op.matmul(emit(op.multiply(q, root)), emit(op.permute_dims(emit(op.multiply(k, root)), [0, 1, 3, 2]))))]
    softcap, scores = node.attr("softcap", 0.0), stages[0]
    if softcap:
        cap = node.scalar(softcap, dtype)
        scores = emit(op.multiply(emit(op.tanh(emit(op.divide(scores, cap)))), cap))
    stages.append(scores)
    hidden = node.scalar(-math.inf, dtype)
    bias = mask
    if mask is not None and node.dtype(mask) == "bool":
        bias = emit(op.where(mask, node.scalar(0, dtype), hidden))
    if allowed:
        bias = _hide(node, node.array(np.zeros((1, 1, 1, 1)), dtype) if bias is None else bias, allowed)
    if bias is not None:
        scores = emit(op.add(*node.align(scores, bias)))
    stages.append(scores)
    precision = node.attr("softmax_precision")
    wide = dtype if precision is None else dtype_name(precision)
    if wide != dtype:
        scores = emit(op.astype(scores, wide))
    if bias is None:
        weights = emit(op.nn.softmax(scores, -1))
    else:
        # TVM's maximum of -inf alone is not -inf, so rows without any key are found by counting
        seen = emit(op.max(emit(op.astype(emit(op.not_equal(bias, hidden)), "int32")), -1, keepdims=True))
        empty, zero = emit(op.equal(seen, node.scalar(0, "int32"))), node.scalar(0, wide)
        weights = emit(op.where(empty, zero, emit(op.nn.softmax(emit(op.where(empty, zero, scores)), -1))))
    if wide != dtype:
        weights = emit(op.astype(weights, dtype))
    stages.append(weights)
    mode = node.attr("qk_matmul_output_mode", 0)
    if mode not in range(len(stages)):
        raise Refusal(f"qk_matmul_output_mode {mode}")
    return emit(op.matmul(weights, v)), stages[mode]


def _repeated(node: Node, value: relax.Expr, heads: Dim) -> relax.Expr:
    """[B, Hk, T, D] -> [B, H, T, D]: each head as often as it is shared."""
    batch, own, length, width = node.shape(value)
    if node.dims.equal(own, heads):
        return value
    groups = node.dims.floor_divide(heads, own)
    spread = node.emit(relax.op.broadcast_to(node.reshape(value, [batch, own, 1, length, width]), [batch, own, groups, length, width]))
    return node.reshape(spread, [batch, heads, length, width])
