"""MatMulNBits (domain com.microsoft): a product with a weight of 2, 4 or 8 bits, scaled in blocks along K."""

from __future__ import annotations

import numpy as np

from ....dialect.weight_only import packed_codes, weight_only_matmul
from ....tvm import relax
from ..compose import contributed
from ..node import Node
from ..values import Refusal


@contributed("MatMulNBits", attributes="K N accuracy_level bits block_size weight_prepacked")
def matmul_nbits(node: Node) -> relax.Expr:
    """A [..., K] times the transpose of B: codes [N, blocks, block_size * bits / 8], (code - zero) * scale, plus a bias [N].

    It becomes the dialect's weight-only product; where that cannot say it (zero points that are no codes, blocks chosen by g_idx), the weight is made at import.
    """
    k, n, bits, block = (node.attr(name, default) for name, default in (("K", 0), ("N", 0), ("bits", 4), ("block_size", 0)))
    if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or node.attr("weight_prepacked", 0):
        raise Refusal(
            f"bits={bits}, block_size={block}, weight_prepacked={node.attr('weight_prepacked', 0)}; 2, 4 or 8 bits in blocks of powers of two from 16"
        )
    blocks = -(-k // block)
    packed = _constant(node, 1).reshape(-1)
    if packed.size != n * blocks * block * bits // 8:
        raise Refusal(f"a weight of {packed.size} bytes, which is not [{n}, {blocks}, {block * bits // 8}]")
    codes = unpacked(packed.reshape(n, -1), bits)
    scales = _constant(node, 2).astype(np.float32).reshape(n, blocks)
    zeros = _zeros(node, n, blocks, bits)
    x = node.tensor(0)
    dtype, shape = node.dtype(x), node.shape(x)
    x = x if dtype == "float32" else node.emit(relax.op.astype(x, "float32"))
    x = node.reshape(x, [1, *shape]) if len(shape) == 1 else x
    x = x if isinstance(shape[-1], int) else node.cast_shape(x, [*shape[:-1], k])
    result = node.emit(_product(node, x, codes, scales, zeros, (k, bits, block)))
    result = node.reshape(result, [n]) if len(shape) == 1 else result
    if node.has(5):
        bias = node.tensor(5)
        bias = bias if node.dtype(bias) == "float32" else node.emit(relax.op.astype(bias, "float32"))
        result = node.emit(relax.op.add(result, bias))
    return result if dtype == "float32" else relax.op.astype(result, dtype)


def _product(node: Node, x: relax.Expr, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, sizes: tuple[int, int, int]) -> relax.Expr:
    k, bits, block = sizes
    group_of = np.arange(k) // block
    given = _constant(node, 4).reshape(-1)[:k] if node.has(4) else group_of
    whole = zeros is None or bool(np.all((zeros == np.rint(zeros)) & (zeros >= 0) & (zeros < 1 << bits)))
    if not np.array_equal(given, group_of) or not whole:
        if np.any((given < 0) | (given >= scales.shape[1])):
            raise Refusal("g_idx names a block that does not exist")
        shift = np.float32(1 << (bits - 1)) if zeros is None else zeros[:, given].astype(np.float32)
        weight = (codes[:, :k].astype(np.float32) - shift) * scales[:, given]
        return relax.op.matmul(x, node.array(weight.T, "float32"))
    operands = [x, node.array(packed_codes(np.ascontiguousarray(codes.T), bits), "uint8"), node.array(scales.T, "float32")]
    if zeros is not None:
        operands.append(node.array(zeros.T, "uint8"))
    return weight_only_matmul(*operands, bits=bits, group=block)


def _zeros(node: Node, n: int, blocks: int, bits: int) -> np.ndarray | None:
    """Zero points [N, blocks]: bytes are packed as the weight is, each row from a byte of its own; floats are not packed. None where they are 2^(bits - 1)."""
    if not node.has(3):
        return None
    zeros = _constant(node, 3)
    if zeros.dtype == np.uint8:
        zeros = unpacked(zeros.reshape(n, -(-blocks * bits // 8)), bits)[:, :blocks]
    else:
        zeros = zeros.astype(np.float32).reshape(n, blocks)
    return None if np.all(zeros == 1 << (bits - 1)) else zeros


def _constant(node: Node, index: int) -> np.ndarray:
    host = node.maybe_host(index)
    if host is None or host.symbolic:
        raise Refusal(f"input {index} ('{node.proto.input[index]}') must be a constant")
    return host.array


def unpacked(rows: np.ndarray, bits: int) -> np.ndarray:
    """[N, bytes] -> [N, bytes * 8 / bits]: the codes in each byte, low bits first."""
    parts = [rows >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(rows), -1).astype(np.uint8)
