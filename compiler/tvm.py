"""The only module that imports TVM for the rest of tcompile and works around its versions.

Everything else writes `from ..compiler.tvm import relax, tirx, tvm`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from .tvm_runtime import torch_hidden  # first: it sets what TVM reads only once

with torch_hidden():
    import tvm
from tvm import relax, s_tir, te, tirx, topi
from tvm.ir import _ffi_api as _ir
from tvm.relax.expr_functor import mutator
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.compilation_pipeline import PIPELINE_MAP
from tvm.tirx.script import builder as T
from tvm_ffi import structural, structural_equal, structural_hash

__all__ = [
    "BufferType",
    "Constant",
    "IRBuilder",
    "PIPELINE_MAP",
    "T",
    "TensorLoad",
    "is_constant",
    "link_executable",
    "mutator",
    "object_modules",
    "operator_attrs",
    "register_intrinsic",
    "register_operator",
    "relax",
    "relax_functions",
    "s_tir",
    "structural_equal",
    "structural_hash",
    "structural_map",
    "structural_walk",
    "te",
    "tirx",
    "topi",
    "tvm",
]


#: a Relax constant: TVM 0.27 moved it out of `relax`
Constant = tvm.ir.GenericConst
#: the type of a buffer variable: its shape, strides and element type
BufferType = tvm.tirx.buffer.BufferType
#: the expression class behind `tirx.BufferLoad(...)`
TensorLoad = type(tirx.BufferLoad(tirx.decl_buffer((1,), "float32"), [0]))

_POST_ORDER = int(structural.WalkOrder.POSTORDER)


def is_constant(expr: object) -> bool:
    """True for a Relax constant."""
    return isinstance(expr, Constant)


def link_executable(builder: relax.ExecBuilder, target: tvm.target.Target, library: tvm.runtime.Module) -> relax.VMExecutable:
    """The VM executable of a builder's functions and the library that holds their code; what `relax.build` does last."""
    return relax.VMExecutable(relax._ffi_api.VMLink(builder, target, library, [], {}))


@functools.cache
def _type_index(kind: Any) -> int:
    return structural._callback_type_to_type_index(kind, api_name="structural_map")


def _typed(callbacks: Any) -> list[tuple[int, Any]]:
    entries = callbacks if isinstance(callbacks, list) else [callbacks]
    return [(_type_index(kind), call) for kinds, call in entries for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]


def structural_map(root: Any, callbacks: Any) -> Any:
    """`tvm_ffi.structural_map` in post-order for a (type or types, callback), or a list of them. It is called for every statement of a kernel, and tvm_ffi's own takes most of
    its time to find the numbers of the types."""
    return structural._ffi_api.StructuralMap(root, _typed(callbacks), [], _POST_ORDER)


def structural_walk(root: Any, callbacks: Any) -> Any:
    """`tvm_ffi.structural_walk`, as `structural_map` here."""
    return structural._ffi_api.StructuralWalk(root, _typed(callbacks), [], _POST_ORDER)


def object_modules(executable: relax.VMExecutable) -> list[Any]:
    """The modules that `write_to_file(path, "o")` makes objects of, together all of an executable: its code, and the bytes that say how the code belongs together.

    What `export_library` does, except that it has LLVM optimise those bytes, and does not take unoptimised code for a library of the system.
    """
    target = json.dumps({"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "opt-level": 0})
    return [*executable.mod._collect_dso_modules(), tvm.runtime._ffi_api.ModulePackImportsToLLVM(executable.mod, False, target, "")]


def register_operator(name: str, arguments: tuple[str, ...], infer: Callable[[Any, Any], Any], legalize: Callable[[Any, Any], Any]) -> Any:
    """Make a pure Relax operator known to TVM and return it. `infer` and `legalize` take a BlockBuilder and a call.

    infer returns the type of the result, and raises ValueError for operands that do not fit. legalize returns an expression over known operators, for targets without
    a kernel of their own. Optional arguments come last; their number is not checked here.
    """
    _ir.RegisterOp(name, "")
    operator = tvm.ir.Op.get(name)
    operator.set_num_inputs(-1)
    for argument in arguments:
        operator.add_argument(argument, "Tensor", "")
    tvm.ir.register_op_attr(name, "FInferType", lambda call, builder: infer(builder, call))
    tvm.ir.register_op_attr(name, "FLegalize", legalize)
    tvm.ir.register_op_attr(name, "FPurity", True)
    return operator


def register_intrinsic(name: str, lower: Callable[[Any], Any]) -> Any:
    """Make a pure function of scalars known to TVM's kernels, where loops over it may be vectorised. lower(call) returns an expression over known ones, for targets without anything better."""
    _ir.RegisterOp(name, "")
    tvm.ir.register_op_attr(name, "TVectorizable", True)
    tvm.ir.register_op_attr(name, "TCallEffectKind", 1)
    tvm.ir.register_op_attr(name, "TScriptPrinterName", name)
    tvm.ir.register_op_attr(name, "default.FLowerIntrinsic", lower)
    return tvm.ir.Op.get(name)


def operator_attrs(**values: Any) -> Any:
    """Attributes of a call of an operator that `register_operator` made: booleans, numbers, strings."""
    return tvm.ir.make_node("ir.DictAttrs", **values)


def relax_functions(module: tvm.IRModule) -> list[tuple[tvm.ir.GlobalVar, relax.Function]]:
    """`main`, and the functions that drivers of control flow call (`tvm_control.py`), by name."""
    found = [(variable, function) for variable, function in module.functions_items() if isinstance(function, relax.Function)]
    return sorted(found, key=lambda entry: entry[0].name_hint)
