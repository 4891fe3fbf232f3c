"""How a convolution of another kind is computed by conv2d: foldings between its result and that of the conv2d, and a rule for each operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..compiler.tvm import relax
from .layout_rules import reshaped
from .products import constant_value, is_static

op = relax.op
Emit = Callable[[Any], Any]


class Folding:
    """How [N, C, *S] of the source program lies in [N', C', H', W']. Equal foldings of tensors of equal shapes are the same arrangement."""

    def fold(self, emit: Emit, x: Any) -> Any:
        """The folded form of x [N, C, *S]; None where that is not worth its movement."""
        raise NotImplementedError

    def unfold(self, emit: Emit, y: Any, shape: Any) -> Any:
        """The source form, of `shape`."""
        raise NotImplementedError

    def constant(self, array: np.ndarray) -> np.ndarray | None:
        """What broadcasts over the folded form as an array of the source form's rank does over that one; None where nothing does."""
        raise NotImplementedError


@dataclass
class Folded:
    """A value that exists folded. shape: of its source form, which is made once."""

    expr: Any
    folding: Folding
    shape: Any = None
    made: list[Any] = field(default_factory=list)

    def shaped(self, call: Any) -> Folded:
        return replace(self, shape=call.ty.shape)

    def unfolded(self, emit: Emit) -> Any:
        if not self.made:
            self.made.append(self.folding.unfold(emit, self.expr, self.shape))
        return self.made[0]


@dataclass(frozen=True)
class Row(Folding):
    """[N, C, W] as [N, C, 1, W]."""

    def fold(self, emit: Emit, x: Any) -> Any:
        n, c, w = x.ty.shape
        return emit(reshaped(x, [n, c, 1, w]))

    def unfold(self, emit: Emit, y: Any, shape: Any) -> Any:
        return emit(reshaped(y, shape))

    def constant(self, array: np.ndarray) -> np.ndarray:
        return array[:, :, None]


@dataclass(frozen=True)
class Frames(Folding):
    """[N, C, D, H, W] as [N * D, C, H, W]."""

    def fold(self, emit: Emit, x: Any) -> Any:
        n, c, d, h, w = x.ty.shape
        return emit(reshaped(emit(op.permute_dims(x, [0, 2, 1, 3, 4])), [n * d, c, h, w]))

    def unfold(self, emit: Emit, y: Any, shape: Any) -> Any:
        n, c, d, h, w = shape
        return emit(op.permute_dims(emit(reshaped(y, [n, d, c, h, w])), [0, 2, 1, 3, 4]))

    def constant(self, array: np.ndarray) -> np.ndarray | None:
        return array[:, :, 0] if array.shape[0] == array.shape[2] == 1 else None


@dataclass(frozen=True)
class Columns(Folding):
    """[N, C, D, H, W] as [N, C, D, H * W]."""

    def fold(self, emit: Emit, x: Any) -> Any:
        n, c, d, h, w = x.ty.shape
        return emit(reshaped(x, [n, c, d, h * w]))

    def unfold(self, emit: Emit, y: Any, shape: Any) -> Any:
        return emit(reshaped(y, shape))

    def constant(self, array: np.ndarray) -> np.ndarray | None:
        return array[..., 0] if array.shape[3] == array.shape[4] == 1 else None


@dataclass(frozen=True)
class Phases(Folding):
    """[N, C, H, W] (or [N, C, W]) in blocks of sh x sw elements: [N, groups * sh * sw * C / groups, H', W'], of which crop is cut off in front, and what is too much behind."""

    groups: int
    strides: tuple[int, int]
    crop: tuple[int, int]

    def fold(self, emit: Emit, x: Any) -> Any:
        return None

    def unfold(self, emit: Emit, y: Any, shape: Any) -> Any:
        n, channels, rows, columns = y.ty.shape
        (sh, sw), groups = self.strides, self.groups
        depth = int(channels) // (groups * sh * sw)
        # name, size, place before, place after; dims of one are left out
        dims = [("n", n), ("g", groups), ("sh", sh), ("sw", sw), ("c", depth), ("h", rows), ("w", columns)]
        dims = [(name, size) for name, size in dims if name in "nchw" or size != 1]
        order = [name for name in ("n", "g", "c", "h", "sh", "w", "sw") if name in dict(dims)]
        y = emit(reshaped(y, [size for _, size in dims]))
        y = emit(op.permute_dims(y, [[name for name, _ in dims].index(name) for name in order]))
        y = emit(reshaped(y, [n, groups * depth, rows * sh, columns * sw]))
        wanted = list(shape) if len(shape) == 4 else [*list(shape)[:2], 1, shape[2]]
        begin = [*self.crop]
        end = [start + size for start, size in zip(begin, wanted[2:], strict=True)]
        if any(begin) or not all(str(a) == str(b) for a, b in zip(y.ty.shape, wanted, strict=True)):
            y = emit(op.strided_slice(y, [2, 3], begin, end, assume_inbound=True))
        return y if len(shape) == 4 else emit(reshaped(y, shape))

    def constant(self, array: np.ndarray) -> np.ndarray | None:
        if math.prod(array.shape) != array.shape[1]:
            return None
        if array.shape[1] == 1:
            return array.reshape(1, 1, 1, 1)
        blocks = np.broadcast_to(array.reshape(self.groups, 1, -1), (self.groups, math.prod(self.strides), array.shape[1] // self.groups))
        return np.ascontiguousarray(blocks).reshape(1, -1, 1, 1)


Rule = Callable[[Any, Any], Folded | None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule. It gets the rewriter and a call of the source program, and returns None where the operator stays as it is."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"relax.nn.{name}"] = function
        return function

    return register


def _layouts(call: Any) -> tuple[str, str, str]:
    attrs = call.attrs
    return attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout


def _operand(rewriter: Any, x: Any, folding: Folding) -> Any:
    """x folded: as it is there already, or by a movement."""
    known = rewriter.folded.get(x)
    return known.expr if known is not None and known.folding == folding else folding.fold(rewriter.emit, rewriter.visit_expr(x))


def _conv(rewriter: Any, call: Any, x: Any, weight: Any, strides: Sequence[Any], padding: Sequence[Any], dilation: Sequence[Any], groups: int) -> Any:
    """conv2d, NCHW; the numbers may be TVM's."""
    numbers = ([int(value) for value in values] for values in (strides, padding, dilation))
    weight = relax.const(np.ascontiguousarray(weight), str(weight.dtype)) if isinstance(weight, np.ndarray) else weight
    return rewriter.emit(op.nn.conv2d(x, weight, *numbers, groups, "NCHW", "OIHW", "NCHW", str(call.ty.dtype)))


@rule("conv1d")
def _conv1d(rewriter: Any, call: Any) -> Folded | None:
    attrs, (x, w) = call.attrs, call.args
    if _layouts(call) != ("NCW", "OIW", "NCW"):
        return None
    weight = constant_value(w)
    weight = Row().fold(rewriter.emit, rewriter.visit_expr(w)) if weight is None else weight[:, :, None]
    left, right = attrs.padding
    row = _operand(rewriter, x, Row())
    y = _conv(rewriter, call, row, weight, [1, *attrs.strides], [0, left, 0, right], [1, *attrs.dilation], int(attrs.groups))
    return Folded(y, Row())


@rule("conv3d")
def _conv3d(rewriter: Any, call: Any) -> Folded | None:
    """Depth first: frames that the taps of the depth read are gathered into channels, or, with groups, one conv2d per tap is summed."""
    attrs, (x, w) = call.attrs, call.args
    weight, groups = constant_value(w), int(call.attrs.groups)
    if weight is None or _layouts(call) != ("NCDHW", "OIDHW", "NCDHW"):
        return None
    (sd, *strides), (dd, *dilation) = ([int(value) for value in values] for values in (attrs.strides, attrs.dilation))
    front, top, left, back, bottom, right = (int(pad) for pad in attrs.padding)
    padding, taps = [top, left, bottom, right], weight.shape[2]
    if weight.shape[3:] == (1, 1) and strides == [1, 1] and not any(padding):
        y = _conv(rewriter, call, _operand(rewriter, x, Columns()), weight[..., 0], [sd, 1], [front, 0, back, 0], [dd, 1], groups)
        return Folded(y, Columns())
    if taps == 1 and sd == 1 and not front and not back:
        return Folded(_conv(rewriter, call, _operand(rewriter, x, Frames()), weight[:, :, 0], strides, padding, dilation, groups), Frames())
    if not is_static([x.ty.shape[2]]):
        return None
    depth, emit, source = int(call.ty.shape[2]), rewriter.emit, rewriter.visit_expr(x)
    if front or back:
        source = emit(op.nn.pad(source, [0, 0, 0, 0, front, back, 0, 0, 0, 0], "constant", 0.0))
    frames = [emit(op.strided_slice(source, [2], [tap * dd], [tap * dd + (depth - 1) * sd + 1], [sd])) for tap in range(taps)]
    if groups == 1:
        gathered = Frames().fold(emit, emit(op.concat(frames, 1)) if taps > 1 else frames[0])
        weight = weight.transpose(0, 2, 1, 3, 4).reshape(len(weight), -1, *weight.shape[3:])
        return Folded(_conv(rewriter, call, gathered, weight, strides, padding, dilation, 1), Frames())
    total: Any = None
    for tap, frame in enumerate(frames):
        y = _conv(rewriter, call, Frames().fold(emit, frame), weight[:, :, tap], strides, padding, dilation, groups)
        total = y if total is None else emit(op.add(total, y))
    return Folded(total, Frames())


@rule("max_pool3d")
def _max_pool3d(rewriter: Any, call: Any) -> Folded | None:
    """The largest of every frame's windows, then the largest along the depth."""
    attrs = call.attrs
    if attrs.layout != "NCDHW":
        return None
    (kd, *kernel), (sd, *strides), (dd, *dilation) = ([int(value) for value in values] for values in (attrs.pool_size, attrs.strides, attrs.dilation))
    front, top, left, back, bottom, right = (int(pad) for pad in attrs.padding)
    n, channels, depth = list(call.args[0].ty.shape)[:3]
    frames = _operand(rewriter, call.args[0], Frames())
    y = rewriter.emit(op.nn.max_pool2d(frames, kernel, strides, [top, left, bottom, right], dilation, attrs.ceil_mode))
    if (kd, sd, front, back) == (1, 1, 0, 0):
        return Folded(y, Frames())
    y = Columns().fold(rewriter.emit, Frames().unfold(rewriter.emit, y, [n, channels, depth, *list(y.ty.shape)[2:]]))
    return Folded(rewriter.emit(op.nn.max_pool2d(y, [kd, 1], [sd, 1], [front, 0, back, 0], [dd, 1], attrs.ceil_mode)), Columns())


@dataclass(frozen=True)
class Axis:
    """One axis of a transposed convolution: output u = stride * i + dilation * k for input i and tap k, `before` elements cut off in front and `after` behind.

    Blocks of `stride` outputs start at u = base: element phase of block m is tap k of input m + reach, where stride * reach = phase + base - dilation * k.
    """

    taps: int
    stride: int
    dilation: int
    before: int
    after: int
    base: int

    def phase(self, tap: int) -> int:
        return (self.dilation * tap - self.base) % self.stride

    def reach(self, tap: int) -> int:
        return (self.phase(tap) + self.base - self.dilation * tap) // self.stride

    def window(self, phases: Sequence[int]) -> Window:
        """What the taps of some phases read."""
        taps = tuple(tap for tap in range(self.taps) if self.phase(tap) in phases)
        reaches = [self.reach(tap) for tap in taps] or [0]
        first, step = min(reaches), math.gcd(*(value - min(reaches) for value in reaches)) or 1
        return Window(taps, first, step, (max(reaches) - first) // step + 1)

    @property
    def blocks_more(self) -> int:
        """Blocks that hold the output, less the inputs."""
        return (self.dilation * (self.taps - 1) - self.after - self.base) // self.stride


@dataclass(frozen=True)
class Window:
    """The inputs m + first, m + first + step, ..., `size` of them."""

    taps: tuple[int, ...]
    first: int
    step: int
    size: int

    @property
    def last(self) -> int:
        return self.first + (self.size - 1) * self.step


@rule("conv1d_transpose", "conv2d_transpose")
def _transposed(rewriter: Any, call: Any) -> Folded | None:
    """Blocks of sh x sw outputs are the channels of a stride-1 convolution; where kernels are no multiple of the stride, every element of the block has a convolution of its
    own with the taps that reach it."""
    attrs, (x, w) = call.attrs, call.args
    weight, groups, rank = constant_value(w), int(call.attrs.groups), len(call.ty.shape)
    if weight is None or _layouts(call) != (("NCW", "IOW", "NCW") if rank == 3 else ("NCHW", "IOHW", "NCHW")):
        return None
    strides, padding, dilation, extra = (
        [int(value) for value in values] for values in (attrs.strides, attrs.padding, attrs.dilation, attrs.output_padding)
    )
    if rank == 3:
        weight, strides, dilation, extra, padding = weight[:, :, None], [1, *strides], [1, *dilation], [0, *extra], [0, padding[0], 0, padding[1]]
    sizes = [
        (taps, stride, step, padding[axis], padding[axis + 2] - extra[axis])
        for axis, (taps, stride, step) in enumerate(zip(weight.shape[2:], strides, dilation, strict=True))
    ]
    together = groups < len(weight) and all(dilation[axis] == 1 and weight.shape[2 + axis] % strides[axis] == 0 for axis in (0, 1))
    # a block that starts where nothing is cut off needs no movement, one that starts with a tap the fewest inputs
    axes = [Axis(*size, base=size[3] - size[3] % size[1] if together else size[3]) for size in sizes]
    parts = [[tuple(range(axis.stride))] if together else [(phase,) for phase in range(axis.stride)] for axis in axes]
    windows = [[axis.window(phases) for phases in part] for axis, part in zip(axes, parts, strict=True)]
    # blocks more in front and behind than there are outputs, where padding would be negative
    fronts = [max(0, *(window.first for window in found)) for found in windows]
    behind = [max(0, *(-axis.blocks_more - window.last for window in found)) for axis, found in zip(axes, windows, strict=True)]
    data = _operand(rewriter, x, Row()) if rank == 3 else rewriter.visit_expr(x)
    results = []
    for row in windows[0]:
        for column in windows[1]:
            filters = _filters(weight, axes, (row, column), groups, together)
            pads = [front - window.first for front, window in zip(fronts, (row, column), strict=True)]
            pads += [axis.blocks_more + window.last + more for axis, window, more in zip(axes, (row, column), behind, strict=True)]
            results.append(_conv(rewriter, call, data, filters, [1, 1], pads, [row.step, column.step], groups))
    y = results[0] if len(results) == 1 else rewriter.emit(op.concat(results, 1))
    crop = tuple(axis.before - axis.base + front * axis.stride for axis, front in zip(axes, fronts, strict=True))
    return Folded(y, Phases(groups if together else 1, (strides[0], strides[1]), (crop[0], crop[1])))


def _filters(weight: np.ndarray, axes: Sequence[Axis], windows: tuple[Window, Window], groups: int, together: bool) -> np.ndarray:
    """[groups * phases * Co / groups, Ci / groups, *windows] of a weight [Ci, Co / groups, kh, kw]."""
    ci, co = len(weight) // groups, weight.shape[1]
    grouped = weight.reshape(groups, ci, co, *weight.shape[2:]).transpose(0, 2, 1, 3, 4)
    phases = [axis.stride if together else 1 for axis in axes]
    filters = np.zeros((groups, *phases, co, ci, *(window.size for window in windows)), weight.dtype)
    for row in windows[0].taps:
        for column in windows[1].taps:
            taps = (row, column)
            phase = [axis.phase(tap) if together else 0 for axis, tap in zip(axes, taps, strict=True)]
            place = [(axis.reach(tap) - window.first) // window.step for axis, tap, window in zip(axes, taps, windows, strict=True)]
            filters[:, phase[0], phase[1], :, :, place[0], place[1]] = grouped[..., row, column]
    return filters.reshape(-1, ci, *filters.shape[-2:])
