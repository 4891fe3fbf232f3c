"""What a quantizer makes of a product by constant weights; a scheme is one way to do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.tvm import relax
from ..products import Site
from .formats import Encoded, Range

Emit = Callable[[Any], Any]


@dataclass(frozen=True)
class Codes:
    """The codes of a tensor; scale: where it is found while running, the tensor of scales, which broadcasts over them."""

    expr: Any
    scale: Any = None


class Scheme(ABC):
    """name: what the report says a product runs in. covering: the codes over a range. chained: sums between convolutions may read codes."""

    name: str
    chained = False
    covering: Callable[[float, float], Range]

    @abstractmethod
    def weight(self, site: Site) -> Encoded:
        """The codes of a site's weight, symmetric with a scale per output channel."""

    @abstractmethod
    def codes(self, emit: Emit, x: Any, covering: Any) -> Codes:
        """The codes of a float32 tensor, in plain operators."""

    @abstractmethod
    def decoded(self, emit: Emit, codes: Codes, covering: Any) -> Any:
        """The float32 tensor of codes."""

    @abstractmethod
    def product(self, emit: Emit, site: Site, codes: Codes, covering: Any, weight: Encoded) -> Any:
        """`site` with its bias, float32, from the codes of its operand."""


def number(value: float) -> Any:
    """A constant of one element: an operand of the kernels that read it, so that layers of the same shape share a kernel. A scalar would be written into the code."""
    return relax.const(np.array([value], np.float32), "float32")


def channels(site: Site, values: np.ndarray, dtype: str = "float32") -> Any:
    """A constant of one number per output channel."""
    return relax.const(np.ascontiguousarray(site.per_channel(values)), dtype)
