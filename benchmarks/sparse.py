"""Sparse kernels beside dense ones: single products over the share of zeros, and BERT-base as a whole.

python benchmarks/sparse.py [products] [bert] [network] [--threads 1,2] [--rounds 8] [--quiet CMD] [--output FILE.json]

products: 128 x 768 x 3072, fp32 and int8, zeros by single weights, in 4x1 and in 4x16 blocks: the dense kernel, the sparse one, and which of them the compiler takes.
bert: the products of BERT-base's encoder (128 tokens), summed over its layers: dense against 80 % zeros in 4x16 blocks and 90 % single ones, fp32 and int8.
network: BERT-base (batch 1, 128 tokens) end to end, fp32 and int8, dense and sparse.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
from tcompile.compiler.api import compile_program
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.timing import interleaved
from tcompile.compiler.tvm import relax
from tcompile.models.zoo import ZOO
from tcompile.targets.base import Target
from tcompile.targets.cpu import lower

M, K, N = 128, 768, 3072
LEVELS = (0.5, 0.7, 0.8, 0.9)
#: products of the encoder of BERT-base: (K, N) -> how often
LAYERS = {(768, 768): 48, (768, 3072): 12, (3072, 768): 12}
PRODUCTS = ("gemm", "gemm_blocks", "gemm_columns")


@contextmanager
def only(name: str | None) -> Iterator[None]:
    """Compile with one GEMM template, or with all of them."""
    everything = lower.templates
    if name is not None:
        lower.templates = lambda: [template for template in everything() if template.name == name or template.name not in PRODUCTS]
    try:
        yield
    finally:
        lower.templates = everything


def product_program(weight: np.ndarray) -> Program:
    """relu(x [M, K] @ w), of codes u8 x s8 times a scale per output."""
    integer = weight.dtype == np.int8
    k, n = weight.shape
    x = relax.Var("x", relax.TensorType((M, k), "uint8" if integer else "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(weight), out_dtype="int32" if integer else "float32"))
            if integer:
                y = builder.emit(relax.op.multiply(relax.op.astype(y, "float32"), relax.const(np.full(n, 1e-4, "float32"))))
            y = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(y)
    inputs, outputs = (TensorSpec("x", (M, k), str(x.ty.dtype)),), (TensorSpec("y", (M, n), "float32"),)
    return Program(builder.get(), inputs, outputs, Provenance("product", "relax"))


def zeros_in(full: np.ndarray, pattern: tuple[int, int], level: float, rng: np.random.Generator) -> np.ndarray:
    """`full` with a share `level` of its r x c blocks zero."""
    r, c = pattern
    keep = np.kron(rng.random((full.shape[0] // r, full.shape[1] // c)) >= level, np.ones((r, c))).astype(bool)
    return np.where(keep, full, full.dtype.type(0))


def random_product(kind: str, k: int, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Activations [M, k] and a dense weight [k, n]."""
    if kind == "int8":
        return rng.integers(0, 256, (M, k)).astype("uint8"), rng.integers(-127, 128, (k, n)).astype("int8")
    return rng.standard_normal((M, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)


def compiled(weight: np.ndarray, threads: int, name: str | None = None) -> tuple[Any, str]:
    """The compiled product, and the template it runs in."""
    with only(name):
        model = compile_program(product_program(weight), Target.parse("cpu"), CompileOptions(threads=threads))
    (used,) = [kernel["template"] for kernel in model.report()["kernels"] if kernel["template"] in PRODUCTS]
    return model, used


def products(threads: int, rounds: int, pause: Callable[[], Any]) -> list[dict[str, Any]]:
    """One row per kind, pattern and level: microseconds of the dense and the sparse kernel, and the compiler's own choice."""
    rng = np.random.default_rng(0)
    calls: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for kind in ("float32", "int8"):
        x, full = random_product(kind, K, N, rng)
        model, _ = compiled(full, threads)
        calls[kind] = lambda model=model, x=x: model(x)
        for pattern in ((1, 1), (4, 1), (4, 16)):
            sparse = "gemm_blocks" if pattern[1] == 16 else "gemm_columns"
            for level in LEVELS:
                weight = zeros_in(full, pattern, level, rng)
                chosen, used = compiled(weight, threads)
                model = chosen if used == sparse else compiled(weight, threads, sparse)[0]
                row = {
                    "kind": kind,
                    "zeros in": f"{pattern[0]}x{pattern[1]}",
                    "share": level,
                    "sparse kernel": sparse,
                    "chosen": used,
                    "threads": threads,
                }
                rows.append(row)
                calls[str(row)] = lambda model=model, x=x: model(x)
    with pause():
        times = interleaved(calls, rounds=rounds)
    found = []
    for row in rows:
        dense, sparse = (times[key].median * 1e6 for key in (row["kind"], str(row)))
        fastest = "gemm" if dense <= sparse else row["sparse kernel"]
        found.append(row | {"dense us": round(dense), "sparse us": round(sparse), "dense / sparse": round(dense / sparse, 2), "fastest": fastest})
    return found


def bert(threads: int, rounds: int, pause: Callable[[], Any]) -> list[dict[str, Any]]:
    """Milliseconds summed over the 72 products of the encoder."""
    rng = np.random.default_rng(0)
    calls: dict[str, Callable[[], object]] = {}
    variants = [("dense", (1, 1), 0.0), ("block4x16:0.8", (4, 16), 0.8), ("unstructured:0.9", (1, 1), 0.9)]
    for kind in ("float32", "int8"):
        for k, n in LAYERS:
            x, full = random_product(kind, k, n, rng)
            for name, pattern, level in variants:
                model, _ = compiled(zeros_in(full, pattern, level, rng) if level else full, threads)
                calls[f"{kind} {name} {k} {n}"] = lambda model=model, x=x: model(x)
    with pause():
        times = interleaved(calls, rounds=rounds)
    rows = []
    for kind in ("float32", "int8"):
        total = {name: sum(count * times[f"{kind} {name} {k} {n}"].median for (k, n), count in LAYERS.items()) for name, _, _ in variants}
        rows += [
            {"kind": kind, "zeros": name, "threads": threads, "ms": round(ms * 1e3, 2), "times as fast as dense": round(total["dense"] / ms, 2)}
            for name, ms in total.items()
        ]
    return rows


def network(threads: int, rounds: int, pause: Callable[[], Any]) -> list[dict[str, Any]]:
    """BERT-base: milliseconds end to end, and of its products by constant weights."""
    entry = ZOO["bert-base"]
    feeds = entry.example_inputs()
    shapes = {key: tuple(value.shape) for key, value in feeds.items()}
    variants: dict[str, dict[str, Any]] = {
        "fp32 dense": {},
        "fp32 unstructured:0.9": {"sparsity": "unstructured:0.9"},
        "fp32 block4x16:0.8": {"sparsity": "block:0.8"},
        "int8 dense": {"quantize": "int8"},
        "int8 block4x16:0.8": {"quantize": "int8", "sparsity": "block:0.8"},
    }
    models = {}
    for name, options in variants.items():
        start = time.perf_counter()
        data = {"calibration": [feeds]} if "quantize" in options else {}
        models[name] = tcompile.compile(str(entry.onnx_path()), shapes=shapes, threads=threads, **options, **data)
        print(f"compiled {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        models[name](**feeds)
    with pause():
        times = interleaved({name: lambda model=model: model(**feeds) for name, model in models.items()}, rounds=rounds)
    rows = []
    for name, model in models.items():
        base = times["fp32 dense" if name.startswith("fp32") else "int8 dense"].median
        rows.append(
            {
                "network": name,
                "threads": threads,
                "ms": round(times[name].median * 1e3, 2),
                "times as fast as dense": round(base / times[name].median, 2),
            }
            | {"weights_mb": round(model.report()["weights_bytes"] / 1e6, 1)}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print(f"| {' | '.join(keys)} |\n|{'---|' * len(keys)}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(key, '')) for key in keys)} |", flush=True)


PARTS = {"products": products, "bert": bert, "network": network}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quiet", help="command that keeps the machine free while it runs the command behind it; used around timing only")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    @contextmanager
    def pause() -> Iterator[None]:
        if options.quiet is None:
            yield
            return
        with subprocess.Popen([options.quiet, "cat"], stdin=subprocess.PIPE) as keeper:
            time.sleep(1)
            yield
            assert keeper.stdin is not None
            keeper.stdin.close()

    found: dict[str, Any] = {}
    for part in options.parts:
        rows = []
        for threads in options.threads.split(","):
            rows += PARTS[part](int(threads), options.rounds, pause)
        show(rows)
        found[part] = rows
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
