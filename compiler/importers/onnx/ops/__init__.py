"""The converters, one file per family of operators. Importing this package fills the registry."""

from . import (  # noqa: F401
    control,
    convolution,
    elementwise,
    host_arithmetic,
    indexing,
    linear,
    normalization,
    pooling,
    quantization,
    reduction,
    resize,
    shape,
    slicing,
)
