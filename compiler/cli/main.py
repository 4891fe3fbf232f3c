"""Entry point of the command: the bare form, exit codes, and errors as one line instead of a traceback."""

from __future__ import annotations

import signal
import sys
from importlib import import_module

import typer

from ..progress import interrupt
from .terminal import settings

#: verb -> what it does is the docstring of the function of that name in the module of that name
VERBS = ("compile", "run", "bench", "verify", "tune", "inspect", "targets", "doctor")

app = typer.Typer(
    name="tcompile",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Compile PyTorch and ONNX models to fast CPU code.

[bold]tcompile MODEL[/bold] is short for [bold]tcompile compile MODEL[/bold]. Every verb takes [bold]--debug[/bold] (traceback of an error) and
[bold]--json[/bold] (machine-readable result on stdout).

Examples:

  tcompile resnet50.onnx                       writes resnet50.tcm for this CPU

  tcompile bert.onnx --shape input_ids=1..8x1..128..512 --target cpu:haswell -o bert.tcm

  tcompile run resnet50.tcm --input x=image.npy --output result.npz

  tcompile bench resnet50.onnx --against onnxruntime,openvino

Exit codes: 0 done, 1 internal fault, 2 usage, 3 model not supported, 4 tool or device missing, 5 verification failed, 130 interrupted.""",
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    if version:
        from ... import __version__

        typer.echo(__version__)
        raise typer.Exit


for _verb in VERBS:
    app.command(_verb)(getattr(import_module(f".verb_{_verb}", __package__), f"{_verb}_verb"))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    settings.debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments and arguments[0] not in (*VERBS, "-h", "--help", "--version"):
        arguments.insert(0, "compile")
    # both unwind, so that temporary files are removed
    handlers = {signal.SIGTERM: lambda *_: interrupt(SystemExit(128 + signal.SIGTERM)), signal.SIGINT: lambda *_: interrupt(KeyboardInterrupt())}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        app(arguments, prog_name="tcompile")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0
