"""Run the suite: `python tests/conformance/run.py [PATTERN ...] [--dynamic] [--update] [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tcompile
from isolated import run_isolated
from tcompile.compiler.errors import TcompileError, UnsupportedModel

from conformance.suite import Case, cases, close

#: results of the tests as they are, and with every dim open
TABLE, DYNAMIC_TABLE = (Path(__file__).with_name(name) for name in ("results.tsv", "results_dynamic.tsv"))


def attempt(case: Case, *, dynamic: bool) -> list[str]:
    """[result, reason] of one test in this process: "pass", "refused" with the first blocker, or "wrong" with what differs."""
    try:
        compiled = tcompile.compile(case.dynamic_model if dynamic else case.model)
    except UnsupportedModel as refusal:
        blocker = refusal.blockers[0]
        return ["refused", f"{blocker.op}: {blocker.reason}"]
    for inputs, expected in case.data_sets():
        try:
            found = compiled(*inputs)
        except TcompileError as error:
            # open dims that the compiler took for equal and that are not
            return ["refused" if dynamic else "crash", f"while running: {error}"]
        outputs = found if isinstance(found, tuple) else (found,)
        if len(outputs) != len(expected):
            return ["wrong", f"{len(outputs)} outputs instead of {len(expected)}"]
        for position, (want, have) in enumerate(zip(expected, outputs, strict=True)):
            difference = close(case, want, np.asarray(have))
            if difference:
                return ["wrong", f"output {position}: {difference}"]
    return ["pass", ""]


def run(selected: Iterable[Case], processes: int | None = None, *, dynamic: bool = False) -> Iterator[tuple[Case, str, str, float]]:
    """(test, result, reason, seconds), with every input dim open where `dynamic`; a process that died, hung or raised anything but a refusal is a "crash"."""
    tcompile.compile(cases()[0].model)  # imports everything, once for all children

    def work(case: Case) -> list[str]:
        return attempt(case, dynamic=dynamic)

    for case, outcome in run_isolated(selected, work, processes=processes, seconds=120):
        result, reason = ("crash", outcome.fault) if outcome.fault else outcome.value
        yield case, result, " ".join(reason.split()), outcome.seconds


def read_table(path: Path = TABLE) -> dict[str, tuple[str, str]]:
    """Test -> (result, reason) as checked in."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: (result, reason) for name, result, reason in (line.split("\t") for line in lines if line)}


def write_table(results: dict[str, tuple[str, str]], path: Path) -> None:
    path.write_text("".join(f"{name}\t{result}\t{reason}\n" for name, (result, reason) in sorted(results.items())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="names of tests, with * (all tests by default)")
    parser.add_argument("--update", action="store_true", help="write the results into the table")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--failed", action="store_true", help="only the tests that do not pass by the table")
    parser.add_argument("--dynamic", action="store_true", help="with every input dim open, against a table of its own")
    parser.add_argument("--processes", type=int, help="tests at a time (all CPUs by default)")
    options = parser.parse_args()
    path = DYNAMIC_TABLE if options.dynamic else TABLE
    table = read_table(path)
    selected = [
        case
        for case in cases()
        if (not options.patterns or any(fnmatch(case.name, pattern) for pattern in options.patterns))
        and (not options.failed or table.get(case.name, ("", ""))[0] != "pass")
    ]
    counts, fair, fresh = Counter(), Counter(), {}
    for done, (case, result, reason, seconds) in enumerate(run(selected, options.processes, dynamic=options.dynamic), 1):
        counts[result] += 1
        fair[result] += case.fair
        fresh[case.name] = (result, reason)
        if result != "pass" and not options.json:
            print(f"{result:8}{case.name}  {reason}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{done} of {len(selected)}, {seconds:.1f} s  ", end="", file=sys.stderr)
    if options.update:
        write_table(table | fresh, path)
    if options.json:
        print(json.dumps({"all": counts, "fair": fair}))
    else:
        print(f"all {sum(counts.values())}: {_text(counts)}\nfair {sum(fair.values())}: {_text(fair)}")
    lost = [name for name, (result, _) in fresh.items() if result in ("wrong", "crash") or table.get(name, ("", ""))[0] == "pass" != result]
    return 1 if lost else 0


def _text(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {result}" for result, count in counts.most_common() if count) or "none"


if __name__ == "__main__":
    sys.exit(main())
