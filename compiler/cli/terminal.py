"""What the verbs share: error handling, output, and the options they have in common."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import typer

from ..errors import TcompileError
from ..progress import raise_pending, shown

INTERRUPTED = 130
#: columns of the widest table; longer cells are folded
WIDEST_TABLE = 120


@dataclass
class Settings:
    """Set once per run of the command. debug: show tracebacks."""

    debug: bool = False


settings = Settings()

Json = typer.Option(False, "--json", help="Print the result as JSON on stdout.")
Threads = typer.Option(None, "--threads", min=1, help="Worker threads; default: the physical cores.")
Seed = typer.Option(0, "--seed", min=0, help="Seed of random choices.")
Shape = typer.Option(
    [], "--shape", metavar="NAME=DIMS", help="Shape of an input, repeatable: x=1x3x224x224, or ranges min..opt..max: x=1..8..32x128."
)


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Run a verb with progress on stderr; turn its errors into one message and the right exit code."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with shown():
                try:
                    verb(*args, **kwargs)
                except Exception:
                    raise_pending()
                    raise
            sys.stdout.flush()
        except TcompileError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing to say, and nothing to flush at exit
            raise SystemExit(1) from None
        except MemoryError:
            _fail("out of memory", 1)
        except Exception as error:  # whatever is left is a fault of tcompile itself
            first = (str(error).strip().splitlines() or [""])[0]
            _fail(f"internal fault: {type(error).__name__}: {first} (run again with --debug for the traceback)", 1)

    return run


def _fail(message: str, code: int) -> NoReturn:
    if settings.debug:
        traceback.print_exc()
    print(f"tcompile: error: {message}" if code != INTERRUPTED else f"tcompile: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def memory_line(memory: dict[str, Any]) -> str:
    """A report's "memory" in one line."""
    more = f", {memory['dynamic_tensors']} more whose size is known while running" if memory.get("dynamic_tensors") else ""
    more += "".join(f", {name} = {size}" for name, size in memory.get("sizes", {}).items()).replace(",", " for", 1)
    return f"{memory['workspace_bytes']} bytes for intermediate tensors ({memory['lower_bound_bytes']} alive at once, {memory['unshared_bytes']} unshared){more}"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A compact table on stdout: columns as wide as their content, numbers right-aligned, the rest left-aligned. Plain when stdout is no terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    cells = [[str(cell) for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, WIDEST_TABLE) if console.is_terminal else WIDEST_TABLE
    console.print(table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
