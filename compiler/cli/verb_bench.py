"""`tcompile bench`: time a model, alone or against other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..errors import UsageError
from .terminal import Json, Seed, Shape, Threads, guarded, print_json, print_table
from .verb_run import Input


@guarded
def bench_verb(
    model: Path = typer.Argument(..., help="Artifact (.tcm), or a source model that is compiled first.", show_default=False),
    against: str = typer.Option("", "--against", help="Engines to time beside it, comma-separated: onnxruntime, openvino, openvino-bf16, torch."),
    source: list[Path] = typer.Option(
        [], "--model", help="Source model for the other engines, repeatable: .onnx for onnxruntime and openvino, .pt2 for torch; default: MODEL."
    ),
    layers: int = typer.Option(
        0, "--layers", min=0, help="Also time this many of the slowest kernels and set them beside what the machine can do; needs a source model."
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

      tcompile bench bert.onnx --shape input_ids=1x128 --layers 10

    ratio is tcompile's median divided by the other engine's: below 1 tcompile is faster.
    """
    from ..artifact import SUFFIX
    from ..page import slowest
    from ..peers import prepare, source_for
    from ..progress import stage
    from ..timing import interleaved
    from .opening import feeds_for, open_model
    from .verb_compile import require_file

    names = [name.strip() for name in against.split(",") if name.strip()]
    if names and not source and model.suffix == SUFFIX:
        raise UsageError("--against needs the source model: give it with --model")
    sources = {name: require_file(source_for(name, [*source, model])) for name in names}
    if layers and model.suffix == SUFFIX:
        raise UsageError("--layers compiles the model anew to time its kernels one by one: give the source model")
    compiled = open_model(model, shape=shape, threads=threads, profile=bool(layers))
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
        found = {"model": str(model), "threads": compiled.threads, "target": compiled.manifest["target"]["text"], "results": results}
        print_json(found | ({"kernels": slowest(compiled.report()["kernels"])[:layers]} if layers else {}))
        return
    if layers:
        _print_kernels(slowest(compiled.report()["kernels"]), layers)
    rows = [[name, f"{timing.median * 1e3:.3f}", f"{timing.min * 1e3:.3f}", f"{ours / timing.median:.3f}"] for name, timing in timings.items()]
    print_table(["engine", "median ms", "min ms", "ratio"], rows)
    print(f"threads: {compiled.threads}, interleaved rounds: {rounds}")


def _print_kernels(kernels: list[dict[str, Any]], count: int) -> None:
    """The slowest kernels beside the roofline; a row is all calls of one kernel."""
    rows = []
    for row in kernels[:count]:
        seconds = max(row["measured_us"], 1e-3) / 1e6
        rates = [f"{row['flops'] / seconds / 1e9:.1f}", f"{row['bytes'] / seconds / 1e9:.1f}", f"{row['limit_us'] / seconds / 1e6:.0%}"]
        rows.append([row["workload"] or row["kernel"], row["template"], row["calls"], f"{seconds * 1e3:.3f}", f"{row['share']:.1%}", *rates])
    print_table(["kernel", "template", "calls", "ms", "share", "GFLOP/s", "GB/s", "of the limit"], rows)
    total, limit = (sum(row[key] for row in kernels) / 1e3 for key in ("measured_us", "limit_us"))
    print(f"all {len(kernels)} kernels: {total:.3f} ms, {limit / max(total, 1e-6):.0%} of the roofline at this machine's measured rates")
