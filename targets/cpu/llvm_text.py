"""Functions written in LLVM's language, for instructions that TVM has no expression of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ...compiler.tvm import T, tirx, tvm

_KEY = "pragma_import_llvm"


def defining(text: str) -> AbstractContextManager[Any]:
    """What is built within may call the functions of `text`; "" defines none."""
    return T.attr(T.int32(0), _KEY, text) if text else nullcontext()


def with_functions(body: Any, text: str) -> Any:
    """A statement that may call the functions of `text`."""
    return tirx.AttrStmt(tirx.const(0, "int32"), _KEY, tvm.ir.StringImm(text), body)
