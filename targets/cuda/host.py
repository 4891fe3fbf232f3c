"""The CUDA source of a whole model: its kernels, and the host function that launches them in order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...compiler.element_types import numpy_dtype
from ...compiler.program import TensorSpec
from ...compiler.weights import device_offsets
from .kernel import ctype
from .lower import Launches, Place, Tensor

INCLUDE = Path(__file__).parent / "include"
#: name of the model's source among those of an artifact
MODEL = "model.cu"
#: headers that the model's source includes, in this order, and all that are in the artifact beside it
INCLUDED = (
    "tcompile.cuh",
    "attention.cuh",
    "weight_only.cuh",
    "sparse.cuh",
    "sort.cuh",
    "depthwise.cuh",
    "recurrent.cuh",
    "hopper.cuh",
    "attention_hopper.cuh",
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
            f"// {len(launches.kernels)} kernels, {len(launches.launches)} launches, {launches.workspace.size_bytes} bytes of workspace. Built by:",
            f"//   {command}",
            "// Entry point: __tvm_ffi_main(workspace, weights, error, inputs..., outputs...), tensors on one CUDA device; it runs on tvm-ffi's current stream.",
        ]
    )


def _main(launches: Launches, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    weight_bytes = device_offsets(launches.weights)[1]
    arguments = [
        TensorSpec("workspace", (launches.workspace.size_bytes,), "uint8"),
        TensorSpec("weights", (weight_bytes,), "uint8"),
        TensorSpec("error", (1,), "int32"),
        *inputs,
        *outputs,
    ]
    lines = ["namespace {"]
    for position, spec in enumerate(arguments):
        lines.append(f"const int64_t shape{position}[] = {{{', '.join(map(str, spec.shape)) or '1'}}};")
    lines.append("const tc::Expected expected[] = {")
    for position, spec in enumerate(arguments):
        dtype = numpy_dtype(spec.dtype)
        text = json.dumps(spec.name)
        lines.append(f"    {{{text}, {{{_CODES[dtype.kind]}, {dtype.itemsize * 8}, 1}}, {len(spec.shape)}, shape{position}}},")
    lines += ["};", "", "// Once per device: kernels that need more than 48 KB of shared memory.", "int prepare(int device) {"]
    lines.append("  static std::atomic<uint64_t> ready{0};")
    lines.append("  const uint64_t bit = uint64_t(1) << device % 64;")
    lines.append("  if (device < 64 && (ready.load() & bit)) return 0;")
    for name, kernel in launches.kernels.items():
        if kernel.shared_bytes > _FREE_SHARED:
            lines.append(f"  if (tc::allow_shared(reinterpret_cast<const void*>(k_{name}), {kernel.shared_bytes})) return -1;")
    lines += ["  ready.fetch_or(bit);", "  return 0;", "}", "}  // namespace", ""]
    lines.append(
        'extern "C" __attribute__((visibility("default"))) int __tvm_ffi_main(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {'
    )
    lines.append(f"  char* data[{len(arguments)}];")
    lines.append("  int id = 0;")
    lines.append(f"  if (tc::bind(arguments, count, expected, {len(arguments)}, data, &id)) return -1;")
    lines += ["  tc::Device device(id);", "  if (device.status || prepare(id)) return -1;", "  const cudaStream_t stream = device.stream;"]
    lines += ["  (void)stream;", "  char *const workspace = data[0], *const weights = data[1];", "  (void)workspace, (void)weights;"]
    lines.append("  int* const error = reinterpret_cast<int*>(data[2]);")
    lines.append("  (void)error;")
    names = list(launches.kernels)
    if most := max((len(kernel.maps) for kernel in launches.kernels.values()), default=0):
        lines.append(f"  tc::TensorMap maps[{most}];")
    for launch in launches.launches:
        at = [_address(tensor, len(inputs)) for tensor in launch.tensors]
        if not launch.kernel:
            lines.append(f"  if (tc::copy({at[0]}, {at[1]}, {launch.tensors[0].size_bytes}, stream)) return -1;")
            continue
        kernel = launches.kernels[launch.kernel]
        values = [
            f"({'' if buffer in kernel.written else 'const '}{_type(buffer)}*)({address})"
            for buffer, address in zip(kernel.buffers, at, strict=False)
        ]
        values += ["error", str(names.index(launch.kernel) + 1)] if kernel.indexed else []
        maps = [f"maps[{position}]" for position in range(len(kernel.maps))]
        values += maps
        grid = f"tc::in_turns({kernel.grid[0]}, id)" if kernel.turns else ", ".join(map(str, kernel.grid))
        if maps:
            made = zip(maps, at[len(kernel.buffers) :], kernel.maps, strict=True)
            calls = (f"tc::{each.function}({', '.join(map(str, (name, address, *each.arguments)))})" for name, address, each in made)
            encoded = " || ".join(calls)
            lines.append(f"  if ({encoded}) return -1;")
        lines.append(f"  TC_LAUNCH(k_{launch.kernel}, dim3({grid}), {kernel.threads}, {kernel.shared_bytes}, stream, {', '.join(values)});")
    lines += ["#ifndef TCOMPILE_SIMT", '  if (tc::check(cudaGetLastError(), "launch")) return -1;', "#endif"]
    lines += ["  result->type_index = kTVMFFINone;", "  result->zero_padding = 0;", "  result->v_int64 = 0;", "  return 0;", "}"]
    return "\n".join(lines)


def _type(buffer: object) -> str:
    return ctype(buffer.ty.dtype)


def _address(tensor: Tensor, inputs: int) -> str:
    place = tensor.place
    if not isinstance(place, Place):
        raise AssertionError("a tensor without a place")
    if place.space in ("workspace", "weights"):
        return f"{place.space} + {place.index}"
    return f"data[{3 + place.index + (inputs if place.space == 'output' else 0)}]"
