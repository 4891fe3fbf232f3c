"""Converters that replace or complete TVM's: (translator, node) -> Relax expression, by aten name with overload."""

from __future__ import annotations

from . import attention, creation, elementwise, linear, normalization, shape

CONVERTERS = {
    **shape.CONVERTERS,
    **creation.CONVERTERS,
    **linear.CONVERTERS,
    **attention.CONVERTERS,
    **elementwise.CONVERTERS,
    **normalization.CONVERTERS,
}
