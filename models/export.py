"""Export a torch network of the zoo to ONNX, once, into a cache whose file names tell what made them."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .entry import Entry
from .optional import require, version

#: the standard operator set of the exported files
OPSET = 18


def default_cache() -> Path:
    """The user's cache folder of this platform, e.g. ~/.cache/tcompile/zoo."""
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "tcompile" / "zoo"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tcompile" / "zoo"
    return Path.home() / ".cache" / "tcompile" / "zoo"


def content_version(entry: Entry) -> str:
    """12 hex digits over everything that the exported file depends on: the builder's source, this exporter and the packages' versions."""
    assert entry.build is not None
    sources = [inspect.getsource(sys.modules[name]) for name in (entry.build.__module__, f"{__package__}.perturb", __name__)]
    versions = [f"{package}={version(package)}" for package in (*entry.packages, "onnxscript")]
    return hashlib.sha256("\0".join([entry.name, *versions, *sources]).encode()).hexdigest()[:12]


def exported(entry: Entry, cache: Path | None = None) -> Path:
    """Path of the ONNX file `NAME-VERSION.onnx` in `cache`, exported now if it is not there; the file appears whole or not at all."""
    folder = cache or default_cache()
    path = folder / f"{entry.name}-{content_version(entry)}.onnx"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        draft = Path(scratch) / path.name
        export(entry, draft)
        os.replace(draft, path)
    return path


def export(entry: Entry, path: Path) -> None:
    """Write the network to `path` with torch.export's exporter; dims as in `entry.dims`, graph input and output names as in the entry."""
    torch = require("torch")
    require("onnxscript")
    module = entry.torch_module()
    assert module is not None, f"{entry.name} has no torch module"
    # two of everything: torch.export takes a size of 1 for a constant
    inputs = entry.example_inputs(**{name: max(2, dim.default) for name, dim in entry.dims.items()})
    program = torch.onnx.export(
        module,
        tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.values()),
        input_names=list(inputs),
        output_names=list(entry.outputs),
        dynamic_shapes=torch_dynamic_shapes(entry),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    program.save(path, external_data=False)


def torch_dynamic_shapes(entry: Entry) -> dict[str, dict[int, Any]]:
    """The entry's dynamic dims as torch.export takes them: {"x": {0: Dim("batch", min=1, max=64)}}."""
    torch = require("torch")
    dims = {name: torch.export.Dim(name, min=dim.min, max=dim.max) for name, dim in entry.dims.items()}
    return {name: {axis: dims[dim] for axis, dim in axes.items()} for name, axes in entry.dynamic_dims.items()}
