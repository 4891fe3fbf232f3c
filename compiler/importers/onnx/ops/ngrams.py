"""TfIdfVectorizer: how often the n-grams of a list occur in rows of integers."""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal


@converter("TfIdfVectorizer", since=9)
def count_ngrams(node: Node) -> relax.Expr:
    """x [C] or [N, C] integers -> [m] or [N, m] float32, m = the greatest of ngram_indexes + 1.

    Elements of an n-gram lie 1..max_skip_count + 1 apart, all by the same distance. Occurrences are compared at all places at once.
    """
    if node.attr("pool_strings"):
        raise Refusal("n-grams of strings are not supported")
    x = node.tensor(0)
    shape = node.shape(x)
    if len(shape) not in (1, 2) or node.dtype(x) not in ("int32", "int64"):
        raise Refusal(f"an input of type {node.dtype(x)} and shape {shape}")
    rows = node.reshape(x, [1, *shape]) if len(shape) == 1 else x
    rows = rows if node.dtype(rows) == "int64" else node.emit(relax.op.astype(rows, "int64"))
    indices, grams = list(node.attr("ngram_indexes")), _ngrams(node)
    if sum(map(len, grams.values())) != len(indices) or len(set(indices)) != len(indices) or min(indices) < 0:
        raise Refusal(f"{len(indices)} ngram_indexes, which must differ, for {sum(map(len, grams.values()))} n-grams")
    counts = _counts(node, rows, grams)
    width = max(indices) + 1
    # n-gram i is column indices[i]; columns of none take the zeros that stand behind all counts
    source = np.full(width, len(indices))
    source[indices] = np.arange(len(indices))
    batch = node.shape(rows)[0]
    zeros = node.emit(relax.op.full([batch, 1], node.scalar(0, "float32"), "float32"))
    table = node.emit(relax.op.concat([node.emit(relax.op.astype(counts, "float32")), zeros], 1))
    result = _weighted(node, node.emit(relax.op.take(table, node.array(source, "int64"), 1)), indices)
    return node.reshape(result, [width] if len(shape) == 1 else [batch, width])


def _ngrams(node: Node) -> dict[int, np.ndarray]:
    """n -> the n-grams of that length, [count, n], in the order of the pool; ngram_counts says where the length changes."""
    pool, starts = node.attr("pool_int64s") or [], node.attr("ngram_counts")
    result = {}
    for length, (start, end) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True), 1):
        if not 0 <= start <= end <= len(pool) or (end - start) % length:
            raise Refusal(f"ngram_counts {starts} does not fit a pool of {len(pool)} elements")
        result[length] = np.array(pool[start:end], np.int64).reshape(-1, length)
    return result


def _counts(node: Node, rows: relax.Expr, grams: dict[int, np.ndarray]) -> relax.Expr:
    """rows: [N, C] -> [N, number of n-grams] int64"""
    batch, size = node.shape(rows)
    least, most, skips = node.attr("min_gram_length"), node.attr("max_gram_length"), node.attr("max_skip_count")
    behind = node.emit(relax.op.full([batch, max(most - 1, 0) * (skips + 1) + 1], node.scalar(0, "int64"), "int64"))
    padded = node.emit(relax.op.concat([rows, behind], 1))
    parts = []
    for length, table in grams.items():
        if not len(table):
            continue
        distances = range(1, (skips if length > 1 else 0) + 2) if least <= length <= most else ()
        total = node.emit(relax.op.full([batch, len(table)], node.scalar(0, "int64"), "int64"))
        for distance in distances:
            total = node.emit(relax.op.add(total, _found(node, padded, size, table, distance)))
        parts.append(total)
    return parts[0] if len(parts) == 1 else node.emit(relax.op.concat(parts, 1))


def _found(node: Node, padded: relax.Expr, size: Dim, table: np.ndarray, distance: int) -> relax.Expr:
    """How often the n-grams of `table` occur with their elements `distance` apart; [N, len(table)] int64."""
    emit, op = node.emit, relax.op
    batch, length = node.shape(padded)[0], table.shape[1]
    place = emit(op.arange(0, size, 1, "int64"))
    last = emit(op.add(place, node.scalar((length - 1) * distance, "int64")))
    extent = emit(op.shape_to_tensor(relax.ShapeExpr([size])))
    hit = node.reshape(emit(op.less(last, extent)), [1, 1, size])
    for position in range(length):
        start = position * distance
        values = emit(op.strided_slice(padded, [1], [start], [size + start], assume_inbound=True))
        same = emit(op.equal(node.reshape(values, [batch, 1, size]), node.array(table[:, position].reshape(1, -1, 1), "int64")))
        hit = emit(op.logical_and(hit, same))
    return emit(op.sum(emit(op.astype(hit, "int64")), [2]))


def _weighted(node: Node, counts: relax.Expr, indices: list[int]) -> relax.Expr:
    """By `mode`: counts, the weights of what occurs, or their product. Weight i belongs to n-gram i, as in ONNX Runtime."""
    mode, weights = node.attr("mode"), node.attr("weights")
    if mode not in ("TF", "IDF", "TFIDF"):
        raise Refusal(f"mode {mode} is not known")
    if weights and len(weights) != len(indices):
        raise Refusal(f"{len(weights)} weights for {len(indices)} n-grams")
    if mode == "TF" or mode == "TFIDF" and not weights:
        return counts
    columns = np.ones(max(indices) + 1)
    columns[indices] = weights or 1.0
    factors, zero = node.array(columns[None], "float32"), node.scalar(0, "float32")
    if mode == "TFIDF":
        return node.emit(relax.op.multiply(counts, factors))
    return node.emit(relax.op.where(node.emit(relax.op.greater(counts, zero)), factors, zero))
