"""Token merging (Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023): tokens that leave are averaged into the one they resemble most.

A merged token stands for as many as went into it: means are weighted by these sizes, and attention to it is as strong as to all of them (log of the size added to the scores).
Tokens that a mask hides weigh nothing and leave first.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from ...compiler.dialect.attention import AttentionAttrs
from ...compiler.tvm import relax
from .axes import dims, same

op = relax.op

#: a token is hidden when every head and query adds less than this to its score
_HIDDEN = -1e4


def _scalar(value: float) -> Any:
    return relax.const(np.float32(value), "float32")


class Merging:
    """Builds the merges of one program. sizes: per stage how many tokens each one stands for, [B, N, 1] float32; None where each stands for itself."""

    def __init__(self, builder: Any):
        self.builder = builder
        self.sizes: list[Any] = [None]

    def _emit(self, expr: Any) -> Any:
        return self.builder.emit(expr)

    def watched(self, args: list[Any], layout: str) -> tuple[Any, Any]:
        """(metric [B, N, D], the mean of the keys over heads; which tokens are visible [B, N] float32 0 or 1, or None for all) of an attention's operands."""
        metric = self._emit(op.mean(args[1], axis=[layout.index("H")]))
        mask = args[3] if len(args) == 4 else None
        tokens = dims(metric)[1]
        if mask is None or not same(dims(mask)[-1], tokens):
            return metric, None
        if str(mask.ty.dtype) == "bool":
            seen = self._emit(op.astype(mask, "float32"))
        else:
            seen = self._emit(op.astype(self._emit(op.greater(mask, _scalar(_HIDDEN))), "float32"))
        rank = len(dims(mask))
        if rank > 2:
            seen = self._emit(op.max(seen, axis=list(range(1, rank - 1))))
        elif rank == 2:
            seen = self._emit(op.max(seen, axis=[0], keepdims=True))
        return metric, self._emit(op.broadcast_to(seen, dims(metric)[:2]))

    def proportional(self, args: list[Any], attrs: AttentionAttrs, stage: int) -> list[Any]:
        """The operands of an attention whose keys count as often as tokens are in them."""
        size = self.sizes[stage]
        if size is None:
            return args
        batch, tokens, _ = dims(size)
        bias = self._emit(op.log(self._emit(op.maximum(size, _scalar(1e-30)))))
        bias = self._emit(op.reshape(bias, [batch, 1, 1, tokens]))
        if len(args) == 3:
            return [*args, bias]
        mask = args[3]
        if str(mask.ty.dtype) == "bool":
            return [*args[:3], self._emit(op.where(mask, bias, _scalar(attrs.fill)))]
        return [*args[:3], self._emit(op.add(mask, bias))]

    def merged(self, x: Any, metric: Any, seen: Any, keep: Fraction, match: Callable[..., Any]) -> tuple[Any, Any]:
        """x: [B, N, C] -> (indices of the tokens that stay [B, K], the merged tokens [B, K, C])."""
        both = self._emit(match(metric, keep, seen))
        indices, destination = (self._emit(relax.TupleGetItem(both, at)) for at in range(2))
        (batch, kept), tokens = dims(indices), dims(x)[1]
        size = self.sizes[-1]
        if size is None and seen is not None:
            size = self._emit(op.reshape(seen, [batch, tokens, 1]))
        goes = self._emit(op.equal(self._emit(op.reshape(indices, [batch, kept, 1])), self._emit(op.reshape(destination, [batch, 1, tokens]))))
        members = self._emit(op.astype(goes, "float32"))
        if size is None:
            total = self._emit(op.sum(members, axis=[2], keepdims=True))
            weighted = x
        else:
            total = self._emit(op.matmul(members, size))
            weighted = self._emit(op.multiply(x, size))
        mean = self._emit(op.divide(self._emit(op.matmul(members, weighted)), self._emit(op.maximum(total, _scalar(1e-30)))))
        self.sizes.append(total)
        return indices, mean
