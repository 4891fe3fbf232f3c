"""Converters that replace or complete TVM's: (translator, node) -> Relax expression, by aten name with overload."""

from __future__ import annotations

from . import (
    attention,
    bags,
    convolution,
    creation,
    distances,
    elementwise,
    experts,
    indexing,
    linear,
    normalization,
    ordering,
    pooling,
    recurrent,
    reduction,
    resampling,
    scatter,
    selection,
    shape,
)

CONVERTERS = {
    **shape.CONVERTERS,
    **creation.CONVERTERS,
    **linear.CONVERTERS,
    **attention.CONVERTERS,
    **elementwise.CONVERTERS,
    **normalization.CONVERTERS,
    **ordering.CONVERTERS,
    **reduction.CONVERTERS,
    **experts.CONVERTERS,
    **indexing.CONVERTERS,
    **scatter.CONVERTERS,
    **selection.CONVERTERS,
    **pooling.CONVERTERS,
    **convolution.CONVERTERS,
    **distances.CONVERTERS,
    **bags.CONVERTERS,
    **recurrent.CONVERTERS,
    **resampling.CONVERTERS,
}
