"""tcompile: a tensor compiler from PyTorch and ONNX models to fast CPU, GPU and FPGA artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CompiledModel", "TcompileError", "ToolchainError", "UnsupportedModel", "UsageError", "VerificationError", "compile", "inspect", "load"]

if TYPE_CHECKING:
    from .compiler.api import compile, load
    from .compiler.errors import TcompileError, ToolchainError, UnsupportedModel, UsageError, VerificationError
    from .compiler.inspection import inspect
    from .compiler.runtime import CompiledModel

#: public name -> module that defines it; imported on first use, so that `import tcompile` costs nothing
_HOMES = {name: ".compiler.errors" for name in __all__ if name.endswith(("Error", "Model"))}
_HOMES |= {"CompiledModel": ".compiler.runtime", "compile": ".compiler.api", "inspect": ".compiler.inspection", "load": ".compiler.runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tcompile' has no attribute '{name}'")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value
