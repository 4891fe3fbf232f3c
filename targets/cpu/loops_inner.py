"""Vectors along an inner axis of a nest: softmax, layer-norm, sums over the last axis; see `loops`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ...compiler.tvm import T, tirx, tvm
from ..common.fused import static
from ..common.nests import Step
from ..common.stages import COMBINERS
from .loops_base import NestLoops, constant


class InnerLoops(NestLoops):
    """A row is folded in vectors of partial results."""

    def _inner(self) -> None:
        assert self.axis is not None
        rows = [(axis.var, axis.extent) for axis in self.nest.axes if not axis.inner]
        passes = self._passes()
        with self._loops(rows) as point:
            kept = self._kept(passes, self.axis.extent)
            for steps in passes:
                if steps[0].wide:
                    self._inner_pass(steps, point, kept)
                    continue
                for step in steps:
                    value = self.value(step, point, None)
                    self.known[step.ref] = constant(value)
                    self._store(step, point, value)

    def _inner_pass(self, steps: list[Step], rows: dict[Any, Any], kept: dict[Any, Any]) -> None:
        """One pass over a row."""
        assert self.axis is not None
        extent, size = self.axis.extent, static(self.axis.extent)
        vectors = self._vectors(size if size is not None else 1 << 30, steps)
        width = vectors * self.lanes
        folds = {step.ref: self._accumulator(step, width) for step in steps if step.combine}
        self.share(steps, width)
        inner = [axis for axis in self.nest.axes if axis.inner and axis is not self.axis]
        with ExitStack() as stack:
            point = rows | {axis.var: stack.enter_context(T.serial(axis.extent)) for axis in inner}

            def body(position: Any, slot: Any, fresh: Any = None) -> None:
                """One vector; lanes where `fresh` is false were folded before."""
                here = {**point, self.axis.var: position}  # type: ignore[union-attr]
                for step in steps:
                    value = self.value(step, here, slot)
                    if step.combine:
                        acc = folds[step.ref]
                        value = value if fresh is None else tirx.Select(fresh, value, tirx.Cast(step.dtype, step.init))
                        T.buffer_store(acc, COMBINERS[step.combine](acc[slot], value), [slot])
                        continue
                    value = self.know(step, value, slot)
                    self._store(step, here, value)
                    if step.ref in kept:
                        T.buffer_store(kept[step.ref], value, [self._place(here, position, extent)])

            self._sweep(extent, vectors, body)
        for step in steps:
            if step.combine:
                value = self._across(folds[step.ref], vectors, step)
                self.known[step.ref] = constant(value)
                self._store(step, rows, value)
            elif step.ref in kept:
                self.known[step.ref] = lambda at, slot, buffer=kept[step.ref]: buffer[self._place(at, at[self.axis.var], extent)]

    def _sweep(self, extent: Any, vectors: int, body: Callable[..., None]) -> None:
        """Cover 0..extent: tiles of `vectors` vectors, then single vectors, then the tail."""
        size, width = static(extent), vectors * self.lanes
        simplify = tvm.sym.Analyzer().simplify
        whole = simplify(tvm.tirx.floordiv(extent, tirx.const(width, "int64")))
        single = simplify(tvm.tirx.floordiv(tvm.tirx.floormod(extent, tirx.const(width, "int64")), tirx.const(self.lanes, "int64")))
        rest = simplify(tvm.tirx.floormod(extent, tirx.const(self.lanes, "int64")))
        if static(whole) != 0:
            with T.serial(whole) as tile:
                self.vector(tile * width, vectors, body)
        if static(single) != 0 and vectors > 1:
            with T.serial(single) as tile:
                self.vector(whole * width + tile * self.lanes, 1, body)
        if size is None:
            with T.serial(rest) as tile:
                body(extent - rest + tile, tirx.const(0, "int64"))
        elif static(rest):
            first = size - self.lanes
            repeated = self.lanes - static(rest)  # type: ignore[operator]
            self.vector(tirx.const(first, "int64"), 1, lambda position, slot: body(position, slot, slot >= repeated))

    def _across(self, acc: Any, vectors: int, step: Step) -> Any:
        """Combine all lanes of the accumulators into one scalar."""
        combine = COMBINERS[step.combine]
        for v in range(1, vectors):
            with T.vectorized(T.int64(self.lanes)) if self.lanes > 1 else T.serial(T.int64(1)) as lane:
                T.buffer_store(acc, combine(acc[lane], acc[lane + v * self.lanes]), [lane])
        half = self.lanes // 2
        while half:
            with T.vectorized(T.int64(half)) if half > 1 else T.serial(T.int64(1)) as lane:
                T.buffer_store(acc, combine(acc[lane], acc[lane + half]), [lane])
            half //= 2
        return T.bind(acc[T.int64(0)])
