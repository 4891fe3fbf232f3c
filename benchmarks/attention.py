"""Attention alone beside its unfused graph and the peers, interleaved.

python benchmarks/attention.py [TOKENS ...] [--queries N] [--heads 12] [--width 64] [--threads 1,2] [--rounds 10] [--clock wall|cpu] [--docs docs/performance.md]
       [--window N | --strided N]

One softmax attention of q [1, queries, heads * width] over k and v [1, tokens, heads * width], as many queries as tokens unless `--queries` says otherwise (1: decoding, keys and values
in the caches). Exported to ONNX as matrix products and a softmax: compiled as it is, and without `fuse-attention`. The peers have a fused operator: PyTorch's
scaled_dot_product_attention, OpenVINO's, onnxruntime's MultiHeadAttention; onnxruntime and OpenVINO also run the exported graph, and the faster of the two forms counts.
`--window N` and `--strided N` compare masks that are compiled into the loops with the kernel that reads all of the same mask (-1e4 where it hides, which is a number like others), with
PyTorch's scaled_dot_product_attention under it, and with PyTorch's flex_attention: of causal attention, a query sees the N keys up to its own (one pattern for all heads); or its own block of 64 keys, the one before, and every Nth, another for each head.
`fastest / fused` above 1 means that tcompile is the fastest; planned MB are those of intermediate tensors. `--clock cpu`: processor time, for a machine that others use.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tcompile
import torch
from onnx import TensorProto, helper
from page import environment, update, vectors
from tcompile.compiler.peers import Peer, prepare
from tcompile.compiler.recipe import Recipe
from tcompile.compiler.timing import interleaved

COLUMNS = [
    "tokens",
    "queries",
    "threads",
    "fused ms",
    "unfused",
    "torch",
    "onnxruntime",
    "openvino",
    "unfused / fused",
    "fastest / fused",
    "planned MB",
    "unfused",
]
MASKED = [
    "tokens",
    "seen %",
    "heads",
    "threads",
    "compiled in ms",
    "whole mask",
    "torch SDPA",
    "torch flex",
    "whole mask / compiled in",
    "SDPA / compiled in",
    "flex / compiled in",
]
#: side of the blocks of `--strided`
BLOCK = 64
Feeds = dict[str, np.ndarray]


class Attention(torch.nn.Module):
    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads, self.width = heads, width

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def forward(self, q, k, v):
        q, k, v = self.split(q), self.split(k), self.split(v)
        return (((q @ k.transpose(-1, -2)) * self.width**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Masked(Attention):
    def __init__(self, heads: int, width: int, mask: torch.Tensor):
        super().__init__(heads, width)
        self.register_buffer("mask", mask)

    def forward(self, q, k, v):
        q, k, v = self.split(q), self.split(k), self.split(v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)


def sees(options: argparse.Namespace) -> Callable[..., torch.Tensor]:
    """(batch, head, query, key) -> whether it is seen, of numbers or tensors of them."""
    if options.window:
        return lambda b, h, s, t: (t <= s) & (s - t < options.window)
    stride = options.strided
    return lambda b, h, s, t: (t <= s) & ((s // BLOCK - t // BLOCK < 2) | (t // BLOCK % stride == h % stride))


def flex(module: Attention, tensors: list[torch.Tensor], seen: Callable[..., torch.Tensor], heads: int | None) -> Callable[[], list[np.ndarray]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = tensors[0].shape[1]
    blocks = create_block_mask(seen, None, heads, tokens, tokens, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            return [compiled(*(module.split(x) for x in tensors), block_mask=blocks).transpose(1, 2).flatten(2).numpy()]

    return run


def measure_masked(tokens: int, threads: int, options: argparse.Namespace) -> list[Any]:
    heads, seen = options.heads, sees(options)
    own = 1 if options.window else heads
    s, t, h = torch.arange(tokens)[:, None], torch.arange(tokens), torch.arange(own)[:, None, None]
    mask = seen(0, h, s, t)[None]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, tokens, heads * options.width, generator=generator) for _ in range(3)]
    torch.set_num_threads(threads)
    module = Masked(heads, options.width, mask).eval()
    whole = Masked(heads, options.width, torch.where(mask, 0.0, -1e4)).eval()
    inside, outside = (tcompile.compile(each, example_inputs=tuple(tensors), threads=threads) for each in (module, whole))

    def sdpa() -> list[np.ndarray]:
        with torch.inference_mode():
            return [module(*tensors).numpy()]

    arrays = [x.numpy() for x in tensors]
    calls: dict[str, Callable[[], Any]] = {"inside": lambda: [inside(*arrays)], "whole": lambda: [outside(*arrays)], "sdpa": sdpa}
    calls["flex"] = flex(module, tensors, seen, own if own > 1 else None)
    want = sdpa()[0]
    for name, call in calls.items():
        np.testing.assert_allclose(call()[0], want, rtol=1e-3, atol=1e-4, err_msg=name)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = {name: timing.median * 1e3 for name, timing in interleaved(calls, rounds=options.rounds, clock=clock).items()}
    figures = [*times.values(), *(times[name] / times["inside"] for name in ("whole", "sdpa", "flex"))]
    return [tokens, f"{100 * mask.float().mean():.1f}", heads, threads, *(f"{figure:.3g}" for figure in figures)]


def multi_head(path: Path, feeds: Feeds, heads: int) -> Path:
    """onnxruntime's fused operator on the same inputs."""
    node = helper.make_node("MultiHeadAttention", list("qkv"), ["y"], domain="com.microsoft", num_heads=heads)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()]
    graph = helper.make_graph([node], "attention", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, feeds["q"].shape)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9), path)
    return path


def openvino_fused(feeds: Feeds, heads: int, threads: int) -> Peer:
    """OpenVINO's fused operator on the same inputs."""
    import openvino
    from openvino import opset13 as ops

    parameters = [ops.parameter(array.shape, np.float32, name) for name, array in feeds.items()]
    parts = [ops.transpose(ops.reshape(x, [0, 0, heads, -1], special_zero=True), [0, 2, 1, 3]) for x in parameters]
    out = ops.transpose(ops.scaled_dot_product_attention(*parts), [0, 2, 1, 3])
    model = openvino.Model([ops.reshape(out, [0, 0, -1], special_zero=True)], parameters)
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    tensors = [openvino.Tensor(array) for array in feeds.values()]
    return lambda: [request.infer(tensors)[0]]


def measure(tokens: int, threads: int, options: argparse.Namespace, folder: Path) -> list[Any]:
    heads, width, queries = options.heads, options.width, options.queries or tokens
    module, generator = Attention(heads, width).eval(), torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, length, heads * width, generator=generator) for length in (queries, tokens, tokens)]
    feeds = dict(zip("qkv", (tensor.numpy() for tensor in tensors), strict=True))
    path, unfused = folder / f"attention{queries}x{tokens}.onnx", folder / "unfused.toml"
    if not path.exists():
        torch.onnx.export(module, tuple(tensors), path, input_names=list("qkv"), output_names=["y"], dynamo=True, verbose=False)
    unfused.write_text("".join(f'[[pass]]\nname = "{step.name}"\n' for step in Recipe.default().passes if step.name != "fuse-attention"))
    models = {"fused": tcompile.compile(path, threads=threads), "unfused": tcompile.compile(path, threads=threads, recipe=unfused)}
    torch.set_num_threads(threads)

    def sdpa() -> list[np.ndarray]:
        with torch.inference_mode():
            return [torch.nn.functional.scaled_dot_product_attention(*(module.split(x) for x in tensors)).transpose(1, 2).flatten(2).numpy()]

    calls: dict[str, Callable[[], Any]] = {name: lambda model=model: [model(**feeds)] for name, model in models.items()}
    calls |= {
        "torch": sdpa,
        "onnxruntime": prepare("onnxruntime", multi_head(folder / "fused.onnx", feeds, heads), feeds, threads),
        "onnxruntime graph": prepare("onnxruntime", path, feeds, threads),
        "openvino": openvino_fused(feeds, heads, threads),
        "openvino graph": prepare("openvino", path, feeds, threads),
    }
    for name, call in calls.items():
        np.testing.assert_allclose(call()[0], sdpa()[0], rtol=1e-3, atol=1e-4, err_msg=name)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = {name: timing.median * 1e3 for name, timing in interleaved(calls, rounds=options.rounds, clock=clock).items()}
    peers = {"torch": times["torch"], **{name: min(times[name], times[f"{name} graph"]) for name in ("onnxruntime", "openvino")}}
    planned = [f"{model.report()['memory']['workspace_bytes'] / 1e6:.1f}" for model in models.values()]
    figures = [times["fused"], times["unfused"], *peers.values(), times["unfused"] / times["fused"], min(peers.values()) / times["fused"]]
    return [tokens, queries, threads, *(f"{figure:.3g}" for figure in figures), *planned]


def line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="*", type=int, default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--queries", type=int)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--docs", type=Path)
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--window", type=int, default=0)
    masks.add_argument("--strided", type=int, default=0)
    options = parser.parse_args()
    masked = bool(options.window or options.strided)
    if masked and (options.docs or options.queries):
        parser.error("--window and --strided go with neither --docs nor --queries")
    columns = MASKED if masked else COLUMNS
    lines = [line(columns), "|" + "---|" * len(columns)]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for threads in map(int, options.threads.split(",")):
            for tokens in options.tokens:
                lines.append(line(measure_masked(tokens, threads, options) if masked else measure(tokens, threads, options, Path(folder))))
                print(lines[-1], flush=True)
    if options.docs:
        name = "attention" if options.queries is None else f"attention of {options.queries}"
        update(
            options.docs, f"{name}, {vectors()}", "attention.py", environment(["tcompile", "apache-tvm", "torch", "onnxruntime", "openvino"]), lines
        )


if __name__ == "__main__":
    main()
