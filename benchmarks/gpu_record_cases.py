"""Workloads whose schedules `benchmarks/gpu_records.py` times: kernels of the networks in docs/performance.md, and random ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tcompile.compiler.dialect import attention as attention_dialect
from tcompile.compiler.dialect import grouped as grouped_dialect
from tcompile.compiler.dialect import weight_only as weight_only_dialect
from tcompile.compiler.element_types import FLOAT8, numpy_dtype
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.tvm import relax, tvm
from tcompile.passes.sparsity.patterns import parse

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One operator with constant weights where a network has them. build(emit, *inputs) is its result; arrays: the inputs; reference: the result, of the inputs; tolerance: of the
    difference, over the reference's norm."""

    name: str
    network: str
    arrays: Callable[[], Arrays]
    build: Callable[..., Any]
    reference: Callable[..., np.ndarray]
    precision: str = "fp32"
    tolerance: float = 1e-2

    def program(self) -> Program:
        arrays = self.arrays()
        names = [f"x{index}" for index in range(len(arrays))]
        kinds = [(array.shape, array.dtype.name) for array in arrays]
        variables = [relax.Var(name, relax.TensorType(*kind)) for name, kind in zip(names, kinds, strict=True)]
        builder = relax.BlockBuilder()
        with builder.function("main", variables):
            with builder.dataflow():
                result = builder.emit_output(self.build(builder.emit, *variables))
            builder.emit_func_output(result)
        module = builder.finalize()
        kind = module["main"].ret_ty
        output = TensorSpec("y", tuple(int(dim) for dim in kind.shape), str(kind.dtype))
        specs = [TensorSpec(name, *kind) for name, kind in zip(names, kinds, strict=True)]
        return Program(tvm.IRModule(dict(module.functions_items())), tuple(specs), (output,), Provenance("records", "relax"), {})


def _normal(seed: int, shape: Sequence[int], dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(numpy_dtype(dtype))


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype("float32")


def product(network: str, m: int, k: int, n: int, kind: str) -> Workload:
    """kind: a precision of float32 operands, or a type that lies in memory."""
    integers, dtype = kind == "uint8", kind if kind in ("float16", "bfloat16", FLOAT8) else "float32"

    def weight() -> np.ndarray:
        return np.random.default_rng(1).integers(-127, 128, (k, n), "int8") if integers else _normal(1, (k, n), dtype, k**-0.5)

    return Workload(
        f"product {kind} {m}x{k}x{n}",
        network,
        lambda: [np.random.default_rng(2).integers(0, 256, (m, k), "uint8") if integers else _normal(2, (m, k), dtype)],
        lambda emit, x: relax.op.matmul(x, relax.const(weight(), "int8" if integers else dtype), out_dtype="int32" if integers else "float32"),
        lambda x: _wide(x) @ _wide(weight()),
        kind if kind in ("fp32", "tf32") else "fp32",
        1e-5 if kind == "fp32" else 1e-2,
    )


def zeros(network: str, m: int, k: int, n: int, pattern: str) -> Workload:
    """bfloat16, weights pruned to a pattern."""

    def weight() -> np.ndarray:
        wanted, dense = parse(pattern), _normal(1, (k, n), "float32", k**-0.5)
        return (dense * wanted.mask(np.abs(dense), wanted.level)).astype(numpy_dtype("bfloat16"))

    return Workload(
        f"product bfloat16 {m}x{k}x{n} {pattern}",
        network,
        lambda: [_normal(2, (m, k), "bfloat16")],
        lambda emit, x: relax.op.matmul(x, relax.const(weight(), "bfloat16"), out_dtype="float32"),
        lambda x: _wide(x) @ _wide(weight()),
        "bf16",
    )


def few_bits(network: str, m: int, k: int, n: int, bits: int, precision: str) -> Workload:

    def weight() -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        return [rng.integers(0, 256, (k * bits // 8, n), "uint8"), (rng.uniform(0.5, 1.5, (k // 32, n)) / (4 * k**0.5)).astype("float32")]

    return Workload(
        f"w{bits} {precision} {m}x{k}x{n}",
        network,
        lambda: [_normal(2, (m, k))],
        lambda emit, x: weight_only_dialect.weight_only_matmul(x, *map(relax.const, weight()), bits=bits, group=32),
        lambda x: weight_only_dialect.reference(x, *weight(), bits=bits, group=32),
        precision,
    )


def convolution(
    network: str, size: int, channels: int, features: int, taps: int, stride: int, kind: str, batch: int = 1, groups: int = 1
) -> Workload:
    dtype = kind if kind in ("float16", "bfloat16") else "float32"
    pad = taps // 2

    def weight() -> np.ndarray:
        return _normal(1, (taps, taps, channels // groups, features), dtype, (taps * taps * channels // groups) ** -0.5)

    def reference(image: np.ndarray) -> np.ndarray:
        import torch

        x, w = torch.from_numpy(_wide(image)).permute(0, 3, 1, 2), torch.from_numpy(_wide(weight())).permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(x, w, stride=stride, padding=pad, groups=groups).permute(0, 2, 3, 1).numpy()

    return Workload(
        f"{'depthwise' if groups > 1 else 'conv'} {kind} {batch}x{size}x{size}x{channels} -> {features}, {taps}x{taps} stride {stride}",
        network,
        lambda: [_normal(2, (batch, size, size, channels), dtype)],
        lambda emit, x: relax.op.nn.conv2d(x, relax.const(weight(), dtype), stride, pad, 1, groups, "NHWC", "HWIO", "NHWC", "float32"),
        reference,
        kind if kind in ("fp32", "tf32") else "fp32",
    )


def attention(network: str, heads: int, own: int, queries: int, keys: int, width: int, causal: bool, dtype: str) -> Workload:
    shapes = (1, heads, queries, width), (1, own, keys, width), (1, own, keys, width)
    return Workload(
        f"attention {dtype} {heads}/{own}x{queries}x{keys}x{width}{' causal' if causal else ''}",
        network,
        lambda: [_normal(seed, shape, dtype) for seed, shape in enumerate(shapes, 1)],
        lambda emit, *x: attention_dialect.attention(*x, causal=causal),
        lambda *x: attention_dialect.reference(*map(_wide, x), causal=causal),
        "bf16" if dtype != "float32" else "fp32",
    )


def experts(network: str, rows: int, k: int, n: int, count: int) -> Workload:
    """float32 rows, sorted by expert."""

    def weight() -> np.ndarray:
        return _normal(1, (count, k, n), "float32", k**-0.5)

    def ends() -> np.ndarray:
        return np.array([*sorted(np.random.default_rng(3).integers(0, rows + 1, count - 1)), rows], "int64")

    return Workload(
        f"experts fp32 {rows}x{k}x{n} of {count}",
        network,
        lambda: [_normal(2, (rows, k)), ends()],
        lambda emit, x, ends: grouped_dialect.grouped_matmul(x, relax.const(weight()), ends),
        lambda x, ends: grouped_dialect.reference(x, weight(), ends),
        tolerance=1e-5,
    )


def of_networks() -> Iterator[Workload]:
    """Of those in docs/performance.md."""
    for kind in ("bfloat16", "fp32"):
        for m in (128, 4096):
            yield product("bert-base", m, 768, 768, kind)
            yield product("bert-base", m, 768, 3072, kind)
            yield product("bert-base", m, 3072, 768, kind)
        yield product("vit-s16", 197, 384, 1536, kind)
        for size, channels, features, taps, stride in (
            (56, 64, 64, 3, 1),
            (28, 128, 128, 3, 1),
            (14, 256, 1024, 1, 1),
            (7, 512, 512, 3, 1),
            (56, 256, 512, 1, 2),
        ):
            yield convolution("resnet50", size, channels, features, taps, stride, kind)
        yield convolution("resnet50", 14, 256, 256, 3, 1, kind, batch=32)
    for kind in ("tf32", "float16", "uint8", FLOAT8):
        yield product("bert-base", 128, 768, 3072, kind)
        yield product("bert-base", 4096, 768, 3072, kind)
    for size, channels, taps in ((56, 72, 3), (28, 120, 5), (7, 960, 5)):
        for batch in (1, 32):
            yield convolution("mobilenetv3-l", size, channels, channels, taps, 1, "fp32", batch, channels)
    for m in (1, 16, 128):
        for k, n in ((576, 1536), (1536, 576)):
            yield product("smollm2", m, k, n, "bfloat16")
            yield few_bits("smollm2", m, k, n, 4, "bf16")
            yield few_bits("smollm2", m, k, n, 8, "bf16")
    for heads, own, queries, keys, width, causal in (
        (12, 12, 128, 128, 64, False),
        (6, 6, 197, 197, 64, False),
        (9, 3, 128, 128, 64, True),
        (32, 8, 2048, 2048, 64, False),
    ):
        yield attention("bert-base, vit-s16, smollm2", heads, own, queries, keys, width, causal, "bfloat16")  # fp32 leaves no choice
    yield attention("llama", 16, 16, 4096, 4096, 128, True, "bfloat16")
    yield zeros("bert-base", 4096, 768, 3072, "block64x128:0.5")
    yield zeros("bert-base", 128, 3072, 768, "block64x64:0.75")
    yield zeros("bert-base", 128, 768, 3072, "2:4")
    yield experts("mixtral", 512, 1024, 3584, 8)
    yield experts("mixtral", 16, 1024, 3584, 8)


def at_random(seed: int, count: int) -> Iterator[Workload]:
    """`count` products and convolutions of sizes that are spread evenly on a logarithmic scale, primes and tails among them."""
    generator = random.Random(seed)

    def size(least: int, most: int, step: int = 1) -> int:
        return max(1, round(least * (most / least) ** generator.random() / step)) * step

    kinds = ("bfloat16", "fp32", "tf32", "float16", "uint8", FLOAT8)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if number % 5 == 4:
            kind = kind if kind in ("fp32", "tf32", "float16", "bfloat16") else "bfloat16"
            taps = generator.choice((1, 3, 5))
            yield convolution("random", size(7, 112), size(16, 512, 8), size(16, 512, 8), taps, generator.choice((1, 2)), kind)
        elif number % 5 == 3:
            yield few_bits("random", size(1, 512), size(256, 8192, 32), size(256, 8192), generator.choice((4, 8)), generator.choice(("bf16", "fp32")))
        else:
            yield product("random", size(1, 4096), size(64, 8192, 16 if kind not in ("fp32", "tf32") else 1), size(32, 8192, 1), kind)
