"""What products have in common, whatever multiplies them: the epilogue on their sums, and the kernel that adds up parts of K."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ...compiler.tvm import TensorLoad, structural_map, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, static
from .kernel import Kernel, Packing, Plan, Signature, Unsupported, copies_of, ctype
from .printer import Printer, check_indices

#: threads per block of the kernel that adds up parts of K
THREADS = 256


def plan(template: type[Product], fused: Fused, target: Target, policy: str, constants: frozenset[int], schedule: Any, rounded: str) -> Plan:
    """The kernels of a fused function by this template and schedule (None: the best); raises Unfusable when it is not for the template.

    constants: positions of parameters that may be packed. rounded: see `Product`.
    """
    if fused.core["op"] not in template.cores:
        raise Unfusable(f"{fused.core['op']} is none of {', '.join(template.cores)}")
    if any(static(dim) is None for param in fused.params for dim in param.shape):
        raise Unfusable("sizes known only at run time")
    if any(static(dim) == 0 for param in fused.params for dim in param.shape):
        raise Unfusable("an operand without elements")
    try:
        made = template(fused, target, policy, constants, rounded)
        return Plan((*fused.params, *made.copies), made.kernels(schedule), made.packings)
    except Unsupported as reason:
        raise Unfusable(str(reason)) from reason


class Product(ABC):
    """A fused function whose core is a product, as C++ over (m, n, sum): m a row of C, n its column, blockIdx.z its batch.

    rounded: a type in which the result is written, too, as one more parameter. Subclasses set `batch_dims` and `row_dims`, the dims of C that these positions
    stand for, `m` and `n`, the rows and columns of C, `sum`, the C type of a sum, and `packings`.
    """

    #: operators that it multiplies
    cores: tuple[str, ...]
    packings: tuple[Packing, ...] = ()
    batch_dims: Sequence[int] = ()
    row_dims: Sequence[int]
    m: int
    n: int
    sum: str = "float"

    def __init__(self, fused: Fused, target: Target, policy: str, constants: frozenset[int], rounded: str = ""):
        """policy: number policy of operands in float32."""
        self.fused, self.target = fused, target
        self.copies = copies_of(fused.output, rounded)
        self.signature = Signature((fused.output, *self.copies))

    @abstractmethod
    def best(self) -> Any:
        """The schedule of least predicted time; `parts` of it says in how many parts K is summed."""

    @abstractmethod
    def _product(self, tile: Any, signature: Signature, written: Sequence[Any], value: list[str]) -> Kernel:
        """The product, or that of a part of K for every blockIdx.z. value: body of the lambda (m, n, sum) -> what is written."""

    def kernels(self, tile: Any) -> tuple[Kernel, ...]:
        """Those of this schedule or the best: the product, or parts of it and their sums."""
        tile = tile or self.best()
        if tile.parts == 1:
            return (self._product(tile, self.signature, (self.fused.output, *self.copies), self._epilogue()),)
        parts = tirx.decl_buffer((tile.parts, self.m, self.n), self.fused.accumulator.ty.dtype, "parts")
        return self._product(tile, Signature((parts,)), (parts,), ["return sum;"]), self._sums(parts)

    def _sums(self, parts: Any) -> Kernel:
        """The sums over the parts of K, in their order, and the epilogue: a thread per element."""
        count, total = int(parts.shape[0]), math.prod(int(dim) for dim in parts.shape[1:])
        result, body = ctype(self.fused.output.ty.dtype), [f"  {line}" for line in self._epilogue()]
        lines = [
            f"const int place = blockIdx.x * {THREADS} + threadIdx.x;",
            f"if (place >= {total}) return;",
            f"const int m = place / {parts.shape[-1]}, n = place % {parts.shape[-1]};",
            f"{self.sum} sum = 0;",
            "#pragma unroll",
            f"for (int part = 0; part < {count}; ++part) sum += {self.signature.name(parts)}[part * {total} + place];",
            f"const {result} value = [&]() -> {result} {{",
            *body,
            "}();",
            *(f"{self.signature.name(buffer)}[place] = value;" for buffer in (self.fused.output, *self.copies)),
        ]
        return self.signature.kernel(
            lines, grid=(-(-total // THREADS), 1, 1), threads=THREADS, shared_bytes=0, kind="sums", workload=f"sums {count} x {total}"
        )

    def _epilogue(self) -> list[str]:
        """The body of the lambda: (m, n, sum) -> the element of the output."""
        lines: list[str] = []
        indices: list[str] = []
        for position, dims in (("blockIdx.z", self.batch_dims), ("m", self.row_dims)):
            stride = total = math.prod(dims)
            for dim in dims:
                above, stride = stride, stride // dim
                value = position if stride == 1 else f"{position} / {stride}"
                value = value if above == total else f"{value} % {dim}"
                lines.append(f"const int i{len(indices)} = {value if dim > 1 else 0};")
                indices.append(f"i{len(indices)}")
        indices.append("n")
        values = {self.fused.accumulator: "sum"}

        def load(buffer: Any, at: Sequence[str]) -> str:
            return values[buffer] if buffer in values else f"{self.signature.name(buffer)}[{_address(buffer, at)}]"

        for number, block in enumerate(self.fused.epilogue):
            axes = {var.var: index for var, index in zip(block.iter_vars, indices, strict=True)}
            ranges = {var.var: int(var.dom.extent) for var in block.iter_vars}
            printer = Printer(load, axes, ranges)
            value = block.body.value
            value = structural_map(value, (TensorLoad, lambda access: access if access.source in values else check_indices(access)))
            lines.append(f"const {ctype(block.body.buffer.ty.dtype)} v{number} = {printer(value)};")
            self.signature.indexed |= printer.indexed
            values[block.body.buffer] = f"v{number}"
        return [*lines, f"return {values[self.fused.output]};"]


def _address(buffer: Any, indices: Sequence[str]) -> str:
    """The flat position of an element, in C."""
    terms, stride = [], 1
    for index, dim in zip(reversed(indices), reversed(buffer.shape), strict=True):
        if int(dim) != 1 and index != "0":
            terms.append(index if stride == 1 else f"{index} * {stride}")
        stride *= int(dim)
    return " + ".join(reversed(terms)) or "0"
