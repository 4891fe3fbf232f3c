"""Running the emitted CUDA on this CPU: the very source of an artifact, compiled by g++ with include/simt.h in place of a GPU.

Every thread of every block runs as a fiber, tensor-core instructions follow the fragment layouts of the PTX manual. Slow (seconds per GMAC); for tests and for
`tcompile verify` on machines without a GPU.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.element_types import CARRIERS, encode, numpy_dtype
from ...compiler.errors import ToolchainError
from ...compiler.program import TensorSpec
from ...compiler.tvm_runtime import OpenSizes, from_dlpack, load_library
from ...compiler.weights import aligned, device_offsets
from .host import MODEL
from .toolchain import ffi_headers

#: includes all others
_ALL = "all.h"
_FLAGS = ("-fPIC", "-std=c++17", "-O2", "-march=x86-64-v3", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DTCOMPILE_SIMT")


class Emulation:
    """An emulated model: call it with numpy arrays in the order of its inputs. Memory that no kernel has written holds NaN.

    Made of what an artifact holds: sources, weights, inputs, outputs, and workspace_bytes of its report (of a model with open sizes the library says it for each call). error: after a call, 0 or the number of the kernel (from 1)
    that met an index out of range.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        weights: Mapping[str, np.ndarray],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        workspace_bytes: int,
    ) -> None:
        library = load_library(build(sources))
        self._main = library["main"]
        self._sizes = (
            OpenSizes(library, [len(spec.shape) for spec in outputs])
            if any(isinstance(dim, str) for spec in (*inputs, *outputs) for dim in spec.shape)
            else None
        )
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        offsets, size = device_offsets(weights)
        self._weights = aligned(np.zeros(size, np.uint8))
        for name, array in weights.items():
            self._weights[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._workspace_bytes = workspace_bytes
        self.error = 0

    def __call__(self, *values: Any) -> tuple[np.ndarray, ...]:
        given = [aligned(np.array(value, numpy_dtype(spec.dtype))) for value, spec in zip(values, self._inputs, strict=True)]
        size, shapes = self._workspace_bytes, [spec.shape for spec in self._outputs]
        if self._sizes is not None:
            size, shapes = self._sizes([from_dlpack(encode(array) if array.dtype.name in CARRIERS else array) for array in given])
        workspace, error = aligned(np.full(size, 0xFF, np.uint8)), aligned(np.zeros(1, np.int32))
        results = [
            aligned(np.full([int(dim) for dim in shape], -1).astype(numpy_dtype(spec.dtype)))
            for spec, shape in zip(self._outputs, shapes, strict=True)
        ]
        tensors = [encode(array) if array.dtype.name in CARRIERS else array for array in (*given, *results)]
        self._main(*map(from_dlpack, (workspace, self._weights, error, *tensors)))
        self.error = int(error[0])
        return tuple(results)


def build(sources: Mapping[str, str]) -> bytes:
    """A shared library with the same entry point, for tensors in main memory. Raises ToolchainError without g++."""
    headers = _headers(tuple(sorted((name, text) for name, text in sources.items() if name != MODEL)), _included(sources[MODEL]))
    with tempfile.TemporaryDirectory(prefix="tcompile-") as folder:
        (Path(folder) / MODEL).write_text(sources[MODEL])
        _compile(Path(folder), "-shared", "-include", f"{headers.name}/{_ALL}", f"-I{headers.name}", "-x", "c++", MODEL, "-o", "lib.so")
        return (Path(folder) / "lib.so").read_bytes()


@functools.cache
def _headers(texts: tuple[tuple[str, str], ...], included: str) -> tempfile.TemporaryDirectory[str]:
    """A folder with the headers, read by g++ once for all models of this process: it takes longer for them than for a model."""
    folder = tempfile.TemporaryDirectory(prefix="tcompile-")
    for name, text in (*texts, (_ALL, included)):
        (Path(folder.name) / name).write_text(text)
    _compile(Path(folder.name), "-x", "c++-header", _ALL, "-o", f"{_ALL}.gch")
    return folder


def _included(model: str) -> str:
    return "".join(f"{line}\n" for line in model.splitlines() if line.startswith('#include "'))


def _compile(folder: Path, *arguments: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise ToolchainError("g++ is not installed: apt-get install g++")
    line = [compiler, *_FLAGS, *(f"-I{path}" for path in ffi_headers()), *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ToolchainError(f"g++ could not build the emulation (exit {done.returncode}):\n{done.stderr.strip()[-4000:]}")
