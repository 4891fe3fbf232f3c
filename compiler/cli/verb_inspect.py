"""`tcompile inspect`: what a model or artifact contains, without running any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from .terminal import Json, Shape, guarded, memory_line, print_json, print_table


@guarded
def inspect_verb(
    path: Path = typer.Argument(..., help="Artifact (.tcm), ONNX file, or .pt2 file of torch.export.", show_default=False),
    check: bool = typer.Option(False, "--check", help="Artifact: hash every file, weights included."),
    target: str = typer.Option("cpu", "--target", help="Whose peak rates and bandwidth the times are for: cpu (this machine), cpu:haswell, ..."),
    count: int = typer.Option(20, "--layers", min=0, help="So many layers, those that take longest; 0: all. JSON has all."),
    shape: list[str] = Shape,
    as_json: bool = Json,
) -> None:
    """Show a model's inputs, outputs, operators and parameters, the arithmetic and memory traffic of its layers with the least time they take on a machine, and everything that
    stands in the way of compiling it; or an artifact's manifest.

    Nothing is compiled or run. Exit code 3 when the model has blockers, 5 when an artifact is damaged. Dynamic dims are counted at their `opt`, else their least size.

    Examples:

      tcompile inspect model.onnx

      tcompile inspect bert.onnx --shape input_ids=1x1..128..512 --target cpu:haswell --json

      tcompile inspect model.tcm --check
    """
    if path.suffix == ".tcm":
        _inspect_artifact(path, check, as_json)
    else:
        _inspect_model(path, shape, target, count, as_json)


def _inspect_artifact(path: Path, check: bool, as_json: bool) -> None:
    from ..artifact import read, read_manifest

    manifest = read_manifest(path)
    memory = read(path, check="full" if check else "quick").report.get("memory")
    if as_json:
        print_json(manifest if memory is None else {**manifest, "memory": memory})
        return
    print(
        f"{path}: format {manifest['format']}, {manifest['target']['text']}, from {manifest['provenance']['source']}{', all hashes agree' if check else ''}"
    )
    _print_tensors(manifest["inputs"], manifest["outputs"])
    if memory is not None:
        print(memory_line(memory))
    print_table(["file", "bytes", "sha256"], [[name, entry["size"], entry["sha256"][:16]] for name, entry in manifest["files"].items()])
    print_table(["package", "version"], manifest["versions"].items())


def _inspect_model(path: Path, shape: list[str], target: str, count: int, as_json: bool) -> None:
    from ..inspection import inspect, refusal
    from .verb_compile import parse_shapes, require_file

    summary = inspect(require_file(path), target, shapes=parse_shapes(shape))
    if as_json:
        print_json(summary)
    else:
        _print_tensors(summary["inputs"], summary["outputs"])
        print_table(["operator", "count"], summary["operators"].items())
        if "layers" in summary:
            _print_layers(summary, count)
        print(f"blockers: {len(summary['blockers']) or 'none, this model compiles'}")
    failure = refusal(summary)
    if failure is not None:
        raise failure


def _print_layers(summary: dict[str, Any], count: int) -> None:
    if summary["dims"]:
        rows = [
            [name, dim["range"], dim["size"], f"{dim['flops_factor']:.2f}", f"{dim['bytes_factor']:.2f}"] for name, dim in summary["dims"].items()
        ]
        print_table(["dim", "range", "counted at", "operations if doubled", "bytes if doubled"], rows)
    slowest = sorted(summary["layers"], key=lambda layer: -layer["milliseconds"])
    rows = [
        [layer["name"], " ".join(dict.fromkeys(layer["operators"])), *_costs(layer), f"{layer['intensity']:.1f}", layer["bound"]]
        for layer in (slowest[:count] if count else slowest)
    ]
    print_table(["layer", "operators", "MFLOP", "MB", "ms", "FLOP/byte", "bound"], rows)
    parameters, (flops, size, milliseconds) = summary["parameters"], _costs(summary["total"])
    print(f"parameters: {parameters['count']} ({parameters['bytes']} bytes)")
    print(f"all {len(slowest)} layers: {flops} MFLOP, {size} MB; at least {milliseconds} ms on {summary['target']}, each layer at the peak rates")


def _costs(entry: dict[str, Any]) -> list[str]:
    return [f"{entry['flops'] / 1e6:.3f}", f"{entry['bytes'] / 1e6:.3f}", f"{entry['milliseconds']:.4f}"]


def _print_tensors(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    rows = [
        [kind, entry["name"], entry["dtype"], "?" if entry["shape"] is None else "x".join(str(dim) for dim in entry["shape"])]
        for kind, group in (("in", inputs), ("out", outputs))
        for entry in group
    ]
    if rows:
        print_table(["", "name", "dtype", "shape"], rows)
