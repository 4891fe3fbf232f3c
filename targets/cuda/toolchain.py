"""nvcc: found, run, and what its machine code contains."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...compiler.errors import ToolchainError
from .host import MODEL

INSTALL = (
    "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl (or tcompile[cuda]), or install a CUDA toolkit"
)

#: where toolkits are installed
TOOLKITS = (Path("/usr/local/cuda"),)


def find_nvcc() -> Path:
    """nvcc on the PATH, in /usr/local/cuda, or of the package nvidia-cuda-nvcc; raises ToolchainError when there is none."""
    found = shutil.which("nvcc")
    places = [Path(found)] if found else []
    places += [folder / "bin" / "nvcc" for folder in (*TOOLKITS, *_packaged())]
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    raise ToolchainError(f"nvcc is not installed: {INSTALL}; or give --emit-only to get the sources alone")


def _packaged() -> list[Path]:
    """Folders of the `nvidia-*` packages that hold a toolkit: nvidia/cu13, nvidia/cuda_nvcc."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    return [folder for root in roots for folder in sorted(Path(root).glob("cu*")) if folder.is_dir()]


def command(arch: str, nvcc: str = "nvcc", headers: str = "$(tvm-ffi-config --includedir)") -> list[str]:
    """The command line that makes lib.so of the sources in the current folder."""
    number = arch.removeprefix("sm_")
    flags = [
        "-shared",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-Xlinker",
        "--strip-all,--build-id=none",
        "-std=c++17",
        "-O3",
        f"-gencode=arch=compute_{number},code=sm_{number}",
    ]
    return [nvcc, *flags, *(f"-I{folder}" for folder in ([headers] if isinstance(headers, str) else headers)), MODEL, "-o", "lib.so"]


def ffi_headers() -> list[str]:
    """The folders of tvm-ffi's C headers."""
    spec = importlib.util.find_spec("tvm_ffi")
    if spec is None or spec.origin is None:
        raise ToolchainError("package apache-tvm-ffi is not installed; `pip install tcompile` brings it")
    return [str(Path(spec.origin).parent / "include")]


@dataclass(frozen=True)
class Built:
    """A shared library, and what the assembler remarked: products that it had to wait for one by one, registers that it could not reallocate."""

    library: bytes
    remarks: tuple[str, ...]


def build(sources: Mapping[str, str], arch: str, nvcc: Path | None = None) -> Built:
    """The shared library of an artifact's sources. Raises ToolchainError without nvcc, or when it fails."""
    nvcc = nvcc or find_nvcc()
    with tempfile.TemporaryDirectory(prefix="tcompile-") as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_text(text)
        line = command(arch, str(nvcc), ffi_headers()[0])
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ToolchainError(f"nvcc could not build the kernels (exit {done.returncode}):\n{(done.stderr or done.stdout).strip()[-4000:]}")
        remarks = sorted({line.strip() for line in done.stderr.splitlines() if line.startswith("ptxas")})
        return Built((Path(folder) / "lib.so").read_bytes(), tuple(remarks))
