"""Rewriting products into integers, and the program a quantizer runs first, which simulates codes in float32.

    x_u8 = clip(round(x / sx) + zx)                     once per tensor, shared by all its readers
    acc  = x_u8 * w_s8 + (round(bias / (sx sw)) - zx colsum(w))      int32, exact
    y    = float(acc) * (sx sw)                         per output channel

The last line and the codes of the next layer are element-wise, so they end up in the product's epilogue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...compiler.program import Program, TensorSpec
from ...compiler.tvm import mutator, relax
from ..products import Graph, Site
from ..rewriting import emit_as
from .formats import Affine, Encoded, Int8

op = relax.op


def number(value: float) -> Any:
    """A constant of one element: an operand of the kernels that read it, so that layers of the same shape share a kernel. A scalar would be written into the code."""
    return relax.const(np.array([value], np.float32), "float32")


def quantized(emit: Any, x: Any, affine: Affine) -> Any:
    """The u8 codes of a float tensor, in plain operators."""
    value = emit(op.round(emit(op.multiply(x, number(1 / affine.scale)))))
    value = emit(op.add(value, number(affine.zero))) if affine.zero else value
    return emit(op.astype(emit(op.clip(value, 0, 255)), "uint8"))


def dequantized(emit: Any, codes: Any, affine: Affine) -> Any:
    value = emit(op.astype(codes, "float32"))
    value = emit(op.subtract(value, number(affine.zero))) if affine.zero else value
    return emit(op.multiply(value, number(affine.scale)))


def integer_product(emit: Any, site: Site, codes: Any, affine: Affine, weight: Encoded) -> Any:
    """`site` with its bias, from the codes of its operand. weight: codes of the site's weight, symmetric per output channel."""
    w = weight.codes
    scale = np.float32(affine.scale) * weight.scale.reshape(-1)
    scale = np.broadcast_to(scale, (site.channels,)).astype(np.float32)
    constant = np.zeros(site.channels, np.int64)
    late_bias = site.bias
    if site.bias is not None:
        rounded = np.rint(site.bias.astype(np.float64) / scale)
        if np.abs(rounded).max(initial=0) < 2**30:
            constant, late_bias = rounded.astype(np.int64), None
    sums = w.astype(np.int64).sum(axis=0 if site.kind == "matmul" else (1, 2, 3))
    constant = (constant - affine.zero * sums).astype(np.int32)
    if site.kind == "matmul":
        acc = op.matmul(codes, relax.const(np.ascontiguousarray(w), "int8"), out_dtype="int32")
    else:
        acc = integer_conv(emit, site.call.attrs, codes, w, affine.zero)
    acc = emit(acc)
    if constant.any():
        acc = emit(op.add(acc, relax.const(np.ascontiguousarray(site.per_channel(constant)), "int32")))
    value = emit(op.multiply(emit(op.astype(acc, "float32")), relax.const(np.ascontiguousarray(site.per_channel(scale)), "float32")))
    return value if late_bias is None else emit(op.add(value, relax.const(np.ascontiguousarray(site.per_channel(late_bias)), "float32")))


def integer_conv(emit: Any, attrs: Any, codes: Any, w: np.ndarray, zero: int) -> Any:
    """The int32 sums of an NCHW convolution; padding holds the code of 0.0."""
    padding = [int(pad) for pad in attrs.padding]
    if zero and any(padding):
        top, left, bottom, right = padding
        codes = emit(op.nn.pad(codes, [0, 0, 0, 0, top, bottom, left, right], "constant", float(zero)))
        padding = [0, 0, 0, 0]
    numbers = ([int(value) for value in attrs.strides], padding, [int(value) for value in attrs.dilation], int(attrs.groups))
    return op.nn.conv2d(codes, relax.const(np.ascontiguousarray(w), "int8"), *numbers, "NCHW", "OIHW", "NCHW", "int32")


def weight_format(site: Site) -> Int8:
    """One scale per output channel."""
    return Int8(axis=1 if site.kind == "matmul" else 0)


@mutator
class Quantizer(relax.PyExprMutator):
    """Rewrites chosen sites. ranges: by source variable. chained: sources whose other readers take the codes too. flags: by site variable, for the simulation: where the flag
    holds, the site works on rounded values in float32."""

    def __init__(
        self,
        graph: Graph,
        ranges: Mapping[Any, Affine],
        chosen: Sequence[Site],
        chained: frozenset[Any] = frozenset(),
        flags: Mapping[Any, Any] | None = None,
    ):
        super().__init__(graph.program.module)
        self.graph, self.ranges, self.chained, self.flags = graph, ranges, chained, flags
        self.sites = {(site.total if flags is None else site.var): site for site in chosen}
        self.codes: dict[Any, Any] = {}
        self.rounded: dict[Any, Any] = {}
        self.name = ""

    def apply(self) -> Program:
        program = self.graph.program
        main = self.visit_expr(program.main)
        inputs = program.inputs
        if self.flags is not None:
            extra = list(self.flags.values())
            main = relax.Function([*main.params, *extra], main.body, main.ret_ty, attrs=main.attrs)
            inputs = (*inputs, *(TensorSpec(flag.name, (1,), "bool") for flag in extra))
        module = relax.transform.DeadCodeElimination()(program.with_main(main).module)
        return replace(program.with_module(module), inputs=inputs)

    def emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr, self.name)

    def visit_var_binding_(self, binding: Any) -> None:
        self.name = binding.var.name
        site = self.sites.get(binding.var)
        if site is None:
            super().visit_var_binding_(binding)
            return
        affine = self.ranges[site.source]
        if self.flags is None:
            value = integer_product(self.emit, site, self._codes(site.x, site.source), affine, weight_format(site).encode(site.weight))
        else:
            value = self._simulated(site)
        if not isinstance(binding.var, relax.DataflowVar):
            value = emit_as(self.builder_, binding.var, value)
        self.set_var_remap(binding.var, value)

    def visit_dataflow_var_(self, var: Any) -> Any:
        """Other readers of a chained source: each makes its own floats, which fusion puts into its kernel."""
        if var not in self.chained or var not in self.ranges:
            return super().visit_dataflow_var_(var)
        if self.flags is None:
            return dequantized(self.emit, self._codes(var, var), self.ranges[var])
        plain = super().visit_dataflow_var_(var)
        flag = next((self.flags[site.var] for site in self.sites.values() if site.source.same_as(var)), None)
        return plain if flag is None else self.emit(op.where(flag, self._rounded(var, var), plain))

    def _plain(self, var: Any) -> Any:
        return super().visit_dataflow_var_(var) if isinstance(var, relax.DataflowVar) else self.visit_expr(var)

    def _codes(self, x: Any, source: Any) -> Any:
        """u8 codes of `x`, a view of `source`."""
        if x not in self.codes:
            call = self.graph.bindings.get(x)
            pooled = self._pooled(x)
            if not x.same_as(source):
                self.codes[x] = self.emit(relax.Call(call.op, [self._codes(call.args[0], source), *call.args[1:]], call.attrs))
            elif pooled is not None:
                self.codes[x] = self.emit(relax.Call(call.op, [quantized(self.emit, self._plain(pooled), self.ranges[source])], call.attrs))
            else:
                self.codes[x] = quantized(self.emit, self._plain(x), self.ranges[source])
        return self.codes[x]

    def _pooled(self, x: Any) -> Any:
        """What a max-pool reads when nobody else does: the largest code is the code of the largest, so a quarter of the bytes are read."""
        pool = self.graph.defining(x, "relax.nn.max_pool2d")
        inner = pool.args[0] if pool is not None else None
        return inner if isinstance(inner, relax.Var) and self.graph.single_reader(inner) is not None else None

    def _rounded(self, x: Any, source: Any) -> Any:
        """`x` through its codes and back, in float32."""
        if x not in self.rounded:
            call = self.graph.bindings.get(x)
            affine = self.ranges[source]
            if x.same_as(source):
                plain = self._plain(x)
                value = self.emit(op.round(self.emit(op.multiply(plain, number(1 / affine.scale)))))
                value = self.emit(op.clip(value, float(-affine.zero), float(255 - affine.zero)))
                self.rounded[x] = self.emit(op.multiply(value, number(affine.scale)))
            else:
                self.rounded[x] = self.emit(relax.Call(call.op, [self._rounded(call.args[0], source), *call.args[1:]], call.attrs))
        return self.rounded[x]

    def _simulated(self, site: Site) -> Any:
        weight = weight_format(site).encode(site.weight).decode()
        call = site.call
        exact = self.emit(relax.Call(call.op, [self.visit_expr(call.args[0]), call.args[1]], call.attrs))
        rounded = self.emit(relax.Call(call.op, [self._rounded(site.x, site.source), relax.const(weight, "float32")], call.attrs))
        assert self.flags is not None
        return self.emit(op.where(self.flags[site.var], rounded, exact))


def simulation(graph: Graph, ranges: Mapping[Any, Affine], chosen: Sequence[Site], chained: frozenset[Any]) -> Program:
    """The program with one more input per site, `flag0`, `flag1`, ... [1] bool: whether that site works on rounded values."""
    flags = {site.var: relax.Var(f"flag{index}", relax.TensorType([1], "bool")) for index, site in enumerate(chosen)}
    return Quantizer(graph, ranges, chosen, chained, flags).apply()
