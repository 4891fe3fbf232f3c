"""Writing at computed places: `relax.scatter_elements` and `relax.scatter_nd`. Updates of one place are applied in their order, so equal inputs give equal bits: no atomics.

Both are a number of lines, which never meet (of scatter_elements those along the axis, of scatter_nd one for each element of a slice), with the same number of updates each.

few updates a line, or lines enough for the GPU: a thread per line takes its updates in order
otherwise: updates are sorted by the place that they go to (sort.py), and a thread per place applies those of its own

The limit is memory: 2 bytes of the tensor for each of its own (it is copied first), those of the updates and their places, and in the second case those of the sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import tirx
from .kernel import Kernel, Plan, Signature, Unsupported, ctype, elements
from .sizes import require_fixed
from .sort import Keys, entries_of, pointer

OPERATORS = ("relax.scatter_elements", "relax.scatter_nd")
THREADS = 256
#: updates of a line that one thread takes whatever the number of lines; lines that keep a GPU busy
FEW_UPDATES, MANY_LINES = 64, 8192
#: (old, update) -> new, in C
_COMBINE = {"update": "{1}", "add": "{0} + {1}", "mul": "{0} * {1}", "min": "tc::min<{2}>({0}, {1})", "max": "tc::max<{2}>({0}, {1})"}


@dataclass(frozen=True)
class _Lines:
    """lines of updates. key(signature, line, update): the number of the place in its line, in C, below `places`; target(line, place): where that lies in the tensor;
    source(line, update): where an update lies among the updates. shared: all lines have the same keys.
    """

    lines: int
    updates: int
    places: int
    key: Callable[[Signature, str, str], str]
    target: Callable[[str, str], str]
    source: Callable[[str, str], str]
    shared: bool


def kernel(call: Any) -> Plan:
    """The kernels of a call of static shape; their parameters are the tensor, the places, the updates and the result. Raises Unsupported."""
    kinds = [arg.ty for arg in call.args]
    require_fixed(*kinds)
    given, indices, updates = (
        tirx.decl_buffer([int(dim) for dim in kind.shape], str(kind.dtype), name)
        for kind, name in zip(kinds, ("data", "indices", "updates"), strict=True)
    )
    out = tirx.decl_buffer(given.shape, str(call.ty.dtype), "out")
    reduction = str(call.attrs.reduction)
    if reduction not in _COMBINE:
        raise Unsupported(f"the reduction {reduction}")
    params = (given, indices, updates, out)
    if elements(out) == 0:
        return Plan(params, ())
    copy = _copy(given, out)
    if elements(updates) == 0:
        return Plan(params, (copy,))
    lines = _along_axis(given, indices, int(call.attrs.axis)) if call.op.name == "relax.scatter_elements" else _slices(given, indices)
    combine = _COMBINE[reduction].format("old", "{}", ctype(out.ty.dtype))
    if lines.updates <= FEW_UPDATES or lines.lines >= MANY_LINES:
        return Plan(params, (copy, _by_line(lines, updates, out, combine)))
    return Plan(params, (copy, *_by_place(lines, updates, out, combine, reduction == "update")))


def _ints(buffer: Any) -> list[int]:
    return [int(dim) for dim in buffer.shape]


def _along_axis(data: Any, indices: Any, axis: int) -> _Lines:
    shape, counts = _ints(data), _ints(indices)
    axis %= len(shape)
    length, behind, own_behind = shape[axis], math.prod(shape[axis + 1 :]), math.prod(counts[axis + 1 :])

    def source(line: str, update: str) -> str:
        return f"{line} / {own_behind} * {counts[axis] * own_behind} + {line} % {own_behind} + {update} * {own_behind}"

    def target(line: str, place: str) -> str:
        return f"{_position(line, counts, shape, axis)} + {place} * {behind}"

    def key(signature: Signature, line: str, update: str) -> str:
        return _checked(signature, indices, source(line, update), length)

    lines = math.prod(counts) // counts[axis]
    return _Lines(lines, counts[axis], length, key, target, source, shared=False)


def _position(line: str, counts: Sequence[int], shape: Sequence[int], axis: int) -> str:
    """The first element of a line, in C; lines are counted over the dims `counts` but the axis, the tensor has `shape`."""
    terms, own, stride = [], 1, 1
    for at in reversed(range(len(shape))):
        if at != axis:
            if counts[at] > 1:
                terms.append(f"{line} / {own} % {counts[at]} * {stride}")
            own *= counts[at]
        stride *= shape[at]
    return " + ".join(terms) or "0"


def _slices(data: Any, indices: Any) -> _Lines:
    shape, (*counts, depth) = _ints(data), _ints(indices)
    size, number = math.prod(shape[depth:]), math.prod(counts)

    def key(signature: Signature, line: str, update: str) -> str:
        terms, stride = [], 1
        for column in reversed(range(depth)):
            terms.append(f"{_checked(signature, indices, f'{update} * {depth} + {column}', shape[column])} * {stride}")
            stride *= shape[column]
        return " + ".join(terms) or "0"

    def at(line: str, place: str) -> str:
        return f"{place} * {size} + {line}"

    return _Lines(size, number, math.prod(shape[:depth]), key, at, at, shared=True)


def _checked(signature: Signature, indices: Any, address: str, extent: int) -> str:
    signature.indexed = True
    return f"tc::index({signature.name(indices)}[{address}], {extent}, error, site)"


def _copy(given: Any, out: Any) -> Kernel:
    total, signature = elements(out), Signature((out,))
    lines = [
        f"const int at = blockIdx.x * {THREADS} + threadIdx.x;",
        f"if (at < {total}) {signature.name(out)}[at] = {signature.name(given)}[at];",
    ]
    return signature.kernel(lines, grid=(-(-total // THREADS), 1, 1), threads=THREADS, shared_bytes=0, kind="map", workload=f"copy {total}")


def _by_line(lines: _Lines, updates: Any, out: Any, combine: str) -> Kernel:
    signature = Signature((out,))
    target, update = lines.target("line", "place"), f"{signature.name(updates)}[{lines.source('line', 'update')}]"
    body = [
        f"const int line = blockIdx.x * {THREADS} + threadIdx.x;",
        f"if (line >= {lines.lines}) return;",
        f"for (int update = 0; update < {lines.updates}; ++update) {{",
        f"  const int place = {lines.key(signature, 'line', 'update')};",
        f"  {ctype(out.ty.dtype)}& old = {signature.name(out)}[{target}];",
        f"  old = {combine.format(update)};",
        "}",
    ]
    workload = f"scatter {lines.lines} x {lines.updates}"
    return signature.kernel(body, grid=(-(-lines.lines // THREADS), 1, 1), threads=THREADS, shared_bytes=0, kind="scatter", workload=workload)


def _by_place(lines: _Lines, updates: Any, out: Any, combine: str, last: bool) -> list[Kernel]:
    """last: of the updates of a place only the last one counts."""
    keys = Keys(1 if lines.shared else lines.lines, lines.updates, "int32", lines.key)
    made, entries = entries_of(keys)
    signature = Signature((out,))
    total = lines.lines * lines.updates
    line, place = (f"% {lines.lines}", f"/ {lines.lines}") if lines.shared else (f"/ {lines.updates}", f"% {lines.updates}")
    old = f"{signature.name(out)}[{lines.target('line', 'target')}]"
    update = f"{signature.name(updates)}[{lines.source('line', 'row[{}].place()')}]"
    neighbour = f"at + 1 < {lines.updates} && row[at + 1]" if last else "at > 0 && row[at - 1]"
    body = [
        f"const int number = blockIdx.x * {THREADS} + threadIdx.x;",
        f"if (number >= {total}) return;",
        f"const int line = number {line}, at = number {place};",
        f"const {keys.entry}* const row = {pointer(keys, signature, entries)}{'' if lines.shared else f' + (size_t)line * {lines.updates}'};",
        "const uint32_t key = row[at].key();",
        f"if ({neighbour}.key() == key) return;  // another thread's",
        "const int target = key ^ 0x80000000u;",
    ]
    if last:
        body.append(f"{old} = {update.format('at')};")
    else:
        body += [
            f"{ctype(out.ty.dtype)} old = {old};",
            f"for (int next = at; next < {lines.updates} && row[next].key() == key; ++next) old = {combine.format(update.format('next'))};",
            f"{old} = old;",
        ]
    workload = f"scatter {lines.lines} x {lines.updates} by place"
    made.append(signature.kernel(body, grid=(-(-total // THREADS), 1, 1), threads=THREADS, shared_bytes=0, kind="scatter", workload=workload))
    return made
