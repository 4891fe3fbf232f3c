"""The pass `precision`: products by constant weights in a shorter floating-point type."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.dialect.attention import NAME as ATTENTION
from ..compiler.dialect.attention import are_few, attrs_of
from ..compiler.dialect.grouped import NAME as GROUPED
from ..compiler.dialect.weight_only import NAME as WEIGHT_ONLY
from ..compiler.element_types import numpy_dtype
from ..compiler.errors import UsageError
from ..compiler.program import Program
from ..compiler.tvm import is_constant, mutator, operator_attrs, relax, tirx
from .base import Pass, PassContext
from .products import VIEWS, Graph, Site, analyze, operator
from .rewriting import emit_as

#: what --precision names -> the type in which operands are stored, None where nothing changes
FORMATS = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
#: operators that read the 16-bit copy of a tensor where there is one: they are computed within the kernel of a product
JOINS = ("relax.add", "relax.subtract", "relax.multiply")
#: the largest of rounded numbers is the largest one rounded
MAXIMA = ("relax.nn.max_pool1d", "relax.nn.max_pool2d", "relax.nn.max_pool3d")
FOR_TARGETS = {"cpu": ("fp32", "bf16"), "cuda": tuple(FORMATS)}


@dataclass(frozen=True)
class Precision(Pass):
    """Matrix products (by group, too) and convolutions by constant weights, and attention, with operands rounded to 16 bits and sums in float32; everything else stays in float32.

    A tensor is rounded once, where it is made, and stored in 16 bits alone if only products read it, or convolutions and beside them sums and products by element: the shortcut of a residual block,
    large beside its weights, then moves half of the bytes. (The shortcuts of transformers stay in float32: those of BERT-base double the error and are small.) On a GPU, rounding goes for what is
    multiplied by weights in few bits, too. A CPU that multiplies float32 as fast rounds only the weights of matrix products, which take half of the memory; the rest gains nothing by it.
    format: "fp32" (nothing changes), "bf16" or, on a GPU, "fp16". skip: layers (node names) to leave in float32.
    """

    name: ClassVar[str] = "precision"
    lossy: ClassVar[bool] = True

    format: str = "bf16"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"precision: products are in {', '.join(FORMATS)}, not in '{self.format}'")
        object.__setattr__(self, "skip", tuple(self.skip))

    def run(self, program: Program, context: PassContext) -> Program:
        dtype = FORMATS[self.format]
        if context.target.kind not in FOR_TARGETS or self.format not in FOR_TARGETS[context.target.kind]:
            known = FOR_TARGETS.get(context.target.kind, ("fp32",))
            raise UsageError(f"precision: {context.target.text} multiplies in {' or '.join(known)}, not in '{self.format}'")
        if dtype is None:
            return program
        graph = analyze(program)
        # depthwise convolutions have one product per lane, and words of two numbers would only widen them
        graph.sites = [site for site in graph.sites if not site.depthwise]
        if unknown := set(self.skip) - {site.name for site in graph.sites}:
            raise UsageError(f"precision: skip names no layer {', '.join(sorted(unknown))}; there are {', '.join(site.name for site in graph.sites)}")
        native = dtype in context.target.formats
        sites = [site for site in graph.sites if site.name not in self.skip and (native or site.kind == "matmul")]
        attentions = [
            var
            for var, value in graph.bindings.items()
            if native and operator(value) == ATTENTION and _takes_words(value) and not (context.target.kind == "cpu" and _read_once(graph, value))
        ]
        codes = (
            [var for var, value in graph.bindings.items() if operator(value) == WEIGHT_ONLY and _in_words(value)]
            if context.target.kind == "cuda"
            else []
        )
        groups = [var for var, value in graph.bindings.items() if operator(value) == GROUPED and is_constant(value.args[1]) and _in_words(value)]
        if not native:
            context.note(f"target {context.target.text} multiplies {dtype} no faster than float32: weights of matrix products alone are rounded")
        if not sites and not attentions and not codes and not groups:
            context.note("no product by constant weights" + (", and no attention," if native else "") + " was found")
            return program
        context.matched(**{kind: sum(site.kind == kind for site in sites) for kind in ("matmul", "conv2d")}, attention=len(attentions))
        if codes:
            context.matched(weight_only=len(codes))
        if groups:
            context.matched(grouped_matmul=len(groups))
        return _Rewriter(graph, sites, [*attentions, *codes, *groups], dtype, native).apply()


def _takes_words(call: Any) -> bool:
    """Words of two numbers along an even depth, and no received attention, whose sums over all queries are of the exact probabilities."""
    q = call.args[0]
    depth = q.ty.shape[3]
    return str(q.ty.dtype) == "float32" and isinstance(depth, tirx.IntImm) and int(depth) % 2 == 0 and not attrs_of(call).received


def _read_once(graph: Graph, call: Any) -> bool:
    """Few queries over keys and values that are inputs of the program, or few as well: each is read once, so that rounding them would cost more than the attention."""
    queries, keys = (call.args[place].ty.shape[attrs_of(call).layouts[place].index("S")] for place in (0, 1))
    return are_few(queries) and (are_few(keys) or all(_is_input(graph, x) for x in call.args[1:3]))


def _is_input(graph: Graph, x: Any) -> bool:
    """An input of the program, or a part of one."""
    while (moved := graph.defining(x, *VIEWS, "relax.strided_slice", "relax.permute_dims")) is not None:
        x = moved.args[0]
    return isinstance(x, relax.Var) and x not in graph.bindings


def _in_words(call: Any) -> bool:
    """Rows of whole words of two numbers; others are rounded by the kernel."""
    k = call.args[0].ty.shape[-1]
    return str(call.args[0].ty.dtype) == "float32" and isinstance(k, tirx.IntImm) and int(k) % 2 == 0


@mutator
class _Rewriter(relax.PyExprMutator):
    """Products on rounded operands, both or (where not `native`) the weights alone; an operand that several products read is rounded once."""

    def __init__(self, graph: Graph, sites: list[Site], others: list[Any], dtype: str, native: bool):
        super().__init__(graph.program.module)
        self.graph, self.others, self.dtype, self.native = graph, set(others), dtype, native
        self.sites = {site.var: site for site in sites}
        self.rounded: dict[Any, Any] = {}
        self.convolutions = {site.var for site in sites if site.kind == "conv2d"}
        self.short = {root for site in sites if self._stored_short(root := graph.root(site.x))}

    def _stored_short(self, root: Any) -> bool:
        """Nobody reads more of a tensor than its 16-bit copy, so that the other one is not made."""
        if not self.native or self.graph.defining(root) is None:
            return False
        return all(reader in self.convolutions or operator(self.graph.bindings.get(reader)) in JOINS for reader in self.graph.all_readers(root))

    def apply(self) -> Program:
        program = self.graph.program
        module = program.with_main(self.visit_expr(program.main)).module
        return program.with_module(relax.transform.DeadCodeElimination()(module))

    def visit_var_binding_(self, binding: Any) -> None:
        site = self.sites.get(binding.var)
        if site is not None:
            value = self._product(site, binding.var.name)
        elif binding.var in self.others:
            call = binding.value
            attention = operator(call) == ATTENTION
            rounded = 3 if attention else int(self.native)
            operands = [self._round(arg, binding.var.name) if place < rounded else self.visit_expr(arg) for place, arg in enumerate(call.args)]
            if operator(call) == GROUPED:
                operands[1] = self._constant(call.args[1].value.numpy())
            attrs = operator_attrs(**{**asdict(attrs_of(call)), "dtype": "float32"}) if attention else call.attrs
            value = self.builder_.emit(relax.Call(call.op, operands, attrs), binding.var.name)
        elif operator(binding.value) in JOINS and any(self._is_short(arg) for arg in binding.value.args):
            operands = [
                relax.op.astype(self._round(arg, binding.var.name), "float32") if self._is_short(arg) else self.visit_expr(arg)
                for arg in binding.value.args
            ]
            value = self.builder_.emit(relax.Call(binding.value.op, operands, binding.value.attrs), binding.var.name)
        else:
            super().visit_var_binding_(binding)
            return
        if not isinstance(binding.var, relax.DataflowVar):
            value = emit_as(self.builder_, binding.var, value)
        self.set_var_remap(binding.var, value)

    def _is_short(self, x: Any) -> bool:
        return isinstance(x, relax.Var) and self.graph.root(x) in self.short

    def _round(self, x: Any, name: str) -> Any:
        """x rounded, behind its views: next to what makes it, which then does the rounding."""
        if x not in self.rounded:
            view = self.graph.defining(x, *VIEWS, *MAXIMA)
            if view is not None and isinstance(view.args[0], relax.Var) and (operator(view) in VIEWS or self.graph.single_reader(view.args[0]) == x):
                short = relax.Call(view.op, [self._round(view.args[0], name), *(self.visit_expr(arg) for arg in view.args[1:])], view.attrs)
            else:
                short = relax.op.astype(self.visit_expr(x), self.dtype)
            self.rounded[x] = self.builder_.emit(short, name)
        return self.rounded[x]

    def _constant(self, weight: np.ndarray) -> Any:
        return relax.const(np.ascontiguousarray(weight.astype(numpy_dtype(self.dtype))), self.dtype)

    def _product(self, site: Site, name: str) -> Any:
        x, weight = self._round(site.x, name) if self.native else self.visit_expr(site.x), self._constant(site.weight)
        if site.kind == "matmul":
            return self.builder_.emit(relax.op.matmul(x, weight, out_dtype="float32"), name)
        attrs = site.call.attrs
        numbers = ([int(value) for value in values] for values in (attrs.strides, attrs.padding, attrs.dilation))
        return self.builder_.emit(relax.op.nn.conv2d(x, weight, *numbers, int(attrs.groups), "NCHW", "OIHW", "NCHW", "float32"), name)
