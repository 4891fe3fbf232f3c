"""C simulation of an emitted project with g++ and the simulation headers that come with it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...compiler.errors import ToolchainError, VerificationError

#: what a build needs of a project
FILES = ("tc_hls.h", "sim_ap_int.h", "sim_hls_stream.h", "weights.h", "kernel.h", "kernel.cpp", "vectors.h", "testbench.cpp")
SECONDS = 120


@dataclass
class Simulation:
    """A built testbench. `folder` lives as long as this object."""

    folder: Path
    out_count: int
    keep: tempfile.TemporaryDirectory | None = None

    def check(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run on the project's own vectors: return code 0 equal, 1 different, 3 deadlock."""
        return _run([str(self.folder / "testbench"), *arguments], self.folder)

    def __call__(self, inputs: np.ndarray, *arguments: str) -> np.ndarray:
        """u8 [n, elements] -> int32 [n, out elements]. Raises VerificationError when the simulation does not come to its end."""
        source, result = self.folder / "in.bin", self.folder / "out.bin"
        source.write_bytes(np.ascontiguousarray(inputs, np.uint8).tobytes())
        done = self.check(*arguments, "--run", str(source), str(result))
        if done.returncode:
            raise VerificationError(f"C simulation stopped with status {done.returncode}: {done.stdout.strip() or done.stderr.strip()}")
        return np.frombuffer(result.read_bytes(), np.int32).reshape(len(inputs), self.out_count)


def build(sources: Mapping[str, str], out_count: int, *, flags: tuple[str, ...] = ("-DTC_SIM",)) -> Simulation:
    """Compile a project's kernel and testbench. Raises ToolchainError without g++, or when it refuses the code."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise ToolchainError("C simulation of an FPGA project needs g++, which is not installed; install it, for example with `apt install g++`")
    keep = tempfile.TemporaryDirectory(prefix="tcompile-csim-")
    folder = Path(keep.name)
    for name in FILES:
        (folder / name).write_text(sources[name])
    command = [compiler, "-std=c++14", "-O0", "-w", *flags, "-I.", "kernel.cpp", "testbench.cpp", "-o", "testbench"]
    done = _run(command, folder)
    if done.returncode:
        raise ToolchainError(f"g++ failed on the emitted project: {done.stderr.strip()[:2000]}")
    return Simulation(folder, out_count, keep)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"{Path(command[0]).name} did not end within {SECONDS} s") from error
