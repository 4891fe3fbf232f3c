"""Points of the resource model: registers, spills and shared memory of tensor-core kernels by workload, schedule, precision and architecture; needs no GPU.

    python benchmarks/cuda_points.py --output autotune/pretrained/cuda-points.json

Kernels of one workload and architecture are compiled together (nvcc -cubin) and read by cuobjdump -res-usage. Some tiles are larger than the compiler's
space has, so that there are kernels that spill.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cuda_compile import cuobjdump
from tcompile.autotune.resources import write_points
from tcompile.compiler.tvm import relax, tirx
from tcompile.targets.base import Target
from tcompile.targets.common import legalize
from tcompile.targets.common.fused import analyze
from tcompile.targets.cuda import toolchain
from tcompile.targets.cuda.gemm import Gemm
from tcompile.targets.cuda.host import HEADERS, INCLUDE
from tcompile.targets.cuda.kernel import Kernel
from tcompile.targets.cuda.product import Request, plan
from tcompile.targets.cuda.schedule import GemmShape, TileSchedule, design, space

GEMM = relax.op.matmul


def conv(stride: int, pad: int) -> Any:
    return lambda a, b: relax.op.nn.conv2d(a, b, (stride, stride), (pad,) * 4, (1, 1), 1, "NHWC", "HWIO", "NHWC")


#: core, shapes of its operands, epilogue behind the bias
WORKLOADS: tuple[tuple[Any, Sequence[tuple[int, ...]], str], ...] = (
    *((GEMM, ((128, 768), (768, 768)), "relu"), (GEMM, ((128, 3072), (3072, 768)), "none"), (GEMM, ((1, 1024), (1024, 4096)), "none")),
    *((GEMM, ((197, 384), (384, 1536)), "sigmoid"), (GEMM, ((100, 100), (100, 100)), "relu"), (GEMM, ((33, 333), (333, 257)), "none")),
    *((GEMM, ((12, 128, 64), (12, 64, 128)), "none"), (GEMM, ((1024, 1024), (1024, 1024)), "sigmoid"), (GEMM, ((77, 50), (50, 30)), "relu")),
    *((conv(1, 1), ((1, 56, 56, 64), (3, 3, 64, 64)), "relu"), (conv(2, 2), ((1, 112, 112, 3), (5, 5, 3, 32)), "none")),
    *((conv(1, 0), ((1, 14, 14, 512), (1, 1, 512, 200)), "relu"), (conv(2, 1), ((1, 28, 28, 96), (3, 3, 96, 96)), "none")),
    *((conv(1, 0), ((1, 17, 19, 50), (3, 3, 50, 80)), "relu"), (conv(2, 3), ((1, 224, 224, 3), (7, 7, 3, 64)), "relu")),
    *((conv(1, 1), ((1, 40, 40, 1), (3, 3, 1, 24)), "none"), (conv(2, 1), ((1, 60, 60, 3), (3, 3, 3, 50)), "sigmoid")),
    *((conv(1, 1), ((2, 20, 20, 66), (3, 3, 66, 99)), "none"), (GEMM, ((50, 101), (101, 64)), "none"), (GEMM, ((64, 64), (64, 99)), "relu")),
    *((GEMM, ((200, 75), (75, 150)), "sigmoid"), (GEMM, ((65, 258), (258, 130)), "none"), (GEMM, ((127, 509), (509, 251)), "relu")),
    *((GEMM, ((4, 31, 50), (4, 50, 31)), "none"), (GEMM, ((300, 1000), (1000, 1001)), "none"), (GEMM, ((17, 2050), (2050, 512)), "relu")),
)
#: 64 and 128 accumulators a thread
LARGER = tuple(TileSchedule(*numbers, 3) for numbers in ((64, 128, 2, 2), (128, 128, 2, 4), (128, 64, 2, 2), (128, 128, 2, 2), (64, 64, 1, 2)))
POLICIES = ("Fp32", "Tf32", "Fp16", "Bf16")
ARCHS = ("sm_80", "sm_90a")


def function(make: Any, shapes: Sequence[tuple[int, ...]], epilogue: str) -> Any:
    """The fused function epilogue(core(a, b) + bias)."""
    a, b = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in zip("ab", shapes, strict=True))
    bias = relax.Var("bias", relax.TensorType((shapes[1][-1],), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [a, b, bias]):
        with builder.dataflow():
            value = builder.emit(relax.op.add(builder.emit(make(a, b)), bias))
            result = builder.emit_output(value if epilogue == "none" else getattr(relax.op.nn if epilogue == "relu" else relax.op, epilogue)(value))
        builder.emit_func_output(result)
    transform, module = relax.transform, legalize.legalize(builder.get())
    for step in (transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR(), transform.DeadCodeElimination()):
        module = step(module)
    (func,) = [func for func in module.functions.values() if isinstance(func, tirx.PrimFunc)]
    return func


def kernels(number: int, arch: str, count: int) -> list[tuple[GemmShape, TileSchedule, str, Kernel]]:
    """A workload under `count` schedules: random ones of the space, and two larger ones; precisions take turns, fp32 every second."""
    target, fused = Target.parse(f"cuda:{arch}"), analyze(function(*WORKLOADS[number]))
    generator = random.Random(number)  # the same for all architectures
    tiles = [*generator.sample(space(target), count - 2), *generator.sample(LARGER, 2)]
    policies = [POLICIES[(number + index) % 3 + 1] if index % 2 else "Fp32" for index in range(count)]
    generator.shuffle(policies)
    requests = [(tile, Request(fused, target, policy)) for tile, policy in zip(tiles, policies, strict=True)]
    return [(Gemm(asked).shape, tile, asked.policy, plan(Gemm, asked, tile).kernels[0]) for tile, asked in requests]


def usage(entries: list[Kernel], arch: str) -> list[tuple[int, int, int]]:
    """(registers, bytes of stack, bytes of static shared memory) of each kernel."""
    tool = cuobjdump()
    if tool is None:
        raise SystemExit("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for header in HEADERS:
            (folder / header).write_text((INCLUDE / header).read_text())
        text = "\n\n".join(kernel.text.format(name=f"k_{index}") for index, kernel in enumerate(entries))
        (folder / "k.cu").write_text(f'#include "tcompile.cuh"\n\n{text}\n')
        line = [str(toolchain.find_nvcc()), "-cubin", "-std=c++17", "-O3", "-w", f"-arch={arch}", "k.cu", "-o", "k.cubin"]
        subprocess.run(line, cwd=folder, check=True)
        dump = subprocess.run([tool, "-res-usage", "k.cubin"], cwd=folder, capture_output=True, text=True, check=True).stdout
    found = {int(k): (int(r), int(s), int(m)) for k, r, s, m in re.findall(r"Function k_(\d+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump)}
    return [found[index] for index in range(len(entries))]


def points(number: int, arch: str, count: int) -> list[dict[str, Any]]:
    chosen = kernels(number, arch, count)
    found = []
    for (shape, tile, policy, kernel), (registers, stack, static) in zip(chosen, usage([entry[-1] for entry in chosen], arch), strict=True):
        known = design(shape, tile, Target.parse(f"cuda:{arch}"), policy)
        measured = {"registers": registers + stack // 4, "shared_bytes": static + kernel.shared_bytes, "stack_bytes": stack}
        workload = kernel.workload.rpartition(" ")[0]
        found.append({"workload": workload, "schedule": f"{tile}, {policy}, {arch}", "design": known, "measured": measured})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--schedules", type=int, default=8, help="per workload")
    options = parser.parse_args()
    jobs = [(number, arch) for number in range(len(WORKLOADS)) for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        rows = [point for found in pool.map(lambda job: points(*job, options.schedules), jobs) for point in found]
    version = subprocess.run([toolchain.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    write_points(options.output, {"nvcc": version}, rows)


if __name__ == "__main__":
    main()
