"""Mixtures of experts of ONNX Runtime (domain com.microsoft): every token goes through the k experts that its router prefers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....dialect.grouped import grouped_matmul
from ....tvm import Constant, relax
from ..compose import apply, contributed
from ..node import Node
from ..symbolic import Dim
from ..values import Refusal
from .matmul_nbits import unpacked

_ATTRIBUTES = "activation_alpha activation_beta activation_type k normalize_routing_weights swiglu_fusion swiglu_limit use_sparse_mixer"


@dataclass(frozen=True)
class _Layer:
    """weight: [E, N, K], bias: [E, N] or None."""

    weight: relax.Expr
    bias: relax.Expr | None


@contributed("MoE", attributes=_ATTRIBUTES)
def mixture_of_experts(node: Node) -> relax.Expr:
    """input [T, H] or [B, S, H], router [T, E], weights of fc1 [E, I or 2 I, H] and fc2 [E, H, I] (and fc3 [E, I, H], a gate's other factor), biases -> like input.

    A token's gates are the k greatest of its softmax over all experts, divided by their sum where `normalize_routing_weights` says so.
    """
    layers = [_layer(node, node.tensor(index), index + 1) if node.has(index) else None for index in (2, 4, 6)]
    return _experts(node, layers, bool(node.attr("normalize_routing_weights", 0)))


@contributed("QMoE", attributes=f"{_ATTRIBUTES} accuracy_level block_size expert_weight_bits quant_type")
def mixture_of_quantized_experts(node: Node) -> relax.Expr:
    """As MoE with weights of 4 or 8 bits, which are made floats at import: codes [E, N, K * bits / 8], scales [E, N] or, of blocks along K, [E, N, blocks], zero points like these.

    Gates are the softmax over the k greatest of the router.
    """
    if node.attr("quant_type", "int") != "int":
        raise Refusal(f"quant_type '{node.attr('quant_type')}' is not supported")
    if any(node.has(index) for index in range(14, 21)):
        raise Refusal("router_weights, global and activation scales are not supported")
    layers = [_quantized(node, index, zeros) if node.has(index) else None for index, zeros in ((2, 11), (5, 12), (8, 13))]
    return _experts(node, layers, True)


def _layer(node: Node, weight: relax.Expr, bias: int) -> _Layer:
    return _Layer(weight, node.tensor(bias) if node.has(bias) else None)


def _quantized(node: Node, index: int, zeros: int) -> _Layer:
    bits = node.attr("expert_weight_bits", 4)
    if bits not in (4, 8):
        raise Refusal(f"weights of {bits} bits")
    codes = node.constant(index)
    experts, n, _ = codes.shape
    codes = unpacked(codes.reshape(experts * n, -1), bits).reshape(experts, n, -1)
    scales = node.constant(index + 1).astype(np.float32).reshape(experts, n, -1)
    blocks, k = scales.shape[2], codes.shape[2]
    block = node.attr("block_size", 0) or k
    if blocks != -(-k // block):
        raise Refusal(f"{blocks} scales for {k} weights in blocks of {block}")
    zero: np.ndarray = np.full((experts, n, blocks), 1 << (bits - 1), np.uint8)
    if node.has(zeros):
        zero = unpacked(node.constant(zeros).reshape(experts * n, -1), bits).reshape(experts, n, -1)[..., :blocks]
    of = np.arange(k) // block
    weight = (codes.astype(np.float32) - zero[..., of].astype(np.float32)) * scales[..., of]
    return _layer(node, node.array(weight, "float32"), index + 2)


def _experts(node: Node, layers: list[_Layer | None], normalized: bool) -> relax.Expr:
    fc1, fc2, fc3 = layers
    assert fc1 is not None and fc2 is not None
    if node.attr("use_sparse_mixer", 0):
        raise Refusal("attribute 'use_sparse_mixer' is not supported")
    x, op, emit = node.tensor(0), relax.op, node.emit
    shape, count = node.shape(x), int(node.attr("k", 1))
    (experts, *_), (hidden,) = node.static(node.shape(fc1.weight), "a weight"), node.static(shape[-1:], "the width of tokens")
    if len(shape) not in (2, 3) or not 0 < count <= experts:
        raise Refusal(f"{count} of {experts} experts for tokens of {len(shape)} dims")
    x = emit(op.reshape(x, [-1, hidden])) if len(shape) == 3 else x
    router = node.with_dim(node.with_dim(node.tensor(1), 0, node.shape(x)[0]), 1, experts)
    gates = apply(node, "Softmax", router, axis=-1)
    top = emit(op.topk(gates, count, -1, "both", True, "int64"))
    gates, chosen = emit(relax.TupleGetItem(top, 0)), emit(relax.TupleGetItem(top, 1))
    if normalized:
        gates = emit(op.divide(gates, emit(op.sum(gates, [-1], keepdims=True))))
    chosen = emit(op.reshape(chosen, [-1]))
    order = emit(op.argsort(chosen, 0, False, "int64"))
    # how many rows are of an expert or one before it
    before = emit(op.less_equal(emit(op.expand_dims(chosen, [0])), node.array(np.arange(experts)[:, None], "int64")))
    ends = emit(op.sum(emit(op.astype(before, "int64")), [1]))
    owner = emit(op.take(chosen, order, axis=0))
    rows = emit(op.take(x, emit(op.floor_divide(order, node.scalar(count, "int64"))), axis=0))

    def through(layer: _Layer, rows: relax.Expr) -> relax.Expr:
        if node.shape(layer.weight)[0] != experts:
            raise Refusal(f"weights of {node.shape(layer.weight)[0]} and {experts} experts")
        product = emit(grouped_matmul(rows, _columns(node, layer.weight, node.shape(rows)[1]), ends))
        return product if layer.bias is None else emit(op.add(product, emit(op.take(node.with_dim(layer.bias, 0, experts), owner, axis=0))))

    rows = through(fc2, _activated(node, through(fc1, rows), None if fc3 is None else through(fc3, rows)))
    gates = emit(op.take(emit(op.reshape(gates, [-1, 1])), order, axis=0))
    back = emit(op.argsort(order, 0, False, "int64"))
    rows = emit(op.take(emit(op.multiply(rows, gates)), back, axis=0))
    total = emit(op.sum(emit(op.reshape(rows, [-1, count, hidden])), [1]))
    return node.reshape(total, shape)


def _columns(node: Node, weight: relax.Expr, depth: Dim) -> relax.Expr:
    """[E, N, depth] -> [E, depth, N]; a constant at import. Older models declare the last two dims the other way round; the elements are in this order in any case."""
    experts, *sizes = node.static(node.shape(weight), "a weight")
    sizes = sorted(sizes, key=lambda size: size == depth)
    if sizes[1:] != [depth]:
        raise Refusal(f"a weight {node.shape(weight)} for tokens of width {depth}")
    if isinstance(weight, Constant):
        return node.array(weight.value.numpy().reshape(experts, *sizes).transpose(0, 2, 1), node.dtype(weight))
    return node.emit(relax.op.permute_dims(node.reshape(weight, [experts, *sizes]), [0, 2, 1]))


def _activated(node: Node, x: relax.Expr, other: relax.Expr | None) -> relax.Expr:
    """The activation of [S, I]; of a gate and the other factor, which lie in x [S, 2 I] where `other` is None."""
    name, op, emit = node.attr("activation_type", "relu"), relax.op, node.emit
    if name == "swiglu":
        gate, factor = (x, other) if other is not None else _halves(node, x)
        return _swiglu(node, gate, factor)
    if name == "gelu":
        x = apply(node, "Gelu", x, approximate="tanh")
    elif name in ("relu", "silu"):
        x = emit(op.nn.relu(x) if name == "relu" else op.nn.silu(x))
    elif name != "identity":
        raise Refusal(f"activation '{name}' is not supported")
    return x if other is None else emit(op.multiply(x, other))


def _halves(node: Node, x: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    fusion, (rows, width) = node.attr("swiglu_fusion", 0), node.shape(x)
    if fusion not in (1, 2) or width % 2:
        raise Refusal(f"swiglu of {width} columns with swiglu_fusion={fusion}, and no third weight")
    op, emit, half = relax.op, node.emit, width // 2
    pairs = node.reshape(x, [rows, half, 2] if fusion == 1 else [rows, 2, half])
    gate, factor = (emit(op.strided_slice(pairs, [2 if fusion == 1 else 1], [part], [part + 1])) for part in (0, 1))
    return node.reshape(gate, [rows, half]), node.reshape(factor, [rows, half])


def _swiglu(node: Node, gate: relax.Expr, factor: relax.Expr) -> relax.Expr:
    """gate * sigmoid(alpha * gate) * (factor + beta), both clamped to `swiglu_limit`."""
    op, emit = relax.op, node.emit
    alpha, beta, limit = node.attr("activation_alpha", 1.0), node.attr("activation_beta", 0.0), node.attr("swiglu_limit")
    if limit is not None:
        gate = emit(op.minimum(gate, node.scalar(limit, "float32")))
        factor = emit(op.clip(factor, -limit, limit))
    turned = emit(op.sigmoid(emit(op.multiply(gate, node.scalar(alpha, "float32")))))
    return emit(op.multiply(emit(op.multiply(gate, turned)), emit(op.add(factor, node.scalar(beta, "float32")))))
