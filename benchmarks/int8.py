"""Integer and weight-only kernels beside our float32 kernels, onnxruntime, OpenVINO and oneDNN (`int8_rivals.py`), interleaved, one thread.

python benchmarks/int8.py prepare DIR [NAME ...]     compile ours and write the peers' models
python benchmarks/int8.py time DIR [--rounds 10]     time what is there; prints a Markdown table

Weights are what `--quantize int8` makes of normally distributed ones for the target: without VNNI such whose sums fit 16 bits, for the peers, too. With `--eight-bits` the largest of a
channel is 127 there as well, as in the graphs of other tools; sums of peers may saturate then.

GEMM: u8 x s8, scale and bias to float32 (onnxruntime: MatMulIntegerToFloat). Convolution: u8 x s8, bias, ReLU, requantised to u8 (onnxruntime: QLinearConv).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from int8_rivals import BYTES, FLOATS, ONE, STEP, graph, onednn, qdq
from onnx import helper
from tcompile.compiler.api import build_artifact
from tcompile.compiler.artifact_writer import write
from tcompile.compiler.dialect.weight_only import weight_only_matmul
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.peers import prepare as prepared
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.runtime import load
from tcompile.compiler.timing import interleaved
from tcompile.compiler.tvm import relax
from tcompile.passes.quantization.formats import GroupedInt
from tcompile.passes.quantization.integers import weight_codes
from tcompile.targets.base import Target

op = relax.op
#: other engines' integer kernels
RIVALS = ["ort int8", "ov int8", "onednn int8"]
RNG = np.random.default_rng(0)

GEMMS = [(128, 768, 768), (128, 768, 3072), (128, 3072, 768), (197, 384, 1536), (1, 768, 3072), (1, 4096, 4096)]
#: (height, Ci, Co, kernel, stride, padding, groups)
CONVOLUTIONS = {
    "stem 7x7/2": (224, 3, 64, 7, 2, 3, 1),
    "3x3 64@56": (56, 64, 64, 3, 1, 1, 1),
    "3x3 128@28": (28, 128, 128, 3, 1, 1, 1),
    "3x3 512@7": (7, 512, 512, 3, 1, 1, 1),
    "1x1 256-64@56": (56, 256, 64, 1, 1, 0, 1),
    "1x1 64-256@56": (56, 64, 256, 1, 1, 0, 1),
    "1x1/2 1024-2048@14": (14, 1024, 2048, 1, 2, 0, 1),
    "dw 3x3 72@56": (56, 72, 72, 3, 1, 1, 72),
    "dw 5x5 120@28": (28, 120, 120, 5, 1, 2, 120),
    "dw 3x3 960@7": (7, 960, 960, 3, 1, 1, 960),
}


def codes(short: bool, *shape: int) -> np.ndarray:
    return weight_codes(RNG.standard_normal(shape).astype(np.float32), short).codes


def constant(array: np.ndarray) -> Any:
    return relax.const(np.ascontiguousarray(array), str(array.dtype))


@dataclass(frozen=True)
class Contest:
    """One workload: our programs by name (body of one input), the peers' ONNX graphs by name, shape of the input, what oneDNN gets."""

    shape: tuple[int, ...]
    ours: dict[str, tuple[str, Callable[[Any, Any], Any]]]
    peers: dict[str, onnx.ModelProto]
    layer: dict[str, np.ndarray]


def program(shape: tuple[int, ...], dtype: str, body: Callable[[Any, Any], Any]) -> Program:
    x = relax.Var("x", relax.TensorType(shape, dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, x))
        builder.emit_func_output(out)
    kind = builder.get()["main"].ret_ty
    outputs = (TensorSpec("y", tuple(int(dim) for dim in kind.shape), str(kind.dtype)),)
    return Program(builder.get(), (TensorSpec("x", shape, dtype),), outputs, Provenance("benchmark", "relax"))


def gemm(short: bool, m: int, k: int, n: int) -> Contest:
    w, scale, bias = codes(short, k, n), RNG.uniform(1e-5, 1e-4, n).astype(np.float32), RNG.standard_normal(n).astype(np.float32)
    real = w.astype(np.float32) * scale

    def integer(emit: Any, x: Any) -> Any:
        y = emit(op.astype(emit(op.matmul(x, constant(w), out_dtype="int32")), "float32"))
        return op.add(emit(op.multiply(y, constant(scale))), constant(bias))

    def floats(emit: Any, x: Any) -> Any:
        return op.add(emit(op.matmul(x, constant(real))), constant(bias))

    def weight_only(bits: int) -> Callable[[Any, Any], Any]:
        made = GroupedInt(bits, 64)
        encoded = made.encode(real)
        packed, scales = constant(made.pack(encoded.codes)), constant(encoded.scale[:, 0])
        return lambda emit, x: op.add(emit(weight_only_matmul(x, packed, scales, bits=bits, group=64)), constant(bias))

    integers = {"w": w, "one": np.asarray(ONE), "s": scale, "zx": np.uint8(0), "zw": np.zeros(n, np.int8), "b": bias}
    fused = helper.make_node("MatMulIntegerToFloat", ["x", "w", "one", "s", "zx", "zw", "b"], ["y"], domain="com.microsoft")
    nodes, layer = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])], {"w": w, "scale": scale, "b": bias}
    pair, weights = qdq(layer, {})
    peers = {
        "ort int8": graph([fused], (m, k), (BYTES, FLOATS), integers),
        "ov int8": graph(pair, (m, k), (BYTES, FLOATS), weights),
        "ort fp32": graph(nodes, (m, k), (FLOATS, FLOATS), {"w": real, "b": bias}),
    }
    ours = {"int8": ("uint8", integer), "fp32": ("float32", floats), "w8": ("float32", weight_only(8)), "w4": ("float32", weight_only(4))}
    return Contest((m, k), ours, peers, layer)


def convolution(short: bool, size: int, ci: int, co: int, k: int, stride: int, pad: int, groups: int) -> Contest:
    w, scale = codes(short and groups < ci, co, ci // groups, k, k), RNG.uniform(1e-5, 1e-4, co).astype(np.float32)
    bias = RNG.integers(-5000, 5000, co).astype(np.int32)
    real = w.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    shape = (1, size, size, ci)

    def conv(emit: Any, x: Any, weight: np.ndarray, out: str) -> Any:
        hwio = constant(weight.transpose(2, 3, 1, 0))
        return emit(op.nn.conv2d(x, hwio, stride, pad, 1, groups, "NHWC", "HWIO", "NHWC", out))

    def integer(emit: Any, x: Any) -> Any:
        y = emit(op.add(conv(emit, x, w, "int32"), constant(bias)))
        y = emit(op.nn.relu(emit(op.multiply(emit(op.astype(y, "float32")), constant(scale * np.float32(100))))))
        return op.astype(emit(op.clip(emit(op.round(y)), 0, 255)), "uint8")

    def floats(emit: Any, x: Any) -> Any:
        return op.nn.relu(emit(op.add(conv(emit, x, real, "float32"), constant(bias.astype(np.float32) * scale))))

    names = ["x", "one", "zx", "w", "s", "zw", "sy", "zy", "b"]
    attrs = {"strides": [stride] * 2, "pads": [pad] * 4, "group": groups}
    weights = {
        "one": np.asarray(ONE),
        "zx": np.uint8(0),
        "w": w,
        "s": scale,
        "zw": np.zeros(co, np.int8),
        "sy": np.asarray(STEP),
        "zy": np.uint8(0),
        "b": bias,
    }
    channels_first, layer = (1, ci, size, size), {"w": w, "scale": scale, "b": bias.astype(np.float32) * scale}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["p"], **attrs), helper.make_node("Relu", ["p"], ["y"])]
    pair, linear = qdq(layer, attrs)
    peers = {
        "ort int8": graph([helper.make_node("QLinearConv", names, ["y"], **attrs)], channels_first, (BYTES, BYTES), weights),
        "ov int8": graph(pair, channels_first, (BYTES, BYTES), linear),
        "ort fp32": graph(nodes, channels_first, (FLOATS, FLOATS), {"w": real, "b": layer["b"]}),
    }
    ours = {"int8": ("uint8", integer), "fp32": ("float32", floats)}
    return Contest(shape, ours, peers, layer | {"window": np.array([stride, pad, groups])})


def contests(short: bool) -> dict[str, Callable[[], Contest]]:
    """By name; short: weights whose sums fit 16 bits."""
    found: dict[str, Callable[[], Contest]] = {f"gemm {m}x{k}x{n}": lambda size=(m, k, n): gemm(short, *size) for m, k, n in GEMMS}
    return found | {name: lambda numbers=numbers: convolution(short, *numbers) for name, numbers in CONVOLUTIONS.items()}


def prepare(folder: Path, names: list[str], target: Target, eight_bits: bool) -> None:
    for name, make in contests("int8" not in target.formats and not eight_bits).items():
        if names and not any(text in name for text in names):
            continue
        place = folder / name.replace("/", "_")
        place.mkdir(parents=True, exist_ok=True)
        contest = make()
        for kind, (dtype, body) in contest.ours.items():
            artifact = build_artifact(program(contest.shape, dtype, body), target, CompileOptions(threads=1))
            write(artifact, place / f"{kind}.tcm")
            for entry in artifact.report["kernels"]:
                print(f"{name:22} {kind:5} {entry['template']:15} {entry['schedule']:60} {entry['predicted_us']}", flush=True)
        for kind, model in contest.peers.items():
            onnx.save(model, str(place / f"{kind}.onnx"))
        np.savez(place / "onednn int8.npz", **contest.layer)  # pyright: ignore[reportArgumentType]


def contestants(place: Path) -> dict[str, Callable[[], object]]:
    """What `prepare` left in a folder, ready to run."""
    found: dict[str, Callable[[], object]] = {}
    for path in sorted(place.glob("*.tcm")):
        model = load(path, threads=1)
        spec = model.inputs[0]
        x = RNG.integers(0, 256, [int(dim) for dim in spec.shape]).astype(spec.dtype)
        found[path.stem] = lambda model=model, x=x: model(x)
        if path.stem == "int8":
            image = x if x.ndim == 2 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    for path in sorted(place.glob("*.onnx")):
        engine = "openvino" if path.stem.startswith("ov") else "onnxruntime"
        found[path.stem] = prepared(engine, path, {"x": image if "int8" in path.stem else image.astype(np.float32)}, 1)
    found["onednn int8"] = onednn(place / "onednn int8.npz", image)
    agree(found)
    return found


def agree(found: dict[str, Callable[[], object]]) -> None:
    """Raises ValueError where an engine's result is not ours: all have the same inputs and weights."""
    ours = np.asarray(found["int8"]()).astype(np.float64)
    for name in RIVALS:
        result: Any = found[name]()
        result = np.asarray(result[0] if isinstance(result, list) else result).astype(np.float64)
        result = result if result.ndim == 2 else result.transpose(0, 2, 3, 1)
        if np.abs(result - ours).max() > max(1.0, 1e-4 * np.abs(ours).max()):
            raise ValueError(f"{name} is {np.abs(result - ours).max()} off")


def time_all(folder: Path, rounds: int) -> None:
    columns = ["int8", "fp32", "w8", "w4", *RIVALS, "ort fp32"]
    print(f"| median us | {' | '.join(columns)} | fp32 / int8 | fastest int8 peer / int8 |\n|---|{'---|' * (len(columns) + 2)}")
    for place in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        times = {name: timing.median * 1e6 for name, timing in interleaved(contestants(place), rounds=rounds).items()}
        cells = [f"{times[name]:.0f}" if name in times else "" for name in columns]
        print(
            f"| {place.name} | {' | '.join(cells)} | {times['fp32'] / times['int8']:.2f} | {min(times[name] for name in RIVALS) / times['int8']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "time"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="parts of names of workloads")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--eight-bits", action="store_true", help="weights of 8 bits whether their sums fit 16 bits or not")
    options = parser.parse_args()
    if options.action == "prepare":
        prepare(options.folder, options.names, Target.parse(options.target), options.eight_bits)
    else:
        time_all(options.folder, options.rounds)


if __name__ == "__main__":
    main()
