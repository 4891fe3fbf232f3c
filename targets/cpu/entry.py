"""What a compiled kernel checks of its arguments before it computes: that sizes are those it was made for, in one test.

TVM's entry of a function tests number, kind, rank, element type, device, strides, alignment and pointers of what it is given one by one, each with a message of its own: of a
kernel of a few lines nine tenths of the machine code, and of the time LLVM takes for it. A program calls its kernels with tensors that it allocated itself or has checked
as they came in, so their types are known; sizes are tested still, as a wrong one would read beyond the end of a tensor.
"""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import structural_walk, tirx, tvm

#: the attribute around what the function itself computes
_COMPUTATION = "compute_scope"
#: of the only function of a module: TVM's code generator writes it down once more, under a name for callers that know none
_ENTRY = "tirx.is_entry_func"
#: what `tvm_struct_get` is asked for: an element of an array, here of a shape
_ELEMENT = 17


def short_entry(func: Any) -> Any:
    """A function that TVM's MakePackedAPI has been over, with one assertion about all sizes in place of many about everything."""
    if "calling_conv" not in (func.attrs or {}):
        return func
    if _ENTRY in func.attrs:
        func = func.without_attr(_ENTRY)
    sizes: list[Any] = []
    name = str(func.attrs["global_symbol"]).removeprefix("__tvm_ffi_")
    body = _shortened(func.body, sizes, name)
    assert not sizes, "no computation that they could be asserted before"
    return func.with_body(body)


def _shortened(statement: Any, sizes: list[Any], name: str) -> Any:
    """The statement without its assertions, None if nothing is left; what they say about sizes is taken down in `sizes` and asserted before the computation."""
    if isinstance(statement, tirx.AssertStmt):
        if _about_sizes(statement.condition):
            sizes.append(statement.condition)
        return None
    if isinstance(statement, tirx.IfThenElse):  # strides, where there are any
        return None
    if isinstance(statement, tirx.SeqStmt):
        kept = [found for part in statement.seq if (found := _shortened(part, sizes, name)) is not None]
        return tirx.SeqStmt(kept)
    if isinstance(statement, tirx.AttrStmt) and statement.attr_key == _COMPUTATION and sizes:
        message = [tvm.ir.StringImm(f"{name}: a tensor has another size than this kernel was made for")]
        fitting = tirx.AssertStmt(tirx.all(*sizes), tvm.ir.StringImm("ValueError"), message)
        sizes.clear()
        return tirx.SeqStmt([fitting, statement])
    if isinstance(statement, tirx.AttrStmt) and statement.attr_key != _COMPUTATION:
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, _shortened(statement.body, sizes, name))
    return statement


def _about_sizes(condition: Any) -> bool:
    found: list[bool] = []

    def visit(call: Any) -> None:
        if getattr(call.op, "name", "") == "tirx.tvm_struct_get":
            found.append(int(call.args[2]) == _ELEMENT)

    structural_walk(condition, (tvm.ir.Call, visit))
    return bool(found) and all(found)
