"""Short numbers packed to the 32-bit words that dot-product instructions read."""

from __future__ import annotations

import numpy as np


def packed_words(groups: np.ndarray) -> np.ndarray:
    """[..., W, group, N] of elements that fill 4 bytes per group -> words [..., W, N] of int32, the first of a group lowest."""
    return np.ascontiguousarray(np.moveaxis(groups, -2, -1)).view(np.int32)[..., 0]
