"""What the CUDA target makes of real networks, without a GPU: seconds of compilation, kernels by kind, tensor-core instructions, local memory, sizes.

    python benchmarks/cuda_compile.py --output benchmarks/results/cuda.json

Needs nvcc, and cuobjdump with nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tcompile.compiler.api import import_model
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.pipeline import lower
from tcompile.compiler.program import Program
from tcompile.models import text
from tcompile.models.zoo import ZOO
from tcompile.targets.base import Target
from tcompile.targets.cuda import toolchain

NETWORKS = {
    "minilm": {"input_ids": (1, 128), "attention_mask": (1, 128)},
    "vit-s16": {"x": (1, 3, 224, 224)},
    "resnet50": {"x": (1, 3, 224, 224)},
    "smollm2": {"input_ids": (1, 128)},
    "smollm2-decode": {},
    "bert-base": {"input_ids": (1, 128), "attention_mask": (1, 128)},
    "mobilenetv3-l": {"x": (1, 3, 224, 224)},
}
#: tokens in the cache of smollm2-decode
PAST = 1023
TENSOR_CORE = ("gemm", "conv2d", "attention", "attention hopper", "gemm hopper", "conv2d hopper", "gemm 2:4", "weight only", "weight only hopper")
#: instructions of the tensor cores: mma.sync and wgmma
MMA = re.compile(r"\b[HI]G?MMA\b")


def cuobjdump() -> Path | None:
    """cuobjdump of a toolkit, or of the package, where nvdisasm lies beside it."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    found = shutil.which("cuobjdump") or next((str(path) for root in roots for path in sorted(Path(root).glob("cu*/bin/cuobjdump"))), None)
    return Path(found) if found else None


def machine_code(library: bytes, *flags: str) -> str:
    """What cuobjdump says of a library."""
    tool = cuobjdump()
    if tool is None:
        raise SystemExit("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, env=environment, check=True).stdout


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers it has run."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def loader(name: str) -> Callable[[], Program]:
    """What imports a network; making the model itself is not part of it."""
    if name != "smollm2-decode":
        path = str(ZOO[name].onnx_path())
        return lambda: import_model(path, shapes=NETWORKS[name])
    import torch

    decoder = text.smollm2()
    sizes = decoder.model.config
    cache = torch.zeros(sizes.num_hidden_layers, 1, sizes.num_key_value_heads, PAST, sizes.hidden_size // sizes.num_attention_heads)
    inputs, step = (torch.zeros(1, 1, dtype=torch.int64), cache, cache.clone()), text.decode_step(decoder)
    return lambda: import_model(step, example_inputs=inputs)


def facts(name: str, target: str, precision: str, quantize: str | None = None) -> dict[str, object]:
    """One row of the table."""
    load = loader(name)
    start, cpu_start = time.perf_counter(), cpu_seconds()
    program = load()
    lowered = lower(program, Target.parse(target), CompileOptions(precision=precision, compression={"quantize": quantize}))
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    rows = lowered.report["kernels"]
    code = {}
    for part in machine_code(lowered.library, "-sass").split("Function : ")[1:]:
        function, _, listing = part.partition("\n")
        code[function.strip().removeprefix("k_")] = listing
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", machine_code(lowered.library, "-res-usage"))
    products = [row for row in rows if row["template"] in TENSOR_CORE]
    return {
        "network": name,
        "target": target,
        "precision": precision,
        "quantize": quantize,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "nvcc_seconds": lowered.report["code_generation"]["seconds"],
        "kernels": dict(sorted(Counter(row["template"] for row in rows).items())),
        "launches": sum(row["calls"] for row in rows),
        "products": sum(row["calls"] for row in products),
        "products_without_tensor_cores": sum(not MMA.search(code[row["kernel"]]) for row in products),
        "hmma": sum(len(MMA.findall(listing)) for listing in code.values()),
        "kernels_with_local_memory": sum(bool(re.search(r"\b(LDL|STL)\b", listing)) for listing in code.values())
        + sum(int(s) + int(m) > 0 for _, s, m in usage),
        "most_registers": max(int(registers) for registers, *_ in usage),
        "most_shared_bytes": max(row["shared_bytes"] for row in rows),
        "library_bytes": len(lowered.library),
        "sources_bytes": sum(map(len, lowered.sources.values())),
        "workspace_bytes": lowered.report["memory"]["workspace_bytes"],
        "weights_bytes": lowered.report["weights_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--targets", default="cuda:sm_80,cuda:sm_90a")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--quantize", choices=["w4", "w8"])
    options = parser.parse_args()
    rows = []
    for name in options.networks.split(","):
        for precision in options.precision.split(","):
            for target in options.targets.split(","):
                rows.append(facts(name, target, precision, options.quantize))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    version = subprocess.run([toolchain.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    result = {"nvcc": version, "cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "latency": "not measured", "networks": rows}
    table = json.dumps(result, indent=1)
    print(table)
    if options.output:
        options.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
