"""The converters, one file per family of operators. Importing this package fills the registry."""

from . import control, convolution, elementwise, host_arithmetic, indexing, linear, normalization, pooling, reduction, resize, shape, slicing  # noqa: F401
