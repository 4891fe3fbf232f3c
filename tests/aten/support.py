"""Write docs/pytorch.md, what the PyTorch route takes: `python tests/aten/support.py [--check]`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

sys.modules.setdefault("torchvision", None)  # pyright: ignore[reportArgumentType]

import torch
from support_pages import short_reason, written
from timm_networks import TIMM
from transformers_networks import REFUSED, REFUSED_OPEN, TRANSFORMERS

from aten.run import SAMPLES, read_table
from aten.suite import cases_of, core_operators

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pytorch.md"

_HEAD = """# PyTorch operators and architectures

*Written by `make support-page` from the results of torch's own operator samples and from the networks that the tests hold; not edited by hand.*

`torch.export` gives a graph of [core ATen operators](https://docs.pytorch.org/docs/stable/torch.compiler_ir.html), which the importer takes one by one. For each of them torch {version} has samples (OpInfo): here up to
{samples} per variant and dtype (float32, int64, bool), spread over all of them, each compiled and held against eager execution: dtype, shape, and every element.

{summary}

Whatever does not pass is refused with the operator and the reason (exit code 3). `make test-aten` repeats the run, a process per variant and dtype.

## Operators

| Operator | Samples | Refused |
|---|---|---|
"""

_NETWORKS = """
## Architectures

Each with few layers and random weights and with open dims (those of transformers and twenty of timm in one size, too), held against eager execution on the CPU (`make test-networks`).

"""


def page() -> str:
    table = read_table()
    rows, without = [], []
    for operator in core_operators():
        names = [case.name for case in cases_of(operator)]
        if not names:
            without.append(f"`{operator}`")
            continue
        counts = [[int(number) for number in table[name][1].split("/")] for name in names]
        reasons = sorted({short_reason(table[name][2]) for name in names if table[name][0] == "refused"})
        rows.append(f"| {operator} | {sum(passed for passed, _ in counts)} / {sum(every for _, every in counts)} | {'; '.join(reasons)} |")
    text = _HEAD.format(version=torch.__version__.split("+")[0], samples=SAMPLES, summary=_summary(table)) + "\n".join(rows) + "\n"
    text += f"\nWithout samples, or with results that are random or undefined: {', '.join(without)}.\n"
    return text + _NETWORKS + _architectures("timm", TIMM) + _architectures("transformers", TRANSFORMERS)


def _summary(table: dict[str, tuple[str, str, str]]) -> str:
    results = Counter(result for result, _, _ in table.values())
    counts = [[int(number) for number in count.split("/")] for _, count, _ in table.values()]
    passed, every = sum(count[0] for count in counts), sum(count[1] for count in counts)
    others = ", ".join(f"{number} {result}" for result, number in sorted(results.items()) if result != "pass")
    return f"Variants and dtypes of which every sample passes: {results['pass']} of {len(table)}, {others}. Samples: {passed} of {every}."


def _architectures(package: str, networks: dict[str, object]) -> str:
    tested = ", ".join(name for name in networks if name not in REFUSED)
    refused = ", ".join(f"{name} ({REFUSED[name]})" for name in networks if name in REFUSED)
    fixed = ", ".join(f"{name} ({REFUSED_OPEN[name]})" for name in networks if name in REFUSED_OPEN)
    notes = [f" With open dims refused: {fixed}." if fixed else "", f" Refused: {refused}." if refused else ""]
    return f"- **{package}**: {tested}." + "".join(notes) + "\n"


if __name__ == "__main__":
    sys.exit(written(PAGE, page()))
