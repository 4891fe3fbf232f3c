"""ONNX graphs that carry their quantization as QuantizeLinear and DequantizeLinear nodes, run in integers.

    matmul(dequantize(x_codes), dequantize(w_codes)) + bias     becomes the product of `integers.integer_product`
    dequantize, view, quantize with the same parameters          becomes the view of the codes

Codes of activations are u8 throughout: int8 ones are shifted by 128 together with their zero point, which changes no value. Sums of integers are exact, so results differ
from the float32 reading of the graph by the rounding of float32 only, at most one step of a code. Dequantizations that something else reads are
made for each reader anew, in its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...compiler.program import Program
from ...compiler.tvm import mutator, relax
from ..base import Pass, PassContext
from ..products import VIEWS, Graph, Site, analyze, constant_value, operator, product_bias
from ..rewriting import emit_as
from .formats import Affine, Encoded
from .integers import dequantized, integer_product, quantized

#: operators that give codes for codes: they move elements, or take the largest
_MOVES = (*VIEWS, "relax.permute_dims", "relax.nn.max_pool2d", "relax.take", "relax.strided_slice")


@dataclass(frozen=True)
class RecognizeQdq(Pass):
    """Products between QuantizeLinear and DequantizeLinear nodes compute in integers. Lossless with respect to what the graph says."""

    name: ClassVar[str] = "recognize-qdq"

    def run(self, program: Program, context: PassContext) -> Program:
        graph = analyze(program)
        if not any(operator(value) in ("relax.quantize", "relax.dequantize") for value in graph.bindings.values()):
            return program
        rewriter = _Recognizer(graph)
        after = rewriter.apply()
        context.matched(**rewriter.counts)
        return after


@dataclass(frozen=True)
class _Codes:
    """u8 codes that stand for a float tensor."""

    expr: Any
    affine: Affine


@mutator
class _Recognizer(relax.PyExprMutator):
    def __init__(self, graph: Graph):
        super().__init__(graph.program.module)
        self.graph = graph
        self.floats: dict[Any, _Codes] = {}  # float variables of the source program, by the codes they come from
        self.integers: dict[Any, tuple[Any, int]] = {}  # integer variables of the source program: u8 codes, and what was added to make them
        self.totals: dict[Any, Site] = {}
        self.weights: dict[Any, Encoded] = {}
        self.counts: dict[str, int] = {}
        self.name = ""

    def apply(self) -> Program:
        for var, value in self.graph.bindings.items():
            if operator(value) in ("relax.matmul", "relax.nn.conv2d") and (site := self._site(var, value)) is not None:
                self.totals[site.total] = site
        program = self.graph.program
        main = self.visit_expr(program.main)
        return program.with_module(relax.transform.DeadCodeElimination()(program.with_main(main).module))

    def emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr, self.name)

    def _count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def visit_var_binding_(self, binding: Any) -> None:
        self.name = binding.var.name
        value, dataflow = binding.value, isinstance(binding.var, relax.DataflowVar)
        name = operator(value)
        site = self.totals.get(binding.var)
        result = None
        if site is not None and site.x in self.floats:
            codes = self.floats[site.x]
            self._count(site.kind)
            result = integer_product(self.emit, site, codes.expr, codes.affine, self.weights[site.var])
        elif name == "relax.quantize" and (affine := _per_tensor(value)) is not None:
            known = self.floats.get(value.args[0])
            same = known is not None and np.float32(known.affine.scale) == np.float32(affine.scale) and known.affine.zero == affine.zero
            codes = known.expr if same and known is not None else quantized(self.emit, self.visit_expr(value.args[0]), affine)
            shift = 128 if str(value.ty.dtype) == "int8" else 0
            if dataflow:
                self.integers[binding.var] = (codes, shift)
                return
            result = _signed(self.emit, codes) if shift else codes
        elif name == "relax.dequantize" and (affine := _per_tensor(value)) is not None:
            codes = self._unsigned(value.args[0])
            if codes is not None and dataflow:
                self.floats[binding.var] = _Codes(codes, affine)
                return
            result = None if codes is None else dequantized(self.emit, codes, affine)
        elif name in _MOVES and dataflow and value.args[0] in self.floats:
            known = self.floats[value.args[0]]
            rest = [self.visit_expr(arg) for arg in value.args[1:]]
            self.floats[binding.var] = _Codes(self.emit(relax.Call(value.op, [known.expr, *rest], value.attrs)), known.affine)
            return
        if result is None:
            super().visit_var_binding_(binding)
            return
        if not dataflow:
            result = emit_as(self.builder_, binding.var, result)
        self.set_var_remap(binding.var, result)

    def visit_dataflow_var_(self, var: Any) -> Any:
        """Readers that want the values themselves."""
        if var in self.floats:
            self._count("dequantized")
            return dequantized(self.emit, self.floats[var].expr, self.floats[var].affine)
        if var in self.integers:
            codes, shift = self.integers[var]
            return _signed(self.emit, codes) if shift else codes
        return super().visit_dataflow_var_(var)

    def _unsigned(self, expr: Any) -> Any:
        """The u8 codes of an 8-bit operand."""
        if expr in self.integers:
            return self.integers[expr][0]
        array = constant_value(expr)
        if array is not None:
            # a constant: shifted here. Weights that a product reads go another way, `_weight`
            return relax.const((array.astype(np.int32) + (128 if array.dtype == np.int8 else 0)).astype(np.uint8), "uint8")
        plain = self.visit_expr(expr)
        if str(expr.ty.dtype) == "uint8":
            return plain
        wide = self.emit(relax.op.add(self.emit(relax.op.astype(plain, "int32")), relax.const(128, "int32")))
        return self.emit(relax.op.astype(wide, "uint8"))

    def _site(self, var: Any, call: Any) -> Site | None:
        """A product whose operand is codes and whose weight is constant codes with one scale, or one per output channel, and no zero point."""
        kind = "matmul" if operator(call) == "relax.matmul" else "conv2d"
        x = call.args[0]
        if not isinstance(x, relax.Var) or x.ty.ndim < 2 or not self._is_codes(x):
            return None
        if kind == "conv2d" and (call.attrs.data_layout, call.attrs.kernel_layout, call.attrs.out_layout or "NCHW") != ("NCHW", "OIHW", "NCHW"):
            return None
        weight = self._weight(call.args[1], 1 if kind == "matmul" else 0)
        if weight is None or (kind == "matmul" and weight.codes.ndim != 2):
            return None
        self.weights[var] = weight
        shape = weight.codes
        total, bias = var, None
        reader = self.graph.single_reader(var)
        add = self.graph.defining(reader, "relax.add") if reader is not None else None
        if add is not None and (value := product_bias(add, var, kind, shape)) is not None:
            total, bias = reader, value
        return Site(self.graph.program.node(var.name), kind, var, call, x, x, shape, total, bias)

    def _is_codes(self, x: Any) -> bool:
        while (call := self.graph.defining(x, *_MOVES)) is not None and isinstance(call.args[0], relax.Var):
            x = call.args[0]
        call = self.graph.defining(x, "relax.dequantize")
        return call is not None and isinstance(call.args[0], relax.Var) and _per_tensor(call) is not None

    def _weight(self, expr: Any, channel: int) -> Encoded | None:
        """Constant int8 codes with scales per slice along `channel`, through a transpose or a view that keeps the channels in front."""
        view = self.graph.defining(expr, *VIEWS)
        if view is not None and channel == 0 and view.ty.shape[0] == view.args[0].ty.shape[0]:
            inner = self._weight(view.args[0], 0)
            shape = [int(size) for size in view.ty.shape]
            return inner and Encoded(inner.codes.reshape(shape), *(part.reshape(-1, *[1] * (len(shape) - 1)) for part in (inner.scale, inner.zero)))
        transpose = self.graph.defining(expr, "relax.permute_dims")
        axes = None
        if transpose is not None:
            rank = transpose.ty.ndim
            axes = [int(axis) for axis in transpose.attrs.axes] if transpose.attrs.axes is not None else list(range(rank))[::-1]
            expr = transpose.args[0]
        call = self.graph.defining(expr, "relax.dequantize")
        codes, scale, zero = (constant_value(arg) for arg in call.args) if call is not None else (None, None, None)
        if call is None or codes is None or scale is None or zero is None:
            return None
        axis = int(call.attrs.axis) % codes.ndim
        if codes.dtype == np.uint8:
            codes, zero = (codes.astype(np.int32) - 128).astype(np.int8), zero.astype(np.int32) - 128
        if np.any(zero != 0):
            return None
        if axes is not None:
            codes, axis = codes.transpose(axes), axes.index(axis)
        if scale.size > 1 and axis != channel:
            return None
        shape = [-1 if position == channel and scale.size > 1 else 1 for position in range(codes.ndim)]
        scale = scale.reshape(shape).astype(np.float32)
        return Encoded(np.ascontiguousarray(codes), scale, np.zeros(scale.shape, np.int32))


def _per_tensor(call: Any) -> Affine | None:
    """The parameters of a (de)quantization by one constant scale; its zero point as that of u8 codes."""
    scale, zero = constant_value(call.args[1]), constant_value(call.args[2])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or not float(scale.reshape(())) > 0:
        return None
    return Affine(float(scale.reshape(())), int(zero.reshape(())) + (128 if zero.dtype == np.int8 else 0))


def _signed(emit: Any, codes: Any) -> Any:
    wide = emit(relax.op.subtract(emit(relax.op.astype(codes, "int32")), relax.const(128, "int32")))
    return emit(relax.op.astype(wide, "int8"))
