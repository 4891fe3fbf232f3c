"""GroupQueryAttention of ONNX Runtime (domain com.microsoft): a cache of keys and values that each sample fills up to a length of its own, rotary embedding, a causal window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ....dialect.attention import attention
from ....tvm import relax
from ..compose import apply, contributed
from ..node import Node
from ..symbolic import Dim
from ..values import Refusal
from .attention import places, size_tensor
from .microsoft_attention import broadcasting, checked, heads, merged
from .quantized_cache import cache_of
from .rotary import consecutive, rotated

_ATTRIBUTES = (
    "causal do_rotary k_norm_epsilon k_quant_type kv_cache_bit_width kv_num_heads local_window_size num_heads q_norm_epsilon qk_norm_epsilon qk_output rotary_interleaved"
    " scale sliding_window_cache smooth_softmax softcap v_quant_type"
)
#: inputs that only other devices take, or that change the layout of the cache
_REFUSED = {16: "query_seqlens"}


@dataclass(frozen=True)
class _Lengths:
    """past: int64 [B], how many tokens of each sample the cache holds before; queries: S; cache, present: the cache's lengths before and after."""

    past: relax.Expr
    queries: Dim
    cache: Dim
    present: Dim


@contributed("GroupQueryAttention", attributes=_ATTRIBUTES)
def group_query_attention(node: Node) -> tuple[relax.Expr, ...]:
    """query [B, S, H * D], key and value [B, S, Hk * D] (or all three in query), past key and value [B, Hk, P, D], seqlens_k [B]: tokens of each sample after this step - 1,
    total_sequence_length: the most of these; cos and sin [positions, R / 2], positions [B, S], an attention bias, a sink per head.

    Caches may be codes (`quantized_cache.py`). The new keys of a sample follow the max(seqlens_k + 1 - S, 0) that its cache holds; the rest of it is zeros. Results: out, present key and value, of max(P, total) tokens.
    """
    for index, name in _REFUSED.items():
        if node.has(index):
            raise Refusal(f"input '{name}' is not supported")
    unusual = [name for name in ("qk_output", "sliding_window_cache") if node.attr(name, 0)]
    if unusual:
        raise Refusal(f"attribute '{unusual[0]}' is not supported")
    q, k, v = _operands(node)
    batch, _, queries, _ = node.shape(q)
    lengths = _lengths(node, batch, queries)
    if node.has(14):
        q, k = (_normalized(node, value, index, name) for value, index, name in ((q, 14, "q_norm_epsilon"), (k, 15, "k_norm_epsilon")))
    if node.attr("do_rotary", 0):
        q, k = _turned(node, q, k, lengths)
    cache = cache_of(node)
    if cache is not None:
        k, v = (cache.codes(value, side) for value, side in ((k, 0), (v, 1)))
    k, v = _present(node, k, v, lengths)
    floats = (k, v) if cache is None else tuple(cache.floats(value, side) for value, side in ((k, 0), (v, 1)))
    scores = [*node.shape(q)[:3], lengths.present]
    scale = node.attr("scale", 0.0) or 1 / math.sqrt(node.static(node.shape(q)[3:], "the head size")[0])
    if node.attr("softcap", 0.0) or node.attr("smooth_softmax", 0) == 1 or node.has(11):
        out = _by_steps(node, q, *floats, _visible(node, scores, lengths, node.dtype(q)), scale)
    elif cache is None and node.attr("causal", 1) and node.dims.equal(lengths.present, queries):
        # nothing came before, so query and key s are the same token
        bias = broadcasting(node, node.tensor(10), scores) if node.has(10) else None
        out = node.emit(attention(q, *floats, bias, scale=scale, causal=True, before=_window(node) - 1 if _window(node) else -1))
    else:
        out = node.emit(attention(q, *floats, _visible(node, scores, lengths, node.dtype(q)), scale=scale))
    return merged(node, out), k, v


def _operands(node: Node) -> tuple[relax.Expr, relax.Expr, relax.Expr]:
    """q [B, H, S, D], k and v [B, Hk, S, D]"""
    count, shared, query = node.attr("num_heads"), node.attr("kv_num_heads"), node.tensor(0)
    if not count or not shared or count % shared:
        raise Refusal(f"{count} heads of q cannot share {shared} heads of k")
    if node.has(1) != node.has(2):
        raise Refusal("key and value must be given together")
    if node.has(1):
        q, k, v = heads(node, query, count), heads(node, node.tensor(1), shared), heads(node, node.tensor(2), shared)
        return (
            q,
            checked(node, k, [*node.shape(q)[:1], shared, *node.shape(q)[2:]]),
            checked(node, v, [*node.shape(q)[:1], shared, *node.shape(q)[2:]]),
        )
    every = heads(node, query, count + 2 * shared)
    edges = [0, count, count + shared, count + 2 * shared]
    parts = [node.emit(relax.op.strided_slice(every, [1], [begin], [end])) for begin, end in zip(edges, edges[1:], strict=False)]
    return parts[0], parts[1], parts[2]


def _lengths(node: Node, batch: Dim, queries: Dim) -> _Lengths:
    counts = node.tensor(5)
    counts = checked(node, node.reshape(counts, [node.dims.product(node.shape(counts))]), [batch])
    total = node.emit(relax.op.add(node.emit(relax.op.astype(counts, "int64")), node.scalar(1, "int64")))
    past = node.emit(relax.op.maximum(node.emit(relax.op.subtract(total, size_tensor(node, queries))), node.scalar(0, "int64")))
    if node.has(3) != node.has(4):
        raise Refusal("past_key and past_value must be given together")
    cache = node.shape(node.tensor(3))[2] if node.has(3) else 0
    if not node.at_run_time(6):
        listed = node.sizes(6)
        if len(listed) != 1:
            raise Refusal(f"total_sequence_length of {len(listed)} elements")
        longest = node.dims.compare(">=", listed[0], cache)
        if longest is not None:
            return _Lengths(past, queries, cache, listed[0] if longest else cache)
    most = node.emit(relax.op.maximum(_total(node), size_tensor(node, cache)))
    return _Lengths(past, queries, cache, node.runtime_sizes(most)[0])


def _total(node: Node) -> relax.Expr:
    """total_sequence_length as an int64 scalar."""
    total = node.tensor(6)
    return node.reshape(total if node.dtype(total) == "int64" else node.emit(relax.op.astype(total, "int64")), [])


def _normalized(node: Node, value: relax.Expr, index: int, name: str) -> relax.Expr:
    epsilon = node.attr(name, node.attr("qk_norm_epsilon", 1e-6))
    return node.emit(relax.op.nn.rms_norm(value, node.tensor(index), [-1], epsilon))


def _turned(node: Node, q: relax.Expr, k: relax.Expr, lengths: _Lengths) -> tuple[relax.Expr, relax.Expr]:
    positions, tables = _positions(node, lengths), []
    for index in (7, 8):
        table = apply(node, "Gather", node.value(index), positions, axis=0)
        shape = node.shape(table)
        tables.append(node.reshape(table, [shape[0], 1, *shape[1:]]))
    part = 2 * node.static(node.shape(tables[0])[3:], "the width of cos_cache")[0]
    interleaved = bool(node.attr("rotary_interleaved", 0))
    return rotated(node, q, *tables, part, interleaved), rotated(node, k, *tables, part, interleaved)


def _positions(node: Node, lengths: _Lengths) -> relax.Expr:
    """[B, S]. Of given ones, a first prompt (as many tokens in all as are new) uses the first element alone: the position of the first token of every sample."""
    if not node.has(9):
        return consecutive(node, lengths.past, lengths.queries)
    positions = node.tensor(9)
    prompt = None if node.at_run_time(6) else node.dims.compare("==", node.sizes(6)[0], lengths.queries)
    if prompt is False:
        return positions
    first = node.emit(relax.op.take(node.reshape(positions, [node.dims.product(node.shape(positions))]), node.scalar(0, "int64"), 0))
    row = consecutive(node, first, lengths.queries)
    if prompt:
        return node.emit(relax.op.broadcast_to(row, node.shape(positions)))
    same = node.emit(relax.op.equal(_total(node), size_tensor(node, lengths.queries)))
    return node.emit(relax.op.where(*node.align(same, row, positions)))


def _present(node: Node, k: relax.Expr, v: relax.Expr, lengths: _Lengths) -> tuple[relax.Expr, relax.Expr]:
    """The caches after the step: rows of [past, new, a row of zeros], chosen for each sample."""
    op, emit = relax.op, node.emit
    batch, count, queries, depth = node.shape(k)
    past = node.reshape(lengths.past, [batch, 1])
    cache, new = size_tensor(node, lengths.cache), size_tensor(node, queries)
    column = places(node, lengths.present, [1, lengths.present])
    after = emit(op.subtract(column, past))  # the place among the new rows; negative before them
    behind = emit(op.clip(emit(op.add(after, node.scalar(1, "int64"))), 0, 1))  # 1 from the first new row on
    row = emit(op.add(cache, emit(op.minimum(after, new))))
    row = emit(op.add(column, emit(op.multiply(behind, emit(op.subtract(row, column))))))
    # a sample longer than the cache it came from, or than the one it goes to, gets rows that do not exist: the gather says so
    over = emit(op.subtract(past, cache))
    beyond = emit(op.subtract(emit(op.add(past, new)), size_tensor(node, lengths.present)))
    excess = emit(op.maximum(emit(op.maximum(over, beyond)), node.scalar(0, "int64")))
    row = emit(op.add(row, emit(op.multiply(excess, node.scalar(2**40, "int64")))))
    every = node.dims.simplify(lengths.cache + queries + 1)
    slots = node.dims.product([batch, count])
    base = emit(op.multiply(places(node, slots, [batch, count, 1]), size_tensor(node, every)))
    rows = emit(op.add(base, node.reshape(row, [batch, 1, lengths.present])))

    def chosen(index: int, value: relax.Expr) -> relax.Expr:
        parts = [value, emit(op.zeros([batch, count, 1, depth], node.dtype(value)))]
        if node.has(index):
            parts.insert(0, checked(node, node.tensor(index), [batch, count, lengths.cache, depth]))
        flat = node.reshape(emit(op.concat(parts, 2)), [node.dims.product([slots, every]), depth])
        return emit(op.take(flat, rows, 0))

    return chosen(3, k), chosen(4, v)


def _window(node: Node) -> int:
    """How many keys a query sees, its own and those before it; 0: all."""
    window = node.attr("local_window_size", -1)
    if window <= 0 and window != -1:
        raise Refusal(f"local_window_size {window}")
    return max(window, 0)


def _visible(node: Node, scores: list[Dim], lengths: _Lengths, dtype: str) -> relax.Expr:
    """What is added to the scores [B, H, S, T]: the attention bias, -inf where a key is hidden."""
    op, emit = relax.op, node.emit
    batch, _, queries, keys = scores
    column, first = places(node, keys, [1, 1, 1, keys]), node.reshape(lengths.past, [batch, 1, 1, 1])
    position = emit(op.add(places(node, queries, [1, 1, queries, 1]), first))
    if node.attr("causal", 1):
        margin = emit(op.subtract(position, column))
    else:
        margin = emit(op.subtract(emit(op.astype(node.reshape(node.tensor(5), [batch, 1, 1, 1]), "int64")), column))
    window = _window(node)
    if window:
        behind = emit(op.add(emit(op.subtract(column, position)), node.scalar(window - 1, "int64")))
        margin = emit(op.minimum(margin, behind))
    bias = broadcasting(node, node.tensor(10), scores) if node.has(10) else node.array(np.zeros((1, 1, 1, 1)), dtype)
    seen = emit(op.greater_equal(margin, node.scalar(0, "int64")))
    return emit(op.where(*node.align(seen, bias, node.scalar(-math.inf, dtype))))


def _by_steps(node: Node, q: relax.Expr, k: relax.Expr, v: relax.Expr, bias: relax.Expr, scale: float) -> relax.Expr:
    """Attention whose scores are capped before the bias is added, or whose probabilities leave some for a sink: a score more, 0 or one for each head, which no value belongs to."""
    op, emit, dtype = relax.op, node.emit, node.dtype(q)
    batch, count, queries, depth = node.shape(q)
    shared, keys = node.shape(k)[1:3]
    groups = node.dims.floor_divide(count, shared)
    q = node.reshape(q, [batch, shared, node.dims.product([groups, queries]), depth])
    scores = emit(op.multiply(emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2])))), node.scalar(scale, dtype)))
    scores = node.reshape(scores, [batch, count, queries, keys])
    softcap = node.attr("softcap", 0.0)
    if softcap:
        cap = node.scalar(softcap, dtype)
        scores = emit(op.multiply(emit(op.tanh(emit(op.divide(scores, cap)))), cap))
    scores = emit(op.add(*node.align(scores, bias)))
    if node.has(11) or node.attr("smooth_softmax", 0) == 1:
        sink = node.reshape(node.tensor(11), [1, count, 1, 1]) if node.has(11) else node.array(np.zeros((1, 1, 1, 1)), dtype)
        sink = emit(op.broadcast_to(sink, [batch, count, queries, 1]))
        weights = emit(op.nn.softmax(emit(op.concat([scores, sink], 3)), -1))
        weights = emit(op.strided_slice(weights, [3], [0], [keys]))
    else:
        weights = emit(op.nn.softmax(scores, -1))
    out = emit(op.matmul(node.reshape(weights, [batch, shared, node.dims.product([groups, queries]), keys]), v))
    return node.reshape(out, [batch, count, queries, node.shape(v)[3]])
