"""How long import takes, from file to Program. Prints a table, or JSON with --json; no test, as it depends on the machine.

python benchmarks/import_speed.py [--network bert-base] [--nodes 1000 3000 10000] [--rounds 3] [--json]

    branches      a chain with a branch at every fourth node, which is added back
    transformer   encoder layers of products, softmax, normalization and activation, with weights of a few elements
    NETWORK       of the zoo, exported first where needed; bar: 3 s for bert-base

Time should be linear in the nodes; bar: 30 s for 10,000. CPU time of the process is given beside wall time: on a busy machine it is the one to read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tcompile.compiler.api import import_model
from tcompile.models.zoo import ZOO

WIDTH = 8


def branches(count: int) -> onnx.ModelProto:
    nodes, value = [], "x"
    while len(nodes) < count:
        at = len(nodes)
        nodes += [
            helper.make_node("Relu", [value], [f"a{at}"]),
            helper.make_node("Sigmoid", [f"a{at}"], [f"b{at}"]),
            helper.make_node("Mul", [f"a{at}", f"b{at}"], [f"c{at}"]),
            helper.make_node("Add", [f"c{at}", value], [f"d{at}"]),
        ]
        value = f"d{at}"
    return _model(nodes, value, {})


def transformer(count: int) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    nodes, weights, value = [], {}, "x"

    def product(source: str, name: str) -> str:
        weights[f"{name}_w"] = generator.standard_normal((WIDTH, WIDTH), dtype=np.float32)
        weights[f"{name}_b"] = np.zeros(WIDTH, np.float32)
        nodes.append(helper.make_node("MatMul", [source, f"{name}_w"], [f"{name}_m"]))
        nodes.append(helper.make_node("Add", [f"{name}_m", f"{name}_b"], [name]))
        return name

    while len(nodes) < count:
        at = len(nodes)
        q, k, v = (product(value, f"{part}{at}") for part in "qkv")
        nodes.append(helper.make_node("Transpose", [k], [f"t{at}"], perm=[0, 2, 1]))
        nodes.append(helper.make_node("MatMul", [q, f"t{at}"], [f"s{at}"]))
        nodes.append(helper.make_node("Softmax", [f"s{at}"], [f"p{at}"], axis=-1))
        nodes.append(helper.make_node("MatMul", [f"p{at}", v], [f"o{at}"]))
        nodes.append(helper.make_node("Add", [product(f"o{at}", f"proj{at}"), value], [f"r{at}"]))
        weights[f"g{at}"], weights[f"h{at}"] = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
        nodes.append(helper.make_node("LayerNormalization", [f"r{at}", f"g{at}", f"h{at}"], [f"n{at}"]))
        nodes.append(helper.make_node("Relu", [product(f"n{at}", f"up{at}")], [f"u{at}"]))
        nodes.append(helper.make_node("Add", [product(f"u{at}", f"down{at}"), f"n{at}"], [f"e{at}"]))
        value = f"e{at}"
    return _model(nodes, value, weights)


def _model(nodes: list[onnx.NodeProto], result: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH, WIDTH])] for name in ("x", result))
    graph = helper.make_graph(nodes, "synthetic", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def measured(path: Path, rounds: int) -> dict[str, float]:
    """Least wall and CPU seconds of a few imports, and the nodes of the file."""
    found = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        import_model(path)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    nodes = len(onnx.load(path, load_external_data=False).graph.node)
    return {"nodes": nodes, "seconds": min(wall for wall, _ in found), "cpu_seconds": min(cpu for _, cpu in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="bert-base")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 3000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for build in (branches, transformer):
            for count in options.nodes:
                path = Path(folder) / f"{build.__name__}{count}.onnx"
                onnx.save(build(count), path)
                rows.append({"graph": build.__name__, **measured(path, options.rounds)})
    rows.append({"graph": options.network, **measured(ZOO[options.network].onnx_path(), options.rounds)})
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'graph':14}{'nodes':>8}{'s':>8}{'CPU s':>8}{'us/node':>9}")
    for row in rows:
        print(f"{row['graph']:14}{row['nodes']:8}{row['seconds']:8.2f}{row['cpu_seconds']:8.2f}{row['cpu_seconds'] / row['nodes'] * 1e6:9.0f}")


if __name__ == "__main__":
    main()
