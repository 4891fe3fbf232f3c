"""What the sparse GEMM templates share: the workload, and a kernel whose weight parameter is replaced by a compressed stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...compiler.tvm import IRBuilder, T, tirx
from ..common.fused import Fused, Unfusable, product, static
from .dot import Dot, dot_kind
from .emit import ATTRS
from .sparse_weights import Constants, compress, density_class, group_mask
from .template import Packing

#: weights whose zeros are looked at in detail; the others of a class resemble them
_SAMPLES = 3


@dataclass(frozen=True)
class SparseWorkload:
    """M x K x N; M is None when known at run time only. kind: of the product, see `dot.dot_kind`. density: nonzero weights / all, the mean over the call sites whose constants `weights` holds."""

    m: int | None
    k: int
    n: int
    kind: str
    density: float
    epilogue: str
    weights: tuple[np.ndarray, ...] = field(compare=False, repr=False)
    _known: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return f"sparse gemm {self.m}x{self.k}x{self.n} {self.kind} density {self.density:.3f}"

    def share(self, r: int, c: int) -> float:
        """Share of the groups of r consecutive k by c outputs that are not all zero."""
        return self._groups(r, c)[0]

    def longest(self, r: int, c: int) -> int:
        """Most such groups in one panel of c outputs."""
        return self._groups(r, c)[1]

    def _groups(self, r: int, c: int) -> tuple[float, int]:
        if (r, c) not in self._known:
            masks = [group_mask(weight, r, c) for weight in self.weights[:_SAMPLES]]
            self._known[r, c] = float(np.mean([mask.mean() for mask in masks])), max(int(mask.sum(axis=1).max()) for mask in masks)
        return self._known[r, c]


def sparse_workload(fused: Fused, constants: frozenset[int]) -> SparseWorkload:
    """The workload of a matmul with a constant weight in which there are zeros enough; Unfusable otherwise."""
    if fused.core["op"] != "matmul":
        raise Unfusable("not a matmul")
    a, b = fused.inputs
    position = fused.param_index(b)
    if len(b.shape) != 2 or position not in constants or not isinstance(constants, Constants):
        raise Unfusable("no constant weight")
    kind = dot_kind(fused.inputs, fused.accumulator)
    if kind not in ("f32", "u8s8"):
        raise Unfusable("sparse weights in bfloat16")
    weights = constants.values[position]
    if not all(density_class(weight) for weight in weights):
        raise Unfusable("no zeros to speak of")
    k, n = weights[0].shape
    if kind != "f32" and k % 4:
        raise Unfusable("K is no multiple of 4, the codes of one word")
    density = float(np.mean([np.count_nonzero(weight) / weight.size for weight in weights]))
    return SparseWorkload(static(product(list(a.shape[:-1]))), k, n, kind, density, fused.epilogue_text(), weights)


def row_chunks(m: int | None, mr: int) -> list[int]:
    """Rows of A per task that are worth a try, multiples of mr; 0: all of them."""
    if m is None or m <= 64:
        return [0]
    return [0, *sorted({chunk // mr * mr for chunk in (64, 128, 256, 512) if chunk // mr * mr < m})]


@dataclass(frozen=True)
class StreamBuffers:
    """A compressed weight among the parameters of a kernel; see sparse_weights."""

    values: Any
    indices: Any
    pointers: Any


@contextmanager
def sparse_kernel(
    fused: Fused, n: int, r: int, c: int, dot: Dot, panels: tuple[int, ...] | None = None
) -> Iterator[tuple[IRBuilder, dict[Any, Any], StreamBuffers]]:
    """Open a PrimFunc with the parameters of `fused`, that of the weight with n outputs replaced by its stream in groups of r by c; panels: shape of dense words that come before the stream.

    Yields the builder, a map from the fused function's buffers (the weight's are its dense words, or none) to the new ones, and the stream.
    """
    _, weight = fused.inputs
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr(dict(ATTRS))
        buffers, stream = {}, None
        for param in fused.params:
            if param.same_as(weight):
                if panels is not None:
                    buffers[param] = T.arg("panels", T.buffer(panels, dot.word))
                groups = tirx.Var("groups", "int64")
                values = T.arg("values", T.buffer((groups, r // dot.group * c), dot.word))
                indices = T.arg("indices", T.buffer((groups,), "int32"))
                pointers = T.arg("pointers", T.buffer((-(-n // c) + 1,), "int32"))
                stream = StreamBuffers(values, indices, pointers)
            elif hasattr(param, "shape"):
                buffers[param] = T.arg(param.name, T.buffer(tuple(param.shape), param.ty.dtype))
            else:
                T.arg(param.name, param)
        assert stream is not None
        yield builder, buffers, stream


def stream_packing(fused: Fused, r: int, c: int, dot: Dot) -> Packing:
    """The packing that makes the stream of such a kernel."""
    position = fused.param_index(fused.inputs[1])
    assert position is not None
    return Packing(position, (), lambda weight: compress(weight, r, c, dot).arrays, f"{dot.name} groups {r}x{c}")
