"""Decoding over caches of codes, and over a prefix that the sequences of a batch share, beside the same in float32 and the peers, interleaved.

python benchmarks/attention_caches.py [codes|prefix] [--queries 1,4] [--keys 1024,4096] [--heads 32] [--kv-heads 8] [--width 128] [--rounds 10] [--clock wall|cpu]

codes: q [1, heads, queries, width] over keys and values [1, kv heads, keys, width], in float32, as int8 and as two codes of 4 bits a byte, a scale per channel; onnxruntime's
GroupQueryAttention with the same caches, which it extends in place by the queries' own keys. Keys and values come from memory: copies of 96 MB take turns. GB/s are those of codes.
prefix: 8 sequences, 1024 keys that they share and 64 of their own; ours with and without the pass `shared-prefix`, PyTorch over caches that hold the prefix eight times, and with the
concatenation that makes them. One thread; microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tcompile
import torch
from attention import line
from onnx import TensorProto, helper
from tcompile.compiler.dialect.attention import reference
from tcompile.compiler.recipe import Recipe
from tcompile.compiler.timing import interleaved
from tcompile.compiler.weights import aligned

#: bytes of caches that take turns
COLD = 96 << 20
FORMS = {"fp32": 32, "int8": 8, "int4": 4}
BATCH, PREFIX, SUFFIX = 8, 1024, 64
Options = argparse.Namespace


def codes(bits: int, keys: int, options: Options, random: np.random.Generator) -> np.ndarray:
    """Keys or values [1, kv heads, keys, width] as they lie in memory."""
    shape = (1, options.kv_heads, keys, options.width * (4 if bits == 4 else 8) // 8)
    if bits == 32:
        return aligned(random.standard_normal(shape, np.float32))
    return aligned(random.integers(0, 256, shape, np.uint8) if bits == 4 else random.integers(-127, 128, shape, np.int8))


def floats(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    if codes.dtype == np.float32:
        return codes
    if codes.dtype == np.uint8:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).astype(np.int8) - np.int8(8)
    return codes * scales


def graph_of(bits: int, queries: int, keys: int, scales: np.ndarray, options: Options) -> onnx.ModelProto:
    """Attention over dequantised inputs."""
    kind = {32: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
    width = options.width if bits != 4 else options.width // 2
    q = helper.make_tensor_value_info("q", TensorProto.FLOAT, (1, options.heads, queries, options.width))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, options.heads, queries, options.width))
    caches = [helper.make_tensor_value_info(name, kind, (1, options.kv_heads, keys, width)) for name in "kv"]
    constants = {
        "scales": scales,
        "fifteen": np.array(15, np.uint8),
        "four": np.array(4, np.uint8),
        "eight": np.array(8, np.float32),
        "last": np.array([4], np.int64),
        "shape": np.array([1, options.kv_heads, keys, options.width], np.int64),
    }
    nodes = []
    for name in "kv" if bits < 32 else "":
        source = name
        if bits == 4:
            nodes += [
                helper.make_node("BitwiseAnd", [name, "fifteen"], [f"{name}low"]),
                helper.make_node("BitShift", [name, "four"], [f"{name}high"], direction="RIGHT"),
                helper.make_node("Unsqueeze", [f"{name}low", "last"], [f"{name}low5"]),
                helper.make_node("Unsqueeze", [f"{name}high", "last"], [f"{name}high5"]),
                helper.make_node("Concat", [f"{name}low5", f"{name}high5"], [f"{name}both"], axis=4),
                helper.make_node("Reshape", [f"{name}both", "shape"], [f"{name}codes"]),
            ]
            source = f"{name}codes"
        nodes.append(helper.make_node("Cast", [source], [f"{name}float"], to=TensorProto.FLOAT))
        if bits == 4:
            nodes.append(helper.make_node("Sub", [f"{name}float", "eight"], [f"{name}centred"]))
        nodes.append(helper.make_node("Mul", [f"{name}centred" if bits == 4 else f"{name}float", "scales"], [f"{name}value"]))
    operands = ["q", *(["k", "v"] if bits == 32 else ["kvalue", "vvalue"])]
    nodes.append(helper.make_node("Attention", operands, ["y"]))
    used = {name for node in nodes for name in node.input}
    initial = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    return helper.make_model(
        helper.make_graph(nodes, "decode", [q, *caches], [out], initial), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )


def group_query(
    bits: int, queries: int, keys: int, scales: np.ndarray, caches: list[list[np.ndarray]], q: np.ndarray, options: Options
) -> Callable[[], Any]:
    """onnxruntime's operator; its results are its own caches."""
    heads, shared, width = options.heads, options.kv_heads, options.width
    kind = {32: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
    cache = list(caches[0][0].shape)
    sizes = {"q": [1, queries, heads * width], "k": [1, queries, shared * width], "v": [1, queries, shared * width]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    inputs += [helper.make_tensor_value_info(name, kind, cache) for name in ("pk", "pv")]
    inputs += [helper.make_tensor_value_info("seen", TensorProto.INT32, [1]), helper.make_tensor_value_info("total", TensorProto.INT32, [])]
    names, attributes = ["q", "k", "v", "pk", "pv", "seen", "total"], {}
    if bits < 32:
        names += [""] * 5 + ["scales", "scales"]
        attributes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes["q"])]
    outputs += [helper.make_tensor_value_info(name, kind, cache) for name in ("nk", "nv")]
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "nk", "nv"], domain="com.microsoft", num_heads=heads, kv_num_heads=shared, **attributes
    )
    constants = [onnx.numpy_helper.from_array(scales, "scales")] if bits < 32 else []
    graph = helper.make_graph([node], "decode", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=9)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    new = {name: np.zeros(size, np.float32) for name, size in sizes.items()} | {
        "q": np.ascontiguousarray(q.transpose(0, 2, 1, 3).reshape(sizes["q"]))
    }
    bindings = []
    for pair in caches:
        binding = session.io_binding()
        for name, array in (*new.items(), ("seen", np.array([keys - 1], np.int32)), ("total", np.array(keys, np.int32))):
            binding.bind_cpu_input(name, array)
        for past, present, array in zip(("pk", "pv"), ("nk", "nv"), pair, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        binding.bind_output("y")
        bindings.append(binding)
    turns = itertools.cycle(bindings)
    return lambda: session.run_with_iobinding(next(turns))


def measure_codes(queries: int, keys: int, options: Options, clock: Callable[[], float]) -> list[list[Any]]:
    random = np.random.default_rng(0)
    q = aligned(random.standard_normal((1, options.heads, queries, options.width), np.float32))
    calls: dict[str, Callable[[], Any]] = {}
    size = {}
    for form, bits in FORMS.items():
        scales = (random.uniform(0.5, 1.5, (1, options.kv_heads, 1, options.width)) * {32: 1, 8: 0.02, 4: 0.3}[bits]).astype(np.float32)
        first = [codes(bits, keys, options, random) for _ in "kv"]
        size[form] = 2 * first[0].nbytes
        caches = [first] + [[aligned(array.copy()) for array in first] for _ in range(COLD // size[form])]
        model = tcompile.compile(graph_of(bits, queries, keys, scales, options), threads=1)
        np.testing.assert_allclose(model(q, *first), reference(q, *(floats(array, scales) for array in first)), rtol=1e-3, atol=1e-4)
        turns = itertools.cycle(caches)
        calls[form] = lambda model=model, turns=turns: model(q, *next(turns))
        calls[f"onnxruntime {form}"] = group_query(bits, queries, keys, scales, caches, q, options)
    times = {name: timing.median * 1e6 for name, timing in interleaved(calls, rounds=options.rounds, clock=clock).items()}
    return [
        [
            queries,
            keys,
            form,
            f"{times[form]:.0f}",
            f"{size[form] / times[form] / 1e3:.1f}",
            f"{times['fp32'] / times[form]:.2f}",
            f"{times[f'onnxruntime {form}']:.0f}",
            f"{times[f'onnxruntime {form}'] / times[form]:.2f}",
        ]
        for form in FORMS
    ]


class Shared(torch.nn.Module):
    def forward(self, q, kp, vp, ks, vs):
        k, v = (torch.cat([x.expand(q.shape[0], -1, -1, -1), y], 2) for x, y in ((kp, ks), (vp, vs)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def measure_prefix(queries: int, options: Options, clock: Callable[[], float]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, options.heads, queries, options.width)]
    shapes += [(lead, options.kv_heads, length, options.width) for lead, length in ((1, PREFIX), (1, PREFIX), (BATCH, SUFFIX), (BATCH, SUFFIX))]
    tensors = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    arrays = [aligned(tensor.numpy()) for tensor in tensors]
    module = Shared().eval()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "copied.toml"
        recipe.write_text("".join(f'[[pass]]\nname = "{step.name}"\n' for step in Recipe.default().passes if step.name != "shared-prefix"))
        models = {
            "ours": tcompile.compile(module, example_inputs=tensors, threads=1),
            "copied": tcompile.compile(module, example_inputs=tensors, threads=1, recipe=recipe),
        }
    torch.set_num_threads(1)
    q, kp, vp, ks, vs = tensors
    k, v = (torch.cat([x.expand(BATCH, -1, -1, -1), y], 2) for x, y in ((kp, ks), (vp, vs)))

    def attend(*given: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(*given, enable_gqa=True)

    def whole() -> torch.Tensor:
        with torch.inference_mode():
            return module(*tensors)

    calls: dict[str, Callable[[], Any]] = {name: lambda model=model: model(*arrays) for name, model in models.items()}
    calls |= {"torch": lambda: attend(q, k, v), "torch, concatenated in the call": whole}
    for call in calls.values():
        np.testing.assert_allclose(np.asarray(call()), whole().numpy(), rtol=1e-3, atol=1e-4)
    times = {name: timing.median * 1e6 for name, timing in interleaved(calls, rounds=options.rounds, clock=clock).items()}
    return [queries, *(f"{value:.0f}" for value in times.values()), *(f"{value / times['ours']:.2f}" for value in list(times.values())[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("codes", "prefix"), nargs="?", default="codes")
    parser.add_argument("--queries", default="1,4")
    parser.add_argument("--keys", default="1024,4096")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    queries = [int(count) for count in options.queries.split(",")]
    if options.what == "prefix":
        heads = ["queries", "ours", "copied", "torch", "torch, concatenated in the call", "copied / ours", "torch / ours", "concatenated / ours"]
    else:
        heads = ["queries", "keys", "caches", "us", "GB/s", "fp32 / this", "onnxruntime", "onnxruntime / ours"]
    print(line(heads), "|" + "---|" * len(heads), sep="\n", flush=True)
    for count in queries:
        if options.what == "prefix":
            print(line(measure_prefix(count, options, clock)), flush=True)
            continue
        for keys in map(int, options.keys.split(",")):
            for row in measure_codes(count, keys, options, clock):
                print(line(row), flush=True)


if __name__ == "__main__":
    main()
