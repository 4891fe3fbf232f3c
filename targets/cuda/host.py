"""The CUDA source of a whole model: its kernels, and the host function that launches them in order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...compiler.element_types import numpy_dtype
from ...compiler.program import TensorSpec
from ...compiler.weights import device_offsets
from .host_sizes import HostSizes
from .kernel import ctype
from .lower import Launch, Launches, Place, Tensor

INCLUDE = Path(__file__).parent / "include"
#: name of the model's source among those of an artifact
MODEL = "model.cu"
#: headers that the model's source includes, in this order, and all that are in the artifact beside it
INCLUDED = (
    "tcompile.cuh",
    "stream.cuh",
    "attention.cuh",
    "grouped.cuh",
    "weight_only.cuh",
    "weight_only_int8.cuh",
    "attention_codes.cuh",
    "sparse.cuh",
    "sort.cuh",
    "depthwise.cuh",
    "recurrent.cuh",
    "hopper.cuh",
    "stream_hopper.cuh",
    "blocks.cuh",
    "attention_hopper.cuh",
    "weight_only_hopper.cuh",
    "host.cuh",
)
HEADERS = (*INCLUDED, "device.cuh", "device_hopper.cuh", "simt.h", "simt_hopper.h")
#: dynamic shared memory that a kernel gets without asking
_FREE_SHARED = 48 * 1024
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6, "V": 4}


def sources(launches: Launches, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], command: str) -> dict[str, str]:
    """File name -> text. command: how the sources are built, for the reader."""
    parts = [
        _banner(launches, command),
        "\n".join(f'#include "{name}"' for name in INCLUDED),
    ]
    for name, kernel in launches.kernels.items():
        nodes = launches.nodes[name]
        shown = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
        comment = f"// {kernel.workload}; {kernel.schedule}" + (f"; computes {shown}" if shown else "")
        parts.append(f"{comment}\n{kernel.text.format(name=f'k_{name}')}")
    parts.append(_main(launches, inputs, outputs))
    return {MODEL: "\n\n".join(parts) + "\n"} | {name: (INCLUDE / name).read_text() for name in HEADERS}


def _banner(launches: Launches, command: str) -> str:
    return "\n".join(
        [
            f"// {len(launches.kernels)} kernels, {len(launches.launches)} launches, {launches.workspace.size_bytes} bytes of workspace{_sizes(launches)}. Built by:",
            f"//   {command}",
            "// Entry point: __tvm_ffi_main(workspace, weights, error, inputs..., outputs...), tensors on one CUDA device; it runs on tvm-ffi's current stream.",
        ]
    )


def _sizes(launches: Launches) -> str:
    """The sizes for which a number holds."""
    return "".join(f", {var.name} = {bounds.opt}" for var, bounds in launches.symbols.bounds.items()).replace(",", " for", 1)


def _main(launches: Launches, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    weight_bytes = device_offsets(launches.weights)[1]
    arguments = [
        TensorSpec("workspace", (launches.workspace.size_bytes,), "uint8"),
        TensorSpec("weights", (weight_bytes,), "uint8"),
        TensorSpec("error", (1,), "int32"),
        *inputs,
        *outputs,
    ]
    sizes = HostSizes(launches, inputs) if launches.symbols.sources else None
    lines = ["namespace {"]
    if sizes is None:
        lines += _expected(arguments, [", ".join(map(str, spec.shape)) for spec in arguments])
    else:
        lines += [*sizes.structure(), *sizes.measure(), *sizes.ranks()]
    lines += ["", "// Once per device: kernels that need more than 48 KB of shared memory.", "int prepare(int device) {"]
    lines.append("  static std::atomic<uint64_t> ready{0};")
    lines.append("  const uint64_t bit = uint64_t(1) << device % 64;")
    lines.append("  if (device < 64 && (ready.load() & bit)) return 0;")
    for name, kernel in launches.kernels.items():
        if kernel.shared_bytes > _FREE_SHARED:
            lines.append(f"  if (tc::allow_shared(reinterpret_cast<const void*>(k_{name}), {kernel.shared_bytes})) return -1;")
    lines += ["  ready.fetch_or(bit);", "  return 0;", "}", "}  // namespace", ""]
    lines += sizes.export() if sizes else []
    lines.append(
        'extern "C" __attribute__((visibility("default"))) int __tvm_ffi_main(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {'
    )
    if sizes is not None:
        shapes = (", ".join(map(sizes.text, shape)) for shape in (*launches.inputs, *launches.outputs))
        given = ["s.workspace", str(weight_bytes), "1", *shapes]
        known = f"arguments, count, 3, {len(arguments)}, input_names, input_dims, {len(inputs)}, inputs"
        lines += [f"  const DLTensor* inputs[{len(inputs)}];", "  Sizes s;", f"  if (tc::shapes({known}) || measure(inputs, s)) return -1;"]
        lines += [f"  {line}" for line in _expected(arguments, given)]
    lines.append(f"  char* data[{len(arguments)}];")
    lines.append("  int id = 0;")
    lines.append(f"  if (tc::bind(arguments, count, expected, {len(arguments)}, data, &id)) return -1;")
    lines += ["  tc::Device device(id);", "  if (device.status || prepare(id)) return -1;", "  const cudaStream_t stream = device.stream;"]
    lines += ["  (void)stream;", "  char *const workspace = data[0], *const weights = data[1];", "  (void)workspace, (void)weights;"]
    lines.append("  int* const error = reinterpret_cast<int*>(data[2]);")
    lines.append("  (void)error;")
    if most := max((len(kernel.maps) for kernel in launches.kernels.values()), default=0):
        lines.append(f"  tc::TensorMap maps[{most}];")
    for launch in launches.launches:
        lines += [f"  {line}" for line in _launch(launches, launch, len(inputs), sizes)]
    lines += ["#ifndef TCOMPILE_SIMT", '  if (tc::check(cudaGetLastError(), "launch")) return -1;', "#endif"]
    lines += ["  result->type_index = kTVMFFINone;", "  result->zero_padding = 0;", "  result->v_int64 = 0;", "  return 0;", "}"]
    return "\n".join(lines)


def _expected(arguments: Sequence[TensorSpec], shapes: Sequence[str]) -> list[str]:
    """What `tc::bind` holds the arguments against; shapes in C."""
    lines = [f"const int64_t shape{position}[] = {{{shape or '1'}}};" for position, shape in enumerate(shapes)]
    lines.append("const tc::Expected expected[] = {")
    for position, spec in enumerate(arguments):
        dtype = numpy_dtype(spec.dtype)
        text = json.dumps(spec.name)
        lines.append(f"    {{{text}, {{{_CODES[dtype.kind]}, {dtype.itemsize * 8}, 1}}, {len(spec.shape)}, shape{position}}},")
    return [*lines, "};"]


def _launch(launches: Launches, launch: Launch, inputs: int, sizes: HostSizes | None) -> list[str]:
    at = [_address(tensor, inputs, sizes) for tensor in launch.tensors]
    if not launch.kernel:
        size = launch.tensors[0].size_bytes
        return [f"if (tc::copy({at[0]}, {at[1]}, {sizes.text(size) if sizes else size}, stream)) return -1;"]
    kernel, number = launches.kernels[launch.kernel], list(launches.kernels).index(launch.kernel) + 1
    values = [
        f"({'' if buffer in kernel.written else 'const '}{_type(buffer)}*)({address})" for buffer, address in zip(kernel.buffers, at, strict=False)
    ]
    values += [sizes.size(size) for size in launch.sizes] if sizes else []
    values += ["error", str(number)] if kernel.indexed else []
    maps = [f"maps[{position}]" for position in range(len(kernel.maps))]
    values += maps
    text = sizes.value if sizes else str
    made = zip(maps, at[len(kernel.buffers) :], kernel.maps, launch.maps, strict=True)
    encoded = [f"tc::{each.function}({', '.join((name, address, *map(text, arguments)))})" for name, address, each, arguments in made]
    lines = [f"if ({' || '.join(encoded)}) return -1;"] if encoded else []
    given = f"{kernel.threads}, {kernel.shared_bytes}, stream, {', '.join(values)}"
    if sizes is None or (launch.when is None and all(isinstance(count, int) for count in launch.grid)):
        counts = f"tc::in_turns({launch.grid[0]}, id)" if kernel.turns else ", ".join(map(str, launch.grid))
        return [*lines, f"TC_LAUNCH(k_{launch.kernel}, dim3({counts}), {given});"]
    grid = [sizes.value(count) for count in launch.grid]
    lines.append(f"TC_LAUNCH_OPEN(k_{launch.kernel}, {', '.join(grid)}, {given});")
    if encoded:  # of nothing there is no map
        lines = [f"if ({' && '.join(f'{count} > 0' for count in grid)}) {{", *(f"  {line}" for line in lines), "}"]
    if launch.when is None:
        return lines
    of, least, most = launch.when
    of = sizes.value(of)
    bounds = [*([f"{of} >= {least}"] if least is not None else []), *([f"{of} <= {most}"] if most is not None else [])]
    condition = " && ".join(bounds)
    return [f"if ({condition}) {{", *(f"  {line}" for line in lines), "}"]


def _type(buffer: object) -> str:
    return ctype(buffer.ty.dtype)


def _address(tensor: Tensor, inputs: int, sizes: HostSizes | None) -> str:
    place = tensor.place
    if not isinstance(place, Place):
        raise AssertionError("a tensor without a place")
    if place.space == "workspace" and sizes is not None and sizes.offsets:
        return f"workspace + {sizes.offset(place.index)}"
    if place.space in ("workspace", "weights"):
        return f"{place.space} + {place.index}"
    return f"data[{3 + place.index + (inputs if place.space == 'output' else 0)}]"
