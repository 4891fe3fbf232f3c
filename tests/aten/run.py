"""Run torch's operator samples: `python tests/aten/run.py [PATTERN ...] [--update]`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

sys.modules.setdefault("torchvision", None)  # pyright: ignore[reportArgumentType]

import numpy as np
import tcompile
import torch
from isolated import run_isolated
from tcompile.compiler.errors import UnsupportedModel

from aten.suite import Call, Case, cases

torch.set_num_threads(1)  # a forked process has none of the threads that its parent's kernels would wait for

TABLE = Path(__file__).with_name("results.tsv")
#: samples of one operator and dtype
SAMPLES = 4


def difference(want: torch.Tensor, have: np.ndarray) -> str:
    """How a result differs from torch's; empty where it does not."""
    expected = want.resolve_neg().detach().numpy()
    if have.dtype != expected.dtype or have.shape != expected.shape:
        return f"{have.dtype} {have.shape} instead of {expected.dtype} {expected.shape}"
    if expected.dtype.kind != "f":
        return "" if np.array_equal(have, expected) else f"{int((have != expected).sum())} of {expected.size} elements differ"
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
    good = np.isclose(have, expected, rtol=1e-4, atol=1e-5 * scale + 1e-7, equal_nan=True)
    return "" if good.all() else f"{int((~good).sum())} of {expected.size} elements differ"


def same_choice(values: torch.Tensor, have: list[np.ndarray], x: torch.Tensor, dim: int) -> bool:
    """Whether places along `dim` are distinct and hold torch's values: places of equal elements may come in any order."""
    places = torch.from_numpy(have[1])
    if places.dtype != torch.int64 or places.shape != values.shape or not x.ndim or difference(values, have[0]):
        return False
    if places.numel() and (places.min() < 0 or places.max() >= x.shape[dim] or (places.sort(dim).values.diff(dim=dim) == 0).any()):
        return False
    return not difference(values, x.gather(dim, places).numpy())


def attempt(case: Case) -> list[list[str]]:
    """[result, reason] of every sample in this process: "pass", "refused", "wrong" or "crash"."""
    results = []
    for module, tensors in case.samples(SAMPLES):
        try:
            results.append(_attempt(module, tensors))
        except Exception as error:
            results.append(["crash", f"raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"])
    return results


def _attempt(module: Call, tensors: list[torch.Tensor]) -> list[str]:
    with torch.no_grad():
        value = module(*tensors)
    wanted = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if leaf is not None]
    try:
        compiled = tcompile.compile(module, example_inputs=tuple(tensors))
    except UnsupportedModel as refusal:
        blocker = refusal.blockers[0]
        return ["refused", f"{blocker.op}: {blocker.reason}"]
    found = compiled(*tensors)
    outputs = found if isinstance(found, tuple) else (found,)
    if len(outputs) != len(wanted):
        return ["wrong", f"{len(outputs)} outputs instead of {len(wanted)}"]
    arrays = [np.asarray(have) for have in outputs]
    for position, (want, have) in enumerate(zip(wanted, arrays, strict=True)):
        if (text := difference(want, have)) and not (module.free is not None and same_choice(wanted[0], arrays, tensors[0], module.free)):
            return ["wrong", f"output {position}: {text}"]
    return ["pass", ""]


#: from best to worst
ORDER = ("pass", "refused", "wrong", "crash")


def run(selected: Iterable[Case], processes: int | None = None) -> Iterator[tuple[Case, str, int, int, str]]:
    """(case, worst result, samples that pass, samples, reason of the worst); a process that died, hung or raised anything but a refusal is a "crash"."""
    tcompile.compile(torch.nn.Linear(2, 2).eval(), example_inputs=(torch.zeros(1, 2),))  # imports everything, once for all children
    for case, outcome in run_isolated(selected, attempt, processes=processes, seconds=120):
        samples = [["crash", outcome.fault]] if outcome.fault else outcome.value
        result, reason = max(samples, key=lambda sample: ORDER.index(sample[0]), default=("pass", "no samples"))
        passed = sum(sample[0] == "pass" for sample in samples)
        yield case, result, passed, len(samples), " ".join(reason.split())[:200]


def read_table() -> dict[str, tuple[str, str, str]]:
    """Case -> (worst result, "PASSED/SAMPLES", reason) as checked in."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return {name: (result, count, reason) for name, result, count, reason in (line.split("\t") for line in lines if line)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="names of cases, with * (all by default)")
    parser.add_argument("--update", action="store_true", help="write the results into the table")
    parser.add_argument("--processes", type=int, help="cases at a time (all CPUs by default)")
    options = parser.parse_args()
    selected = [case for case in cases() if not options.patterns or any(fnmatch(case.name, pattern) for pattern in options.patterns)]
    counts, samples, table = Counter(), Counter(), read_table()
    fell = []
    for case, result, passed, count, reason in run(selected, options.processes):
        counts[result] += 1
        samples["pass"] += passed
        samples["all"] += count
        before = table.get(case.name, ("crash", "0/0", ""))
        if ORDER.index(result) > ORDER.index(before[0]) or passed < int(before[1].split("/")[0]):
            fell.append(case.name)
        table[case.name] = (result, f"{passed}/{count}", reason)
        if result != "pass":
            print(f"{result:8}{case.name}  {passed}/{count}  {reason}", flush=True)
        if options.update:
            TABLE.write_text("".join("\t".join((name, *row)) + "\n" for name, row in sorted(table.items())))
    print(
        f"cases {sum(counts.values())}: {dict(counts)}; samples {dict(samples)}" + (f"; worse than in the table: {', '.join(fell)}" if fell else "")
    )
    return 1 if counts["wrong"] or counts["crash"] or fell else 0


if __name__ == "__main__":
    sys.exit(main())
