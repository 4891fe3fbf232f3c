"""Small modules and fused kernels that several tests begin with."""

from __future__ import annotations

from typing import Any

from tcompile.compiler.dialect.attention import attention
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.common.fused import Fused, analyze
from tcompile.targets.common.legalize import legalize

#: what references are built for: code that runs once on little data is not worth the time in which LLVM would optimise it
UNOPTIMIZED = tvm.target.Target({"kind": "llvm", "opt-level": 0})


def only_kernel(module: Any) -> Fused:
    """The one kernel that legalization and fusion make of a module."""
    module, transform = legalize(module), relax.transform
    for step in (transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR(), transform.DeadCodeElimination()):
        module = step(module)
    functions = [func for _, func in module.functions_items() if isinstance(func, tirx.PrimFunc)]
    assert len(functions) == 1, "the epilogue was not fused"
    return analyze(functions[0])


def attention_module(types: Any, **attrs: Any) -> Any:
    """One attention over operands q, k, v and perhaps a mask of these (shape, dtype)."""
    builder = relax.BlockBuilder()
    params = [relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in zip("qkvm", types, strict=False)]
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(attention(*params, **attrs)))
        builder.emit_func_output(out)
    return builder.get()
