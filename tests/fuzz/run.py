"""Mutated models through the compiler: `python tests/fuzz/run.py --count 10000 [--seed N]`.

Every mutant has a process of its own with 10 s of CPU time and 2 GiB, and has to end as an imported model or a refusal (exit code 0 or 3 of the command): anything else is a
find, which is made smaller and written as a file. The mutants follow from the seed alone. They are made of
- tests of the ONNX backend suite, as they are or with all dims open (6 of 10): imported, every second one also compiled for the CPU and run;
- pieces of up to six nodes of the zoo's networks, with their weights (3 of 10): the same;
- whole networks of the zoo (1 of 10): inspected, which is the import and a count of the work of every layer. A whole network takes longer to compile than a
  mutant may; what its compiler does with the nodes is what it does with the pieces.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx
import tcompile
from isolated import Outcome, run_isolated
from tcompile.compiler.api import compile_program, import_model
from tcompile.compiler.errors import TcompileError, UnsupportedModel, UsageError
from tcompile.compiler.feeds import random_feeds
from tcompile.compiler.inspection import inspect
from tcompile.targets.base import Target

from fuzz.mutate import mutate
from fuzz.networks import networks, piece

SECONDS = 10
MEMORY_BYTES = 2 << 30
#: values of a model that is run hold at most so many bytes in all: larger ones are slow for a good reason
_RUN_BYTES = 32 << 20
_MINIMIZE_SECONDS = 60
#: wall time over the time of the processor that a mutant may take: the machine may be busy
_PATIENCE = 10
#: of all mutants, those of whole networks and those of pieces
_WHOLE_SHARE, _PIECE_SHARE = 0.1, 0.3
#: usage errors that a model without any request of the user may end with
_FAIR_USAGE = ("give its shape", "cannot be chosen")


@dataclass(frozen=True)
class Mutant:
    """work: "import", "run" (imported, compiled and run) or "inspect"."""

    index: int
    content: bytes
    work: str


@cache
def seeds() -> tuple[bytes, ...]:
    """The models of the backend suite, as they are and with all dims open, serialized."""
    from conformance.suite import cases

    return tuple(model.SerializeToString(deterministic=True) for case in cases() for model in (case.model, case.dynamic_model))


def mutant(seed: int, index: int, run_share: int) -> Mutant:
    random = Random(f"{seed}:{index}")
    part = random.random()
    work = "inspect" if part < _WHOLE_SHARE else "import" if index % run_share else "run"
    base = random.choice(networks()) if part < _WHOLE_SHARE else piece(random) if part < _WHOLE_SHARE + _PIECE_SHARE else random.choice(seeds())
    return Mutant(index, mutate(base, random, seeds()), work)


def attempt(content: bytes, work: str) -> str:
    """How a model ends in this process: "refused", "imported", "inspected", "stopped" by a check at run time, or "ran"; whatever else is raised is a find."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(content)
        file.flush()
        try:
            if work == "inspect":
                return "refused" if inspect(file.name)["blockers"] else "inspected"
            program = import_model(file.name)
        except UnsupportedModel as refusal:
            assert refusal.blockers and all(blocker.reason for blocker in refusal.blockers)
            return "refused"
        if work == "import" or _value_bytes(program) > _RUN_BYTES:
            return "imported"
        try:
            compiled = compile_program(program, Target.parse("cpu"))
        except UnsupportedModel:
            return "refused"
        try:
            compiled(**random_feeds(program.inputs, program.dims))
        except UsageError as error:
            if not any(text in str(error) for text in _FAIR_USAGE):
                raise
        except TcompileError:
            return "stopped"
        return "ran"


def _value_bytes(program: object) -> int:
    """Bytes of all inputs and bound tensors of static shape."""
    main = program.main  # pyright: ignore[reportAttributeAccessIssue]
    total = 0
    for variable in (*main.params, *(binding.var for block in main.body.blocks for binding in block.bindings)):
        size = 4
        for dim in getattr(getattr(variable.ty, "shape", None), "values", ()):
            size *= int(getattr(dim, "value", 1))
        total += size
    return total


def ends(mutants: Iterable[Mutant], processes: int, seconds: int) -> Iterator[tuple[Mutant, Outcome]]:
    """Every mutant with how it ended, as they end."""
    space = _mapped() + MEMORY_BYTES
    work = lambda one: attempt(one.content, one.work)  # noqa: E731
    return run_isolated(mutants, work, processes=processes, seconds=_PATIENCE * seconds, cpu_seconds=seconds, address_space=space)


def _mapped() -> int:
    """Bytes that this process maps already."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


def minimized(found: Mutant, fault: str, seconds: int) -> bytes:
    """Greedy: parts of the model are removed, many at a time at first, for as long as it ends in the same fault."""

    def same(candidate: bytes) -> bool:
        return next(ends([replace(found, content=candidate)], 1, seconds))[1].fault[:40] == fault[:40]

    content = found.content
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception:
        return content
    until = time.monotonic() + _MINIMIZE_SECONDS
    for select in _PARTS:
        place = len(select(model))
        many = max(1, place // 2)
        while many and time.monotonic() < until:
            candidate = onnx.ModelProto.FromString(content)
            place = min(place, len(select(candidate)))
            if not place:
                many, place = many // 2, len(select(candidate))
                continue
            del select(candidate)[max(0, place - many) : place]
            place = max(0, place - many)
            smaller = candidate.SerializeToString(deterministic=True)
            if same(smaller):
                content = smaller
    return content


_PARTS: tuple[Callable[[onnx.ModelProto], Any], ...] = (
    lambda model: model.functions, lambda model: model.graph.value_info, lambda model: model.graph.node,
    lambda model: model.graph.initializer, lambda model: model.graph.input, lambda model: model.graph.output,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first mutant")
    parser.add_argument("--run-share", type=int, default=2, help="one mutant of the suite and of pieces in so many is also run")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="CPU time of one mutant")
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"), help="folder for what is found")
    parser.add_argument("--no-minimize", action="store_true")
    options = parser.parse_args()
    tcompile.compile(onnx.ModelProto.FromString(seeds()[0]))  # imports everything, once for all children
    mutants = (mutant(options.seed, index, options.run_share) for index in range(options.first, options.first + options.count))
    counts: Counter[str] = Counter()
    started = time.monotonic()
    for done, (ended, outcome) in enumerate(ends(mutants, options.processes, options.seconds), 1):
        counts["find" if outcome.fault else outcome.value] += 1
        if outcome.fault:
            options.finds.mkdir(exist_ok=True)
            small = ended.content if options.no_minimize else minimized(ended, outcome.fault, options.seconds)
            (options.finds / f"{options.seed}-{ended.index}.onnx").write_bytes(small)
            print(f"find {options.seed}:{ended.index} ({ended.work}): {outcome.fault}", flush=True)
        if done % 500 == 0:
            print(f"{done} in {time.monotonic() - started:.0f} s: {json.dumps(counts)}", flush=True)
    rate = options.count / (time.monotonic() - started)
    print(f"{options.count} mutants of seed {options.seed}, {rate:.1f} per second: {json.dumps(counts)}")
    return 1 if counts["find"] else 0


if __name__ == "__main__":
    sys.exit(main())
