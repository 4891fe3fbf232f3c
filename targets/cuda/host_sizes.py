"""The host's code for open sizes: what the shapes of the inputs say, whether they fit together, and where intermediate tensors begin in the workspace."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ...compiler.program import TensorSpec
from ...compiler.tvm import tirx
from ...compiler.weights import DEVICE_ALIGNMENT
from ..common.node_names import printable
from .lower import Launches
from .sizes import host_text


class HostSizes:
    """C++ of the sizes of one model. `structure` declares them, `measure` computes them from the inputs, `export` tells a caller what to allocate; the others name them."""

    def __init__(self, launches: Launches, inputs: Sequence[TensorSpec]):
        self.launches, self.inputs = launches, inputs
        self.names = {
            var: f"n_{var.name}" if re.fullmatch(r"\w+", var.name, re.ASCII) else f"n{number}" for number, var in enumerate(launches.symbols.sources)
        }
        self.sizes = {str(size): size for launch in launches.launches for size in launch.sizes}
        self.positions = {text: number for number, text in enumerate(self.sizes)}
        #: what launches take besides: grids, conditions, arguments of maps
        taken = (
            size
            for each in launches.launches
            for size in (*each.grid, *(each.when or ())[:1], *(size for arguments in each.maps for size in arguments))
        )
        self.values = {str(size): size for size in taken if not isinstance(size, (int, tirx.Var))}
        self.numbers = {text: number for number, text in enumerate(self.values)}
        #: of every temporary, the number of its offset; 0 is the beginning
        self.offsets: dict[int, int] = {}
        self.placed: list[str] = []
        self._place()

    def text(self, size: Any) -> str:
        """A size in C++."""
        return host_text(size, lambda var: f"s.{self.names[var]}")

    def _wide(self, size: Any) -> str:
        """A size in C++ that cannot overflow."""
        return host_text(size, self.names.__getitem__, "tc::Wide")

    def size(self, size: Any) -> str:
        """A size as the parameter of a kernel."""
        return f"s.sizes[{self.positions[str(size)]}]"

    def value(self, size: Any) -> str:
        """What a launch takes besides."""
        return f"s.values[{self.numbers[str(size)]}]" if str(size) in self.numbers else self.text(size)

    def offset(self, key: int) -> str:
        """Where a temporary begins."""
        return f"s.at[{self.offsets[key]}]"

    def _place(self) -> None:
        known: dict[frozenset[str], int] = {frozenset(): 0}
        ends: dict[int, str] = {}
        for key, below in self.launches.below.items():
            terms = frozenset(ends[other] for other in below)
            if terms not in known:
                known[terms] = len(known)
                self.placed.append(f"s.at[{known[terms]}] = {_most(terms)};")
            self.offsets[key] = known[terms]
            ends[key] = f"s.at[{known[terms]}] + tc::aligned({self.text(self.launches.temporaries[key].size_bytes)}, {DEVICE_ALIGNMENT})"
        self.count = len(known)
        covered = {ends[other] for below in self.launches.below.values() for other in below}
        self.placed.append(f"s.workspace = {_most(frozenset(ends.values()) - covered)};")

    def structure(self) -> list[str]:
        return [
            "// Of one call.",
            "struct Sizes {",
            f"  int64_t {', '.join(self.names.values())};",
            f"  int64_t values[{max(1, len(self.values))}];  // grids, and what decides which kernels are launched",
            f"  tc::Size sizes[{max(1, len(self.sizes))}];  // parameters of kernels",
            "  int64_t workspace;  // bytes",
            f"  int64_t at[{self.count}];  // where intermediate tensors begin in it",
            "};",
            "",
        ]

    def measure(self) -> list[str]:
        """`int measure(inputs, s)`, which fails where sizes do not fit together."""
        lines = ["int measure(const DLTensor* const* inputs, Sizes& s) {"]
        for var, source in self.launches.symbols.sources.items():
            name = self.names[var]
            if not isinstance(source, tuple):
                lines.append(f"  s.{name} = {self.text(source)};")
                continue
            position, axis = source
            bounds, most = self.launches.symbols.bounds[var], "INT64_MAX"
            most = most if bounds.max is None else str(bounds.max)
            lines.append(f"  s.{name} = inputs[{position}]->shape[{axis}];")
            lines.append(f"  if (tc::outside({json.dumps(self.inputs[position].name)}, {axis}, s.{name}, {bounds.min}, {most})) return -1;")
        for check in self.launches.symbols.checks:
            lines.append(f"  if (tc::differ({json.dumps(printable(check.what))}, {self.text(check.found)}, {self.text(check.wanted)})) return -1;")
        lines += [f"  const tc::Wide {name} = s.{name};\n  (void){name};" for name in self.names.values()]
        wide = list(dict.fromkeys(self._wide(count) for count in self.launches.symbols.elements))
        if wide:
            lines.append(f"  const tc::Wide elements[] = {{{', '.join(wide)}}};")
            lines.append(f"  if (tc::too_large(elements, {len(wide)})) return -1;")
        if self.sizes:
            lines.append(f"  const tc::Wide sizes[] = {{{', '.join(self._wide(size) for size in self.sizes.values())}}};")
            lines.append(f"  if (tc::too_large(sizes, {len(self.sizes)})) return -1;")
            lines.append(f"  for (int i = 0; i < {len(self.sizes)}; ++i) s.sizes[i] = tc::Size((int64_t)sizes[i]);")
        lines += [f"  s.values[{number}] = {self.text(size)};" for number, size in enumerate(self.values.values())]
        return [*lines, "  s.at[0] = 0;", *(f"  {line}" for line in self.placed), "  return 0;", "}", ""]

    def ranks(self) -> list[str]:
        """What `tc::shapes` wants to know of the inputs."""
        names, dims = (
            ", ".join(values) for values in ((json.dumps(spec.name) for spec in self.inputs), (str(len(spec.shape)) for spec in self.inputs))
        )
        return [f"const char* const input_names[] = {{{names}}};", f"const int input_dims[] = {{{dims}}};"]

    def export(self) -> list[str]:
        """`sizes(result, inputs...)`: bytes of workspace and the dims of the outputs, one after the other, into an int64 tensor of the host."""
        values = ["s.workspace", *(self.text(dim) for shape in self.launches.outputs for dim in map(_plain, shape))]
        return [
            'extern "C" __attribute__((visibility("default"))) int __tvm_ffi_sizes(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {',
            f"  const DLTensor* inputs[{len(self.inputs)}];",
            "  Sizes s;",
            f"  if (tc::shapes(arguments, count, 1, {1 + len(self.inputs)}, input_names, input_dims, {len(self.inputs)}, inputs) || measure(inputs, s)) return -1;",
            f"  const int64_t values[] = {{{', '.join(values)}}};",
            f"  return tc::tell(arguments[0], values, {len(values)}, result);",
            "}",
            "",
        ]


def _plain(dim: Any) -> Any:
    return int(dim) if hasattr(dim, "value") else dim


def _most(terms: frozenset[str]) -> str:
    return f"tc::most({{{', '.join(sorted(terms))}}})" if terms else "0"
