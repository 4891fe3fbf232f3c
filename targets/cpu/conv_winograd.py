"""Winograd template: 3 x 3 convolutions of stride 1 as F(m x m, 3 x 3), NHWC; (m + 2)^2 products per m^2 outputs instead of 9 m^2.

    for (n, strip of tile rows) in parallel:                        # a strip: `strip` rows of tiles, `tiles` tiles in all
        for tile, ci vector: V[xi][tile][ci] = B^T d B              # xi: the (m + 2)^2 positions of a transformed tile
        for panel of NR = nv * lanes output channels:
            for xi: M[xi][tile][NR] = V[xi] @ U[panel][xi]          # register tiles of mr x nv accumulators
            for tile, co vector: y = epilogue(A^T M A)

With `shared` there is one strip per image, and first the tile rows, then the panels run in parallel: small images with many channels, where each strip
would stream all weights.
U = G g G^T is computed at compile time. Tiles over the edge read zeros and store what is inside. An infinite input makes NaN of its whole tile, m x m outputs
around it, where the direct sum gives infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from .conv_common import ConvWorkload, conv_workload, unflatten, vector_lanes
from .conv_cost import winograd_features
from .dot import F32, splat, vector
from .emit import Accumulators, balanced, kernel, register_tiles, store_tile, with_columns
from .prefetch import Ahead, Share, asking, panels_ahead, share
from .template import Kernel, Packing
from .winograd import POINTS, times_vector, transform_weights, transforms


@dataclass(frozen=True)
class WinogradSchedule:
    """F(m x m); strips of `strip` tile rows; mr x nv vectors of `lanes` channels in registers; shared: see the module."""

    m: int
    strip: int
    mr: int
    nv: int
    lanes: int
    shared: bool


class ConvWinograd:
    """See the module."""

    name = "conv_winograd"

    def workload(self, fused: Fused, constants: frozenset[int]) -> ConvWorkload:
        workload = conv_workload(fused, constants)
        if workload.kind != "f32":
            raise Unfusable("not float32")
        if (workload.kh, workload.kw) != (3, 3) or workload.strides != (1, 1) or workload.dilation != (1, 1) or workload.groups > 1:
            raise Unfusable("not a 3x3 convolution of stride 1")
        if workload.h is None or workload.w is None:
            raise Unfusable("height and width are known only at run time")
        if workload.ci < 8 or workload.co < 8:
            raise Unfusable("too few channels")
        return workload

    def space(self, workload: ConvWorkload, target: Target) -> Sequence[WinogradSchedule]:
        lanes = vector_lanes(workload.co, target)
        found = []
        for m in POINTS:
            rows = tile_counts(workload, m)[0]
            strips = sorted({min(strip, rows) for strip in (1, 2, 3, 4, 8, rows)})
            for mr, nv in register_tiles(target, (1, 2, 3, 4), -(-workload.co // lanes)):
                if mr >= 4:
                    found += [WinogradSchedule(m, strip, mr, nv, lanes, False) for strip in strips]
                    found.append(WinogradSchedule(m, rows, mr, nv, lanes, True))
        return found

    def features(self, workload: ConvWorkload, schedule: WinogradSchedule, target: Target) -> KernelFeatures:
        counts = tile_counts(workload, schedule.m)
        return winograd_features(workload, schedule.m, counts, schedule.strip, schedule.mr, schedule.nv, schedule.lanes, schedule.shared, target)

    def build(self, fused: Fused, workload: ConvWorkload, schedule: WinogradSchedule, target: Target) -> Kernel:
        position = fused.param_index(fused.inputs[1])
        assert position is not None
        nr, m = schedule.nv * schedule.lanes, schedule.m
        shape = (-(-workload.co // nr), (m + 2) ** 2, workload.ci, nr)
        packing = Packing(position, shape, lambda weight: pack_winograd(weight, m, nr), f"winograd{m}x{nr}")
        with kernel(fused, {position: shape}) as (builder, buffers):
            # a position of a panel is what register tiles pass
            ahead = panels_ahead((shape[0] * shape[1], *shape[2:]), buffers[fused.inputs[1]], F32, target)
            _Emitter(fused, buffers, workload, schedule, vector_lanes(workload.ci, target), ahead).emit()
        return Kernel(builder.get(), (packing,))


def tile_counts(workload: ConvWorkload, m: int) -> tuple[int, int]:
    """Rows and columns of tiles of one image."""
    assert workload.out_h is not None and workload.out_w is not None
    return -(-workload.out_h // m), -(-workload.out_w // m)


def pack_winograd(weight: np.ndarray, m: int, nr: int) -> np.ndarray:
    """[3, 3, Ci, Co] -> [ceil(Co / nr), (m + 2)^2, Ci, nr], transformed, zero filled."""
    wide = transform_weights(weight, m)
    count, ci, co = wide.shape
    panels = -(-co // nr)
    padded = np.zeros((count, ci, panels * nr), weight.dtype)
    padded[..., :co] = wide
    return np.ascontiguousarray(padded.reshape(count, ci, panels, nr).transpose(2, 0, 1, 3))


class _Emitter:
    """Emits one convolution; see the module for the loop nest."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], workload: ConvWorkload, schedule: WinogradSchedule, ci_lanes: int, ahead: Ahead | None):
        """ahead: prefetch of the weights of a position, if they are worth it."""
        self._ahead: Any = ahead
        self.fused, self.buffers, self.workload, self.schedule, self.ci_lanes = fused, buffers, workload, schedule, ci_lanes
        x, w = fused.inputs
        self.x = T.decl_buffer((product(x.shape),), "float32", data=buffers[x].data)
        self.batch, self.weights = x.shape[0], buffers[w]
        self.m, self.size = schedule.m, schedule.m + 2
        self.tile_rows, self.tile_columns = tile_counts(workload, schedule.m)
        self.nr = schedule.nv * schedule.lanes
        #: tiles of a strip; the last strip starts earlier rather than being short
        self.tiles = schedule.strip * self.tile_columns
        self.matrices = transforms(schedule.m)

    def emit(self) -> None:
        strips = -(-self.tile_rows // self.schedule.strip)
        panels = -(-self.workload.co // self.nr)
        if self.schedule.shared:
            with T.serial(self.batch) as n:
                transformed = self._workspace()
                with T.parallel(T.int64(self.tile_rows)) as row:
                    self._input_row(n, row, row, transformed)
                with T.parallel(T.int64(panels)) as panel:
                    self._panel(n, T.int64(0), panel, transformed)
            return
        extents = [self.batch, T.int64(strips)]
        with T.parallel(product(extents)) as task:
            n, strip = unflatten(task, extents)
            first = T.bind(T.min(strip * T.int64(self.schedule.strip), T.int64(self.tile_rows - self.schedule.strip)))
            transformed = self._workspace()
            with T.serial(T.int64(self.schedule.strip)) as row:
                self._input_row(n, first + row, row, transformed)
            with T.serial(T.int64(panels)) as panel:
                self._panel(n, first, panel, transformed)

    def _workspace(self) -> Any:
        return T.alloc_buffer((self.size**2 * self.tiles * self.workload.ci,), "float32")

    # -- input ---------------------------------------------------------------------------------------------------------------------------------

    def _input_row(self, n: Any, tile_row: Any, row: Any, transformed: Any) -> None:
        """Transform one row of tiles: the tile row `tile_row` of image n, stored as row `row` of the strip."""
        workload = self.workload
        top, left = T.int64(workload.padding[0]), T.int64(workload.padding[1])
        h, w, ci = T.int64(workload.h), T.int64(workload.w), T.int64(workload.ci)
        y = T.bind(tile_row * T.int64(self.m) - top)
        with T.serial(T.int64(self.tile_columns)) as column:
            x = T.bind(column * T.int64(self.m) - left)
            tile = T.bind(row * T.int64(self.tile_columns) + column)
            inside = T.And(T.And(y >= T.int64(0), y + T.int64(self.size) <= h), T.And(x >= T.int64(0), x + T.int64(self.size) <= w))
            with T.If(inside):
                with T.Then():
                    start = T.bind(((n * h + y) * w + x) * ci)
                    self._input_tile(self.x, start, w * ci, tile, transformed)
                with T.Else():
                    patch = T.alloc_buffer((self.size**2 * workload.ci,), "float32")
                    self._fill_patch(n, y, x, patch)
                    self._input_tile(patch, T.int64(0), T.int64(self.size * workload.ci), tile, transformed)

    def _fill_patch(self, n: Any, y: Any, x: Any, patch: Any) -> None:
        """Copy a tile that reaches over the edge, with zeros outside."""
        workload, lanes = self.workload, self.ci_lanes
        h, w, ci = T.int64(workload.h), T.int64(workload.w), T.int64(workload.ci)
        with T.serial(T.int64(self.size)) as i, T.serial(T.int64(self.size)) as j:
            at = T.bind((i * T.int64(self.size) + j) * ci)
            inside = T.And(T.And(y + i >= T.int64(0), y + i < h), T.And(x + j >= T.int64(0), x + j < w))
            with T.If(inside):
                with T.Then():
                    start = T.bind(((n * h + y + i) * w + x + j) * ci)
                    self._channels(lambda c: T.buffer_store(patch, self.x[vector(start + c, lanes)], [vector(at + c, lanes)]))
                with T.Else():
                    self._channels(lambda c: T.buffer_store(patch, splat(T.float32(0), lanes), [vector(at + c, lanes)]))

    def _channels(self, body: Callable[[Any], None]) -> None:
        """body(first channel) for every vector of input channels; the last one overlaps rather than being partial."""
        ci, lanes = self.workload.ci, self.ci_lanes
        with T.serial(T.int64(-(-ci // lanes))) as block:
            channel = block * T.int64(lanes)
            body(T.bind(T.min(channel, T.int64(ci - lanes)) if ci % lanes else channel))

    def _input_tile(self, source: Any, start: Any, pitch: Any, tile: Any, transformed: Any) -> None:
        """V = B^T d B of one tile whose rows lie `pitch` elements apart."""
        ci, lanes, size = T.int64(self.workload.ci), self.ci_lanes, self.size

        def body(channel: Any) -> None:
            columns = []
            for j in range(size):
                column = [T.bind(source[vector(start + T.int64(i) * pitch + T.int64(j) * ci + channel, lanes)]) for i in range(size)]
                columns.append(times_vector(self.matrices.input, column, lanes))
            for i in range(size):
                row = times_vector(self.matrices.input, [columns[j][i] for j in range(size)], lanes)
                for j in range(size):
                    at = (T.int64((i * size + j) * self.tiles) + tile) * ci + channel
                    T.buffer_store(transformed, row[j], [vector(at, lanes)])

        self._channels(body)

    # -- products and output ---------------------------------------------------------------------------------------------------------------------

    def _panel(self, n: Any, first_row: Any, panel: Any, transformed: Any) -> None:
        """All products of one panel of output channels, and its outputs."""
        products = T.alloc_buffer((self.size**2 * self.tiles * self.nr,), "float32")
        with T.serial(T.int64(self.size**2)) as xi:
            tiles = balanced(self.tiles, self.schedule.mr)
            for rows in sorted({size for _, size in tiles}, reverse=True):
                starts = [start for start, size in tiles if size == rows]
                before = sum(start < starts[0] for start, _ in tiles)
                with T.serial(T.int64(len(starts))) as step:
                    own = None if self._ahead is None else share(step + T.int64(before), len(tiles), self.workload.ci, self.nr)
                    self._product(xi, T.bind(step * T.int64(rows) + T.int64(starts[0])), rows, panel, transformed, products, own)
        with T.serial(T.int64(self.schedule.strip)) as row, T.serial(T.int64(self.tile_columns)) as column:
            tile = T.bind(row * T.int64(self.tile_columns) + column)
            y, x = T.bind((first_row + row) * T.int64(self.m)), T.bind(column * T.int64(self.m))
            with_columns(panel, self.workload.co, self.nr, lambda columns: self._output_tile(n, y, x, tile, panel, columns, products))

    def _product(self, xi: Any, first: Any, rows: int, panel: Any, transformed: Any, products: Any, own: Share | None) -> None:
        """One register tile: `rows` tiles x nv vectors of one position."""
        nv, lanes, ci = self.schedule.nv, self.schedule.lanes, T.int64(self.workload.ci)
        acc = Accumulators(rows, nv, lanes)
        acc.fill()
        start = T.bind((xi * T.int64(self.tiles) + first) * ci)
        following = panel * T.int64(self.size**2) + xi + T.int64(1)
        for k in asking(ci, own, lambda line: self._ahead(following, line)):
            weights = [T.bind(self.weights[panel, xi, k, vector(T.int64(v * lanes), lanes)]) for v in range(nv)]
            acc.multiply(range(rows), lambda i: transformed[start + T.int64(i) * ci + k], weights)  # noqa: B023
        for i in range(rows):
            for v in range(nv):
                at = (xi * T.int64(self.tiles) + first + T.int64(i)) * T.int64(self.nr) + T.int64(v * lanes)
                T.buffer_store(products, acc.load(i, v), [vector(at, lanes)])

    def _output_tile(self, n: Any, y: Any, x: Any, tile: Any, panel: Any, columns: int, products: Any) -> None:
        """y = epilogue(A^T M A) of one tile, vector by vector."""
        lanes, size, m = self.schedule.lanes, self.size, self.m
        for v in range(-(-columns // lanes)):
            sides = []
            for j in range(size):
                at = [(T.int64((i * size + j) * self.tiles) + tile) * T.int64(self.nr) + T.int64(v * lanes) for i in range(size)]
                sides.append(times_vector(self.matrices.output, [T.bind(products[vector(place, lanes)]) for place in at], lanes))
            acc = Accumulators(m * m, 1, lanes)
            for i in range(m):
                row = times_vector(self.matrices.output, [sides[j][i] for j in range(size)], lanes)
                for j in range(m):
                    acc.store(i * m + j, 0, row[j])
            channel = T.bind(panel * T.int64(self.nr) + T.int64(v * lanes))
            store_tile(
                self.fused,
                self.buffers,
                acc,
                lambda i: self._pixel(n, y, x, i),
                lambda _, channel=channel: channel,
                columns - v * lanes,
                inside=self._inside(y, x),
            )

    def _pixel(self, n: Any, y: Any, x: Any, i: Any) -> list[Any]:
        """Indices of pixel i of the tile at (y, x)."""
        return [n, y + T.floordiv(i, T.int64(self.m)), x + T.floormod(i, T.int64(self.m))]

    def _inside(self, y: Any, x: Any) -> Callable[[Any], Any] | None:
        """Which pixels of the tile the image has; None: all of them."""
        out_h, out_w = self.workload.out_h, self.workload.out_w
        assert out_h is not None and out_w is not None
        if out_h % self.m == 0 and out_w % self.m == 0:
            return None

        def check(i: Any) -> Any:
            _, row, column = self._pixel(T.int64(0), y, x, i)
            return T.And(row < T.int64(out_h), column < T.int64(out_w))

        return check
