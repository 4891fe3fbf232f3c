"""Analysis of a fused PrimFunc: one core block (GEMM, convolution, ...) followed by a chain of element-wise blocks, its epilogue.

Relax fuses; this module only reads what fusion left, so that a template can rewrite the core as a register-tiled loop nest and re-emit the epilogue on the
accumulators, one vector at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import T, TensorLoad, s_tir, structural_map, structural_walk, tirx, tvm

#: block annotation that marks the core block; its value is a JSON object {"op": ..., attributes}
CORE = "tcompile.core"
#: attribute of a function that is one core operator as a whole, with no block that is its core: the same object, and "outputs", how many there are
WHOLE = "tcompile.whole"
#: nodes that cost nothing to recompute
_FREE = (tirx.IntImm, tirx.FloatImm, tirx.Var, tirx.Cast, TensorLoad)


def static(value: Any) -> int | None:
    """The value of a dim when it is known at compile time."""
    if isinstance(value, int):
        return value
    return int(value.value) if isinstance(value, tirx.IntImm) else None


def product(dims: Sequence[Any]) -> Any:
    """Product of dims, simplified; int64."""
    result: Any = T.int64(1)
    for dim in dims:
        result = result * dim
    return tvm.sym.Analyzer().simplify(result)


def core_attrs(op: str, **attrs: Any) -> dict[str, str]:
    """`attrs=` of the `te.compute` that defines a core op."""
    return {CORE: json.dumps({"op": op, **attrs}, sort_keys=True)}


def sblocks(func: tirx.PrimFunc) -> list[Any]:
    """All computing blocks in program order (the root block left out)."""
    found: list[Any] = []
    structural_walk(func.body, (s_tir.SBlock, lambda block: found.append(block)))
    return [block for block in found if block.name_hint != "root" or len(block.iter_vars)]


def loads(expr: Any) -> list[Any]:
    """Every buffer read in an expression, inner ones (indices of gathers) included."""
    found: list[Any] = []
    structural_walk(expr, (TensorLoad, found.append))
    return found


def variables_of(expr: Any) -> set[Any]:
    found: set[Any] = set()
    structural_walk(expr, (tirx.Var, found.add))
    return found


def is_reduction(block: Any) -> bool:
    return block.init is not None or any(int(var.iter_type) == 2 for var in block.iter_vars)


def cost(expr: Any) -> int:
    """Arithmetic nodes of an expression, index arithmetic left out; calls count ten."""
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, tvm.ir.Call):
            total += 1 if getattr(node.op, "name", "") == "prim.if_then_else" else 10
        elif not isinstance(node, _FREE) and str(node.ty.dtype).startswith(("float", "bfloat")):
            total += 1

    structural_walk(expr, (tvm.ir.Expr, visit))
    return total


class Unfusable(Exception):
    """The PrimFunc is not one core block with an element-wise epilogue; the generic scheduler takes it."""


@dataclass(frozen=True)
class Fused:
    """One core block and its epilogue.

    func: the PrimFunc; its parameter list (inputs..., output) is the contract that a template keeps, packed weights excepted.
    core: the core's attributes ("op" and those given to `core_attrs`); inputs: the core's operands in the order of its definition;
    accumulator: the buffer the core writes; output: the buffer the last block writes (the accumulator itself without an epilogue).
    """

    func: tirx.PrimFunc
    core: dict[str, Any]
    inputs: tuple[Any, ...]
    accumulator: Any
    output: Any
    epilogue: tuple[Any, ...]

    @property
    def params(self) -> list[Any]:
        return list(self.func.params)

    def param_index(self, buffer: Any) -> int | None:
        """Position of a buffer among the parameters, None for an intermediate."""
        for position, param in enumerate(self.func.params):
            if param.same_as(buffer):
                return position
        return None

    def epilogue_text(self) -> str:
        """The epilogue as text, for workload keys and reports."""
        return "; ".join(str(block.body.value).replace("\n", " ") for block in self.epilogue)

    @property
    def epilogue_cost(self) -> int:
        """Arithmetic operations of the epilogue per element; calls count ten."""
        return sum(cost(block.body.value) for block in self.epilogue)

    def emit_epilogue(self, value: Any, indices: Sequence[Any], load: Callable[[Any, Sequence[Any]], Any]) -> Any:
        """Emit the epilogue for one element and return its value.

        value: the accumulator's value at `indices` (one index per dim of the output). `load(buffer, indices)` reads an operand; templates pass a
        function that knows their views of the parameters. Each block's result is bound once, so shared subexpressions are not repeated.
        """
        known: dict[Any, Any] = {self.accumulator: value}
        for block in self.epilogue:
            axes = {var.var: index for var, index in zip(block.iter_vars, indices, strict=True)}

            def read(access: Any) -> Any:
                return known[access.source] if access.source in known else load(access.source, list(access.indices))

            # post order: the indices are substituted before `read` sees the access
            rules = [(TensorLoad, read), (tirx.Var, lambda var: axes.get(var, var)), (tirx.LT, _truth), (tirx.Cast, _number)]  # noqa: B023
            expr = structural_map(block.body.value, rules)
            # TVM's legalization of bfloat16 changes the type of a value, but not that of the name it is bound to; vectors of truth values cannot be bound
            known[block.body.buffer] = expr if str(expr.ty.dtype).startswith(("bfloat16", "bool")) else T.bind(expr)
        return known[self.output]


def _number(cast: Any) -> Any:
    """Casts that TVM's analyzer of bounds cannot see through: it makes constants of integers' bounds, also of vectors of truth values and of floats, which there are not."""
    x, dtype = cast.value, str(cast.ty.dtype)
    source = str(x.ty.dtype)
    if source == "bool":
        return tirx.Select(x, tirx.const(1, dtype), tirx.const(0, dtype))
    if dtype.startswith("float") and source.startswith(("int", "uint")):
        other = source[1:] if source.startswith("u") else f"u{source}"
        return tirx.Cast(dtype, tirx.reinterpret(source, tirx.reinterpret(other, x)))
    return cast


def _truth(less: Any) -> Any:
    """What `where` tests, 0 < the number of a truth value, is that truth value."""
    number = less.b
    if not isinstance(number, tirx.Select) or str(number.condition.ty.dtype) != "bool":
        return less
    values = [getattr(each, "value", None) for each in (less.a, number.true_value, number.false_value)]
    return number.condition if values == [0, 1, 0] else less


def analyze(func: tirx.PrimFunc) -> Fused:
    """Split a PrimFunc into core and epilogue; raises Unfusable with the reason."""
    if WHOLE in (func.attrs or {}):
        about = json.loads(str(func.attrs[WHOLE]))
        buffers = [param for param in func.params if hasattr(param, "shape")]
        inputs, outputs = buffers[: -about["outputs"]], buffers[-about["outputs"] :]
        return Fused(func, about, tuple(inputs), outputs[0], outputs[0], ())
    blocks = sblocks(func)
    cores = [block for block in blocks if CORE in block.annotations]
    if len(cores) != 1:
        raise Unfusable(f"{len(cores)} core blocks")
    core = cores[0]
    operands = [region.source for region in core.reads]
    for block in blocks:
        if not block.same_as(core) and any(region.source.same_as(buffer) for region in block.writes for buffer in operands):
            raise Unfusable(f"block {block.name_hint} runs before the core")
    # what the core does not read (another operand of a sum with its result) is computed behind it
    blocks = [core, *(block for block in blocks if not block.same_as(core))]
    accumulator = core.writes[0].source
    produced = [accumulator]
    for block in blocks[1:]:
        if is_reduction(block) or not isinstance(block.body, tirx.BufferStore):
            raise Unfusable(f"block {block.name_hint} is not element-wise")
        if not is_identity(block, block.body.indices) or not same_dims(block.body.buffer.shape, accumulator.shape):
            raise Unfusable(f"block {block.name_hint} is not over the core's shape")
        for read in loads(block.body.value):
            if any(read.source.same_as(buffer) for buffer in produced) and not is_identity(block, read.indices):
                raise Unfusable(f"block {block.name_hint} reads an intermediate out of place")
        produced.append(block.body.buffer)
    output = produced[-1]
    if not any(param.same_as(output) for param in func.params):
        raise Unfusable("the last block does not write the output")
    if any(param.same_as(buffer) for param in func.params for buffer in produced[:-1]):
        raise Unfusable("more than one output")
    reads = [region.source for region in core.reads if not region.source.same_as(accumulator)]
    return Fused(func, json.loads(str(core.annotations[CORE])), tuple(reads), accumulator, output, tuple(blocks[1:]))


def is_identity(block: Any, indices: Sequence[Any]) -> bool:
    """The indices are the block's axes in their order."""
    variables = [var.var for var in block.iter_vars]
    return len(indices) == len(variables) and all(
        index.same_as(var) or _is_unit(axis) for index, var, axis in zip(indices, variables, block.iter_vars, strict=True)
    )


def _is_unit(axis: Any) -> bool:
    extent = axis.dom.extent
    return isinstance(extent, tirx.IntImm) and extent.value == 1


def same_dims(a: Any, b: Any) -> bool:
    """Equal shapes, as far as can be proved."""
    analyzer = tvm.sym.Analyzer()
    return len(a) == len(b) and all(analyzer.can_prove_equal(x, y) for x, y in zip(a, b, strict=True))
