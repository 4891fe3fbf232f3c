"""What the templates and the generic scheduler emit: CUDA kernels as text, with what is needed to launch them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...compiler.element_types import FLOAT8
from ...compiler.tvm import tirx
from .sizes import Unsupported, simplified, times

#: C types by TVM's names
CTYPES = {
    "float32": "float",
    "float64": "double",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "bool": "bool",
    "float16": "tc::float16",
    "bfloat16": "tc::bfloat16",
    FLOAT8: "tc::float8",
}
#: numbers of two bytes, and of one too, that are computed with as float
HALF = ("float16", "bfloat16")
SHORT = (*HALF, FLOAT8)
#: the largest count of elements or threads along x: positions are 32-bit
MAX_ELEMENTS = 2**31 - 1


def ctype(dtype: Any) -> str:
    """The C type of a dtype; raises Unsupported for those without one."""
    if str(dtype) not in CTYPES:
        raise Unsupported(f"dtype {dtype}")
    return CTYPES[str(dtype)]


def summed(dtype: Any) -> str:
    """The C type in which numbers of a dtype are folded."""
    return "float" if str(dtype) in SHORT else ctype(dtype)


@dataclass(frozen=True)
class TensorMap:
    """A tensor described for TMA, by the host: `encode` (a matrix) or `encode_windows` (an image) of include/host.cuh, with these arguments."""

    buffer: Any
    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Kernel:
    """One `__global__` function.

    text: its source, with the name `{name}` left open; buffers: its tensor parameters in order, the written ones in `written`; sizes: parameters behind those, which the host computes
    while running; maps: its last parameters. grid: blocks along x, y, z; threads per block; shared_bytes of dynamic shared memory. indexed: it takes an error word and a site number
    behind its sizes, because data decides what it reads. kind: the template, or the rule of the generic scheduler. when: (size, least, most): it is launched only while that size is
    in this range, both included; None is no bound. turns: blocks, along x alone, take pieces of work in turns, so that there need be no more than multiprocessors.
    """

    text: str
    buffers: tuple[Any, ...]
    written: tuple[Any, ...]
    grid: tuple[Any, Any, Any]
    threads: int
    shared_bytes: int
    kind: str
    workload: str = ""
    schedule: str = ""
    indexed: bool = False
    reason: str = ""
    maps: tuple[TensorMap, ...] = ()
    turns: bool = False
    sizes: tuple[Any, ...] = ()
    when: tuple[Any, int | None, int | None] | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What a launch needs the places of: the parameters, then what the maps describe."""
        return (*self.buffers, *(each.buffer for each in self.maps))


@dataclass(frozen=True)
class Packing:
    """A constant parameter that a kernel reads in another layout, as `buffer`."""

    param: Any
    buffer: Any
    pack: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Plan:
    """A fused function as kernels in launch order; buffers of theirs that are neither parameters of the function nor packed are intermediates."""

    params: tuple[Any, ...]
    kernels: tuple[Kernel, ...]
    packings: tuple[Packing, ...] = ()


@dataclass
class Signature:
    """Collects the parameters of a kernel while its body is printed."""

    written: tuple[Any, ...]
    names: dict[Any, str] = field(default_factory=dict)
    indexed: bool = False
    maps: list[TensorMap] = field(default_factory=list)
    sizes: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def size(self, size: Any) -> str:
        """A size in C: a number, or the name of a parameter that holds it."""
        size = simplified(size)
        if isinstance(size, int):
            return str(size)
        text = str(size)
        if text not in self.sizes:
            name = "n_" + re.sub(r"\W+", "_", text.replace("T.int64", "")).strip("_")
            taken = {other for other, _ in self.sizes.values()}
            self.sizes[text] = (name if len(name) < 32 and name not in taken else f"n{len(self.sizes)}"), size
        return self.sizes[text][0]

    def map(self, buffer: Any, function: str, *arguments: Any) -> str:
        """The name of a parameter that describes a tensor for TMA."""
        self.maps.append(TensorMap(buffer, function, arguments))
        return f"map{len(self.maps) - 1}"

    def name(self, buffer: Any) -> str:
        """The parameter's name in the kernel."""
        if buffer not in self.names:
            count = elements(buffer)
            if isinstance(count, int) and count > MAX_ELEMENTS:
                raise Unsupported(f"a tensor of {count} elements")
            self.names[buffer] = f"{'out' if buffer in self.written else 'in'}{len(self.names)}"
        return self.names[buffer]

    def head(self, threads: int, resident: int | None) -> str:
        """The declaration, up to the opening brace; the kernel's name stays open. resident: blocks that have to fit a multiprocessor, which bounds the registers."""
        params = []
        for buffer, name in self.names.items():
            const = "" if buffer in self.written else "const "
            params.append(f"{const}{ctype(buffer.ty.dtype)}* __restrict__ {name}")
        params += [f"const tc::Size {name}" for name, _ in self.sizes.values()]
        if self.indexed:
            params += ["int* error", "int site"]
        params += [f"TC_MAP map{position}" for position in range(len(self.maps))]
        bounds = f"{threads}" if resident is None else f"{threads}, {resident}"
        return f"TC_KERNEL({bounds}) {{name}}({', '.join(params)}) {{{{"

    def kernel(self, body: list[str], *, grid: tuple[Any, Any, Any], threads: int, resident: int | None = None, **rest: Any) -> Kernel:
        """The finished kernel; `body` is its lines."""
        lines = [self.head(threads, resident), *(f"  {line}".replace("{", "{{").replace("}", "}}") for line in body), "}}"]
        limits = (MAX_ELEMENTS, 65535, 65535)
        if any(isinstance(count, int) and count > limit for count, limit in zip(grid, limits, strict=True)):
            raise Unsupported(f"a grid of {grid} blocks")
        sizes = tuple(size for _, size in self.sizes.values())
        return Kernel(
            "\n".join(lines), tuple(self.names), self.written, grid, threads, indexed=self.indexed, maps=tuple(self.maps), sizes=sizes, **rest
        )


def copies_of(buffer: Any, dtype: str) -> tuple[Any, ...]:
    """A tensor of the same shape for the same numbers rounded to `dtype`; none without one."""
    return (tirx.decl_buffer(buffer.shape, dtype, "rounded"),) if dtype else ()


def elements(buffer: Any) -> Any:
    """Elements of a tensor: a size."""
    return times(buffer.shape)
