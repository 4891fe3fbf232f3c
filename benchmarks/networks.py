"""`make bench`: the networks of the zoo beside other engines, interleaved, one process per network, batch and thread count.

python benchmarks/networks.py [NAME ...] [--precision fp32|bf16|bf16x2|bf16x3] [--threads 1,2] [--batch 1] [--rounds 10] [--against NAME,...]
                              [--deepsparse PYTHON] [--output FOLDER] [--docs docs/performance.md]

A name may ask for sizes of its dims: bert-base@seq=512. Prints a Markdown table; `--output` writes the figures with hardware, versions and date (networks_fp32_avx2.json), `--docs` puts the table between the markers of a page. fp32 runs against
onnxruntime, OpenVINO, torch.compile with frozen weights (bf16x2 and bf16x3, float32 by tiles of bfloat16, too), and DeepSparse if `--deepsparse` names the interpreter of an environment that has `deepsparse==1.8.0`; bf16 against
OpenVINO in bf16 and torch.compile under autocast. `fastest / tcompile` above 1 means that tcompile is the fastest.
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
from contestants import RIVALS, contestant
from page import environment, update, vectors
from tcompile.compiler.api import import_model
from tcompile.compiler.peers import prepare
from tcompile.compiler.roofline import layers
from tcompile.compiler.timing import interleaved
from tcompile.models.zoo import ZOO
from tcompile.targets.base import Target
from tcompile.targets.cpu.peak import operations_per_second

Row = dict[str, Any]


def measure(name: str, options: argparse.Namespace) -> Row:
    """Compile one network at one size; difference to the float32 of onnxruntime, compile time, peak memory and times beside all rivals."""
    network, _, sizes = name.partition("@")
    entry, threads = ZOO[network], int(options.threads)
    dims = {dim: int(size) for dim, size in (part.split("=") for part in sizes.split(",") if part)}
    feeds = entry.example_inputs(**dims | ({"batch": int(options.batch)} if options.batch != "1" else {}))
    path = entry.onnx_path()
    shapes = {key: tuple(value.shape) for key, value in feeds.items()}
    start = time.perf_counter()
    model = tcompile.compile(str(path), shapes=shapes, threads=threads, precision=options.precision)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reference = prepare("onnxruntime", path, feeds, threads)()
    rivals = {rival: contestant(rival, entry, feeds, threads, options.deepsparse) for rival in options.against.split(",")}
    rivals = {rival: call for rival, call in rivals.items() if call is not None}
    ours = model(**feeds)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    difference = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(outputs, reference, strict=True))
    times = interleaved({"tcompile": lambda: model(**feeds), **rivals}, rounds=options.rounds)
    # all operations as multiply-adds in registers
    rate = operations_per_second({"fp32": "float32", "bf16": "bfloat16"}.get(options.precision, options.precision)) * min(
        threads, Target.parse("cpu").cores
    )
    flops = sum(layer.flops for layer in layers(import_model(path, shapes=shapes), Target.parse("cpu")))
    ms = {contender: round(timing.median * 1e3, 2) for contender, timing in times.items()}
    fastest = min((name for name in ms if name != "tcompile"), key=lambda name: ms[name], default="")
    return {
        "network": name,
        "batch": int(options.batch),
        "threads": threads,
        "ms": ms,
        "fastest": fastest,
        "ratio": round(ms[fastest] / ms["tcompile"], 3) if fastest else None,
        "limit_ms": round(flops / rate * 1e3, 2),
        "of_limit": round(flops / rate * 1e3 / ms["tcompile"], 3),
        "difference": difference,
        "compile_s": round(seconds, 1),
        "peak_mb": round(peak),
    }


def run_child(name: str, threads: str, batch: str, options: argparse.Namespace) -> Row | str:
    """The measurement of one network in a process of its own, or the last line of what went wrong."""
    command = [sys.executable, __file__, name, "--child", "--threads", threads, "--batch", batch, "--rounds", str(options.rounds)]
    command += ["--against", options.against, "--precision", options.precision]
    command += ["--deepsparse", str(options.deepsparse)] if options.deepsparse else []
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return (run.stderr.strip().splitlines() or ["no message"])[-1][:160]
    return json.loads(run.stdout.splitlines()[-1])


def header(rivals: list[str]) -> list[str]:
    """The two Markdown lines that open the table."""
    head = ["network", "batch", "threads", "tcompile ms", *(f"{rival} ms" for rival in rivals), "fastest / tcompile", "of the arithmetic limit"]
    head += ["difference / range", "compile s", "peak MB"]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]


def line(row: Row | str, rivals: list[str]) -> str:
    """One network as a Markdown line; a row that failed is its message."""
    if isinstance(row, str):
        return f"| {row} |"
    cells = [row["network"], row["batch"], row["threads"], *(row["ms"].get(name, "-") for name in ("tcompile", *rivals)), row["ratio"]]
    cells += [f"{row['of_limit']:.0%}", f"{row['difference']:.1e}", row["compile_s"], row["peak_mb"]]
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: list[Row | str], rivals: list[str]) -> list[str]:
    """Markdown lines of all networks, and the means over those that were measured."""
    lines = [*header(rivals), *(line(row, rivals) for row in rows)]
    measured = [row for row in rows if isinstance(row, dict)]
    means = []
    for rival in rivals:
        ratios = [row["ms"][rival] / row["ms"]["tcompile"] for row in measured if rival in row["ms"]]
        means += [f"{rival} {np.exp(np.mean(np.log(ratios))):.2f}"] if ratios else []
    ratios = [row["ratio"] for row in measured if row["ratio"]]
    means += [f"the fastest of them {np.exp(np.mean(np.log(ratios))):.2f}"] if ratios else []
    return [*lines, f"\nGeometric means of the time divided by tcompile's: {', '.join(means)}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ZOO), metavar="NAME")
    parser.add_argument("--precision", choices=sorted(RIVALS), default="fp32")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--against", help="comma-separated; default: all rivals of the precision")
    parser.add_argument("--deepsparse", type=Path, metavar="PYTHON")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rivals = (
        options.against.split(",") if options.against else [name for name in RIVALS[options.precision] if name != "deepsparse" or options.deepsparse]
    )
    options.against = ",".join(rivals)
    if options.child:
        print(json.dumps(measure(options.names[0], options)))
        return
    packages = ["tcompile", "apache-tvm", *sorted({rival.split("-")[0] for rival in rivals} - {"deepsparse"})]
    facts = environment(packages, precision=options.precision)
    facts["versions"] |= {"deepsparse": "1.8.0"} if "deepsparse" in rivals else {}
    rows: list[Row | str] = []
    print("\n".join(header(rivals)), flush=True)
    for name in options.names:
        for batch in options.batch.split(","):
            for threads in options.threads.split(","):
                result = run_child(name, threads, batch, options)
                rows.append(result if isinstance(result, dict) else f"{name} | {batch} | {threads} | failed: {result}")
                print(line(rows[-1], rivals), flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"networks_{options.precision}_{vectors().lower().replace(' ', '_')}.json"
        (options.output / name).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    if options.docs:
        update(options.docs, f"networks {options.precision}, {vectors()}", "networks.py", facts, table(rows, rivals))


if __name__ == "__main__":
    main()
