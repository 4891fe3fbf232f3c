"""Fusions that ONNX Runtime's optimizers write (domain com.microsoft): products with activations, GELU, normalisations with their sums."""

from __future__ import annotations

from typing import Any

from ....tvm import relax
from ..compose import apply, contributed, given
from ..node import Node
from ..values import Refusal
from ..vectors import from_the_front
from .integer_products import WINDOW
from .qoperator import channels_first, channels_last

_PLAIN = frozenset({"Relu", "Tanh", "Sigmoid", "Softplus", "Softsign"})
#: activation -> attributes that its parameters stand for, in their order
_WITH_PARAMETERS = {
    "LeakyRelu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "Elu": ("alpha",),
    "Celu": ("alpha",),
    "Selu": ("alpha", "gamma"),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
_CONV_ATTRIBUTES = "activation activation_params auto_pad dilations group kernel_shape pads strides"


def activated(node: Node, value: relax.Expr, name: str, parameters: dict[str, float]) -> relax.Expr:
    """An activation by its name; parameters that are left out are those of the standard operator."""
    if name in ("", "Identity"):
        return value
    if name not in _PLAIN and name not in _WITH_PARAMETERS:
        raise Refusal(f"activation '{name}' is not supported")
    if name == "Clip":
        return node.emit(relax.op.clip(value, parameters["min"], parameters["max"]))
    return apply(node, name, value, **{key: number for key, number in parameters.items() if key in _WITH_PARAMETERS.get(name, ())})


@contributed("FusedMatMul", "TransposeMatMul", attributes="alpha transA transB transBatchA transBatchB")
def fused_matmul(node: Node) -> relax.Expr:
    """alpha * A @ B. transBatchA: A is [M, batch.., K]; transA: its last two dims are swapped after that."""
    sides = []
    for index, name in enumerate("AB"):
        value, rank = node.tensor(index), node.rank(node.tensor(index))
        order = list(range(rank))
        if node.attr(f"transBatch{name}", 0) and rank > 2:
            order = [*order[1:-1], 0, order[-1]]
        if node.attr(f"trans{name}", 0) and rank > 1:
            order[-2:] = order[:-3:-1]
        sides.append(value if order == list(range(rank)) else node.emit(relax.op.permute_dims(value, order)))
    product, alpha = apply(node, "MatMul", *sides), node.attr("alpha", 1.0)
    return product if alpha == 1 else relax.op.multiply(product, node.scalar(alpha, node.dtype(product)))


@contributed("FusedGemm", attributes="activation activation_alpha activation_beta activation_gamma alpha beta transA transB")
def fused_gemm(node: Node) -> relax.Expr:
    result = apply(node, "Gemm", *node.inputs, **given(node, "alpha", "beta", "transA", "transB"))
    parameters = {name: value for name in ("alpha", "beta", "gamma") if (value := node.attr(f"activation_{name}")) is not None}
    if node.attr("activation", "") == "Clip":
        parameters = {"min": parameters.get("alpha", -float("inf")), "max": parameters.get("beta", float("inf"))}
    return activated(node, result, node.attr("activation", ""), parameters)


@contributed("FusedConv", "NhwcConv", "NhwcFusedConv", attributes=_CONV_ATTRIBUTES)
def fused_conv(node: Node) -> relax.Expr:
    """activation(conv(X, W) + B + Z); X, Z and the result are channels last in the Nhwc forms, W never is."""
    x, last = node.tensor(0), node.op.startswith("Nhwc")
    rank = node.rank(x)
    x = node.emit(relax.op.permute_dims(x, channels_first(rank))) if last else x
    result = apply(node, "Conv", x, node.value(1), node.value(2) if node.has(2) else None, **given(node, *WINDOW, "kernel_shape"))
    result = node.emit(relax.op.permute_dims(result, channels_last(rank))) if last else result
    if node.has(3):
        result = apply(node, "Add", result, node.value(3))
    name, numbers = node.attr("activation", ""), node.attr("activation_params") or []
    names = _WITH_PARAMETERS.get(name, ())
    if len(numbers) > len(names) or name == "Clip" and len(numbers) != 2:
        raise Refusal(f"{len(numbers)} parameters for activation '{name}'")
    return activated(node, result, name, dict(zip(names, numbers, strict=False)))


@contributed("FastGelu", "BiasGelu")
def gelu_of_a_sum(node: Node) -> relax.Expr:
    """gelu(x + bias), FastGelu by tanh; its bias may be left out."""
    x = node.tensor(0)
    if node.has(1):
        x = apply(node, "Add", x, node.value(1))
    return relax.op.nn.gelu_tanh(x) if node.op == "FastGelu" else relax.op.nn.gelu(x)


@contributed("BiasAdd")
def bias_add(node: Node) -> relax.Expr:
    return apply(node, "Add", apply(node, "Add", node.value(0), node.value(1)), node.value(2))


@contributed("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", attributes="epsilon")
def skip_normalization(node: Node) -> tuple[relax.Expr, ...]:
    """The normalised sum of input, skip and bias; the sum is the fourth output. Mean and deviation (second and third) are of use in training only."""
    simplified = node.op == "SkipSimplifiedLayerNormalization"
    bias = 3 if simplified else 4
    total = apply(node, "Add", node.value(0), node.value(1))
    if node.has(bias):
        total = apply(node, "Add", total, node.value(bias))
    normal = _normalized(node, total, 2, None if simplified else 3, simplified)
    unwanted = [name for name in node.proto.output[1:3] if name]
    if unwanted:
        raise Refusal(f"the output '{unwanted[0]}', which only training needs, is not supported")
    return normal, normal, normal, total


def _normalized(node: Node, x: relax.Expr, gamma: int, beta: int | None, simplified: bool = False) -> relax.Expr:
    options: dict[str, Any] = {"axis": -1, "epsilon": node.attr("epsilon", 1e-12)}
    if simplified:
        return node.emit(relax.op.nn.rms_norm(x, node.tensor(gamma), [-1], options["epsilon"]))
    return apply(node, "LayerNormalization", x, node.value(gamma), node.value(beta) if beta is not None and node.has(beta) else None, **options)


@contributed("EmbedLayerNormalization", attributes="epsilon mask_index_type")
def embed_normalization(node: Node) -> tuple[relax.Expr, ...]:
    """The normalised sum of word, position and segment embeddings; the number of words of each row that the mask shows (int32), 0 without a mask; the sum itself."""
    ids, op = node.tensor(0), relax.op
    batch, length = node.shape(ids)
    total = apply(node, "Gather", node.value(2), from_the_front(node, node.value(0)), axis=0)
    positions = from_the_front(node, node.value(8)) if node.has(8) else node.reshape(node.emit(op.arange(0, length, 1, "int64")), [1, length])
    total = apply(node, "Add", total, apply(node, "Gather", node.value(3), positions, axis=0))
    if node.has(4):
        if not node.has(1):
            raise Refusal("segment_ids are missing")
        total = apply(node, "Add", total, apply(node, "Gather", node.value(4), from_the_front(node, node.value(1)), axis=0))
    normal = _normalized(node, total, 5, 6)
    if node.has(7):
        shown = node.emit(op.equal(node.tensor(7), node.scalar(1, node.dtype(node.tensor(7)))))
        words = node.emit(op.sum(node.emit(op.astype(shown, "int32")), 1))
    else:
        words = node.emit(op.zeros([batch], "int32"))
    return normal, words, total
