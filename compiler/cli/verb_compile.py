"""`tcompile MODEL`: compile a model to an artifact."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from ..errors import UsageError
from .terminal import Json, Seed, Shape, Threads, guarded, memory_line, print_json


@guarded
def compile_verb(
    model: Path = typer.Argument(..., help="ONNX file, or .pt2 file written by torch.export.save.", show_default=False),
    target: str = typer.Option("cpu", "--target", "-t", help="cpu (this machine), cpu:NAME, cuda:NAME, ...; `tcompile targets` lists them."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Artifact directory, ending in .tcm; default: MODEL's name in this folder."),
    shape: list[str] = Shape,
    threads: int | None = Threads,
    quantize: str | None = typer.Option(
        None, "--quantize", help="Number format of the weights (and activations): int8, fp8, w8, w4, w3, ...; see docs/quantization.md."
    ),
    sparsity: str | None = typer.Option(
        None, "--sparsity", help="Zeros in the weights: 2:4, block:0.8, unstructured:0.9, ...; see docs/sparsity.md."
    ),
    token_keep: float | None = typer.Option(None, "--token-keep", help="Share of tokens that attention keeps at each pruning place, in (0, 1]."),
    attention_scores: str | None = typer.Option(
        None, "--attention-scores", help="Format in which attention multiplies queries and keys: int8; see docs/attention.md."
    ),
    calibration: Path | None = typer.Option(None, "--calibration", help="Real inputs: a .npz file with an array per input, or a folder of them."),
    metric: str | None = typer.Option(None, "--metric", help="Loss that --max-drop limits: cosine (default), relative or top1."),
    max_drop: float | None = typer.Option(None, "--max-drop", help="Largest loss allowed on the calibration data; exit code 5 beyond it."),
    report: Path | None = typer.Option(None, "--report", help="Write what was done as one HTML page, with measured times per layer."),
    recipe: Path | None = typer.Option(None, "--recipe", help="TOML file with the passes to run."),
    tune_trials: int = typer.Option(0, "--tune-trials", min=0, help="Candidates to measure per kernel before compiling; see docs/tuning.md."),
    time_budget: str | None = typer.Option(None, "--time-budget", help="How long to tune at most: 90s, 10m, 1.5h."),
    tuning_db: Path | None = typer.Option(None, "--tuning-db", help="Tuning database: take its winners, and add what is tuned now."),
    dump_ir: Path | None = typer.Option(None, "--dump-ir", help="Write the module after every pass into this directory."),
    precision: str | None = typer.Option(
        None,
        "--precision",
        help="Of products: fp32 (default) or bf16; on a CPU also bf16x2 or bf16x3, see docs/quantization.md, on a GPU tf32 or fp16, see docs/cuda.md.",
    ),
    emit_only: bool = typer.Option(False, "--emit-only", help="Write the sources without building them (CUDA: nvcc is not needed)."),
    seed: int = Seed,
    as_json: bool = Json,
) -> None:
    """Compile MODEL to an artifact directory (the verb may be left out).

    Examples:

      tcompile resnet50.onnx

      tcompile bert.onnx --shape input_ids=1x128 --target cpu:haswell -o bert.tcm

      tcompile vit.onnx --quantize int8 --sparsity block:0.8 --token-keep 0.7 --calibration data.npz --max-drop 0.02 --report out.html

    An older artifact at --output is replaced; anything else there is left alone.
    """
    from ...targets.base import Target
    from ..api import accuracy_on, compile_program, import_model, tuned, write_report
    from ..artifact import SUFFIX
    from ..artifact_writer import writable_path, write
    from ..options import CompileOptions
    from ..page import writable_page
    from ..progress import stage

    start = time.perf_counter()
    require_file(model)
    path = writable_path(output if output is not None else Path(model.with_suffix(SUFFIX).name))
    resolved = Target.parse(target)
    if report is not None:
        writable_page(report)
    compression = {"quantize": quantize, "sparsity": sparsity, "token_keep": token_keep, "attention_scores": attention_scores}
    options = CompileOptions(recipe, compression, dump_ir, seed, report is not None, threads, precision, emit_only)
    program = import_model(model, shapes=parse_shapes(shape))
    accuracy = accuracy_on(program, calibration, metric=metric, max_drop=max_drop, threads=threads)
    with tuned(program, resolved, options, accuracy, trials=tune_trials, budget=time_budget, database=tuning_db) as found:
        compiled = compile_program(program, resolved, found, accuracy)
    artifact = compiled.artifact
    with stage("writing"):
        write(artifact, path)
    if report is not None:
        write_report(report, program, compiled, accuracy)
    seconds = time.perf_counter() - start
    weight_bytes = sum(array.nbytes for array in artifact.weights.values())
    if as_json:
        print_json(
            {
                "output": str(path),
                "seconds": round(seconds, 3),
                "weight_bytes": weight_bytes,
                "manifest": artifact.manifest,
                "report": artifact.report,
            }
        )
        return
    print(f"{path}  {resolved.text}, {weight_bytes / 1e6:.1f} MB weights, {len(artifact.library) / 1e6:.1f} MB code, {seconds:.1f} s")
    if "memory" in artifact.report:
        print(f"  {memory_line(artifact.report['memory'])}")
    for spec in artifact.inputs:
        print(f"  in   {spec}")
    for spec in artifact.outputs:
        print(f"  out  {spec}")


def require_file(path: Path) -> Path:
    """`path` when it is a file (UsageError)."""
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        raise UsageError(f"{path} is not a file; expected an ONNX model")
    return path


def parse_shapes(flags: list[str]) -> dict[str, object] | None:
    """`--shape` flags as the importers take them."""
    from ..shapes import parse_shape_flag

    return dict(parse_shape_flag(flag) for flag in flags) or None
