"""Products of a few rows with weights that no cache holds: share of the memory's rate.

python benchmarks/gemv.py [--rows 1,2,4,8] [--formats fp32,w8,w4] [--width 2048] [--megabytes 96] [--threads 1] [--rounds 10] [--clock wall|cpu]

A chain of square layers, as many as have `--megabytes` of packed weights. In turns with it, one pass over as many bytes by NumPy's dot product (one thread): `share` is the time of that
pass over the time of the chain, 1 where weights come as fast as they can. fp32 is also timed in PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import tcompile
import torch
from tcompile.compiler.timing import interleaved
from tcompile.passes.quantization.weight_only import WEIGHT_ONLY

#: bytes of a weight, with its part of the scales of groups of 32
BYTES = {"fp32": 4.0, "bf16": 2.0, **{name: (bits + 1) / 8 for name, (bits, _) in WEIGHT_ONLY.items()}}


def measure(kind: str, rows: int, options: argparse.Namespace) -> str:
    layers = max(1, round(options.megabytes * 1e6 / (BYTES[kind] * options.width**2)))
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(options.width, options.width, bias=False) for _ in range(layers))).eval()
    x = torch.randn(rows, options.width)
    compress = {"precision": kind} if kind in ("fp32", "bf16") else {"quantize": kind}
    model = tcompile.compile(module, example_inputs=(x,), threads=options.threads, **compress)
    size = int(model.report()["weights_bytes"])
    stream, array = np.ones(size // 4, np.float32), x.numpy()
    calls = {"ours": lambda: model(array), "pass": lambda: np.dot(stream, stream)}
    if kind == "fp32":
        torch.set_num_threads(options.threads)

        def peer() -> torch.Tensor:
            with torch.inference_mode():
                return module(x)

        calls["torch"] = peer
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = {name: timing.samples for name, timing in interleaved(calls, rounds=options.rounds, clock=clock).items()}
    share = statistics.median(one / own for one, own in zip(times["pass"], times["ours"], strict=True))
    ours, torchs = (statistics.median(times[name]) if name in times else None for name in ("ours", "torch"))
    assert ours is not None
    cells = [
        kind,
        rows,
        layers,
        f"{size / 1e6:.0f}",
        f"{ours * 1e3:.2f}",
        f"{size / ours / 1e9:.1f}",
        f"{share:.2f}",
        f"{torchs / ours:.2f}" if torchs else "-",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--formats", default="fp32,w8,w4")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--megabytes", type=float, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    print("| format | rows | layers | MB of weights | ms | GB/s | share | torch / ours |\n|---|---|---|---|---|---|---|---|")
    for kind in options.formats.split(","):
        for rows in map(int, options.rows.split(",")):
            print(measure(kind, rows, options), flush=True)


if __name__ == "__main__":
    main()
