"""Attention alone beside its unfused graph and the peers, interleaved.

python benchmarks/attention.py [TOKENS ...] [--heads 12] [--width 64] [--threads 1,2] [--rounds 10]

One softmax attention over q, k, v [1, tokens, heads * width], exported to ONNX as matrix products and a softmax: compiled as it is, compiled without `fuse-attention`,
onnxruntime on the same file, and PyTorch's scaled_dot_product_attention. The last columns are the bytes planned for intermediate tensors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import tcompile
import torch
from tcompile.compiler.peers import prepare
from tcompile.compiler.recipe import Recipe
from tcompile.compiler.timing import interleaved


class Attention(torch.nn.Module):
    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads, self.width = heads, width

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def forward(self, q, k, v):
        q, k, v = self.split(q), self.split(k), self.split(v)
        return (((q @ k.transpose(-1, -2)) * self.width**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def measure(tokens: int, heads: int, width: int, threads: int, rounds: int, folder: Path) -> str:
    module, generator = Attention(heads, width).eval(), torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, tokens, heads * width, generator=generator) for _ in range(3)]
    feeds = dict(zip("qkv", (tensor.numpy() for tensor in tensors), strict=True))
    path, unfused = folder / f"attention{tokens}.onnx", folder / "unfused.toml"
    if not path.exists():
        torch.onnx.export(module, tuple(tensors), path, input_names=list("qkv"), output_names=["y"], dynamo=True, verbose=False)
    unfused.write_text("".join(f'[[pass]]\nname = "{step.name}"\n' for step in Recipe.default().passes if step.name != "fuse-attention"))
    models = {"fused": tcompile.compile(path, threads=threads), "unfused": tcompile.compile(path, threads=threads, recipe=unfused)}
    torch.set_num_threads(threads)

    def sdpa() -> torch.Tensor:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(*(module.split(x) for x in tensors)).transpose(1, 2).flatten(2)

    calls = {name: lambda model=model: model(**feeds) for name, model in models.items()}
    calls |= {"torch": sdpa, "onnxruntime": prepare("onnxruntime", path, feeds, threads)}
    for name, model in models.items():
        np.testing.assert_allclose(model(**feeds), sdpa().numpy(), rtol=1e-3, atol=1e-5, err_msg=name)
    times = {name: timing.median * 1e3 for name, timing in interleaved(calls, rounds=rounds).items()}
    ratios = [f"{times[name] / times['fused']:.2f}" for name in ("unfused", "torch", "onnxruntime")]
    planned = [f"{model.report()['memory']['workspace_bytes'] / 1e6:.1f}" for model in models.values()]
    return "| " + " | ".join([str(tokens), str(threads), *(f"{time:.2f}" for time in times.values()), *ratios, *planned]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokens", nargs="*", type=int, default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(
        "| tokens | threads | fused ms | unfused | torch | onnxruntime | unfused / fused | torch / fused | onnxruntime / fused | planned MB fused | unfused |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for threads in map(int, options.threads.split(",")):
            for tokens in options.tokens:
                print(measure(tokens, options.heads, options.width, threads, options.rounds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
