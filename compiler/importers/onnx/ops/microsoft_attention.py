"""Attention and MultiHeadAttention of ONNX Runtime (domain com.microsoft): the dialect's operator with an additive mask."""

from __future__ import annotations

import math

import numpy as np

from ....dialect.attention import attention
from ....tvm import relax
from ..compose import apply, contributed
from ..node import Node
from ..symbolic import Dim
from ..values import Refusal
from .attention import places, size_tensor

_SWAPPED = [0, 2, 1, 3]


@contributed("MultiHeadAttention", attributes="mask_filter_value num_heads scale unidirectional")
def multi_head_attention(node: Node) -> tuple[relax.Expr, ...]:
    """query [B, S, H * D], key [B, T, H * D], value [B, T, H * E] with one bias for all; packed: query [B, S, H, 3, D], or key [B, T, H, 2, D]; key and value may come as
    [B, H, T, D], projected before. Then the key padding mask, the attention bias, past key and value. Results: out [B, S, H * E], present key and value.
    """
    for index, name in ((8, "past_sequence_length"), (9, "cache_indirection")):
        if node.has(index):
            raise Refusal(f"input '{name}' is not supported")
    if any(node.proto.output[3:]):
        raise Refusal("the output 'qk' is not supported")
    q, k, v = _operands(node)
    past: Dim = 0
    if node.has(6) != node.has(7):
        raise Refusal("past_key and past_value must be given together")
    if node.has(6):
        past = node.shape(node.tensor(6))[2]
        k, v = (with_past(node, node.tensor(index), new) for index, new in ((6, k), (7, v)))
    out = _attend(node, q, k, v, 4, 5, past)
    return (out, k, v) if any(node.proto.output[1:]) else (out,)


@contributed(
    "Attention",
    attributes="do_rotary mask_filter_value num_heads past_present_share_buffer qkv_hidden_sizes rotary_embedding_dim scale unidirectional",
)
def packed_attention(node: Node) -> tuple[relax.Expr, ...]:
    """Attention on input [B, S, I] @ weights [I, widths of q, k and v] + bias; then the mask, past [2, B, H, P, D] and the attention bias. Results: out, present."""
    if node.attr("do_rotary", 0) or node.attr("past_present_share_buffer", 0) or node.has(6):
        raise Refusal("do_rotary and past_present_share_buffer are not supported")
    projected = apply(node, "MatMul", node.value(0), node.value(1))
    if node.has(2):
        projected = apply(node, "Add", projected, node.value(2))
    total = node.static(node.shape(projected)[2:], "the width of the weights")[0]
    widths = node.attr("qkv_hidden_sizes") or [total // 3] * 3
    if len(widths) != 3 or sum(widths) != total or any(width % node.attr("num_heads") for width in widths):
        raise Refusal(f"widths {widths} of q, k and v with {node.attr('num_heads')} heads and weights of {total} columns")
    edges = [0, widths[0], widths[0] + widths[1], total]
    q, k, v = (
        heads(node, node.emit(relax.op.strided_slice(projected, [2], [begin], [end])), node.attr("num_heads"))
        for begin, end in zip(edges, edges[1:], strict=False)
    )
    past: Dim = 0
    if node.has(4):
        both = node.tensor(4)
        shape = node.shape(both)
        past = shape[3]
        k, v = (
            with_past(node, node.reshape(node.emit(relax.op.strided_slice(both, [0], [index], [index + 1])), shape[1:]), new)
            for index, new in ((0, k), (1, v))
        )
    out = _attend(node, q, k, v, 3, 5, past)
    return (out, node.emit(relax.op.stack([k, v], axis=0))) if any(node.proto.output[1:]) else (out,)


def heads(node: Node, value: relax.Expr, count: int) -> relax.Expr:
    """[B, S, H * D] -> [B, H, S, D]"""
    batch, length, width = node.shape(value)
    if not count or isinstance(width, int) and width % count:
        raise Refusal(f"{width} channels are not divisible by {count} heads")
    return node.emit(relax.op.permute_dims(node.reshape(value, [batch, length, count, node.dims.floor_divide(width, count)]), _SWAPPED))


def merged(node: Node, out: relax.Expr) -> relax.Expr:
    """[B, H, S, D] -> [B, S, H * D]"""
    batch, count, length, width = node.shape(out)
    return node.reshape(node.emit(relax.op.permute_dims(out, _SWAPPED)), [batch, length, node.dims.product([count, width])])


def with_past(node: Node, past: relax.Expr, new: relax.Expr) -> relax.Expr:
    """[B, H, P, D] before [B, H, S, D]"""
    shape = node.shape(new)
    return node.emit(relax.op.concat([checked(node, past, [*shape[:2], node.shape(past)[2], shape[3]]), new], 2))


def checked(node: Node, value: relax.Expr, wanted: list[Dim]) -> relax.Expr:
    """A tensor of the shape `wanted`; what cannot be proven is checked at run time."""
    have = node.shape(value)
    if len(have) != len(wanted) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(have, wanted, strict=True)):
        raise Refusal(f"an operand of shape {have} should have shape {wanted}")
    if all(node.dims.equal(a, b) for a, b in zip(have, wanted, strict=True)):
        return value
    return node.cast_shape(value, [a if node.dims.equal(a, b) else b for a, b in zip(have, wanted, strict=True)])


def broadcasting(node: Node, bias: relax.Expr, scores: list[Dim]) -> relax.Expr:
    """An additive mask [B or 1, H or 1, S or 1, T], checked against the shape of the scores."""
    shape = node.shape(bias)
    if len(shape) != 4:
        raise Refusal(f"an attention bias of rank {len(shape)}")
    return checked(node, bias, [1 if isinstance(have, int) and have == 1 else want for have, want in zip(shape, scores, strict=True)])


def _operands(node: Node) -> tuple[relax.Expr, relax.Expr, relax.Expr]:
    count = node.attr("num_heads")
    query = node.tensor(0)
    if node.rank(query) == 5:
        q, k, v = _unpacked(node, query, 3)
        return _biased(node, q, k, v, count)
    key = node.tensor(1)
    if node.rank(key) == 5:
        k, v = _unpacked(node, key, 2)
        return _biased(node, query, k, v, count)
    return _biased(node, query, key, node.tensor(2), count)


def _unpacked(node: Node, packed: relax.Expr, parts: int) -> list[relax.Expr]:
    """[B, S, H, parts, D] as tensors [B, S, H * D]"""
    batch, length, count, have, width = node.shape(packed)
    if not isinstance(have, int) or have != parts:
        raise Refusal(f"a packed operand of shape {node.shape(packed)}, whose fourth dim should be {parts}")
    slices = [node.emit(relax.op.strided_slice(packed, [3], [index], [index + 1])) for index in range(parts)]
    return [node.reshape(value, [batch, length, node.dims.product([count, width])]) for value in slices]


def _biased(node: Node, q: relax.Expr, k: relax.Expr, v: relax.Expr, count: int) -> tuple[relax.Expr, relax.Expr, relax.Expr]:
    """q, k and v as [B, H, S, D], each with its part of the bias; operands of four dims are ready."""
    split = []
    begin = 0
    for value in (q, k, v):
        ready = node.rank(value) == 4
        if node.has(3):
            width = node.static([node.dims.product([node.shape(value)[1], node.shape(value)[3]]) if ready else node.shape(value)[2]], "a width")[0]
            if not ready:
                value = node.emit(relax.op.add(value, node.emit(relax.op.strided_slice(node.tensor(3), [0], [begin], [begin + width]))))
            begin += width
        split.append(value if ready else heads(node, value, count))
    if node.has(3) and not node.dims.equal(node.shape(node.tensor(3))[0], begin):
        raise Refusal(f"a bias of shape {node.shape(node.tensor(3))} for operands of {begin} channels together")
    return split[0], split[1], split[2]


def _attend(node: Node, q: relax.Expr, k: relax.Expr, v: relax.Expr, mask: int, bias: int, past: Dim) -> relax.Expr:
    """[B, S, H * E]; mask and bias are input indices."""
    batch, count, queries, depth = node.shape(q)
    keys = node.shape(k)[2]
    k = checked(node, k, [batch, count, keys, depth])
    v = checked(node, v, [batch, count, keys, node.shape(v)[3]])
    scores = [batch, count, queries, keys]
    added = _padding(node, mask, scores, node.dtype(q)) if node.has(mask) else None
    if node.has(bias):
        given = broadcasting(node, node.tensor(bias), scores)
        added = given if added is None else node.emit(relax.op.add(*node.align(given, added)))
    causal = bool(node.attr("unidirectional", 0))
    if causal and not (isinstance(past, int) and past == 0):
        position = node.emit(relax.op.add(places(node, queries, [1, 1, queries, 1]), size_tensor(node, past)))
        seen = node.emit(relax.op.less_equal(places(node, keys, [1, 1, 1, keys]), position))
        shown = node.array(np.zeros((1, 1, 1, 1)), node.dtype(q)) if added is None else added
        added = node.emit(relax.op.where(*node.align(seen, shown, node.scalar(-math.inf, node.dtype(q)))))
        causal = False
    scale = node.attr("scale", 0.0) or 1 / math.sqrt(node.static([depth], "the head size")[0])
    return merged(node, node.emit(attention(q, k, v, added, scale=scale, causal=causal)))


def _padding(node: Node, index: int, scores: list[Dim], dtype: str) -> relax.Expr:
    """The mask as what is added to the scores: mask_filter_value, -10000 by default, where a key is hidden."""
    mask = node.tensor(index)
    shape, (batch, _, queries, keys) = node.shape(mask), scores
    zero = node.scalar(0, node.dtype(mask))
    if len(shape) == 2:
        shown = node.emit(relax.op.greater(node.reshape(checked(node, mask, [batch, keys]), [batch, 1, 1, keys]), zero))
    elif len(shape) == 3:
        shown = node.emit(relax.op.greater(node.reshape(checked(node, mask, [batch, queries, keys]), [batch, 1, queries, keys]), zero))
    elif len(shape) == 1:
        shown = _shown_between(node, mask, batch, keys)
    else:
        raise Refusal(f"a mask of rank {len(shape)}")
    return node.emit(relax.op.where(shown, node.scalar(0, dtype), node.scalar(node.attr("mask_filter_value", -10000.0), dtype)))


def _shown_between(node: Node, mask: relax.Expr, batch: Dim, keys: Dim) -> relax.Expr:
    """A mask [B]: the end of the keys of each sample; [2 B]: then their beginnings."""
    size = node.shape(mask)[0]
    mask = node.emit(relax.op.astype(mask, "int64"))
    column = places(node, keys, [1, 1, 1, keys])
    if node.dims.equal(size, batch):
        return node.emit(relax.op.less(column, node.reshape(mask, [batch, 1, 1, 1])))
    if not node.dims.equal(size, node.dims.product([2, batch])):
        raise Refusal(f"a mask of shape [{size}] for a batch of {batch}; one or two positions for each sample are supported")
    ends, begins = (node.emit(relax.op.strided_slice(node.reshape(mask, [2, batch]), [0], [part], [part + 1])) for part in (0, 1))
    inside = node.emit(relax.op.less(column, node.reshape(ends, [batch, 1, 1, 1])))
    return node.emit(relax.op.logical_and(inside, node.emit(relax.op.greater_equal(column, node.reshape(begins, [batch, 1, 1, 1])))))
