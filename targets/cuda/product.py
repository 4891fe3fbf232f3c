"""What products have in common, whatever multiplies them: the epilogue on their sums, and the kernel that adds up parts of K."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...compiler.tvm import TensorLoad, structural_map
from ..common.fused import Fused
from .kernel import Kernel, Signature, copies_of, ctype
from .printer import Printer, check_indices

#: threads per block of the kernel that adds up parts of K
THREADS = 256


class Product:
    """A fused function whose core is a product, as C++ over (m, n, sum): m a row of C, n its column, blockIdx.z its batch.

    rounded: a type in which the result is written, too, as one more parameter. Subclasses set `batch_dims` and `row_dims`, the dims of C that these positions
    stand for, and `sum`, the C type of a sum.
    """

    batch_dims: Sequence[int] = ()
    row_dims: Sequence[int]
    sum: str = "float"

    def __init__(self, fused: Fused, rounded: str = ""):
        self.fused = fused
        self.copies = copies_of(fused.output, rounded)
        self.signature = Signature((fused.output, *self.copies))

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
