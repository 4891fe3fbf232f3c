"""`make bench`: the networks of the zoo beside onnxruntime, interleaved, one process per network; prints a Markdown table and writes JSON.

python benchmarks/networks.py [NAME ...] [--threads 1,2] [--rounds 10] [--output benchmarks/results/networks.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
from tcompile.compiler.peers import prepare
from tcompile.compiler.timing import interleaved
from tcompile.models.zoo import ZOO


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """Compile one network at batch 1 with its default sizes; agreement, compile time and times beside onnxruntime."""
    entry = ZOO[name]
    feeds = entry.example_inputs()
    path = entry.onnx_path()
    start = time.perf_counter()
    model = tcompile.compile(str(path), shapes={key: tuple(value.shape) for key, value in feeds.items()}, threads=threads)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peer = prepare("onnxruntime", path, feeds, threads)
    ours = model(**feeds)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    difference = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(outputs, peer(), strict=True))
    times = interleaved({"tcompile": lambda: model(**feeds), "onnxruntime": peer}, rounds=rounds)
    return {
        "network": name,
        "threads": threads,
        "difference": difference,
        "compile_s": round(seconds, 1),
        "peak_mb": round(peak),
        "tcompile_ms": round(times["tcompile"].median * 1e3, 2),
        "onnxruntime_ms": round(times["onnxruntime"].median * 1e3, 2),
        "ratio": round(times["tcompile"].median / times["onnxruntime"].median, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ZOO), metavar="NAME")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.names[0], int(options.threads), options.rounds)))
        return
    print(
        "| network | threads | tcompile ms | onnxruntime ms | ratio | difference / range | compile s | peak MB |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    results = []
    for name in options.names:
        for threads in options.threads.split(","):
            command = [sys.executable, __file__, name, "--child", "--threads", threads, "--rounds", str(options.rounds)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                print(f"| {name} | {threads} | failed: {run.stderr.strip().splitlines()[-1][:160]} | | | | | |", flush=True)
                continue
            row = json.loads(run.stdout.splitlines()[-1])
            results.append(row)
            cells = [row[key] for key in ("tcompile_ms", "onnxruntime_ms", "ratio")]
            print(
                f"| {name} | {threads} | {' | '.join(map(str, cells))} | {row['difference']:.1e} | {row['compile_s']} | {row['peak_mb']} |",
                flush=True,
            )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
