"""Short numbers packed to the 32-bit words that dot-product instructions read."""

from __future__ import annotations

import numpy as np


def packed_words(groups: np.ndarray) -> np.ndarray:
    """[..., W, group, N] of elements that fill 4 bytes per group -> words [..., W, N] of int32, the first of a group lowest."""
    return np.ascontiguousarray(np.moveaxis(groups, -2, -1)).view(np.int32)[..., 0]


def planes(bits: int) -> list[tuple[int, int]]:
    """(width, lowest bit) of the parts of 8, 4, 2 and 1 bits of a code, the lowest bits in the widest one."""
    return [(width, bits & ~(2 * width - 1)) for width in (8, 4, 2, 1) if bits & width]
