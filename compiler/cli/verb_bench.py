"""`tcompile bench`: time a model, alone or against other engines."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import UsageError
from .terminal import Json, Seed, Shape, Threads, guarded, print_json, print_table
from .verb_run import Input


@guarded
def bench_verb(
    model: Path = typer.Argument(..., help="Artifact (.tcm), or a source model that is compiled first.", show_default=False),
    against: str = typer.Option("", "--against", help="Engines to time beside it, comma-separated: onnxruntime, openvino, torch."),
    source: list[Path] = typer.Option(
        [], "--model", help="Source model for the other engines, repeatable: .onnx for onnxruntime and openvino, .pt2 for torch; default: MODEL."
    ),
    rounds: int = typer.Option(20, "--rounds", min=1, help="Rounds; in each, every engine takes one turn."),
    inputs: list[str] = Input,
    shape: list[str] = Shape,
    threads: int | None = Threads,
    seed: int = Seed,
    as_json: bool = Json,
) -> None:
    """Time a model; with --against, interleaved with other engines on the same inputs and threads.

    Examples:

      tcompile bench resnet50.onnx --against onnxruntime,openvino

      tcompile bench resnet50.tcm --model resnet50.onnx --against onnxruntime --threads 1 --rounds 50 --json

      tcompile bench resnet50.onnx --against onnxruntime,torch --model resnet50.pt2

    ratio is tcompile's median divided by the other engine's: below 1 tcompile is faster.
    """
    from ..artifact import SUFFIX
    from ..peers import prepare, source_for
    from ..progress import stage
    from ..timing import interleaved
    from .opening import feeds_for, open_model
    from .verb_compile import require_file

    names = [name.strip() for name in against.split(",") if name.strip()]
    if names and not source and model.suffix == SUFFIX:
        raise UsageError("--against needs the source model: give it with --model")
    sources = {name: require_file(source_for(name, [*source, model])) for name in names}
    compiled = open_model(model, shape=shape, threads=threads)
    if compiled.manifest["target"]["kind"] == "fpga":
        raise UsageError(f"{model} is for an FPGA and is only simulated here, which has no speed; its cycles are in source/plan.txt")
    feeds = feeds_for(compiled, inputs, seed)
    contestants = {"tcompile": lambda: compiled(**feeds)}
    contestants |= {name: prepare(name, path, feeds, compiled.threads) for name, path in sources.items()}
    with stage("timing"):
        timings = interleaved(contestants, rounds=rounds)
    ours = timings["tcompile"].median
    if as_json:
        results = {name: timing.to_dict() | {"ratio": round(ours / timing.median, 4)} for name, timing in timings.items()}
        print_json({"model": str(model), "threads": compiled.threads, "target": compiled.manifest["target"]["text"], "results": results})
        return
    rows = [[name, f"{timing.median * 1e3:.3f}", f"{timing.min * 1e3:.3f}", f"{ours / timing.median:.3f}"] for name, timing in timings.items()]
    print_table(["engine", "median ms", "min ms", "ratio"], rows)
    print(f"threads: {compiled.threads}, interleaved rounds: {rounds}")
