"""What rewriters of the graph share."""

from __future__ import annotations

from typing import Any

from ..compiler.tvm import relax, tvm


def emit_as(builder: Any, var: Any, value: Any) -> Any:
    """Bind `value` in place of the source's binding of `var`: under its name, and as an output of the dataflow block where that is one."""
    output = not isinstance(var, relax.DataflowVar) and builder.current_block_is_dataflow()
    return (builder.emit_output if output else builder.emit)(value, var.name)


def same_dims(a: Any, b: Any) -> bool:
    """Whether two shapes (None: not known) are equal, as far as can be proved."""
    if a is None or b is None or len(a) != len(b):
        return False
    analyzer = tvm.sym.Analyzer()
    return all(analyzer.can_prove_equal(one, other) for one, other in zip(a, b, strict=True))
