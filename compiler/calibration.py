"""Calibration data: real inputs on which passes observe a model and its loss is measured."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .element_types import numpy_dtype
from .errors import UsageError
from .program import DimRange, TensorSpec

#: one call's inputs by name
Feeds = dict[str, np.ndarray]


def load(source: Any, inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange]) -> tuple[Feeds, ...]:
    """The calls in `source`, checked against a model's inputs.

    source: a `.npz` file, a folder of them, or an iterable of dicts (by input name) or tuples (by position) of arrays. An array of a file may hold one call,
    or many: stacked along a new first axis, or along the model's own batch axis, which is then cut into the model's batch (1 where it is dynamic).

    Raises UsageError for data that is missing, empty, not finite, or does not fit the inputs by name, dtype or shape.
    """
    if isinstance(source, (str, os.PathLike)):
        calls = [call for file in _files(Path(source)) for call in _calls(_read(file), inputs, dims, file)]
    elif isinstance(source, Mapping):
        calls = list(_calls(dict(source), inputs, dims, Path("calibration")))
    elif isinstance(source, Iterable):
        calls = [_named(item, inputs) for item in source]
    else:
        raise UsageError(f"calibration: expected a .npz file, a folder of them, or an iterable of dicts, not a {type(source).__name__}")
    if not calls:
        raise UsageError("calibration: no samples; give at least one, better 32 to 512 that look like real inputs")
    return tuple(_checked(call, index, inputs, dims) for index, call in enumerate(calls))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise UsageError(f"calibration: no .npz file in {path}")
        return files
    if not path.is_file():
        raise UsageError(f"calibration: {path}: no such file")
    if path.suffix != ".npz":
        raise UsageError(f"calibration: {path} must be a .npz file with one array per input, or a folder of them")
    return [path]


def _read(file: Path) -> Feeds:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"calibration: cannot read {file}: {error}") from error


def _named(item: Any, inputs: Sequence[TensorSpec]) -> Feeds:
    if isinstance(item, Mapping):
        return {name: np.asarray(value) for name, value in item.items()}
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(values) != len(inputs):
        raise UsageError(f"calibration: a sample has {len(values)} arrays, the model {len(inputs)} inputs")
    return {spec.name: np.asarray(value) for spec, value in zip(inputs, values, strict=True)}


def _calls(arrays: Feeds, inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange], file: Path) -> Iterable[Feeds]:
    """Cut a file's arrays into calls."""
    _same_names(arrays, inputs, str(file))
    pieces = {spec.name: _pieces(arrays[spec.name], spec, dims) for spec in inputs}
    counts = {name: len(values) for name, values in pieces.items() if len(values) != 1}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"calibration: {file}: inputs hold different numbers of samples: " + ", ".join(f"{n} {c}" for n, c in sorted(counts.items()))
        )
    # an input that is the same for all samples (a scale, a table) may be given once
    for index in range(next(iter(counts.values()), 1)):
        yield {name: values[index if len(values) > 1 else 0] for name, values in pieces.items()}


def _pieces(array: np.ndarray, spec: TensorSpec, dims: Mapping[str, DimRange]) -> list[np.ndarray]:
    rank = len(spec.shape)
    if array.ndim == rank + 1:
        return list(array)
    if array.ndim != rank or not rank:
        return [array]
    first = spec.shape[0]
    batch = first if isinstance(first, int) else max(1, dims.get(first, DimRange()).min)
    if batch and len(array) > batch and len(array) % batch == 0:
        return list(array.reshape(-1, batch, *array.shape[1:]))
    return [array]


def _same_names(arrays: Mapping[str, Any], inputs: Sequence[TensorSpec], where: str) -> None:
    wanted = [spec.name for spec in inputs]
    if missing := [name for name in wanted if name not in arrays]:
        raise UsageError(f"calibration: {where} has no array for input {', '.join(missing)}; it has {', '.join(arrays) or 'none'}")
    if extra := [name for name in arrays if name not in wanted]:
        raise UsageError(f"calibration: {where}: {', '.join(extra)} is no input of the model; its inputs are {', '.join(wanted)}")


def _checked(call: Feeds, index: int, inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange]) -> Feeds:
    where = f"sample {index}"
    _same_names(call, inputs, where)
    result, sizes = {}, {}
    for spec in inputs:
        array, dtype = call[spec.name], numpy_dtype(spec.dtype)
        if array.dtype != dtype and not (array.dtype.kind == dtype.kind or (array.dtype.kind in "iu" and dtype.kind in "iu")):
            raise UsageError(f"calibration: {where}, input '{spec.name}': {array.dtype} does not go into {spec.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(f"calibration: {where}, input '{spec.name}' holds NaN or infinity; take the sample out")
        fits = array.ndim == len(spec.shape) and array.size > 0
        for have, want in zip(array.shape, spec.shape, strict=fits):
            if isinstance(want, int):
                fits = fits and have == want
            else:
                bounds = dims.get(want, DimRange())
                fits = fits and sizes.setdefault(want, have) == have and bounds.min <= have and (bounds.max is None or have <= bounds.max)
        if not fits:
            raise UsageError(f"calibration: {where}, input '{spec.name}' has shape {list(array.shape)}, the model takes {spec}")
        result[spec.name] = np.ascontiguousarray(array.astype(dtype, copy=False))
    return result
