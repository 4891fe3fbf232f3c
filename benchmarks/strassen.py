"""Products of float32 in seven halves instead of eight (`targets/cpu/gemm_strassen.py`) beside the direct kernel: time, and the rounding error of both and of other engines.

python benchmarks/strassen.py [MxKxN ...] [--threads 1] [--rounds 30] [--docs docs/performance.md]

Kernels alone, weights cold, each with the schedule that the cost model chooses for it; interleaved, medians. The template is asked as on a machine that starts one multiply-add of 512 bits in a cycle,
so that it takes part where it is not offered, too. Errors: root of the mean square over that of the result, to float64, of normally distributed numbers; direct: the kernel that is chosen without it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import helper, numpy_helper
from page import environment, update, vectors
from tcompile.autotune.corpus_workloads import gemm
from tcompile.autotune.learned import default_model
from tcompile.autotune.measure import bench, measure
from tcompile.compiler.peers import prepare
from tcompile.targets.base import Target
from tcompile.targets.cpu.gemm_strassen import GemmStrassen
from tcompile.targets.cpu.tasks import tasks, with_cores

#: of BERT-base, SmolLM2, ViT-S, T5, and BERT-base and ViT-S with batch 8
SHAPES = (
    *("128x768x768", "128x768x2304", "128x768x3072", "128x3072x768", "128x576x1536", "128x1536x576", "128x576x49152", "197x384x1152"),
    *("197x384x1536", "197x1536x384", "128x512x512", "1024x768x3072", "1024x3072x768", "1576x384x1536"),
)
PEERS = ("onnxruntime", "openvino")


def error(found: np.ndarray, want: np.ndarray) -> str:
    return f"{np.sqrt(np.mean((found - want) ** 2) / np.mean(want**2)):.1e}"


def row(shape: str, target: Target, rounds: int) -> list[str]:
    """One line of the table."""
    m, k, n = map(int, shape.split("x"))
    (task,) = tasks(gemm(m, k, n, "none"), target)
    rng = np.random.default_rng(0)
    x, w, b = inputs = [rng.standard_normal(operand.shape, np.float32) for operand in task.operands[:-1]]
    want = x.astype(np.float64) @ w + b
    model, contestants = default_model(), []
    for fast in (False, True):
        candidates = [each for each in task.candidates if (each.template == GemmStrassen.name) == fast]
        chosen, _ = model.choose(candidates, task.machine)
        arguments, constant = task.arguments(chosen, inputs)
        contestants.append(bench(task.compile(chosen), arguments, constant, task.output()))
    direct, seven = measure(contestants, threads=target.cores, rounds=rounds)
    errors = [error(each.output, want) for each in contestants]
    with tempfile.TemporaryDirectory() as folder:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
        values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name, size in (("x", [m, k]), ("y", [m, n]))]
        graph = helper.make_graph(nodes, "product", values[:1], values[1:], [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")])
        path = Path(folder) / "product.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        errors += [error(prepare(peer, path, {"x": x}, target.cores)()[0], want) for peer in PEERS]  # pyright: ignore[reportIndexIssue]
    ratio = median(ours / theirs for ours, theirs in zip(seven.samples, direct.samples, strict=True))
    rate = 2 * m * k * n / seven.median_us / 1e3
    return [shape, f"{direct.median_us:.0f}", f"{seven.median_us:.0f}", f"{ratio:.3f}", f"{rate:.0f}", *errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="MxKxN")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    target = with_cores(replace(Target.parse("cpu"), fma_per_cycle=1.0), options.threads)
    head = [
        "M x K x N",
        "direct us",
        "seven products us",
        "seven / direct",
        "GFLOP/s",
        "error, direct",
        "error, seven",
        *(f"error, {peer}" for peer in PEERS),
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for shape in options.shapes:
        lines.append(f"| {' | '.join(row(shape, target, options.rounds))} |")
        print(lines[-1], flush=True)
    if options.docs:
        update(options.docs, f"seven products, {vectors()}", "strassen.py", environment(["tcompile", "apache-tvm", "onnxruntime", "openvino"]), lines)


if __name__ == "__main__":
    main()
