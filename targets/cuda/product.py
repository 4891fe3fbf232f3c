"""What products have in common, whatever multiplies them: the epilogue on their sums, and the kernel that adds up parts of K."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...compiler.tvm import TensorLoad, structural_map, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, static
from .kernel import Kernel, Packing, Plan, Signature, Unsupported, copies_of, ctype
from .printer import Printer, check_indices
from .sizes import FIXED, Known, blocks, shown, simplified, times

if TYPE_CHECKING:
    from .zeros import Zeros

#: numbers of rows for which schedules are chosen where rows are open
ROWS = (16, 256, 4096)
#: threads per block of the kernel that adds up parts of K
THREADS = 256


@dataclass(frozen=True)
class Request:
    """What templates are asked for: a fused function on a target, float32 operands by this number policy.

    constants: positions of parameters that are known at compile time and may be packed. rounded: a type in which the result is written, too, as one more parameter. known: what is known of
    open sizes; where rows are open, the host chooses among schedules for few and for many. zeros: the pattern of zeros of the weights, where there is one.
    """

    fused: Fused
    target: Target
    policy: str
    constants: frozenset[int] = frozenset()
    rounded: str = ""
    known: Known = FIXED
    zeros: Zeros | None = None


def plan(template: type[Product], asked: Request, schedule: Any = None) -> Plan:
    """The kernels by this template and schedule (None: the best, of those for which the template is predicted to be faster than others); raises Unfusable when the function is not for it."""
    fused, target = asked.fused, asked.target
    if template.targets and target.name not in template.targets:
        raise Unfusable(f"{target.name} is none of {', '.join(sorted(template.targets))}")
    if fused.core["op"] not in template.cores:
        raise Unfusable(f"{fused.core['op']} is none of {', '.join(template.cores)}")
    params = [param for param in fused.params if hasattr(param, "shape")]
    if not template.open_sizes and any(static(dim) is None for param in params for dim in param.shape):
        raise Unfusable("sizes known only at run time")
    if any(static(dim) == 0 for param in params for dim in param.shape):
        raise Unfusable("an operand without elements")
    try:
        made = template(asked)
        return Plan((*params, *made.copies), made.kernels(schedule), made.packings)
    except Unsupported as reason:
        raise Unfusable(str(reason)) from reason


class Product(ABC):
    """A fused function whose core is a product, as C++ over (m, n, sum): m a row of C, n its column, blockIdx.z its batch.

    Subclasses set `batch_dims` and `row_dims`, the dims of C that these positions stand for, `m` and `n`, the rows and columns of C, `sum`, the C type of a sum, and `packings`.
    """

    #: operators that it multiplies
    cores: tuple[str, ...]
    #: GPUs that it is for; all where there are none
    targets: frozenset[str] = frozenset()
    #: it takes sizes that are known only while running
    open_sizes = False
    packings: tuple[Packing, ...] = ()
    batch_dims: Sequence[Any] = ()
    row_dims: Sequence[Any]
    m: Any
    n: Any
    sum: str = "float"

    def __init__(self, asked: Request):
        self.asked, self.fused, self.target, self.known = asked, asked.fused, asked.target, asked.known
        self.copies = copies_of(asked.fused.output, asked.rounded)
        self.signature = self._signature()

    def _signature(self) -> Signature:
        """Of a kernel that writes the result."""
        return Signature((self.fused.output, *self.copies))

    @abstractmethod
    def best(self) -> Any:
        """The schedule of least predicted time; `parts` of it says in how many parts K is summed."""

    def best_for(self, rows: int) -> Any:
        """The schedule of least predicted time for so many rows. For templates that take open sizes."""
        raise Unfusable("sizes known only at run time")

    def cycles(self, tile: Any, rows: int) -> float:
        """The predicted time of a schedule for so many rows; infinite where it does not take them. For templates that take open sizes."""
        raise Unfusable("sizes known only at run time")

    @abstractmethod
    def _product(self, tile: Any, signature: Signature, written: Sequence[Any], value: list[str]) -> Kernel:
        """The product, or that of a part of K for every blockIdx.z. value: body of the lambda (m, n, sum) -> what is written."""

    def anchors(self) -> list[int]:
        """Numbers of rows for which schedules are chosen where rows are open."""
        least, most = max(1, self.known.least(self.m)), self.known.most(self.m, ROWS[-1])
        return sorted({min(max(rows, least), most) for rows in (*ROWS, *self.known.wanted(self.m))})

    def variants(self) -> Sequence[tuple[Any, tuple[Any, int | None, int | None] | None]]:
        """(schedule, when it is launched): the best; where rows are open, those for some numbers of rows, each up to where the next is predicted to take less time."""
        if isinstance(self.m, int):
            return ((self.best(), None),)
        rows = self.anchors()
        tiles = list(dict.fromkeys(map(self.best_for, rows)))
        found: list[tuple[Any, tuple[Any, int | None, int | None] | None]] = []
        first = 0
        for tile, after in itertools.pairwise(tiles):
            tried = _growing(max(first, rows[0]), rows[-1])
            ends = next((number for number in tried if self.cycles(after, number) < self.cycles(tile, number)), rows[-1])
            if ends > first:
                found.append((tile, (self.m, first or None, ends - 1)))
                first = ends
        return (*found, (tiles[-1], (self.m, first, None) if found else None))

    def kernels(self, tile: Any) -> tuple[Kernel, ...]:
        """Those of this schedule or of the best: the product, or parts of it and their sums."""
        made: list[Kernel] = []
        for chosen, when in ((tile, None),) if tile else self.variants():
            self.signature = self._signature()
            made += (replace(kernel, when=when) for kernel in self._of(chosen))
        return tuple(made)

    def _of(self, tile: Any) -> tuple[Kernel, ...]:
        if tile.parts == 1:
            return (self._product(tile, self.signature, (self.fused.output, *self.copies), self.epilogue()),)
        parts = tirx.decl_buffer((tile.parts, self.m, self.n), self.fused.accumulator.ty.dtype, "parts")
        return self._product(tile, Signature((parts,)), (parts,), ["return sum;"]), self._sums(parts)

    def _sums(self, parts: Any) -> Kernel:
        """The sums over the parts of K, in their order, and the epilogue: a thread per element."""
        count, total = int(parts.shape[0]), times(parts.shape[1:])
        size, columns = self.signature.size, self.signature.size(parts.shape[-1])
        result, body = ctype(self.fused.output.ty.dtype), [f"  {line}" for line in self.epilogue()]
        lines = [
            f"const int place = blockIdx.x * {THREADS} + threadIdx.x;",
            f"if (place >= {size(total)}) return;",
            f"const int m = place / {columns}, n = place % {columns};",
            f"{self.sum} sum = 0;",
            "#pragma unroll",
            f"for (int part = 0; part < {count}; ++part) sum += {self.signature.name(parts)}[part * {size(total)} + place];",
            f"const {result} value = [&]() -> {result} {{",
            *body,
            "}();",
            *(f"{self.signature.name(buffer)}[place] = value;" for buffer in (self.fused.output, *self.copies)),
        ]
        return self.signature.kernel(
            lines, grid=(blocks(total, THREADS), 1, 1), threads=THREADS, shared_bytes=0, kind="sums", workload=f"sums {count} x {shown(total)}"
        )

    def epilogue(self) -> list[str]:
        """The body of the lambda: (m, n, sum) -> the element of the output."""
        lines: list[str] = []
        indices: list[str] = []
        for position, dims in (("blockIdx.z", self.batch_dims), ("m", self.row_dims)):
            first = True
            for number, dim in enumerate(dims):
                stride = times(dims[number + 1 :])
                value = position if stride == 1 else f"{position} / {self.signature.size(stride)}"
                value = value if first else f"{value} % {self.signature.size(dim)}"
                first = first and dim == 1
                lines.append(f"const int i{len(indices)} = {0 if isinstance(dim, int) and dim == 1 else value};")
                indices.append(f"i{len(indices)}")
        indices.append("n")
        values = {self.fused.accumulator: "sum"}

        def load(buffer: Any, at: Sequence[str]) -> str:
            return values[buffer] if buffer in values else f"{self.signature.name(buffer)}[{_address(buffer, at, self.signature.size)}]"

        for number, block in enumerate(self.fused.epilogue):
            axes = {var.var: index for var, index in zip(block.iter_vars, indices, strict=True)}
            ranges = {var.var: simplified(var.dom.extent) for var in block.iter_vars}
            printer = Printer(load, axes, ranges, self.signature.size)
            value = block.body.value
            value = structural_map(value, (TensorLoad, lambda access: access if access.source in values else check_indices(access)))
            lines.append(f"const {ctype(block.body.buffer.ty.dtype)} v{number} = {printer(value)};")
            self.signature.indexed |= printer.indexed
            values[block.body.buffer] = f"v{number}"
        return [*lines, f"return {values[self.fused.output]};"]


def _growing(least: int, most: int) -> Iterator[int]:
    """Numbers of rows from `least` to `most`, farther apart the larger they are."""
    rows = least
    while rows < most:
        yield rows
        rows += max(1, rows // 8)


def _address(buffer: Any, indices: Sequence[str], size: Callable[[Any], str]) -> str:
    """The flat position of an element, in C."""
    terms = []
    for number, (index, dim) in enumerate(zip(indices, buffer.shape, strict=True)):
        if static(dim) != 1 and index != "0":
            stride = times(buffer.shape[number + 1 :])
            terms.append(index if stride == 1 else f"{index} * {size(stride)}")
    return " + ".join(terms) or "0"
