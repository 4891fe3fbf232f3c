"""What the FPGA target makes of three trained networks: seconds of plan and emission, C simulation against the integer reference, accuracy on held-out data,
the plan's modelled figures, and of the MLP the measured ones (Verilator, yosys).

    python benchmarks/fpga.py --output benchmarks/results/fpga.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
import torch
from tcompile.compiler.api import import_model
from tcompile.models import datasets, mnist
from tcompile.targets.fpga import csim, emit_sv, parts, plan, rtl
from tcompile.targets.fpga.calibrate import quantise
from tcompile.targets.fpga.graph import lower_to_nodes

CALIBRATION, HELD_OUT = 64, 500


def networks() -> dict[str, tuple[torch.nn.Module, np.ndarray, np.ndarray, np.ndarray | None]]:
    """name -> (module, calibration inputs, held-out inputs, held-out classes); one sample a call."""
    (grid_train, grid_test), (train, test) = datasets.mnist_grid(), datasets.mnist()
    vit: Any = mnist.mnist_vit()
    block = vit.blocks[2].eval()

    def tokens(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            images = torch.from_numpy(x)
            patches = vit.stem(images).flatten(2).transpose(1, 2) + vit.positions[:, 1:]
            first = (vit.cls + vit.positions[:, :1]).expand(len(x), -1, -1)
            return vit.blocks[:2](torch.cat([first, patches], 1)).numpy()

    return {
        "MLP 16-64-32-32-5": (mnist.mnist_mlp(), grid_train.x[:CALIBRATION], grid_test.x[:HELD_OUT], grid_test.y[:HELD_OUT]),
        "CNN on MNIST": (mnist.mnist_cnn(), train.x[:CALIBRATION], test.x[:HELD_OUT], test.y[:HELD_OUT]),
        "encoder layer, 50 tokens of 64": (block, tokens(train.x[:CALIBRATION]), tokens(test.x[:64]), None),
    }


def measure(module: torch.nn.Module, calibration: np.ndarray, held_out: np.ndarray, classes: np.ndarray | None, part: str) -> dict[str, Any]:
    """One row of the results."""
    calls = [(x[None],) for x in calibration]
    start = time.perf_counter()
    compiled = tcompile.compile(module, f"fpga:{part}", example_inputs=(torch.from_numpy(calls[0][0]),), calibration=calls, quantize="int8")
    seconds = time.perf_counter() - start
    report = compiled.report()
    fpga = report["fpga"]
    by_step = {entry["name"]: entry["seconds"] for entry in report["passes"]}
    sources = compiled.artifact.sources
    simulation = csim.build(sources, int(np.prod(fpga["output"]["shape"])))
    checks = {name: simulation.check(*arguments).returncode == 0 for name, arguments in _RUNS.items()}
    levels = np.clip(np.rint(held_out.astype(np.float64) / fpga["input"]["scale"]) + fpga["input"]["zero"], 0, 255).reshape(len(held_out), -1)
    result = (simulation(levels) - fpga["output"]["zero"]) * np.asarray(fpga["output"]["scale"])
    with torch.no_grad():
        expected = module(torch.from_numpy(held_out)).numpy().reshape(len(held_out), -1)
    row = {
        "compile_s": round(seconds, 2),
        "plan_and_emit_s": round(sum(by_step[name] for name in ("integer_network", "dataflow_plan", "emit_project")), 2),
        "csim_equal": checks,
        "held_out_cosine": float(np.mean(np.sum(result * expected, 1) / np.linalg.norm(result, axis=1) / np.linalg.norm(expected, axis=1))),
        "modelled": {**fpga["plan"]["total"], "interval_cycles": fpga["plan"]["interval_cycles"], "latency_cycles": fpga["plan"]["latency_cycles"]},
    }
    if classes is not None:
        row |= {"float_accuracy": mnist.accuracy(expected, classes), "integer_accuracy": mnist.accuracy(result, classes)}
    return row


_RUNS = {"sequential": (), "finite streams": ("--fifo",), "finite streams, 40 % pauses": ("--fifo", "--stall", "40", "--seed", "7")}


def whole_mlp(part: str, interval: int) -> dict[str, Any]:
    """The MLP's plan at an interval, modelled and measured side by side."""
    module, calibration, held_out, _ = networks()["MLP 16-64-32-32-5"]
    program = import_model(module, example_inputs=(torch.from_numpy(calibration[:1]),))
    network, _ = quantise(lower_to_nodes(program), list(calibration[:, None]), "mlp")
    made = plan.make(network, parts.part(part), interval=interval)
    sources, edges = emit_sv.project(made), {edge.name: edge for edge in made.edges}
    levels = np.stack([network.input.quantise(x) for x in held_out[:50]])
    expected = np.stack([network.run(row) for row in levels])
    simulation = rtl.build(sources, edges["input"], edges["output"])
    runs = [simulation(levels), simulation(levels, pause_in=50, pause_out=50, seed=3)]
    return {
        "equal": [bool(np.array_equal(run.outputs, expected)) for run in runs],
        "measured": {
            "interval_cycles": runs[0].interval,
            "first_result_cycles": simulation(levels[:1]).total,
            **rtl.synthesise(sources, "xcup").to_dict(),
        },
        "modelled": {"interval_cycles": made.interval, "latency_cycles": made.latency, **made.total.to_dict()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", default="xcu280")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"part": arguments.part, "networks": {}}
    for name, pieces in networks().items():
        results["networks"][name] = measure(*pieces, arguments.part)
        print(name, json.dumps(results["networks"][name]))
    results["mlp_in_rtl"] = {str(interval): whole_mlp(arguments.part, interval) for interval in (64, 256)}
    print(json.dumps(results["mlp_in_rtl"]))
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
