"""`python -m tcompile.models list` and `python -m tcompile.models export NAME...`: what the zoo holds, and its ONNX files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..compiler.errors import TcompileError, UsageError
from .zoo import ZOO


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tcompile.models", description="Networks for tests and benchmarks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="names, inputs and weights")
    export = verbs.add_parser("export", help="print the path of each network's ONNX file, exporting it first where needed")
    export.add_argument("names", nargs="+", metavar="NAME", help="names as in `list`, or `all`")
    export.add_argument("--cache", type=Path, help="folder for exported files (default: the user's cache folder)")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "list":
            for entry in ZOO.values():
                inputs = ", ".join(f"{spec.name}[{', '.join(map(str, spec.shape))}]" for spec in entry.inputs)
                print(f"{entry.name:20} {entry.weights:11} {inputs}")
        else:
            for name in list(ZOO) if options.names == ["all"] else options.names:
                if name not in ZOO:
                    raise UsageError(f"unknown network '{name}': expected one of {', '.join(ZOO)}")
                print(f"exporting {name}", file=sys.stderr)
                print(ZOO[name].onnx_path(options.cache))
    except TcompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
