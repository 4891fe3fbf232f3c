"""What using tcompile costs beside computing: importing, compiling (memory), loading, calling. Prints a table, or JSON with --json; no test, as it depends on the machine.

python benchmarks/overheads.py [--network bert-base] [--rounds 5] [--json]

    import        `import tcompile` in a fresh process
    compile       peak resident memory of `tcompile MODEL` in a process of its own; bar: 4 x weights + 1 GiB
    load          `tcompile.load` of that artifact in a fresh process with tcompile imported, all hashes checked; bar: 0.3 s
    call          one call of a model of a single operator on four floats, numpy and torch; bar: 30 us
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from tcompile.models.zoo import ZOO

BASE = "import time; start = time.perf_counter(); import tcompile; imported = time.perf_counter()"
LOAD = f"{BASE}; model = tcompile.load({{path!r}}); print(imported - start, time.perf_counter() - imported)"
CALL = f"""{BASE}
import numpy, torch
model = tcompile.load({{path!r}}, threads=1)
buffer = numpy.zeros(32, numpy.float32)
first = -buffer.ctypes.data % 64 // 4
arrays = [buffer[first : first + 4], torch.from_numpy(buffer[first : first + 4])]
for array in arrays:
    best = []
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(200):
            model(array)
        best.append((time.perf_counter() - start) / 200)
    print(sorted(best)[25])
"""


def python(code: str) -> list[float]:
    """The numbers that `code` prints in a fresh process."""
    return [float(word) for word in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()]


def compile_in_child(model: Path, output: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of the command."""
    flags = [word for name, shape in shapes.items() for word in ("--shape", f"{name}={'x'.join(map(str, shape))}")]
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "tcompile", str(model), "-o", str(output), *flags], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"compiling {model} failed with exit code {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def one_operator(folder: Path) -> Path:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", info[:1], info[1:])
    path = folder / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def measure(network: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Every figure as {"value", "unit", "bar"}; bar None where there is none."""
    entry = ZOO[network]
    feeds = entry.example_inputs()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compile_in_child(one_operator(folder), folder / "one.tcm", {})
        seconds, peak = compile_in_child(entry.onnx_path(), folder / "big.tcm", {key: value.shape for key, value in feeds.items()})
        weights = (folder / "big.tcm" / "weights.safetensors").stat().st_size
        loads = [python(LOAD.format(path=str(folder / "big.tcm"))) for _ in range(rounds)]
        calls = python(CALL.format(path=str(folder / "one.tcm")))

    def figure(value: float, unit: str, bar: float | None = None) -> dict[str, Any]:
        return {"value": round(value, 2), "unit": unit, "bar": None if bar is None else round(bar, 2)}

    return {
        "import tcompile": figure(statistics.median(load[0] for load in loads) * 1e3, "ms"),
        f"load {network}": figure(statistics.median(load[1] for load in loads) * 1e3, "ms", 300),
        "call, numpy": figure(calls[0] * 1e6, "us", 30),
        "call, torch": figure(calls[1] * 1e6, "us", 30),
        f"compile {network}": figure(seconds, "s"),
        f"compile {network}, peak": figure(peak / 2**20, "MiB", 4 * weights / 2**20 + 1024),
        f"weights of {network}": figure(weights / 2**20, "MiB"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="bert-base", choices=sorted(ZOO))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure(options.network, options.rounds)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print("| what | measured | bar |\n|---|---|---|")
    for name, figure in figures.items():
        bar = "" if figure["bar"] is None else f"{figure['bar']} {figure['unit']}"
        print(f"| {name} | {figure['value']} {figure['unit']} | {bar} |")


if __name__ == "__main__":
    main()
