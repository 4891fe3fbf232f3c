"""What the benchmarks write into the pages of docs/: hardware, versions and date of a run, and its table, between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tcompile.targets.base import Target


def environment(packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Processor, date and versions of packages. more: further entries."""
    model = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    target = Target.parse("cpu")
    return {
        "cpu": f"{model} ({target.mcpu}, {target.vector_bits}-bit vectors, {target.cores} cores)",
        "date": date.today().isoformat(),
        **more,
        "versions": {package: version(package) for package in packages},
    }


def vectors() -> str:
    """AMX, AVX512 without it, the same of AMD, whose products of bfloat16 are fast, or AVX2: their figures stand side by side, in tables of their own."""
    target = Target.parse("cpu")
    if target.vector_bits < 512:
        return "AVX2"
    return "AMX" if "amx-tile" in target.features else "AVX512 AMD" if target.mcpu.startswith("znver") else "AVX512"


def update(page: Path, name: str, script: str, facts: dict[str, Any], lines: Sequence[str], notes: str = "medians of interleaved rounds.") -> None:
    """Replace what stands between the markers of `name`, which benchmarks/`script` writes."""
    start, end = f"<!-- {name}: written by benchmarks/{script} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text().partition(start)
    if not found:
        raise SystemExit(f"{page} has no line {start.strip()}")
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    text = f"{facts['cpu']}; {versions}; {facts['date']}; {notes}\n\n" + "\n".join(lines) + "\n"
    page.write_text(before + start + text + end + rest.partition(end)[2])
