"""TVM's runtime without its compiler: 5 MB of libraries instead of 260, loaded in milliseconds. All that running an artifact needs."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np

# A worker of TVM's pool spins this often before it sleeps. The default, 300000, is 160 ms: after every call each worker would burn a core that
# the caller, other pools and peers in a benchmark need. This is about 2 ms, longer than any serial stretch inside a model.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "4000")


class torch_hidden(MetaPathFinder):
    """While active, `import torch` fails in the thread that made it: TVM and tvm_ffi import torch, three seconds, if only it is installed.

    A torch that has been imported before stays visible.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is imported by those who need it", name="torch")

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(self)


with torch_hidden():
    import tvm_ffi

__all__ = ["Executable", "array", "config_threadpool", "from_dlpack", "load_executable", "load_library", "torch_hidden"]

from_dlpack = tvm_ffi.from_dlpack
array = tvm_ffi.Array

_CPU = 1
_POOLED_ALLOCATOR = 2


def _load_runtime() -> None:
    """Make libtvm_runtime's functions known, unless `import tvm` has done so."""
    if "tvm" in sys.modules:
        return
    found = importlib.util.find_spec("tvm")
    if found is None or found.origin is None:
        raise ImportError("package apache-tvm is not installed; `pip install tcompile` brings it")
    ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)


_load_runtime()
config_threadpool = tvm_ffi.get_global_func("runtime.config_threadpool")

_load_library = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")


class Executable:
    """A loaded library; `main()` gives each calling thread a function of its own (a Relax VM is not re-entrant, the code below it is)."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def main(self) -> Any:
        """A new VM's `main`: (*input tensors, weights array) -> tensor or array of tensors."""
        machine = self._module["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
        from .tvm_control import entry  # needs what this module loads

        return entry(machine)


def load_executable(library: bytes) -> Executable:
    """Load a shared library that holds a Relax executable."""
    return Executable(load_library(library))


def load_library(library: bytes) -> Any:
    """Load a shared library from memory.

    Through an anonymous file: what runs is exactly the bytes that were checked. The path to it is a link with a name never used before, because the
    dynamic linker gives a path that it has seen the library it loaded then, and TVM's modules keep state in theirs.
    """
    descriptor = os.memfd_create("lib.so", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(library)
        with tempfile.TemporaryDirectory(prefix="tcompile-") as folder:
            link = os.path.join(folder, "lib.so")
            os.symlink(f"/proc/self/fd/{descriptor}", link)
            return _load_library(link, "so")
    finally:
        os.close(descriptor)


class OpenSizes:
    """What the library of a CUDA model with open sizes says of a call: it looks at the inputs' shapes alone. ranks: of the outputs."""

    def __init__(self, library: Any, ranks: Sequence[int]) -> None:
        self._ask, self._ranks = library["sizes"], tuple(ranks)

    def __call__(self, tensors: Sequence[Any]) -> tuple[int, list[tuple[int, ...]]]:
        """(bytes of workspace, shapes of the outputs). Raises RuntimeError where sizes do not fit together."""
        numbers = np.zeros(1 + sum(self._ranks), np.int64)
        self._ask(from_dlpack(numbers), *tensors)
        rest = iter(numbers[1:].tolist())
        return int(numbers[0]), [tuple(itertools.islice(rest, rank)) for rank in self._ranks]
