"""`tcompile run`: run a model once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer

from ..errors import UsageError
from .terminal import Json, Seed, Shape, Threads, guarded, print_json, print_table

Input = typer.Option([], "--input", "-i", metavar="NAME=FILE", help="Input array, repeatable: NAME=FILE.npy, or FILE.npz with one array per input.")


@guarded
def run_verb(
    model: Path = typer.Argument(..., help="Artifact (.tcm), or a source model that is compiled first.", show_default=False),
    inputs: list[str] = Input,
    random: bool = typer.Option(False, "--random", help="Random inputs instead of --input."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Write the outputs to this .npz file."),
    shape: list[str] = Shape,
    threads: int | None = Threads,
    seed: int = Seed,
    as_json: bool = Json,
) -> None:
    """Run a model once on arrays from files or on random inputs.

    Examples:

      tcompile run resnet50.tcm --input x=image.npy --output result.npz

      tcompile run bert.tcm --random --json
    """
    from .opening import feeds_for, open_model

    if bool(inputs) == random:
        raise UsageError("give the inputs with --input NAME=FILE.npy, or ask for random ones with --random (one of the two)")
    if output is not None and output.suffix != ".npz":
        raise UsageError(f"--output '{output}' must end in .npz")
    compiled = open_model(model, shape=shape, threads=threads)
    result = compiled(**feeds_for(compiled, inputs, seed))
    results = result if isinstance(result, tuple) else (result,)
    named = {spec.name: value for spec, value in zip(compiled.outputs, results, strict=True)}
    if output is not None:
        try:
            np.savez(output, **named)
        except OSError as error:
            raise UsageError(f"cannot write {output}: {error.strerror}") from error
    rows = [_summary(name, value) for name, value in named.items()]
    if as_json:
        print_json({"outputs": rows, "written": None if output is None else str(output)})
    else:
        print_table(list(rows[0]), [row.values() for row in rows])


def _summary(name: str, value: np.ndarray) -> dict[str, object]:
    floats = value.astype(np.float64) if value.size else np.zeros(1)
    return {
        "output": name,
        "dtype": value.dtype.name,
        "shape": list(value.shape),
        "min": float(floats.min()),
        "mean": float(floats.mean()),
        "max": float(floats.max()),
    }
