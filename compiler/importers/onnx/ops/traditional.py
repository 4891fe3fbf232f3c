"""Operators of the traditional machine learning domain on numbers; those on strings are refused."""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..values import Refusal, Value

DOMAIN = "ai.onnx.ml"


def _as_float(node: Node, index: int = 0) -> relax.Expr:
    value = node.tensor(index)
    return value if node.dtype(value) == "float32" else node.emit(relax.op.astype(value, "float32"))


@converter("ArrayFeatureExtractor", domain=DOMAIN)
def array_feature_extractor(node: Node) -> relax.Expr:
    """The columns of the last axis at the given places; a vector becomes one row."""
    x = node.tensor(0)
    places = node.reshape(node.tensor(1), [node.dims.product(node.shape(node.tensor(1)))])
    x = node.reshape(x, [1, *node.shape(x)]) if node.rank(x) == 1 else x
    return relax.op.take(x, places, node.rank(x) - 1, mode="fast")


@converter("Binarizer", domain=DOMAIN)
def binarizer(node: Node) -> relax.Expr:
    """1 above the threshold, else 0."""
    x = node.tensor(0)
    above = node.emit(relax.op.greater(x, node.scalar(node.attr("threshold", 0.0), node.dtype(x))))
    return relax.op.astype(above, node.dtype(x))


@converter("Scaler", domain=DOMAIN)
def scaler(node: Node) -> relax.Expr:
    """(x - offset) * scale, each one number or one per column."""
    x = _as_float(node)
    offset, scale = (node.array(np.asarray(node.attr(name, default)), "float32") for name, default in (("offset", [0.0]), ("scale", [1.0])))
    return relax.op.multiply(*node.align(node.emit(relax.op.subtract(*node.align(x, offset))), scale))


@converter("Normalizer", domain=DOMAIN)
def normalizer(node: Node) -> relax.Expr:
    """Rows divided by their norm; rows of norm 0 stay."""
    x, norm = _as_float(node), node.attr("norm", "MAX")
    axis = node.rank(x) - 1
    if norm == "L1":
        size = relax.op.sum(node.emit(relax.op.abs(x)), axis, keepdims=True)
    elif norm == "L2":
        size = relax.op.sqrt(node.emit(relax.op.sum(node.emit(relax.op.multiply(x, x)), axis, keepdims=True)))
    elif norm == "MAX":
        size = relax.op.max(x, axis, keepdims=True)
    else:
        raise Refusal(f"norm '{norm}'")
    bound, zero = node.emit(size), node.scalar(0, "float32")
    return relax.op.where(node.emit(relax.op.equal(bound, zero)), x, node.emit(relax.op.divide(x, bound)))


@converter("LinearRegressor", domain=DOMAIN)
def linear_regressor(node: Node) -> relax.Expr:
    """[N, C] -> [N, targets]"""
    targets = node.attr("targets", 1)
    if node.attr("post_transform", "NONE") != "NONE":
        raise Refusal(f"post_transform {node.attr('post_transform')} is not supported")
    weights = np.asarray(node.attr("coefficients"), np.float32).reshape(targets, -1).T
    product = node.emit(relax.op.matmul(_as_float(node), node.array(weights, "float32")))
    intercepts = node.attr("intercepts")
    return relax.op.add(product, node.array(np.asarray(intercepts), "float32")) if intercepts else product


@converter("LabelEncoder", domain=DOMAIN, since=2)
def label_encoder(node: Node) -> Value:
    """The value that belongs to the key that equals an element, else the default; integers and floats."""
    x = node.tensor(0)
    keys, key_type = _table(node, "keys")
    values, value_type = _table(node, "values")
    if len(keys) != len(values):
        raise Refusal(f"{len(keys)} keys and {len(values)} values")
    default = node.attr("default_float", -0.0) if value_type == "float32" else node.attr("default_int64", -1)
    result = node.emit(relax.op.full(node.shape(x), node.scalar(default, value_type), value_type))
    if node.dtype(x) != key_type:
        raise Refusal(f"keys of type {key_type} for elements of type {node.dtype(x)}")
    if len(keys) > _MOST_KEYS:
        raise Refusal(f"{len(keys)} keys; up to {_MOST_KEYS} are supported")
    if key_type == "float32" and np.isnan(keys).any():
        raise Refusal("a key that is not a number")
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        hit = node.emit(relax.op.equal(x, node.scalar(key, key_type)))
        result = node.emit(relax.op.where(hit, node.scalar(value, value_type), result))
    return result


#: each key is a comparison of its own
_MOST_KEYS = 64


def _table(node: Node, what: str) -> tuple[np.ndarray, str]:
    for name, dtype in ((f"{what}_int64s", "int64"), (f"{what}_floats", "float32")):
        if node.attr(name):
            return np.asarray(node.attr(name), dtype), dtype
    raise Refusal(f"{what} that are strings or a tensor are not supported")
