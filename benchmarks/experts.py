"""A mixture of experts by grouped products, beside every expert computing every row, torch and torch.compile, interleaved.

python benchmarks/experts.py [TOKENS ...] [--experts 8] [--chosen 2] [--width 1024] [--hidden 3584] [--threads 1] [--rounds 7] [--clock cpu|wall]

The layer of Mixtral and its likes as transformers writes it: a router chooses experts for each token, rows are sorted by expert, x [rows, width] goes through a gated product
to `hidden` and back. `every`: the same compiled with all experts computing all rows, then selected. torch: `torch.nn.functional.grouped_mm`; torch.compile takes the loop over experts that
transformers has for it. Times are medians in ms; `GB/s`: the weights of the experts that have rows over our time. Peers / ours above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tcompile
import torch
from tcompile.compiler.timing import interleaved
from transformers.integrations.moe import _grouped_mm

COLUMNS = [
    "tokens",
    "experts with rows",
    "ours ms",
    "GB/s",
    "every",
    "torch",
    "torch.compile",
    "every / ours",
    "torch / ours",
    "torch.compile / ours",
]
Grouped = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def every(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """All rows by all experts."""
    starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    rows = torch.arange(len(x))
    inside = (rows >= starts[:, None]) & (rows < ends[:, None])
    return torch.where(inside[..., None], x @ weight, 0).sum(0)


class Experts(torch.nn.Module):
    """x: [T, width] -> [T, width]."""

    def __init__(self, experts: int, chosen: int, width: int, hidden: int, grouped: Grouped):
        super().__init__()
        self.experts, self.chosen, self.grouped = experts, chosen, grouped
        self.router = torch.nn.Linear(width, experts, bias=False)
        self.gate_up = torch.nn.Parameter(torch.randn(experts, 2 * hidden, width) * width**-0.5)
        self.down = torch.nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates, chosen = torch.topk(self.router(x).softmax(-1), self.chosen)
        return gates / gates.sum(-1, keepdim=True), chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates, chosen = self.route(x)
        owner, order = torch.sort(chosen.reshape(-1))
        ends = torch.cumsum(torch.histc(owner.float(), bins=self.experts, min=0, max=self.experts - 1), 0, dtype=torch.int32)
        gate, up = self.grouped(x[order // self.chosen], self.gate_up.transpose(1, 2), ends).chunk(2, -1)
        rows = self.grouped(torch.nn.functional.silu(gate) * up, self.down.transpose(1, 2), ends) * gates.reshape(-1)[order][:, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return rows[back].view(len(x), self.chosen, -1).sum(1)


def measure(tokens: int, options: argparse.Namespace) -> list[Any]:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    sizes = (options.experts, options.chosen, options.width, options.hidden)
    module = Experts(*sizes, _grouped_mm).eval()
    dense = Experts(*sizes, every).eval()
    dense.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(tokens, options.width)
    array, compiled = x.numpy(), torch.compile(module)
    ours, whole = (tcompile.compile(each, example_inputs=(x,), threads=options.threads) for each in (module, dense))

    def peer(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], np.ndarray]:
        def call() -> np.ndarray:
            with torch.inference_mode():
                return function(x).numpy()

        return call

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(array),
        "every": lambda: whole(array),
        "torch": peer(module),
        "torch.compile": peer(compiled),
    }
    for name, call in calls.items():
        np.testing.assert_allclose(call(), calls["torch"](), rtol=1e-3, atol=1e-4, err_msg=name)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = {name: timing.samples for name, timing in interleaved(calls, rounds=options.rounds, clock=clock).items()}
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    ratios = [statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True)) for name in ("every", "torch", "torch.compile")]
    used = len(module.route(x)[1].unique())
    rate = used * 3 * options.width * options.hidden * 4 / medians["ours"] / 1e9
    figures = [medians["ours"] * 1e3, rate, *(medians[name] * 1e3 for name in ("every", "torch", "torch.compile")), *ratios]
    return [tokens, used, *(f"{figure:.3g}" for figure in figures)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="*", type=int, default=[1, 16, 128])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--chosen", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for tokens in options.tokens:
        print(f"| {' | '.join(map(str, measure(tokens, options)))} |", flush=True)


if __name__ == "__main__":
    main()
