"""RotaryEmbedding, the standard one and ONNX Runtime's."""

from __future__ import annotations

from ....tvm import relax
from ..compose import apply, contributed
from ..node import Node
from ..registry import converter
from ..values import Refusal, Value
from ..vectors import from_the_front


@converter("RotaryEmbedding", since=23)
def rotary_embedding(node: Node) -> relax.Expr:
    """x [B, H, S, D] or [B, S, H * D]; cos and sin [positions, R / 2] with positions [B, S], or [B, S, R / 2] without."""
    if node.has(3):
        positions = from_the_front(node, node.value(3))
        cos, sin = (apply(node, "Gather", node.value(index), positions, axis=0) for index in (1, 2))
    else:
        cos, sin = node.tensor(1), node.tensor(2)
    heads = node.attr("num_heads", 0)
    if node.rank(node.tensor(0)) == 3 and not heads:
        raise Refusal("num_heads is needed for an input of three dims")
    return _embedded(node, cos, sin, heads)


@contributed("RotaryEmbedding", attributes="interleaved is_packed_batching num_heads rotary_embedding_dim scale")
def microsoft_rotary_embedding(node: Node) -> relax.Expr:
    """x as in the standard; positions [B, S], or [1]: the position of the first of S in a row."""
    if node.attr("is_packed_batching", 0) or node.attr("scale", 1.0) != 1:
        raise Refusal("is_packed_batching and scale are not supported")
    x = node.tensor(0)
    shape = node.shape(x)
    width = node.static(node.shape(node.tensor(2))[-1:], "the width of cos_cache")[0]
    heads = node.attr("num_heads", 0)
    if len(shape) == 3 and not node.attr("rotary_embedding_dim", 0):
        heads = node.static([node.dims.floor_divide(shape[2], 2 * width)], "the number of heads")[0]
    elif len(shape) == 3 and not heads:
        raise Refusal("num_heads is needed with rotary_embedding_dim")
    positions = node.to_tensor(from_the_front(node, node.value(1)))
    if node.rank(positions) < 2:
        length = shape[1] if len(shape) == 3 else shape[2]
        positions = consecutive(node, positions, length)
    cos, sin = (apply(node, "Gather", node.value(index), positions, axis=0) for index in (2, 3))
    return _embedded(node, cos, sin, heads)


def consecutive(node: Node, first: relax.Expr, length: Value) -> relax.Expr:
    """`length` positions in a row for each element of `first` [B]: int64 [B, length]."""
    first = first if node.dtype(first) == "int64" else node.emit(relax.op.astype(first, "int64"))
    first = node.reshape(first, [node.dims.product(node.shape(first)), 1])
    return node.emit(relax.op.add(first, node.reshape(node.emit(relax.op.arange(0, length, 1, "int64")), [1, length])))


def _embedded(node: Node, cos: relax.Expr, sin: relax.Expr, heads: int) -> relax.Expr:
    """x rotated by cos and sin [B or 1, S, R / 2]."""
    x = node.tensor(0)
    shape = node.shape(x)
    if len(shape) not in (3, 4):
        raise Refusal(f"an input of {len(shape)} dims")
    packed = len(shape) == 3
    if packed:
        x = node.reshape(x, [*shape[:2], heads, node.dims.floor_divide(shape[2], heads)])
    size = node.static(node.shape(x)[3:], "the head size")[0]
    part = node.attr("rotary_embedding_dim", 0) or size
    result = rotated(node, x, *(_spread(node, table, 2 if packed else 1) for table in (cos, sin)), part, bool(node.attr("interleaved", 0)))
    return node.reshape(result, shape)


def _spread(node: Node, table: relax.Expr, heads: int) -> relax.Expr:
    """[B, S, R / 2] with a dim of one for the heads."""
    if node.rank(table) != 3:
        raise Refusal(f"cos and sin of {node.rank(table)} dims at each position")
    shape = node.shape(table)
    return node.reshape(table, [*shape[:heads], 1, *shape[heads:]])


def rotated(node: Node, x: relax.Expr, cos: relax.Expr, sin: relax.Expr, part: int, interleaved: bool) -> relax.Expr:
    """The first `part` elements of the last dim as pairs, each rotated; pairs are neighbours if interleaved, else one half apart. cos, sin: [.., part / 2], broadcast to x."""
    op, emit = relax.op, node.emit
    shape, half = node.shape(x), part // 2
    last = len(shape) - 1
    size = node.static(shape[last:], "the head size")[0]
    if part % 2 or part > size:
        raise Refusal(f"{part} rotated elements of a head of {size}")
    if any(not node.dims.equal(node.shape(table)[-1], half) for table in (cos, sin)):
        raise Refusal(f"cos and sin of shape {node.shape(cos)} for {part} rotated elements")
    if interleaved:
        pairs = node.reshape(emit(op.strided_slice(x, [last], [0], [part])) if part < size else x, [*shape[:last], half, 2])
        first, second = (node.reshape(emit(op.strided_slice(pairs, [last + 1], [index], [index + 1])), [*shape[:last], half]) for index in (0, 1))
    else:
        first, second = (emit(op.strided_slice(x, [last], [index * half], [(index + 1) * half])) for index in (0, 1))
    aligned = node.align(first, second, cos, sin)
    first, second, cos, sin = aligned
    turned = [
        emit(op.subtract(emit(op.multiply(first, cos)), emit(op.multiply(second, sin)))),
        emit(op.add(emit(op.multiply(second, cos)), emit(op.multiply(first, sin)))),
    ]
    if interleaved:
        turned = [node.reshape(emit(op.stack(turned, axis=last + 1)), [*node.shape(turned[0])[:last], part])]
    rest = [emit(op.strided_slice(x, [last], [part], [size]))] if part < size else []
    return turned[0] if len(turned) + len(rest) == 1 else emit(op.concat([*turned, *rest], last))
