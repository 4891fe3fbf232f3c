"""One row by weights of every width that no cache holds: the kernels alone, on random codes.

python benchmarks/few_bits.py [--formats fp32,w8,w6,w4,w3,w2,w8a8,w4a8,w2a8] [--width 4096] [--megabytes 64] [--rounds 15]

A call multiplies by every copy of a square weight once, as many as have `--megabytes`, so that none is in a cache when its turn comes. Formats, and a pass over as many bytes by NumPy's dot product,
take turns; processor time of one thread, medians. Groups of 32, no zeros. Of the schedules for one row that are predicted to be fastest (by features alone) the two best are timed, and the better one is shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tcompile.compiler.dialect.weight_only import weight_only_matmul
from tcompile.compiler.timing import interleaved
from tcompile.compiler.tvm import relax, tvm
from tcompile.passes.quantization.weight_only import WEIGHT_ONLY
from tcompile.targets.base import Target
from tcompile.targets.common.fused import analyze
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tcompile.targets.cpu.weight_only import WeightOnly
from tcompile.targets.cpu.weight_only_int8 import WeightOnlyInt8

GROUP = 32


def fused(kind: str, width: int) -> Any:
    """The product as the templates read it."""
    bits, dtype = WEIGHT_ONLY.get(kind, (0, "float32"))
    x = relax.Var("x", relax.TensorType((1, width), dtype))
    if bits:
        weights = [
            relax.Var("w", relax.TensorType((width * bits // 8, width), "uint8")),
            relax.Var("s", relax.TensorType((width // GROUP, width), "float32")),
        ]
        call = weight_only_matmul(x, *weights, bits=bits, group=GROUP)
    else:
        weights = [relax.Var("w", relax.TensorType((width, width), "float32"))]
        call = relax.op.matmul(x, weights[0])
    builder = relax.BlockBuilder()
    with builder.function("main", [x, *weights]):
        builder.emit_func_output(builder.emit(call))
    module = legalize(builder.get())
    (func,) = [each for name, each in module.functions_items() if name.name_hint != "main"]
    return analyze(func)


def calls_of(kind: str, options: argparse.Namespace, target: Target) -> dict[str, tuple[Callable[[], None], int]]:
    """(call, its bytes of weights) of schedules of a format."""
    func, rng = fused(kind, options.width), np.random.default_rng(0)
    template: Any = Gemm() if kind == "fp32" else WeightOnlyInt8() if kind.endswith("a8") else WeightOnly()
    workload = template.workload(func, frozenset([1, 2]))
    space = sorted(template.space(workload, target), key=lambda schedule: template.features(workload, schedule, target).latency_cycles)
    x = tvm.runtime.tensor(
        rng.integers(-127, 128, (1, options.width), np.int8) if kind.endswith("a8") else rng.standard_normal((1, options.width), np.float32)
    )
    out = tvm.runtime.tensor(np.zeros((1, options.width), np.float32))
    found = {}
    for schedule in space[:2]:
        kernel = template.build(func, workload, schedule, target)
        run = tvm.compile(kernel.func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)["f"]
        dtypes = {packing.param: str(kernel.func.params[packing.param].ty.dtype) for packing in kernel.packings}
        copies, size = [], 0
        while size < options.megabytes * 1e6:
            arrays = []
            for packing in kernel.packings:
                if dtypes[packing.param] == "float32":
                    array = rng.standard_normal(packing.shape, np.float32)
                else:
                    info = np.iinfo(dtypes[packing.param])
                    array = rng.integers(info.min, info.max, packing.shape, dtypes[packing.param])
                size += array.nbytes
                arrays.append(tvm.runtime.tensor(array))
            copies.append(arrays)

        def call(run: Any = run, copies: Any = copies) -> None:
            for arrays in copies:
                run(x, *arrays, out)

        found[f"{kind} {schedule}"] = call, size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp32,w8,w6,w4,w3,w2,w8a8,w4a8,w2a8")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    target = Target.parse("cpu")
    calls = {name: pair for kind in options.formats.split(",") for name, pair in calls_of(kind, options, target).items()}
    stream = np.ones(int(options.megabytes * 1e6) // 4, np.float32)
    runs: dict[str, Callable[[], object]] = {name: call for name, (call, _) in calls.items()}
    runs["pass"] = lambda: np.dot(stream, stream)
    times = {name: statistics.median(timing.samples) for name, timing in interleaved(runs, rounds=options.rounds, clock=time.process_time).items()}
    rate = stream.nbytes / times["pass"]
    weights = options.width**2
    print("| format | MB a product | us a product | GB/s | share of a pass | faster than fp32 |\n|---|---|---|---|---|---|")
    base = 0.0
    for kind in options.formats.split(","):
        name = min((each for each in calls if each.split()[0] == kind), key=lambda each: times[each] / calls[each][1])
        size = calls[name][1]
        bits = WEIGHT_ONLY[kind][0] if kind in WEIGHT_ONLY else 0
        each = weights * (bits / 8 + 4 / GROUP) if bits else 4.0 * weights
        took = times[name] * each / size
        base = base or took
        print(
            f"| {kind} | {each / 1e6:.1f} | {took * 1e6:.0f} | {size / times[name] / 1e9:.1f} | {size / times[name] / rate:.2f} | {base / took:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
