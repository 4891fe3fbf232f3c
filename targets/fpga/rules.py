"""The rules of `graph.Walk`: what each Relax operator becomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .graph import Refused, Walk, linear, rule
from .nodes import Functions, Node, Quant, View, affine, in_order, rows_of
from .rules_codes import exact_linear, integer_weights


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _array(value: Any, what: str) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise Refused(f"{what} must be a constant")
    return value


def _view(value: Any, what: str = "its operand") -> View:
    if not isinstance(value, View):
        raise Refused(f"{what} must depend on the input")
    return value


def _shape(call: Any) -> list[int]:
    return _ints(call.ty.shape)


# ---- products


@rule("matmul")
def _matmul(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    a, b = operands
    a = _view(a, "the first operand of a product")
    shape = _shape(call)
    if isinstance(b, np.ndarray):
        if b.ndim > 2 and any(size != 1 for size in b.shape[:-2]) or b.ndim < 2:
            raise Refused(f"a batch of constant matrices {list(b.shape)}; expected one [K, N]")
        weights, rows, quant = b.reshape(b.shape[-2:]).T, a.index.size // a.shape[-1], None
        if weights.dtype.kind == "i":
            a, quant = integer_weights(a, weights, source)
        node, order = rows_of(a)
        if order is not None:
            weights = _permuted(weights, order)
        result = _weighted(node, weights, quant, rows, source)
        return View(result, np.arange(result.size).reshape(shape))
    return matmul(a, b, shape, source)


def matmul(a: View, b: View, shape: list[int], source: str) -> View:
    """A product of two streams: a [..., M, K], b [..., K, N]; the second is read transposed."""
    if len(shape) < 2 or len(b.shape) < 2:
        raise Refused("a product of vectors; expected matrices")
    lead, m, n, k = tuple(shape[:-2]), shape[-2], shape[-1], a.shape[-1]
    first = in_order(a, np.broadcast_to(a.index, (*lead, m, k)))
    second = in_order(b, np.broadcast_to(np.swapaxes(b.index, -1, -2), (*lead, n, k)))
    batch = math.prod(lead)

    def real(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.reshape(batch, m, k) @ y.reshape(batch, n, k).transpose(0, 2, 1)).ravel()

    node = Node("matmul", [first, second], batch * m * n, real, source, {"batch": batch, "m": m, "n": n, "k": k})
    return View(node, np.arange(node.size).reshape(shape))


def _weighted(node: Node, weights: np.ndarray, quant: Quant | None, rows: int, source: str) -> Node:
    if quant is not None:
        return exact_linear(node, weights, quant, rows, source)
    return linear(node, weights, np.zeros(len(weights)), rows, source)


def _permuted(weights: np.ndarray, order: np.ndarray) -> np.ndarray:
    """weights [N, K] for rows whose element k arrives as number order[k]."""
    result = np.empty_like(weights)
    result[:, order] = weights
    return result


@rule("nn.conv2d")
def _conv2d(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    attrs = call.attrs
    weights = _array(operands[1], "the kernel of a convolution")
    value, quant = operands[0], None
    if weights.dtype.kind == "i":
        value, quant = integer_weights(_view(value), weights, source)
    image, restore = _image(_view(value), str(attrs.data_layout))
    image, pads = _unpadded(image, _pads(attrs.padding))
    if int(attrs.groups) != 1:
        raise Refused(f"{int(attrs.groups)} groups; FPGA convolutions have one")
    if any(size != 1 for size in _ints(attrs.dilation)):
        raise Refused(f"dilation {_ints(attrs.dilation)}; FPGA convolutions have none")
    layouts = {"OIHW": (0, 2, 3, 1), "HWIO": (3, 0, 1, 2), "OHWI": (0, 1, 2, 3)}
    if str(attrs.kernel_layout) not in layouts or str(attrs.out_layout) not in ("", str(attrs.data_layout)):
        raise Refused(f"kernel layout {attrs.kernel_layout}, output layout {attrs.out_layout}")
    weights = weights.transpose(layouts[str(attrs.kernel_layout)])
    stride = tuple(_ints(attrs.strides))
    h, w, c = image.shape
    kernel = weights.shape[1:3]
    size = ((h + pads[0] + pads[2] - kernel[0]) // stride[0] + 1, (w + pads[1] + pads[3] - kernel[1]) // stride[1] + 1)
    node = in_order(image)
    if kernel != (1, 1) or stride != (1, 1) or any(pads):
        params = {"image": (h, w, c), "kernel": kernel, "stride": stride, "pads": pads}
        node = Node("window", [node], size[0] * size[1] * kernel[0] * kernel[1] * c, lambda x: windows(x, params).ravel(), source, params)
    flat = weights.reshape(len(weights), -1)
    result = _weighted(node, flat, quant, size[0] * size[1], source)
    return View(result, restore(np.arange(result.size).reshape(*size, len(weights))))


def windows(stream: np.ndarray, params: dict[str, Any], fill: float = 0.0) -> np.ndarray:
    """[Ho, Wo, kh, kw, C] of an image."""
    from .network import Window

    h, w, c = params["image"]
    return Window("", ("",), "", h, w, c, params["kernel"], params["stride"], params["pads"]).windows(stream, fill)  # type: ignore[arg-type]


def _pads(padding: Any) -> tuple[int, int, int, int]:
    values = _ints(padding)
    return tuple(values * 2 if len(values) == 2 else values)  # type: ignore[return-value]


def _unpadded(image: View, pads: tuple[int, int, int, int]) -> tuple[View, tuple[int, int, int, int]]:
    """An image [H, W, C] without the padding that is part of it, and all of the padding."""
    inside = image.index[:, :, 0] >= 0
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not rows.size:
        raise Refused("an image of padding alone")
    (h, w), (top, bottom), (left, right) = inside.shape, (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
    more = (int(top), int(left), int(h - bottom), int(w - right))
    whole = image.rearranged(lambda x: x[top:bottom, left:right])
    return whole, tuple(old + new for old, new in zip(pads, more, strict=True))  # type: ignore[return-value]


def _image(view: View, layout: str) -> tuple[View, Callable[[np.ndarray], np.ndarray]]:
    """(the one image as a view [H, W, C], what turns [H, W, C] back into the operator's layout)."""
    if layout not in ("NCHW", "NHWC") or len(view.shape) != 4:
        raise Refused(f"layout {layout}; expected NCHW or NHWC")
    if view.shape[0] != 1:
        raise Refused(f"a batch of {view.shape[0]} images; FPGA networks take one at a time: compile with a batch of 1")
    if layout == "NCHW":
        return view.rearranged(lambda x: x[0].transpose(1, 2, 0)), lambda x: x.transpose(2, 0, 1)[None]
    return view.rearranged(lambda x: x[0]), lambda x: x[None]


# ---- pooling and means


@rule("nn.max_pool2d", "nn.avg_pool2d")
def _pool(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    attrs = call.attrs
    maximum = call.op.name.endswith("max_pool2d")
    image, restore = _image(_view(operands[0]), str(attrs.layout))
    pads = _pads(attrs.padding)
    if any(size != 1 for size in _ints(attrs.dilation)) or attrs.ceil_mode:
        raise Refused("dilation or ceil_mode; FPGA pooling has neither")
    if any(pads) and not maximum:
        raise Refused("an average over padded windows; FPGA averages have no padding")
    return _pooled(image, restore, tuple(_ints(attrs.pool_size)), tuple(_ints(attrs.strides)), pads, maximum, source)


@rule("nn.adaptive_avg_pool2d")
def _adaptive(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    image, restore = _image(_view(operands[0]), str(call.attrs.layout))
    out = _ints(call.attrs.output_size or image.shape[:2])
    if len(set(out)) != 1 or out[0] != 1:
        raise Refused(f"output size {out}; FPGA adaptive pooling averages the whole image")
    return _pooled(image, restore, image.shape[:2], (1, 1), (0, 0, 0, 0), False, source)


def _pooled(image: View, restore: Any, kernel: Any, stride: Any, pads: Any, maximum: bool, source: str) -> View:
    h, w, c = image.shape
    later: Functions = ()
    if maximum and all(function.kind == "affine" for function in image.functions):
        # they grow with their argument: the largest result is that of the largest argument
        image, later = View(image.node, image.index), image.functions
    params = {"image": (h, w, c), "kernel": tuple(kernel), "stride": tuple(stride), "pads": tuple(pads)}
    size = ((h + pads[0] + pads[2] - kernel[0]) // stride[0] + 1, (w + pads[1] + pads[3] - kernel[1]) // stride[1] + 1)
    if maximum:
        node = Node(
            "maxpool", [in_order(image)], size[0] * size[1] * c, lambda x: windows(x, params, -np.inf).max(axis=(2, 3)).ravel(), source, params
        )
    else:
        node = Node("average", [in_order(image)], size[0] * size[1] * c, lambda x: windows(x, params).mean(axis=(2, 3)).ravel(), source, params)
    return View(node, restore(np.arange(node.size).reshape(*size, c)), later)


@rule("mean")
def _mean(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    view = _view(operands[0])
    axes = sorted(int(axis) % len(view.shape) for axis in (call.attrs.axis if call.attrs.axis is not None else range(len(view.shape))))
    kept = [axis for axis in range(len(view.shape)) if axis not in axes]
    count, rest = math.prod(view.shape[axis] for axis in axes), math.prod(view.shape[axis] for axis in kept)
    image = view.rearranged(lambda x: x.transpose(*axes, *kept).reshape(count, 1, rest))
    shape = _shape(call)
    return _pooled(image, lambda x: x.reshape(shape), (count, 1), (1, 1), (0, 0, 0, 0), False, source)


# ---- rows


@rule("nn.softmax")
def _softmax(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    return softmax(_view(operands[0]), int(call.attrs.axis), source)


def softmax(view: View, axis: int, source: str) -> View:
    if axis % len(view.shape) != len(view.shape) - 1:
        raise Refused(f"softmax over axis {axis}; FPGA softmax runs over the last one")
    length = view.shape[-1]

    def real(x: np.ndarray) -> np.ndarray:
        e = np.exp(x.reshape(-1, length) - x.reshape(-1, length).max(axis=1, keepdims=True))
        return (e / e.sum(axis=1, keepdims=True)).ravel()

    node = Node("softmax", [in_order(view)], view.index.size, real, source, {"length": length})
    return View(node, np.arange(node.size).reshape(view.shape))


@rule("nn.layer_norm")
def _layer_norm(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    view, attrs = _view(operands[0]), call.attrs
    if [axis % len(view.shape) for axis in _ints(attrs.axes)] != [len(view.shape) - 1]:
        raise Refused(f"layer norm over axes {_ints(attrs.axes)}; FPGA layer norm runs over the last one")
    length = view.shape[-1]
    gamma = _array(operands[1], "gamma").astype(np.float64).ravel() if attrs.scale else np.ones(length)
    beta = _array(operands[2], "beta").astype(np.float64).ravel() if attrs.center else np.zeros(length)
    epsilon = float(attrs.epsilon)

    def real(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1, length)
        return ((x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + epsilon) * gamma + beta).ravel()

    node = Node("layer_norm", [in_order(view)], view.index.size, real, source, {"gamma": gamma, "beta": beta, "epsilon": epsilon})
    return View(node, np.arange(node.size).reshape(view.shape))


@rule("tcompile.attention")
def _attention(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    q, k, v = (_view(operand, "queries, keys and values") for operand in operands[:3])
    layouts = str(call.attrs.layout).split(",")
    layouts = layouts * 4 if len(layouts) == 1 else layouts

    def swapped(x: np.ndarray) -> np.ndarray:
        return x.transpose(0, 2, 1, 3)

    q, k, v = (view if layout == "BHSD" else view.rearranged(swapped) for view, layout in zip((q, k, v), layouts, strict=False))
    if len(operands) > 3 or call.attrs.causal or call.attrs.before >= 0 or call.attrs.after >= 0 or call.attrs.received or call.attrs.logsum:
        raise Refused("a mask, causal, a window or further results; FPGA attention has none of them")
    if k.shape[1] != q.shape[1]:
        raise Refused(f"{q.shape[1]} query heads over {k.shape[1]} key heads; FPGA attention has as many of both")
    b, h, s, _ = q.shape
    scores = matmul(q, k.rearranged(lambda x: np.swapaxes(x, -1, -2)), [b, h, s, k.shape[2]], source)
    scale = float(call.attrs.scale)
    result = matmul(softmax(scores.mapped(affine(scale, 0.0)), -1, source), v, [b, h, s, v.shape[3]], source)
    return result if layouts[3] == "BHSD" else result.rearranged(swapped)


# ---- shapes


@rule("reshape", "expand_dims", "squeeze", "flatten", "nn.batch_flatten")
def _reshape(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    shape = _shape(call)
    return _moved(operands[0], lambda x: x.reshape(shape))


def _moved(value: Any, operation: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A constant or view rearranged."""
    return operation(value) if isinstance(value, np.ndarray) else _view(value).rearranged(operation)


@rule("permute_dims")
def _permute(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    axes = None if call.attrs.axes is None else _ints(call.attrs.axes)
    return _moved(operands[0], lambda x: x.transpose(axes))


@rule("broadcast_to")
def _broadcast(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    shape = _shape(call)
    return _moved(operands[0], lambda x: np.broadcast_to(x, shape))


@rule("strided_slice")
def _slice(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    def numbers(arg: Any) -> list[int]:
        return _ints(item.value if hasattr(item, "value") else item for item in arg.fields)

    axes, begins, ends = (numbers(arg) for arg in call.args[1:4])
    strides = numbers(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    if any(stride < 1 for stride in strides):
        raise Refused("a slice that runs backwards")
    slices = [slice(None)] * len(operands[0].shape)
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        slices[axis] = slice(begin, end, stride)
    return _moved(operands[0], lambda x: x[tuple(slices)])


@rule("split")
def _split(walk: Walk, call: Any, operands: list[Any], source: str) -> tuple[View, ...]:
    where, axis = call.attrs.indices_or_sections, int(call.attrs.axis)
    pieces = int(where) if isinstance(where, int) or hasattr(where, "value") else _ints(where)
    view = _view(operands[0])
    return tuple(view.rearranged(lambda x, i=i: np.split(x, pieces, axis)[i]) for i in range(len(np.split(view.index, pieces, axis))))
