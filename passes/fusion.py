"""Epilogue fusion: every GEMM, convolution or reduction takes the element-wise operations behind it into its own kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax, structural_walk, tirx, tvm
from .base import Pass, PassContext
from .observing import returning
from .origins import kernel_sources

#: attributes of a kernel: names of the source nodes that its calls compute, and of the variables of the graph before it was fused
NODES, SOURCES = "tcompile.nodes", "tcompile.sources"


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Runs on a legalized module (every operator a `call_tir`): groups kernels by Relax's dominator-based fusion and merges each group into one PrimFunc.

    depth: most operators in one group.
    """

    name: ClassVar[str] = "fuse_epilogues"
    depth: int = 256

    def run(self, program: Program, context: PassContext) -> Program:
        transform = relax.transform
        before = _kernel_calls(program)
        annotated = _Spread(transform.AnnotateTIROpPattern()(program.module)).apply()
        with tvm.transform.PassContext(config={"relax.FuseOps.max_depth": self.depth}):
            grouped = _after_their_sizes(_fuse(program.with_module(annotated)))
        sources = kernel_sources(annotated, grouped)
        module = transform.DeadCodeElimination()(transform.FuseTIR()(grouped))
        fused = program.with_module(_with_sources(module, sources, program))
        context.matched(kernels_before=before, kernels_after=_kernel_calls(fused))
        return fused


def _fuse(program: Program) -> Any:
    """Relax's grouping, in which a tensor of short numbers that a sum with another product reads widened is a result of its kernel: the widening would go with the product that makes it, and the
    tensor between both kernels would be the wide one."""
    short = _Spread(program.module).short_results()
    if not short:
        return relax.transform.FuseOps()(program.module)
    count = len(program.main.ret_ty.fields) if isinstance(program.main.ret_ty, relax.TupleType) else 0
    # results of the program are results of their kernels
    grouped = program.with_module(relax.transform.FuseOps()(returning(program, short).module))
    main = grouped.main
    *blocks, last = main.body.blocks
    values = last.bindings[-1].value.fields
    bound = last.bindings[:-1]
    result = relax.Tuple(values[:count]) if count else values[0]
    body = relax.SeqExpr([*blocks, type(last)(bound)] if bound else blocks, result)
    return grouped.with_main(relax.Function(main.params, body, program.main.ret_ty, attrs=main.attrs)).module


#: Relax's pattern kinds
ELEMENTWISE, BROADCAST, OUT_ELEMENTWISE_FUSABLE, OPAQUE = 0, 1, 4, 8


@mutator
class _Spread(relax.PyExprMutator):
    """Keeps apart a GEMM or convolution and a larger tensor over which its result is spread (a squeeze-and-excite gate): the last operator before the spreading fuses
    with nothing. In one kernel the product would have to be computed by the loops of the larger tensor."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.module = module
        self.calls: dict[Any, Any] = {}
        self.apart: set[Any] = set()
        relax.analysis.post_order_visit(module["main"], self._collect)

    def apply(self) -> Any:
        for call in list(self.calls.values()):
            if self._kind(call) <= BROADCAST:
                self.apart.update(self.calls[arg] for arg in call.args[1].fields if self._spread(arg, call) and self._comes_from_a_core(arg))
        if not self.apart:
            return self.module
        self.builder_.update_func(self.module.get_global_var("main"), self.visit_expr(self.module["main"]))
        return relax.transform.DeadCodeElimination()(self.builder_.get())

    def short_results(self) -> list[Any]:
        """Variables of bfloat16 made behind a product, whose float32 alone is read, by an operator that reads another product as well."""
        readers: dict[Any, list[Any]] = {}
        for var, call in self.calls.items():
            for arg in call.args[1].fields:
                readers.setdefault(arg, []).append(var)
        found = []
        for var in self.calls:
            if str(getattr(var.ty, "dtype", "")) != "bfloat16" or len(wide := readers.get(var, [])) != 1 or not self._comes_from_a_core(var):
                continue
            joins = readers.get(wide[0], [])
            if str(wide[0].ty.dtype) == "float32" and self._kind(self.calls[wide[0]]) == ELEMENTWISE and len(joins) == 1:
                others = [arg for arg in self.calls[joins[0]].args[1].fields if not arg.same_as(wide[0])]
                if any(self._comes_from_a_core(arg) for arg in others):
                    found.append(var)
        return found

    def _collect(self, expr: Any) -> None:
        for block in expr.blocks if isinstance(expr, relax.SeqExpr) else ():
            for binding in block.bindings:
                value = getattr(binding, "value", None)
                if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir":
                    self.calls[binding.var] = value

    def _kind(self, call: Any) -> int:
        return int((self.module[call.args[0]].attrs or {}).get("op_pattern", OPAQUE))

    def _comes_from_a_core(self, var: Any) -> bool:
        """Element-wise operators lead from a GEMM or convolution to `var`."""
        while (call := self.calls.get(var)) is not None and self._kind(call) <= BROADCAST:
            produced = [arg for arg in call.args[1].fields if arg in self.calls and not self._spread(arg, call)]
            if not produced:
                return False
            var = produced[0]
        return call is not None and self._kind(call) == OUT_ELEMENTWISE_FUSABLE

    @staticmethod
    def _spread(arg: Any, call: Any) -> bool:
        """The result of `call` has a dim other than 1 where `arg` has 1 or none."""
        if not isinstance(arg.ty, relax.TensorType) or not isinstance(call.ty, relax.TensorType):
            return False
        mine, out = list(arg.ty.shape), list(call.ty.shape)
        mine = [1] * (len(out) - len(mine)) + mine
        return any(_one(a) and not _one(b) for a, b in zip(mine, out, strict=False))

    def visit_call_(self, call: Any) -> Any:
        if call not in self.apart:
            return super().visit_call_(call)
        own = self.builder_.add_func(self.module[call.args[0]].with_attr("op_pattern", OPAQUE), call.args[0].name_hint)
        args = [self.visit_expr(arg) for arg in call.args[1].fields]
        return relax.Call(call.op, [own, relax.Tuple(args), *call.args[2:]], call.attrs, call.ty_args)


def _one(dim: Any) -> bool:
    return dim == 1 if isinstance(dim, int) else isinstance(dim, tirx.IntImm) and int(dim) == 1


def _with_sources(module: Any, sources: Mapping[str, list[str]], program: Program) -> Any:
    """The module with the attributes `NODES` and `SOURCES` on every kernel."""
    module = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for variable, func in list(module.functions_items()):
        names = sources.get(variable.name_hint)
        if names and isinstance(func, tirx.PrimFunc):
            nodes = list(dict.fromkeys(node for name in names if (node := program.node(name)) != name))
            module.update_func(variable, func.with_attr(SOURCES, names).with_attr(NODES, nodes))
    return module


def _kernel_calls(program: Program) -> int:
    count = 0

    def visit(expr: object) -> None:
        nonlocal count
        count += isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir"

    relax.analysis.post_order_visit(program.main, visit)
    return count


def _after_their_sizes(module: Any) -> Any:
    """`main` with every binding after the casts that define the sizes in it: grouping looks at tensors alone, and moves a kernel in front of them."""
    main = module["main"]
    if not any(
        isinstance(binding, relax.MatchCast) and isinstance(binding.ty, relax.ShapeType) for block in main.body.blocks for binding in block.bindings
    ):
        return module
    blocks = [type(block)(_sorted(list(block.bindings))) for block in main.body.blocks]
    ordered = relax.Function(main.params, relax.SeqExpr(blocks, main.body.body), main.ret_ty, main.is_pure, main.attrs)
    module = module.clone()
    module.update_func(module.get_global_var("main"), ordered)
    return module


def _sorted(bindings: list[Any]) -> list[Any]:
    """A topological order by variables and sizes, as near to the given one as can be."""
    maker: dict[Any, int] = {}
    for index, binding in enumerate(bindings):
        maker[binding.var] = index
        if isinstance(binding, relax.MatchCast) and isinstance(binding.ty, relax.ShapeType):
            for size in binding.ty.values or ():
                if isinstance(size, tirx.Var):
                    maker.setdefault(size, index)
    order: list[Any] = []
    done: set[int] = set()
    for start in range(len(bindings)):
        stack = [start]
        while stack:
            index = stack[-1]
            missing = [maker[name] for name in _reads(bindings[index]) if name in maker and maker[name] not in done and maker[name] != index]
            if missing and index not in done:
                stack += missing
                continue
            stack.pop()
            if index not in done:
                done.add(index)
                order.append(bindings[index])
    return order


def _reads(binding: Any) -> list[Any]:
    """The variables and the sizes that a binding needs."""
    found: list[Any] = []

    def dims(values: Any) -> None:
        for value in values or ():
            structural_walk(value, (tirx.Var, found.append))

    def visit(node: Any) -> None:
        if isinstance(node, relax.Var):
            found.append(node)
        elif isinstance(node, relax.ShapeExpr):
            dims(node.values)

    relax.analysis.post_order_visit(binding.value, visit)
    for kind in _tensor_types(binding.var.ty):
        dims(kind.shape.values if isinstance(kind.shape, relax.ShapeExpr) else ())
    return found


def _tensor_types(kind: Any) -> list[Any]:
    if isinstance(kind, relax.TupleType):
        return [inner for field in kind.fields for inner in _tensor_types(field)]
    return [kind] if isinstance(kind, relax.TensorType) else []
