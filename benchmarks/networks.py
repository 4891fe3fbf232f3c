"""`make bench`: the networks of the zoo beside onnxruntime and OpenVINO, interleaved, one process per network and thread count.

python benchmarks/networks.py [NAME ...] [--threads 1,2] [--rounds 10] [--against onnxruntime,openvino] [--output FILE.json] [--docs docs/performance.md]

Prints a Markdown table; `--output` writes the figures with hardware, versions and date, `--docs` puts the table between the markers of a page.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
from tcompile.compiler.peers import prepare
from tcompile.compiler.timing import interleaved
from tcompile.models.zoo import ZOO
from tcompile.targets.base import Target

MARKERS = "<!-- networks: written by benchmarks/networks.py -->\n", "<!-- end of networks -->\n"


def measure(name: str, threads: int, rounds: int, peers: list[str]) -> dict[str, Any]:
    """Compile one network at batch 1 with its default sizes; agreement with the first peer, compile time, peak memory and times beside all of them."""
    entry = ZOO[name]
    feeds = entry.example_inputs()
    path = entry.onnx_path()
    start = time.perf_counter()
    model = tcompile.compile(str(path), shapes={key: tuple(value.shape) for key, value in feeds.items()}, threads=threads)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    contestants = {peer: prepare(peer, path, feeds, threads) for peer in peers}
    ours = model(**feeds)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    reference = contestants[peers[0]]()
    difference = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(outputs, reference, strict=True))
    times = interleaved({"tcompile": lambda: model(**feeds), **contestants}, rounds=rounds)
    return {
        "network": name,
        "threads": threads,
        "difference": difference,
        "compile_s": round(seconds, 1),
        "peak_mb": round(peak),
        "ms": {contestant: round(timing.median * 1e3, 2) for contestant, timing in times.items()},
        "ratio": {peer: round(times["tcompile"].median / times[peer].median, 3) for peer in peers},
    }


def run_child(name: str, threads: str, options: argparse.Namespace) -> dict[str, Any] | str:
    """The measurement of one network in a process of its own, or the last line of what went wrong."""
    command = [sys.executable, __file__, name, "--child", "--threads", threads, "--rounds", str(options.rounds), "--against", options.against]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return (run.stderr.strip().splitlines() or ["no message"])[-1][:160]
    return json.loads(run.stdout.splitlines()[-1])


def environment(peers: list[str]) -> dict[str, Any]:
    """Hardware, versions and date of a run."""
    model = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    target = Target.parse("cpu")
    packages = ("tcompile", "apache-tvm", *peers)
    return {
        "cpu": f"{model} ({target.mcpu}, {target.vector_bits}-bit vectors, {target.cores} cores)",
        "date": date.today().isoformat(),
        "versions": {package: version(package) for package in packages},
    }


def header(peers: list[str]) -> list[str]:
    """The two Markdown lines that open the table."""
    head = ["network", "threads", "tcompile ms", *(f"{peer} ms" for peer in peers), *(f"/ {peer}" for peer in peers), "difference / range"]
    head += ["compile s", "peak MB"]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]


def line(row: dict[str, Any] | str) -> str:
    """One network as a Markdown line; a row that failed is its message."""
    if isinstance(row, str):
        return f"| {row} |"
    measured = [*row["ms"].values(), *row["ratio"].values(), f"{row['difference']:.1e}", row["compile_s"], row["peak_mb"]]
    return f"| {' | '.join(map(str, [row['network'], row['threads'], *measured]))} |"


def table(rows: list[dict[str, Any] | str], peers: list[str]) -> list[str]:
    """Markdown lines of all networks, and the means over those that were measured."""
    lines = [*header(peers), *map(line, rows)]
    measured = [row for row in rows if isinstance(row, dict)]
    for peer in peers:
        ratios = [row["ratio"][peer] for row in measured]
        if ratios:
            lines.append(f"\nGeometric mean of the time divided by {peer}'s: {np.exp(np.mean(np.log(ratios))):.2f}.")
    return lines


def update_page(page: Path, lines: list[str], facts: dict[str, Any]) -> None:
    """Replace what stands between the markers of `page`."""
    before, _, rest = page.read_text().partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    text = f"{facts['cpu']}; {versions}; {facts['date']}; batch 1, medians of interleaved rounds.\n\n" + "\n".join(lines) + "\n"
    page.write_text(before + MARKERS[0] + text + MARKERS[1] + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ZOO), metavar="NAME")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--against", default="onnxruntime,openvino")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    peers = options.against.split(",")
    if options.child:
        print(json.dumps(measure(options.names[0], int(options.threads), options.rounds, peers)))
        return
    facts = environment(peers)
    rows: list[dict[str, Any] | str] = []
    print("\n".join(header(peers)), flush=True)
    for name in options.names:
        for threads in options.threads.split(","):
            result = run_child(name, threads, options)
            rows.append(result if isinstance(result, dict) else f"{name} | {threads} | failed: {result}")
            print(line(rows[-1]), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    if options.docs:
        update_page(options.docs, table(rows, peers), facts)


if __name__ == "__main__":
    main()
