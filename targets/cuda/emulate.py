"""Running the emitted CUDA on this CPU: the very source of an artifact, compiled by g++ with include/simt.h in place of a GPU.

Every thread of every block runs as a fiber, tensor-core instructions follow the fragment layouts of the PTX manual. Slow (seconds per GMAC); for tests and for
`tcompile verify` on machines without a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ...compiler.errors import ToolchainError
from .host import MODEL
from .toolchain import ffi_headers


def build(sources: Mapping[str, str]) -> bytes:
    """A shared library with the same entry point, for tensors in main memory. Raises ToolchainError without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise ToolchainError("g++ is not installed: apt-get install g++")
    with tempfile.TemporaryDirectory(prefix="tcompile-") as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_text(text)
        flags = ["-shared", "-fPIC", "-std=c++17", "-O2", "-march=x86-64-v3", "-ffp-contract=off", "-w", "-DTCOMPILE_SIMT", "-x", "c++"]
        line = [compiler, *flags, *(f"-I{path}" for path in ffi_headers()), MODEL, "-o", "lib.so"]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ToolchainError(f"g++ could not build the emulation (exit {done.returncode}):\n{done.stderr.strip()[-4000:]}")
        return (Path(folder) / "lib.so").read_bytes()
