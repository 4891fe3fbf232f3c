"""Inputs for a run from the command line: random ones from the specs, or arrays from files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from .element_types import numpy_dtype
from .errors import UsageError
from .program import DimRange, TensorSpec


def random_feeds(inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal floats, integers 0 or 1 (valid both as ids and as mask), booleans. A symbolic dim takes its `opt`, else its minimum."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        shape = [dim if isinstance(dim, int) else _size(dims.get(dim, DimRange())) for dim in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        values = generator.integers(0, 2, shape) if dtype.kind in "biu" else generator.standard_normal(shape)
        feeds[spec.name] = values.astype(dtype)
    return feeds


def read_feeds(arguments: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays from `NAME=FILE.npy` and `FILE.npz` (one array per input name). Raises UsageError for a file that is not one."""
    feeds: dict[str, np.ndarray] = {}
    for argument in arguments:
        name, separator, file = argument.rpartition("=")
        if not separator and not argument.endswith(".npz"):
            raise UsageError(f"--input '{argument}': expected NAME=FILE.npy or FILE.npz, for example --input x=image.npy")
        try:
            loaded = np.load(file, allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {name: loaded}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"--input '{argument}': cannot read {file}: {error}") from error
        if separator and len(arrays) == 1:
            arrays = {name: next(iter(arrays.values()))}
        feeds |= arrays
    return feeds


def _size(bounds: DimRange) -> int:
    return bounds.opt if bounds.opt is not None else max(1, bounds.min)
