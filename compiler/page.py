"""The report as one self-contained HTML page: what each step changed and cost, and where the time goes."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined

from .artifact import Artifact
from .errors import UsageError

if TYPE_CHECKING:
    from .timing import Timing

#: rounds of the comparison with the unchanged model
ROUNDS = 10


def writable_page(path: str | Path) -> Path:
    """`path` when a page may be written there (UsageError): it ends in .html and its folder exists."""
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"report '{path}' must end in .html")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    return path


def write_page(path: str | Path, artifact: Artifact, *, original_bytes: int, timings: Mapping[str, Timing] | None = None) -> Path:
    """Write the page of a compiled model.

    original_bytes: size of the weights before any pass; timings: "original" and "compiled" model, of one interleaved run. UsageError where it cannot be written.
    """
    path = writable_page(path)
    text = render(artifact, original_bytes=original_bytes, timings=timings)
    try:
        path.write_text(text)
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "choose another --report"
        raise UsageError(f"cannot write {path}: {error.strerror}; {advice}") from error
    return path


def render(artifact: Artifact, *, original_bytes: int, timings: Mapping[str, Timing] | None = None) -> str:
    """The page as text; no script, no style and no picture comes from elsewhere."""
    report, manifest = artifact.report, artifact.manifest
    passes = [dict(entry) for entry in report["passes"]]
    steps = [entry | {"options": _options(entry["name"], manifest["recipe"])} for entry in passes]
    environment = Environment(
        loader=PackageLoader(__package__ or "", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": _size, "number": _number}
    return environment.get_template("report.html.j2").render(
        artifact=artifact,
        manifest=manifest,
        steps=steps,
        layers=slowest(report.get("kernels", [])),
        losses=next((entry["loss"] for entry in reversed(passes) if entry.get("loss")), {}),
        lossy=any(entry.get("lossy") for entry in passes),
        original_bytes=original_bytes,
        weight_bytes=sum(array.nbytes for array in artifact.weights.values()),
        timings={name: timing.median * 1e3 for name, timing in (timings or {}).items()},
        recipe=tomli_w.dumps(manifest["recipe"]),
    )


def _options(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    found = next((entry for entry in recipe.get("pass", []) if entry["name"] == name), {})
    return {key: value for key, value in found.items() if key != "name"}


def slowest(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per kernel, all its calls together, slowest first; shares are of the measured time, of the predicted one where nothing was measured."""
    rows = []
    for kernel in kernels:
        calls = max(1, kernel["calls"])
        predicted = None if kernel["predicted_us"] is None else kernel["predicted_us"] * calls
        rows.append(kernel | {"calls": calls, "predicted_us": predicted, "measured_us": kernel.get("measured_us")})
    times = [row["measured_us"] if row["measured_us"] is not None else row["predicted_us"] or 0.0 for row in rows]
    total = sum(times) or 1.0
    rows = [row | {"share": time / total} for row, time in zip(rows, times, strict=True)]
    return sorted(rows, key=lambda row: -row["share"])


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
