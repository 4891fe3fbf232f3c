"""Programs that the `quantize` pass has rounded: codes are functions a * x + b of real values, whose levels are thereby given, and integer products give
their weights exactly.

    codes = uint8(clip(round(x / s [+ z]), 0, 255))     x's levels are (s, z)
    sums  = codes . w_s8 + c_s32;  y = float(sums) * (s * s_w)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .graph import Refused, Walk, linear, rule
from .nodes import Function, Node, Quant, View, affine, clamp, joined

#: kinds of nodes that round their results to levels of their own
ROUNDING = ("input", "linear", "add", "average", "matmul", "function", "layer_norm")


@rule("round")
def _round(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    if not isinstance(operands[0], View):
        raise Refused("its operand must depend on the input")
    return operands[0].mapped(Function(np.rint, ("round",)))


@rule("astype")
def _astype(walk: Walk, call: Any, operands: list[Any], source: str) -> Any:
    value, dtype = operands[0], str(call.attrs.dtype)
    if isinstance(value, np.ndarray):
        return value.astype(dtype)
    if not isinstance(value, View):
        raise Refused("its operand must depend on the input")
    if dtype == "float32":
        return value
    if dtype != "uint8":
        raise Refused(f"a conversion to {dtype}; FPGA streams hold uint8")
    return _pinned(value, source)


def _pinned(view: View, source: str) -> View:
    """The codes of a tensor, from round, clip and scale before the conversion."""
    steps = list(view.functions)
    if not steps or steps[-1].kind != "clip" or steps[-1].numbers != (0.0, 255.0):
        raise Refused("a conversion to uint8 without a clip to 0..255 before it")
    steps.pop()
    zero = 0.0
    if steps and steps[-1].kind == "affine" and steps[-1].numbers[0] == 1.0:
        zero = steps.pop().numbers[1]
    if not steps or steps[-1].kind != "round":
        raise Refused("a conversion to uint8 without rounding before it")
    steps.pop()
    scale = 1.0
    if steps and steps[-1].kind == "affine":
        a, b = steps.pop().numbers
        scale = 1 / a
        if b:
            steps.append(affine(1.0, b / a))
    if zero != round(zero) or not 0 <= zero <= 255:
        raise Refused(f"zero point {zero:g}; expected a level of 0..255")
    quant = Quant(scale, int(zero))
    if not quant.zero and view.node.kind != "input":  # codes of no negative numbers stand for a ReLU that the pass took away
        steps = list(joined(tuple(steps), clamp(0.0, np.inf)))
    node = View(view.node, view.index, tuple(steps)).settled()
    if node.kind not in ROUNDING or node.params.get("pinned") not in (None, quant):
        node = Node("function", [node], node.size, lambda x: x, source, {"function": affine(1.0, 0.0)})
    node.params["pinned"] = quant
    return View(node, view.index, (affine(1 / scale, zero),))


def integer_weights(view: View, weights: np.ndarray, source: str) -> tuple[View, Quant]:
    """(the real values whose codes `view` holds, their levels) for a product with int8 weights."""
    quant = view.node.params.get("pinned")
    if weights.dtype != np.int8 or len(view.functions) != 1 or view.functions[0].kind != "affine":
        raise Refused(f"a product of {weights.dtype} weights with a tensor that is not uint8 codes")
    a, b = view.functions[0].numbers
    return View(view.node, view.index), quant or Quant(1 / a, int(b))


def exact_linear(node: Node, weights: np.ndarray, quant: Quant, rows: int, name: str) -> Node:
    """The integer sums of codes as a function of real values: codes = x / scale + zero."""
    real = weights.astype(np.float64) / quant.scale
    bias = quant.zero * weights.astype(np.float64).sum(axis=1)
    return linear(node, real, bias, rows, name, (weights, np.full(len(weights), 1 / quant.scale)))


@rule("nn.pad")
def _pad(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    view = operands[0]
    if not isinstance(view, View):
        raise Refused("its operand must depend on the input")
    widths = [int(width) for width in call.attrs.pad_width]
    value = float(np.asarray(operands[1]).ravel()[0]) if len(operands) > 1 and isinstance(operands[1], np.ndarray) else float(call.attrs.pad_value)
    zero = view.functions[0].numbers[1] if len(view.functions) == 1 and view.functions[0].kind == "affine" else 0.0
    if str(call.attrs.pad_mode) != "constant" or value != zero:
        raise Refused(f"padding with {value:g}; FPGA convolutions pad with the value 0")
    return view.rearranged(lambda x: np.pad(x, list(zip(widths[::2], widths[1::2], strict=True)), constant_values=-1))
