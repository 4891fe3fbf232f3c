"""From the functions of a program to machine code: every large kernel an object of its own, several made at a time.

Objects are kept, because the programs that a compression compiles to measure what each step costs share most of their kernels with each other and with the result.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ...compiler.linker import memory_file
from ...compiler.tvm import PIPELINE_MAP, structural_equal, structural_hash, structural_walk, tirx, tvm
from ..base import Target
from .lower import code_generation, tvm_target
from .math_lowering import TIR_PIPELINE

#: names of the functions that Relax's code generator makes of the program's own functions
_HOST_PREFIX = "__vmtir__"
#: sorts before them
_DECLARATIONS = "__declarations"
#: objects of one library: each takes an open file while it is linked, and a process may have 1024
_MOST_OBJECTS = 256
#: stores in the text of a kernel up to which it is small: LLVM takes longer for what TVM puts into every object (conversions of float16) than for the kernel
_SMALL = 12
#: small kernels in one object
_TOGETHER = 8

Kernels = Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class _Object:
    """Machine code of kernels: the object file, and the functions that it defines, as lowered."""

    kernels: Kernels
    code: bytes
    functions: tuple[Any, ...]


class _Kept:
    """The objects made last, by what they were made of."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of object files; the first ones made go first."""
        self.limit, self.size = limit, 0
        self._objects: OrderedDict[tuple[str, int], _Object] = OrderedDict()
        self._lock = Lock()

    def find(self, key: tuple[str, int], kernels: Kernels) -> _Object | None:
        with self._lock:
            found = self._objects.get(key)
        if found is None or len(found.kernels) != len(kernels):
            return None
        same = all(
            one.name_hint == other.name_hint and structural_equal(func, kept)
            for (one, func), (other, kept) in zip(kernels, found.kernels, strict=True)
        )
        return found if same else None

    def keep(self, key: tuple[str, int], made: _Object) -> None:
        with self._lock:
            if key in self._objects:
                self.size -= len(self._objects.pop(key).code)
            self._objects[key] = made
            self.size += len(made.code)
            while self.size > self.limit:
                self.size -= len(self._objects.popitem(last=False)[1].code)


_kept = _Kept(64 * 1024 * 1024)


def machine_code(functions: Any, target: Target) -> Any:
    """The library of a program's functions. Kernels are compiled with all of LLVM's optimisations; the host functions, which only call them one after the other, with none.

    Optimising the call sequence gains nothing, and takes LLVM time that grows with the square of its length: a minute for 600 kernels.
    """
    kernels, host = [], {}
    for variable, func in functions.functions_items():
        if variable.name_hint.startswith(_HOST_PREFIX):
            host[variable] = func
        else:
            kernels.append((variable, func))
    if not kernels or not host:
        return _generated(_lowered(functions, target), target)
    groups = _groups(kernels)
    # LLVM works outside of Python's lock
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        objects = list(workers.map(lambda group: _object(group, target), groups))
    lowered = _lowered(tvm.IRModule(host, attrs=functions.attrs), target)
    first = _declarations([func for made in objects for func in made.functions])
    library = _generated(_with(lowered, first), target, optimize=False)
    for made in objects:
        with memory_file() as path:
            path.write_bytes(made.code)
            library.import_module(tvm.runtime.load_static_library(str(path), [func.attrs["global_symbol"] for func in made.functions]))
    return library


def _groups(kernels: Kernels) -> list[Kernels]:
    """What is compiled together: every large kernel alone, small ones by the handful."""
    small, large = [], []
    for kernel in kernels:
        (small if _stores(kernel[1]) <= _SMALL else large).append(kernel)
    groups = [*_parts(large, 1), *_parts(small, _TOGETHER)]
    return groups if len(groups) <= _MOST_OBJECTS else _parts(kernels, -(-len(kernels) // _MOST_OBJECTS))


def _parts(kernels: Kernels, size: int) -> list[Kernels]:
    return [kernels[first : first + size] for first in range(0, len(kernels), size)]


def _stores(func: Any) -> int:
    found: list[Any] = []
    structural_walk(func.body, (tirx.BufferStore, found.append))
    return len(found)


def _object(kernels: Kernels, target: Target) -> _Object:
    key = str(tvm_target(target)), hash(tuple(structural_hash(func) for _, func in kernels))
    found = _kept.find(key, kernels)
    if found is not None:
        return found
    with tvm_target(target), code_generation():  # each thread has contexts of its own
        lowered = _lowered(tvm.IRModule(dict(kernels)), target)
        library = _generated(lowered, target)
        with memory_file() as path:
            library.write_to_file(str(path), "o")
            made = _Object(kernels, path.read_bytes(), tuple(func for _, func in lowered.functions_items()))
    _kept.keep(key, made)
    return made


def _lowered(module: Any, target: Target) -> Any:
    code = tvm_target(target)
    lower, finish, _ = PIPELINE_MAP[TIR_PIPELINE]()
    return finish()(lower(tvm.tirx.transform.BindTarget(code.with_host(code))(module)))


def _generated(lowered: Any, target: Target, optimize: bool = True) -> Any:
    return tvm.get_global_func("target.build.llvm")(lowered, tvm_target(target, optimize=optimize))


def _with(module: Any, func: Any) -> Any:
    """The module with one more function, before all others."""
    return tvm.IRModule({tvm.ir.GlobalVar(func.attrs["global_symbol"]): func, **dict(module.functions_items())}, attrs=module.attrs)


def _declarations(kernels: list[Any]) -> Any:
    """A function that is never called, generated before all others of the host's module, so that they find the kernels of the other objects declared."""
    first = kernels[0]
    calls = [tirx.Evaluate(tirx.call_extern("int32", kernel.attrs["global_symbol"], *first.params)) for kernel in kernels]
    return first.with_body(tirx.SeqStmt([*calls, tirx.Return(tirx.const(0, "int32"))])).with_attr("global_symbol", _DECLARATIONS)
