"""One token of SmolLM2-135M behind a cache, with its pretrained weights, beside the other engines, interleaved.

python benchmarks/decoding.py [--cache 511] [--threads 1,2] [--rounds 12] [--docs docs/performance.md]

Every engine gets the same inputs: the token and the caches of all layers (random numbers), and gives logits and the token's own keys and values. The same graph for all: onnxruntime and OpenVINO run
the export to ONNX, PyTorch the module under torch.compile with frozen weights, each in float32 and those that can in bfloat16; ours with weights of 8 bits in groups of 32 (`--quantize w8`), too.
Share: the time of a pass over as many bytes as the weights and the cache have, by NumPy's dot product in turns with the engines (one thread), over ours; above 1 on two threads.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
import torch
import torch._inductor.config as inductor
from page import environment, update, vectors
from tcompile.compiler.peers import Peer, prepare
from tcompile.compiler.timing import interleaved
from tcompile.models import text

COLUMNS = [
    "weights",
    "cache",
    "threads",
    "tcompile ms",
    "onnxruntime ms",
    "openvino ms",
    "torch-compile ms",
    "fastest / tcompile",
    "GB/s",
    "share",
    "difference / range",
]
#: format -> how it is compiled, bytes of a weight with its part of the scales, and the engines beside it
FORMATS: dict[str, tuple[dict[str, Any], float, tuple[str, ...]]] = {
    "float32": ({}, 4.0, ("onnxruntime", "openvino", "torch")),
    "bf16": ({"precision": "bf16"}, 2.0, ("openvino-bf16", "torch-bf16")),
    "w8": ({"quantize": "w8"}, 9 / 8, ()),
}
#: what NumPy reads in a turn
_PASS = 200_000_000


def _torch(step: torch.nn.Module, given: tuple[torch.Tensor, ...], bf16: bool) -> Peer:
    compiled = torch.compile(step)

    def run() -> list[np.ndarray]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return [value.float().numpy() for value in compiled(*given)]

    run()
    return run


def measure(step: torch.nn.Module, given: tuple[torch.Tensor, ...], model: Path, weights: int, threads: int, rounds: int) -> list[list[str]]:
    feeds = {name: value.numpy() for name, value in zip(("input_ids", "keys", "values"), given, strict=True)}
    cache, positions = given[1].nbytes + given[2].nbytes, given[1].shape[3]
    torch.set_num_threads(threads)
    numbers = np.ones(_PASS // 4, np.float32)
    calls: dict[str, Any] = {"pass": lambda: float(numbers @ numbers)}
    for name, (options, _, rivals) in FORMATS.items():
        compiled = tcompile.compile(step, example_inputs=given, threads=threads, **options)
        calls[name] = lambda compiled=compiled: compiled(**feeds)
        for rival in rivals:
            calls[rival] = _torch(step, given, rival == "torch-bf16") if rival.startswith("torch") else prepare(rival, model, feeds, threads)
    reference = calls["onnxruntime"]()[0]
    times = interleaved(calls, rounds=rounds)
    lines = []
    for name, (_, size, rivals) in FORMATS.items():
        ours, moved = times[name].median, weights * size + cache
        theirs = [
            next((times[rival].median for rival in rivals if rival.startswith(engine)), None) for engine in ("onnxruntime", "openvino", "torch")
        ]
        known = [each for each in theirs if each is not None]
        ratio = f"{min(known) / ours:.2f}" if known else "-"
        share = times["pass"].median * moved / _PASS / ours
        error = np.abs(np.asarray(calls[name]()[0]) - reference).mean() / np.ptp(reference)
        shown = [f"{each * 1e3:.1f}" if each is not None else "-" for each in (ours, *theirs)]
        lines.append([name, str(positions), str(threads), *shown, ratio, f"{moved / ours / 1e9:.1f}", f"{share:.2f}", f"{error:.1e}"])
        print("| " + " | ".join(lines[-1]) + " |", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=int, default=511, help="tokens before the one that is decoded")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    inductor.freezing = True
    decoder = text.smollm2()
    step, sizes = text.decode_step(decoder).eval(), decoder.model.config
    torch.manual_seed(0)
    shape = (sizes.num_hidden_layers, 1, sizes.num_key_value_heads, options.cache, sizes.hidden_size // sizes.num_attention_heads)
    given = (torch.full((1, 1), 7), torch.randn(shape), torch.randn(shape))
    weights = sum(parameter.numel() for parameter in decoder.parameters())  # the tied embedding once, as the head reads it
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "step.onnx"
        torch.onnx.export(step, given, str(model), input_names=["input_ids", "keys", "values"], dynamo=True, external_data=True, verbose=False)
        print("| " + " | ".join(COLUMNS) + " |", flush=True)
        for threads in map(int, options.threads.split(",")):
            lines += measure(step, given, model, weights, threads, options.rounds)
    if options.docs is not None:
        table = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *lines)]
        update(
            options.docs,
            f"decoding, {vectors()}",
            Path(__file__).name,
            environment(("tcompile", "apache-tvm", "torch", "onnxruntime", "openvino")),
            table,
        )


if __name__ == "__main__":
    main()
