"""`tcompile verify`: compare a compiled model with a reference engine."""

from __future__ import annotations

from pathlib import Path

import typer

from ..compare import ATOL, RTOL
from ..errors import UsageError, VerificationError
from .terminal import Json, Seed, Shape, Threads, guarded, print_json, print_table
from .verb_run import Input


@guarded
def verify_verb(
    model: Path = typer.Argument(..., help="Artifact (.tcm), or a source model that is compiled first.", show_default=False),
    source: Path | None = typer.Option(None, "--model", help="The source model when MODEL is an artifact."),
    reference: str = typer.Option("onnxruntime", "--against", help="Reference engine: onnxruntime, openvino or torch (.pt2)."),
    rtol: float | None = typer.Option(None, "--rtol", min=0.0, help=f"Relative tolerance; default: {RTOL}, 0.01 for 16-bit floats."),
    atol: float | None = typer.Option(
        None, "--atol", min=0.0, help=f"Absolute tolerance, after division by the output's range; default: {ATOL}, 0.01 for 16-bit floats."
    ),
    inputs: list[str] = Input,
    shape: list[str] = Shape,
    threads: int | None = Threads,
    seed: int = Seed,
    as_json: bool = Json,
) -> None:
    """Run a model and a reference engine on the same inputs (random without --input) and compare every output. Exit code 5 when they differ.

    Examples:

      tcompile verify resnet50.onnx

      tcompile verify bert.tcm --model bert.onnx --input feeds.npz
    """
    from ..artifact import SUFFIX
    from ..compare import agree
    from ..peers import prepare
    from .opening import feeds_for, open_model

    source = source if source is not None else model
    if source.suffix == SUFFIX:
        raise UsageError("verifying an artifact needs the source model: give it with --model")
    compiled = open_model(model, shape=shape, threads=threads)
    feeds = feeds_for(compiled, inputs, seed)
    result = compiled(**feeds)
    ours = result if isinstance(result, tuple) else (result,)
    theirs = prepare(reference, source, feeds, compiled.threads)()
    if len(ours) != len(theirs):
        raise VerificationError(f"{len(ours)} outputs, but {reference} gives {len(theirs)}")
    checks = {spec.name: agree(a, b, rtol=rtol, atol=atol) for spec, a, b in zip(compiled.outputs, ours, theirs, strict=True)}
    if as_json:
        print_json({name: {"ok": check.ok, "max_error": check.max_error, "reason": check.reason} for name, check in checks.items()})
    else:
        rows = [[name, "ok" if check.ok else "DIFFERS", f"{check.max_error:.2e}", check.reason] for name, check in checks.items()]
        print_table(["output", "result", "max error / range", "reason"], rows)
    if wrong := [f"'{name}' at {list(check.where)}: {check.reason}" for name, check in checks.items() if not check.ok]:
        raise VerificationError(f"{len(wrong)} of {len(checks)} outputs differ from {reference}: " + "; ".join(wrong))
