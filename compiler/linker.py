"""From a TVM executable to the bytes of a shared library.

Object files never touch a disk: LLVM ends the whole process when it cannot write one, so they are written into anonymous memory files. The linker is a
child process and reports a full disk like any other failure. Its command line is fixed, without build id, so that equal objects give equal bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .errors import ToolchainError, UsageError
from .tvm import object_modules, relax

#: compiler drivers first (they know where libm is), then bare linkers
DRIVERS = ("cc", "gcc", "clang")
LINKERS = ("ld", "ld.lld", "ld.gold")


def find_linker() -> list[str]:
    """Command prefix that links a shared library; raises ToolchainError when the host has none."""
    for name in DRIVERS:
        if path := shutil.which(name):
            return [path, "-shared", "-nostartfiles", "-Wl,--build-id=none", "-Wl,-z,noexecstack"]
    for name in LINKERS:
        if path := shutil.which(name):
            return [path, "-shared", "--build-id=none", "-z", "noexecstack"]
    raise ToolchainError(
        f"no linker found: none of {', '.join(DRIVERS + LINKERS)} is on PATH; install one, for example `apt-get install gcc` or `apt-get install binutils`"
    )


def link(executable: relax.VMExecutable) -> bytes:
    """Shared library of `executable` as bytes; equal for equal executables under the same linker.

    Raises ToolchainError when no linker is there or it fails, UsageError when the disk is full.
    """
    command = find_linker()
    libm = ["-lm"] if Path(command[0]).name in DRIVERS else ["-l:libm.so.6"]
    with ExitStack() as stack:
        objects = []
        for module in object_modules(executable):
            file = stack.enter_context(memory_file())
            module.write_to_file(str(file), "o")
            objects.append(file)
        result = Path(stack.enter_context(_temporary_directory())) / "lib.so"
        done = subprocess.run(
            [*command, "-o", str(result), *map(str, objects), *libm], capture_output=True, text=True, pass_fds=[int(file.name) for file in objects]
        )
        if done.returncode == 0:
            return result.read_bytes()
        message = done.stderr.strip()
        if "No space left" in message or "File too large" in message:
            raise UsageError(f"cannot link into {tempfile.gettempdir()}: the disk is full; free some space and run again")
        raise ToolchainError(f"{command[0]} could not link the kernels (exit {done.returncode}):\n{message}")


@contextmanager
def memory_file() -> Iterator[Path]:
    """The path, in this process and to children that inherit it, of a file that is no more when the context is left."""
    descriptor = os.memfd_create("object")
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="tcompile-")
    except OSError as error:
        raise UsageError(f"cannot create a temporary directory: {error.strerror}; free some space and run again") from error
