"""`tcompile inspect`: what a model or artifact contains, without running any of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import typer

from ..errors import UnsupportedModel
from .terminal import Json, Shape, guarded, print_json, print_table


@guarded
def inspect_verb(
    path: Path = typer.Argument(..., help="Artifact (.tcm) or ONNX file.", show_default=False),
    check: bool = typer.Option(False, "--check", help="Artifact: hash every file, weights included."),
    shape: list[str] = Shape,
    as_json: bool = Json,
) -> None:
    """Show the inputs, outputs and operators of an ONNX model with everything that stands in the way of compiling it; or an artifact's manifest.

    No code is loaded. Exit code 3 when the model has blockers, 5 when an artifact is damaged.

    Examples:

      tcompile inspect model.onnx

      tcompile inspect model.tcm --check
    """
    if path.suffix == ".tcm":
        _inspect_artifact(path, check, as_json)
    else:
        _inspect_onnx(path, shape, as_json)


def _inspect_artifact(path: Path, check: bool, as_json: bool) -> None:
    from ..artifact import read, read_manifest

    manifest = read_manifest(path)
    if check:
        read(path, check="full")
    if as_json:
        print_json(manifest)
        return
    print(
        f"{path}: format {manifest['format']}, {manifest['target']['text']}, from {manifest['provenance']['source']}{', all hashes agree' if check else ''}"
    )
    _print_tensors(manifest["inputs"], manifest["outputs"])
    print_table(["file", "bytes", "sha256"], [[name, entry["size"], entry["sha256"][:16]] for name, entry in manifest["files"].items()])
    print_table(["package", "version"], manifest["versions"].items())


def _inspect_onnx(path: Path, shape: list[str], as_json: bool) -> None:
    from ..api import import_model
    from .verb_compile import parse_shapes, require_file

    require_file(path)
    failure: UnsupportedModel | None = None
    try:
        program = import_model(path, shapes=parse_shapes(shape))
        blockers, tensors = [], {"inputs": [_tensor(spec) for spec in program.inputs], "outputs": [_tensor(spec) for spec in program.outputs]}
    except UnsupportedModel as error:
        if not any(blocker.op for blocker in error.blockers):  # not a graph at all: there is nothing to show
            raise
        blockers, tensors, failure = error.blockers, {"inputs": [], "outputs": []}, error
    summary: dict[str, Any] = {**tensors, "operators": _operators(path), "blockers": [vars(blocker) for blocker in blockers]}
    if as_json:
        print_json(summary)
    else:
        _print_tensors(summary["inputs"], summary["outputs"])
        print_table(["operator", "count"], summary["operators"].items())
        print(f"blockers: {len(blockers) or 'none, this model compiles'}")
    if failure is not None:
        raise failure


def _operators(path: Path) -> dict[str, int]:
    """Operator -> count, most frequent first, straight from the file; weights are not read."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node)
    return dict(counts.most_common())


def _tensor(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


def _print_tensors(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    rows = [
        [kind, entry["name"], entry["dtype"], "x".join(str(dim) for dim in entry["shape"])]
        for kind, group in (("in", inputs), ("out", outputs))
        for entry in group
    ]
    if rows:
        print_table(["", "name", "dtype", "shape"], rows)
