"""`tcompile doctor`: is everything here that compiling and running need?"""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

from ..errors import TcompileError, ToolchainError
from .terminal import Json, guarded, print_json, print_table

#: package -> what it is needed for; "" when tcompile cannot work without it
PACKAGES = {
    "apache-tvm": "",
    "apache-tvm-ffi": "",
    "numpy": "",
    "onnx": "",
    "torch": "PyTorch models",
    "onnxruntime": "verify, bench",
    "openvino": "bench",
}


@guarded
def doctor_verb(as_json: bool = Json) -> None:
    """Check versions, the host CPU and the linker. Exit code 4 when something necessary is missing.

    Examples:

      tcompile doctor

      tcompile doctor --json
    """
    checks = [("python", True, platform.python_version()), ("tcompile", True, _own_version())]
    for package, purpose in PACKAGES.items():
        found = _version(package)
        checks.append((package, bool(found or purpose), found or f"not installed{f' (only for: {purpose})' if purpose else ''}"))
    checks += [_check("host CPU", _host), _check("linker", _linker)]
    free = shutil.disk_usage(".").free
    checks.append(("free disk here", free > 1 << 30, f"{free / 1e9:.1f} GB"))
    if as_json:
        print_json({name: {"ok": ok, "detail": detail} for name, ok, detail in checks})
    else:
        print_table(["check", "result", "detail"], [[name, "ok" if ok else "PROBLEM", detail] for name, ok, detail in checks])
    if problems := [name for name, ok, _ in checks if not ok]:
        raise ToolchainError(f"problem with {', '.join(problems)}; see the details above")


def _own_version() -> str:
    from ... import __version__

    return f"{__version__} ({sys.modules['tcompile'].__file__})" if "tcompile" in sys.modules else __version__


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _check(name: str, probe) -> tuple[str, bool, str]:
    try:
        return name, True, probe()
    except TcompileError as error:
        return name, False, str(error)


def _host() -> str:
    from ...targets.base import Target

    target = Target.parse("cpu")
    return f"{target.mcpu}, {target.cores} CPUs, {target.vector_bits}-bit vectors, {', '.join(sorted(target.features))}"


def _linker() -> str:
    from ..linker import find_linker

    return find_linker()[0]
