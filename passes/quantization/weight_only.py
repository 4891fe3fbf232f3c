"""Weights in few bits: matrix products by constants become `tcompile.weight_only_matmul`.

Activations stay in float32, or are codes with a scale per row that is found while the model runs, which meets the product behind its sums:

    x8, sx = rows of int8, or float8_e4m3fn              once per tensor
    y      = sum over groups of (scale * sum of (code - zero) * x8) * sx
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...compiler.dialect.scaled_rows import scaled_rows
from ...compiler.dialect.weight_only import weight_only_matmul
from ...compiler.element_types import FLOAT8
from ...compiler.program import Program
from ...compiler.tvm import mutator, relax
from ..base import PassContext
from ..products import Site, analyze
from .formats import GroupedInt

op = relax.op
#: activations by the end of an option's name
ACTIVATIONS = {"": "float32", "a8": "int8", "fp8": FLOAT8}
#: option -> (bits of weights, type of activations)
WEIGHT_ONLY = {f"w{bits}{name}": (bits, dtype) for name, dtype in ACTIVATIONS.items() for bits in range(1, 9)}


def quantize_weights(program: Program, context: PassContext, name: str, group: int, symmetric: bool, skip: Sequence[str]) -> Program:
    """Every matmul by a constant weight, but those named in `skip`; scales are searched for the least squared error. name: of `WEIGHT_ONLY`."""
    bits, activations = WEIGHT_ONLY[name]
    graph = analyze(program)
    sites = [site for site in graph.sites if site.kind == "matmul" and site.name not in skip]
    if not sites:
        context.note("no matrix product by constant weights was found")
        return program
    # what makes an output of the model loses most, and is read once: it keeps 8 bits
    heads = {site.var for site in sites if bits < 8 and "output" in graph.all_readers(site.total)}
    formats = {site.var: GroupedInt(8 if site.var in heads else bits, group, symmetric) for site in sites}
    if activations == FLOAT8:  # whose numbers are held in the type of 16 bits that the target multiplies
        activations = "float16" if context.target.kind == "cuda" else "bfloat16"
    rewriter = _WeightOnly(program, {site.var: site for site in sites}, formats, activations)
    after = rewriter.apply()
    context.table("quantized weights", rewriter.rows)
    context.matched(matmul=len(sites), heads_in_8_bits=len(heads))
    return after


@mutator
class _WeightOnly(relax.PyExprMutator):
    def __init__(self, program: Program, sites: Mapping[Any, Site], formats: Mapping[Any, GroupedInt], activations: str):
        super().__init__(program.module)
        self.program, self.sites, self.formats, self.activations = program, sites, formats, activations
        self.codes: dict[Any, tuple[Any, Any]] = {}
        self.site: Site | None = None
        self.rows: list[dict[str, Any]] = []

    def apply(self) -> Program:
        main = self.visit_expr(self.program.main)
        return self.program.with_module(relax.transform.DeadCodeElimination()(self.program.with_main(main).module))

    def visit_var_binding_(self, binding: Any) -> None:
        self.site = self.sites.get(binding.var)
        super().visit_var_binding_(binding)

    def visit_call_(self, call: Any) -> Any:
        site, self.site = self.site, None
        call = super().visit_call_(call)
        if site is None:
            return call
        made, weight = self.formats[site.var], site.weight
        encoded = made.encode_best(weight)
        decoded = made.decode(encoded, len(weight))
        norm = float(np.linalg.norm(weight))
        self.rows.append(
            {
                "layer": site.name,
                "weight": "x".join(str(size) for size in weight.shape),
                "bits": made.bits,
                "relative_error": round(float(np.linalg.norm(decoded - weight)) / norm, 6) if norm else 0.0,
                "bytes_before": weight.nbytes,
                "bytes_after": made.size_bytes(*weight.shape),
            }
        )
        zeros = None if made.symmetric else relax.const(np.ascontiguousarray(encoded.zero[:, 0].astype(np.uint8)), "uint8")
        x, scale = self._operand(site.x, call.args[0])
        product = weight_only_matmul(
            x,
            relax.const(np.ascontiguousarray(made.pack(encoded.codes)), "uint8"),
            relax.const(np.ascontiguousarray(encoded.scale[:, 0]), "float32"),
            zeros,
            bits=made.bits,
            group=made.group,
        )
        return product if scale is None else op.multiply(self.builder_.emit(product), scale)

    def _operand(self, source: Any, x: Any) -> tuple[Any, Any]:
        """What is multiplied, and the scale of its rows; None where there is none."""
        if self.activations == "float32":
            return x, None
        if source not in self.codes:
            emit = self.builder_.emit
            both = emit(scaled_rows(x, self.activations))
            codes, scales = (emit(relax.TupleGetItem(both, index)) for index in range(2))
            scales = emit(op.reshape(scales, [*list(x.ty.shape)[:-1], 1]))
            # its numbers are multiplied as those of any other tensor of floats
            self.codes[source] = (codes if self.activations == "int8" else emit(op.astype(codes, "float32"))), scales
        return self.codes[source]
