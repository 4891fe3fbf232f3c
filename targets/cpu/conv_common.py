"""What the convolution templates share: the workload, weight packing, the split of an output row into register tiles, the task loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product, static
from .dot import Dot, dot_kind
from .emit import balanced

#: what a size known only at run time is taken for when schedules are compared, in pixels
TYPICAL = 64


@dataclass(frozen=True)
class ConvWorkload:
    """x [n, h, w, ci] * w [kh, kw, ci / groups, co]; None marks a size known only at run time. padding: top, left, bottom, right.

    turned: h and w stand for the tensors' width and height, see `along_the_width`. kind: of the product, see `dot.dot_kind`.
    """

    n: int | None
    h: int | None
    w: int | None
    ci: int
    co: int
    kh: int
    kw: int
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    epilogue: str
    turned: bool = False
    kind: str = "f32"

    def __str__(self) -> str:
        text = "conv2d " if self.kind == "f32" else f"conv2d {self.kind} "
        text += f"{self.n}x{self.h}x{self.w}x{self.ci} -> {self.co}, {self.kh}x{self.kw} stride {self.strides[0]}x{self.strides[1]}"
        text += f" pad {','.join(map(str, self.padding))}" if any(self.padding) else ""
        text += f" dilation {self.dilation[0]}x{self.dilation[1]}" if self.dilation != (1, 1) else ""
        return text + (f" groups {self.groups}" if self.groups > 1 else "")

    @property
    def out_h(self) -> int | None:
        return self._out(self.h, 0, self.kh)

    @property
    def out_w(self) -> int | None:
        return self._out(self.w, 1, self.kw)

    def _out(self, size: int | None, axis: int, taps: int) -> int | None:
        if size is None:
            return None
        return (size + self.padding[axis] + self.padding[axis + 2] - self.dilation[axis] * (taps - 1) - 1) // self.strides[axis] + 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.ci == self.co > 1

    @property
    def ci_group(self) -> int:
        return self.ci // self.groups

    @property
    def co_group(self) -> int:
        return self.co // self.groups

    def sizes(self) -> tuple[int, int, int]:
        """(n, output height, output width) for comparing schedules, run-time sizes replaced by typical ones."""
        return self.n or 1, self.out_h or TYPICAL, self.out_w or TYPICAL


def conv_workload(fused: Fused, constants: frozenset[int]) -> ConvWorkload:
    """Read the workload; raises Unfusable when it is not a convolution with constant weights."""
    if fused.core["op"] != "conv2d":
        raise Unfusable("not a convolution")
    x, w = fused.inputs
    kind = dot_kind(fused.inputs, fused.accumulator)
    n, h, width, ci = (static(dim) for dim in x.shape)
    kh, kw, _, co = (static(dim) for dim in w.shape)
    if fused.param_index(w) not in constants or ci is None or kh is None or kw is None or co is None:
        raise Unfusable("weights are not constant")
    strides, padding, dilation = (tuple(fused.core[name]) for name in ("strides", "padding", "dilation"))
    return ConvWorkload(n, h, width, ci, co, kh, kw, strides, padding, dilation, fused.core["groups"], fused.epilogue_text(), kind=kind)


def along_the_width(workload: ConvWorkload) -> ConvWorkload:
    """A convolution over a single column as one over a single row, which lies in memory alike: tiles of pixels run along the width."""
    top, left, bottom, right = workload.padding
    if workload.w != 1 or workload.kw != 1 or left or right or workload.h == 1:
        return workload
    turn = {name: getattr(workload, name)[::-1] for name in ("strides", "dilation")}
    return replace(workload, h=1, w=workload.h, kh=1, kw=workload.kh, padding=(0, top, 0, bottom), turned=True, **turn)


@dataclass(frozen=True)
class Taps:
    """Consecutive horizontal taps [first, first + count) that read inside the input for exactly these pixels of a tile."""

    first: int
    count: int
    pixels: tuple[int, ...]


def tile_taps(workload: ConvWorkload, first: int, pixels: int) -> tuple[Taps, ...]:
    """The horizontal taps of a tile that starts at output column `first`, those that read padding left out. Needs a static width."""
    assert workload.w is not None
    runs: list[Taps] = []
    for tap in range(workload.kw):
        start = first * workload.strides[1] + tap * workload.dilation[1] - workload.padding[1]
        valid = tuple(i for i in range(pixels) if 0 <= start + i * workload.strides[1] < workload.w)
        if runs and runs[-1].pixels == valid and runs[-1].first + runs[-1].count == tap:
            runs[-1] = Taps(runs[-1].first, runs[-1].count + 1, valid)
        else:
            runs.append(Taps(tap, 1, valid))
    return tuple(run for run in runs if run.pixels)


@dataclass(frozen=True)
class TileRun:
    """`count` tiles of `pixels` output columns from column `first`, all with the same taps."""

    first: int
    pixels: int
    count: int
    taps: tuple[Taps, ...]


def row_tiles(workload: ConvWorkload, limit: int) -> list[TileRun]:
    """The tiles of one output row, neighbours with the same taps joined into runs. Needs a static width."""
    assert workload.out_w is not None
    runs: list[TileRun] = []
    for first, pixels in balanced(workload.out_w, limit):
        taps = tile_taps(workload, first, pixels)
        if runs and runs[-1].pixels == pixels and runs[-1].taps == taps:
            runs[-1] = TileRun(runs[-1].first, pixels, runs[-1].count + 1, taps)
        else:
            runs.append(TileRun(first, pixels, 1, taps))
    return runs


class RowWords:
    """How a row kh of a panel is cut into words: kw * ci elements in a row where groups of them never straddle two taps, otherwise one section per run of taps
    that some tile reads at once, each with its last word padded by zeros. (Ci = 3: all taps of a row make one run, edge tiles read shorter ones.)"""

    def __init__(self, workload: ConvWorkload, pixels: int, dot: Dot):
        self.dot, self.depth, self.even = dot, workload.ci_group, workload.ci_group % dot.group == 0
        runs = {(tap, 1) for tap in range(workload.kw)}
        if self.folds(workload):
            if workload.w is None:
                runs.add((0, workload.kw))
            else:
                runs = {(taps.first, taps.count) for tiles in row_tiles(workload, pixels) for taps in tiles.taps}
        self.runs = [(0, workload.kw)] if self.even else sorted(runs, key=lambda run: (run[1], run[0]))
        ends = np.cumsum([0, *(dot.words(count * self.depth) for _, count in self.runs)])
        self.total = int(ends[-1])
        self.starts = dict(zip(self.runs, (int(end) for end in ends), strict=False))

    @staticmethod
    def folds(workload: ConvWorkload) -> bool:
        """Consecutive taps read consecutive elements."""
        return workload.dilation[1] == 1 and workload.groups == 1

    def start(self, first: int, count: int) -> int:
        """First word of a run of taps."""
        return first * self.depth // self.dot.group if self.even else self.starts[first, count]

    def tap(self, tap: Any) -> Any:
        """First word of a single tap, known or not; single taps come first among the sections, in order."""
        return tap * T.int64(self.dot.words(self.depth))


def pack_conv(weight: np.ndarray, groups: int, nr: int, row: RowWords) -> np.ndarray:
    """[kh, kw, Ci / groups, Co] -> [groups * ceil(Co / groups / nr), kh, words of a row, nr], zero filled; nr words as many times as the dot product has parts."""
    kh, kw, ci, co = weight.shape
    per_group, dot = co // groups, row.dot
    panels = -(-per_group // nr)
    padded = np.zeros((kh, kw, ci, groups, panels * nr), weight.dtype)
    padded[..., :per_group] = weight.reshape(kh, kw, ci, groups, per_group)
    split = padded.reshape(kh, kw, ci, groups, panels, nr).transpose(3, 4, 0, 1, 2, 5)
    sections = []
    for first, count in row.runs:
        section = np.zeros((groups, panels, kh, dot.words(count * ci) * dot.group, nr), weight.dtype)
        section[..., : count * ci, :] = split[:, :, :, first : first + count].reshape(groups, panels, kh, count * ci, nr)
        sections.append(dot.pack_words(section.reshape(groups, panels, kh, -1, dot.group, nr)))
    return np.ascontiguousarray(np.concatenate(sections, axis=3).reshape(groups * panels, kh, row.total, nr * dot.parts))


def unflatten(index: Any, extents: list[Any]) -> list[Any]:
    """Digits of a task number, the last extent varying fastest; extents of one give 0."""
    digits: list[Any] = []
    for position in range(len(extents) - 1, -1, -1):
        if static(extents[position]) == 1:
            digits.insert(0, T.int64(0))
        elif static(product(extents[:position])) == 1:
            digits.insert(0, index)
            index = T.int64(0)
        else:
            digits.insert(0, T.bind(T.floormod(index, extents[position])))
            index = T.bind(T.floordiv(index, extents[position]))
    return digits


def row_taps(workload: ConvWorkload, out_row: Any, height: Any) -> tuple[Any, Any]:
    """[first, end) of the vertical taps of an output row that read inside the input."""
    top, _, bottom, _ = workload.padding
    if not top and not bottom:
        return T.int64(0), T.int64(workload.kh)
    start = T.bind(out_row * T.int64(workload.strides[0]) - T.int64(top))
    dilation = T.int64(workload.dilation[0])
    first = T.max(T.int64(0), T.floordiv(dilation - T.int64(1) - start, dilation))
    end = T.min(T.int64(workload.kh), T.floordiv(height - start + dilation - T.int64(1), dilation))
    return T.bind(first), T.bind(end)


def row_chunks(out_h: int | None) -> list[int]:
    """Output rows per task worth trying; 0 means all of them."""
    if out_h is None:
        return [0, 1, 4, 8]
    return [0, *(rows for rows in (1, 2, 4, 8, 16) if rows < out_h)]


def vector_lanes(channels: int, target: Target) -> int:
    """Widest vector, a power of two, that `channels` fill."""
    lanes = target.lanes()
    while lanes > channels:
        lanes //= 2
    return lanes
