"""`make gpu-bench`: products, attention, networks and decoding on this machine's GPU, beside torch (cuBLAS, cuDNN, flash attention) and torch.compile's search (Triton).

python benchmarks/gpu.py [PATTERN ...] [--rounds 20] [--output benchmarks/results/gpu.json] [--docs docs/performance.md] [--rehearse]

Every contestant's call is captured in a CUDA graph; in each round all of them are replayed in turns, between two events, behind a write of more bytes than the L2 cache holds, and
the median counts. Results are first compared with a reference of higher precision: a contestant that misses it gets no time. `fastest / tcompile` above 1 means that
tcompile is the fastest. Two rates are measured in the same run, for the shares: a copy of 4 GB, and torch's bfloat16 product of 8192^3 on random data.

Without a GPU it says so and ends with exit code 0. `--rehearse` runs smaller cases on the CPU, for the harness itself: its times say nothing about GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
import torch
from gpu_cases import Call, Case, cases, first
from page import update
from tcompile.compiler.errors import TcompileError

#: bytes written between two replays
FLUSH = 256 * 1024 * 1024
COLUMNS = (
    "case",
    "tcompile ms",
    "fastest peer",
    "ms",
    "fastest / tcompile",
    "bar",
    "TFLOP/s",
    "of torch's rate",
    "GB/s",
    "of the copy's rate",
    "error",
)


class Gpu:
    """Times calls by graphs and events."""

    device = torch.device("cuda")
    target = "cuda"

    def __init__(self) -> None:
        self._scratch = torch.empty(FLUSH, dtype=torch.uint8, device=self.device)

    def facts(self) -> dict[str, Any]:
        query = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
        smi = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", "--id=0"]
        try:
            answer = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        except (OSError, subprocess.CalledProcessError):
            answer = [torch.cuda.get_device_name(), *["unknown"] * (len(query) - 1)]
        return {
            **dict(zip(query, answer, strict=True)),
            "cuda": torch.version.cuda,
            "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        }

    def captured(self, call: Call) -> tuple[Call, Any]:
        """(what replays the call, its outputs)."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # kernels, handles and memory that a capture cannot make
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, outputs

    def times(self, replays: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """Seconds by contestant, one per round."""
        names, events = list(replays), {name: [] for name in replays}
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                self._scratch.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                replays[name]()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) * 1e-3 for start, end in pairs] for name, pairs in events.items()}


class Rehearsal(Gpu):
    """The same on the CPU, by the clock."""

    device = torch.device("cpu")
    target = "cpu"

    def facts(self) -> dict[str, Any]:
        return {"name": "none: a rehearsal on the CPU"}

    def captured(self, call: Call) -> tuple[Call, Any]:
        return call, call()

    def times(self, replays: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(rounds):
            for name, replay in replays.items():
                start = time.perf_counter()
                replay()
                found[name].append(time.perf_counter() - start)
        return found


def rates(machine: Gpu, small: bool) -> dict[str, float]:
    """What the machine does at best: bytes a second, read and written, of a copy, and operations a second of torch's bfloat16 product."""
    size, side = (1 << 20, 64) if small else (1 << 32, 8192)
    source, there = (torch.ones(size, dtype=torch.uint8, device=machine.device) for _ in range(2))
    a, b = (torch.randn(side, side, device=machine.device).bfloat16() for _ in range(2))
    replays = {"copy": machine.captured(lambda: there.copy_(source))[0], "product": machine.captured(lambda: a @ b)[0]}
    medians = {name: statistics.median(values) for name, values in machine.times(replays, 10).items()}
    return {"bytes_per_second": 2 * size / medians["copy"], "bf16_flops": 2 * side**3 / medians["product"]}


def measure(case: Case, machine: Gpu, rounds: int) -> dict[str, Any]:
    """Errors and times of tcompile and all peers; contestants that cannot run, or give another result, are named with the reason and not timed."""
    start = time.perf_counter()
    model = tcompile.compile(case.model(), target=machine.target, **case.options)
    seconds = time.perf_counter() - start
    inputs = case.inputs(machine.device)
    replays, errors, refused = {}, {}, {}
    with torch.inference_mode():
        reference = case.reference(inputs).double()
        for name, call in {"tcompile": lambda: model(*inputs), **case.peers(inputs)}.items():
            try:
                replay, outputs = machine.captured(call)
            except (RuntimeError, TcompileError) as reason:
                refused[name] = str(reason).strip().partition("\n")[0]
                continue
            errors[name] = float(torch.linalg.vector_norm(first(outputs).double() - reference) / torch.linalg.vector_norm(reference))
            if errors[name] <= case.tolerance:
                replays[name] = replay
            else:
                refused[name] = f"error {errors[name]:.1e} above {case.tolerance:.0e}"
        samples = machine.times(replays, rounds)
    model.check() if machine.target != "cpu" else None
    kernels = [{key: row[key] for key in ("kernel", "template", "workload", "schedule", "calls") if key in row} for row in model.report()["kernels"]]
    return {
        "case": case.name,
        "compile_seconds": round(seconds, 1),
        "ms": {name: round(statistics.median(values) * 1e3, 5) for name, values in samples.items()},
        "spread": {name: [round(float(part) * 1e3, 5) for part in np.percentile(values, (10, 90))] for name, values in samples.items()},
        "errors": errors,
        "refused": refused,
        "flops": case.flops,
        "bytes": case.moved,
        "bar": case.bar,
        "against": case.against,
        "kernels": kernels,
    }


def cells(row: dict[str, Any], rate: Mapping[str, float]) -> list[str]:
    """A line of the table; an empty cell where there is nothing to say."""
    ms = row["ms"]
    ours, peers = ms.get("tcompile"), {name: value for name, value in ms.items() if name != "tcompile"}
    fastest = min(peers, key=lambda name: peers[name], default="")
    if ours is None:
        return [row["case"], row["refused"]["tcompile"], fastest, *(f"{peers[name]:.4g}" for name in [fastest] if name), *[""] * (len(COLUMNS) - 4)]
    flops, moved = row["flops"] / ours * 1e3, row["bytes"] / ours * 1e3
    return [
        row["case"],
        f"{ours:.4g}",
        fastest,
        f"{peers[fastest]:.4g}" if fastest else "",
        f"{peers[fastest] / ours:.2f}" if fastest else "",
        _bar(row),
        f"{flops / 1e12:.4g}" if flops else "",
        f"{flops / rate['bf16_flops']:.0%}" if flops else "",
        f"{moved / 1e9:.4g}" if moved else "",
        f"{moved / rate['bytes_per_second']:.0%}" if moved else "",
        f"{row['errors']['tcompile']:.1e}",
    ]


def _bar(row: dict[str, Any]) -> str:
    """What is asked for; where it refers to one of the peers, also what is."""
    if row["bar"] is None or row["against"] is None:
        return "" if row["bar"] is None else f"{row['bar']:g}"
    found = row["ms"].get(row["against"])
    return f"{row['bar']:g} of {row['against']}: " + (f"{found / row['ms']['tcompile']:.2f}" if found else "not measured")


def line(parts: Any) -> str:
    return f"| {' | '.join(map(str, parts))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of cases, with * for any text")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print(f"gpu-bench: nothing measured: torch {torch.__version__} finds no CUDA device")
        return
    machine = Rehearsal() if options.rehearse else Gpu()
    rate = rates(machine, options.rehearse)
    facts = {**machine.facts(), "date": date.today().isoformat(), "torch": torch.__version__, "rates": rate, "rounds": options.rounds}
    rows, lines = [], [line(COLUMNS), "|" + "---|" * len(COLUMNS)]
    print("\n".join(lines), flush=True)
    for case in cases(options.rehearse):
        if not any(fnmatch(case.name, f"*{pattern}*") for pattern in options.patterns):
            continue
        try:
            rows.append(measure(case, machine, options.rounds))
        except TcompileError as reason:
            rows.append({"case": case.name, "ms": {}, "refused": {"tcompile": str(reason)}})
        lines.append(line(cells(rows[-1], rate)))
        print(lines[-1], flush=True)
        if options.output:  # after every case: a visit to a GPU may end at any time
            options.output.write_text(json.dumps({**facts, "cases": rows}, indent=1) + "\n")
    if options.docs:
        names = {"cpu": f"{facts['name']}, driver {facts.get('driver_version', '-')}", "date": facts["date"], "versions": {"torch": facts["torch"]}}
        update(options.docs, "gpu", "gpu.py", names, lines, "medians of interleaved replays of CUDA graphs, caches cold.")


if __name__ == "__main__":
    sys.exit(main())
