"""Matrix products: MatMul, Gemm, Einsum."""

from __future__ import annotations

import string
from math import prod

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal
from ..vectors import Vector


@converter("MatMul")
def matmul(node: Node) -> relax.Expr:
    left, right = node.tensor(0), node.tensor(1)
    left_shape, right_shape = node.shape(left), node.shape(right)
    inner, outer = left_shape[-1], right_shape[-2 if len(right_shape) > 1 else 0]
    if not node.dims.equal(inner, outer) and not (isinstance(inner, int) and isinstance(outer, int)):
        if isinstance(outer, int):
            left = node.cast_shape(left, [*left_shape[:-1], outer])
        else:
            right = node.cast_shape(right, [*right_shape[:-2], inner, *right_shape[-1:]] if len(right_shape) > 1 else [inner])
    if len(left_shape) > 2 and len(right_shape) > 2:
        left, right = node.align(left, right, trailing=2)
    return relax.op.matmul(left, right)


@converter("Gemm", since=7)
def gemm(node: Node) -> relax.Expr:
    """alpha * op(A) @ op(B) + beta * C; a constant B is transposed and scaled at import."""
    alpha, beta = node.attr("alpha", 1.0), node.attr("beta", 1.0)
    left = node.tensor(0)
    if node.attr("transA", 0):
        left = node.emit(relax.op.permute_dims(left, [1, 0]))
    weight = node.maybe_host(1)
    if weight is not None and not weight.symbolic:
        array = weight.array.T if node.attr("transB", 0) else weight.array
        scaled = array if alpha == 1 else array * np.asarray(alpha, array.dtype)
        right = weight.to_constant() if scaled is weight.array else node.array(scaled, weight.dtype)
    else:
        right = node.tensor(1)
        if node.attr("transB", 0):
            right = node.emit(relax.op.permute_dims(right, [1, 0]))
        if alpha != 1:
            left = node.emit(relax.op.multiply(left, node.scalar(alpha, node.dtype(left))))
    product = relax.op.matmul(left, right)
    if not node.has(2) or beta == 0:
        return product
    bias, host = node.tensor(2), node.maybe_host(2)
    if beta != 1:
        if host is not None and not host.symbolic:
            bias = node.array(host.array * np.asarray(beta, host.array.dtype), host.dtype)
        else:
            bias = node.emit(relax.op.multiply(bias, node.scalar(beta, node.dtype(bias))))
    return relax.op.add(*node.align(node.emit(product), bias))


@converter("Einsum", since=12)
def einsum(node: Node) -> relax.Expr:
    """One batched matmul between transposes after the other, from left to right. A letter that one operand has twice takes its diagonal; sizes of one letter are the same."""
    operands = node.tensors()
    subscripts, result = _subscripts(node.attr("equation").replace(" ", ""), [node.rank(operand) for operand in operands])
    for index, term in enumerate(subscripts):
        operands[index], subscripts[index] = _diagonal(node, operands[index], term)
    operands = _of_one_size(node, operands, subscripts)
    value, term = operands[0], subscripts[0]
    for index in range(1, len(operands)):
        wanted = "".join((*subscripts[index + 1 :], result))
        kept = "".join(letter for letter in dict.fromkeys(term + subscripts[index]) if letter in wanted) if index + 1 < len(operands) else result
        value, term = node.emit(_contract(node, value, operands[index], term, subscripts[index], kept)), kept
    value, term = _sum_private(node, value, term, result)
    return value if term == result else relax.op.permute_dims(value, [term.index(letter) for letter in result])


def _of_one_size(node: Node, operands: list[relax.Expr], subscripts: list[str]) -> list[relax.Expr]:
    """The operands with one size for each letter, a known one if any is known; checked while running where sizes are open."""
    shapes = [node.shape(operand) for operand in operands]
    found = [pair for term, shape in zip(subscripts, shapes, strict=True) for pair in zip(term, shape, strict=True)]
    sizes: dict[str, Dim] = {}
    for letter, dim in sorted(found, key=lambda pair: not isinstance(pair[1], int)):
        if (size := sizes.setdefault(letter, dim)) is not dim and isinstance(dim, int) and size != dim:
            raise Refusal(f"the equation has sizes {size} and {dim} for '{letter}'")
    checked = []
    for value, term, shape in zip(operands, subscripts, shapes, strict=True):
        wanted = [sizes[letter] for letter in term]
        same = all(node.dims.equal(dim, want) for dim, want in zip(shape, wanted, strict=True))
        checked.append(value if same else node.cast_shape(value, wanted))
    return checked


def _subscripts(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """One letter per dim of each operand and of the result. An ellipsis becomes letters of its own: the dims in front of which it stands are aligned at their ends."""
    terms, arrow, result = equation.partition("->")
    listed = terms.split(",")
    if len(listed) != len(ranks):
        raise Refusal(f"the equation '{equation}' has {len(listed)} terms, the node has {len(ranks)} inputs")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(listed, ranks, strict=True)]
    if min(hidden) < 0 or max(hidden) > len(spare) or any(len(term) != rank for term, rank in zip(listed, ranks, strict=True) if "..." not in term):
        raise Refusal(f"the equation '{equation}' does not fit operands of ranks {ranks}")
    if not arrow:
        plain = "".join(listed).replace(".", "")
        result = "..." + "".join(sorted(letter for letter in set(plain) if plain.count(letter) == 1))
    dots = "".join(spare[: max(hidden)])
    found = [term.replace("...", dots[len(dots) - count :]) for term, count in zip(listed, hidden, strict=True)]
    result = result.replace("...", dots)
    if not set(result) <= set("".join(found)) or len(set(result)) != len(result) or not all(map(str.isalpha, filter(None, found))):
        raise Refusal(f"the equation '{equation}': a result has letters of the operands, each once")
    return found, result


def _diagonal(node: Node, value: relax.Expr, term: str) -> tuple[relax.Expr, str]:
    """The elements whose places along dims of one letter are the same."""
    while len(set(term)) != len(term):
        letter = next(letter for letter in term if term.count(letter) > 1)
        first, second = (position for position, other in enumerate(term) if other == letter and term[:position].count(letter) < 2)
        rest = [position for position in range(len(term)) if position not in (first, second)]
        dims = node.shape(value)
        size = dims[first]
        if not node.dims.equal(size, dims[second]):
            value = node.cast_shape(value, [size if position == second else dim for position, dim in enumerate(dims)])
        moved = node.emit(relax.op.permute_dims(value, [*rest, first, second]))
        flat = node.reshape(moved, [*(dims[position] for position in rest), node.dims.product([size, size])])
        step = node.emit(relax.op.add(Vector.sizes(node, [size]).expr, node.scalar(1, "int64")))
        places = node.emit(relax.op.multiply(node.emit(relax.op.arange(0, size, 1, "int64")), step))
        value = node.emit(relax.op.take(flat, places, len(rest), mode="fast"))
        term = "".join(term[position] for position in rest) + letter
    return value, term


def _contract(node: Node, left: relax.Expr, right: relax.Expr, a: str, b: str, result: str) -> relax.Expr:
    """left[batch, m, k] @ right[batch, k, n], each of the four a group of letters."""
    left, a = _sum_private(node, left, a, b + result)
    right, b = _sum_private(node, right, b, a + result)
    sizes: dict[str, Dim] = {**dict(zip(b, node.shape(right), strict=True)), **dict(zip(a, node.shape(left), strict=True))}
    batch = [letter for letter in a if letter in b and letter in result]
    summed = [letter for letter in a if letter in b and letter not in result]
    rows, columns = [letter for letter in a if letter not in b], [letter for letter in b if letter not in a]

    def grouped(value: relax.Expr, term: str, order: list[str], groups: list[list[str]]) -> relax.Expr:
        moved = value if list(term) == order else node.emit(relax.op.permute_dims(value, [term.index(letter) for letter in order]))
        return node.reshape(moved, [*(sizes[letter] for letter in batch), *(prod((sizes[letter] for letter in group), start=1) for group in groups)])

    product = node.emit(
        relax.op.matmul(grouped(left, a, batch + rows + summed, [rows, summed]), grouped(right, b, batch + summed + columns, [summed, columns]))
    )
    order = batch + rows + columns
    unfolded = node.reshape(product, [sizes[letter] for letter in order])
    return unfolded if order == list(result) else relax.op.permute_dims(unfolded, [order.index(letter) for letter in result])


def _sum_private(node: Node, value: relax.Expr, term: str, others: str) -> tuple[relax.Expr, str]:
    """Sum over the letters that only this operand has."""
    private = [position for position, letter in enumerate(term) if letter not in others]
    if not private:
        return value, term
    return node.emit(relax.op.sum(value, private)), "".join(letter for letter in term if letter in others)
