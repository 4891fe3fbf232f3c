"""Weights in few bits, activations in float32: matrix products by constants become `tcompile.weight_only_matmul`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...compiler.dialect.weight_only import weight_only_matmul
from ...compiler.program import Program
from ...compiler.tvm import mutator, relax
from ..base import PassContext
from ..products import Site, analyze
from .formats import GroupedInt

#: option -> bits
WEIGHT_ONLY = {f"w{bits}": bits for bits in range(1, 9)}


def quantize_weights(program: Program, context: PassContext, bits: int, group: int, symmetric: bool, skip: Sequence[str]) -> Program:
    """Every matmul by a constant weight, but those named in `skip`; scales are searched for the least squared error."""
    graph = analyze(program)
    sites = [site for site in graph.sites if site.kind == "matmul" and site.name not in skip]
    if not sites:
        context.note("no matrix product by constant weights was found")
        return program
    # what makes an output of the model loses most, and is read once: it keeps 8 bits
    heads = {site.var for site in sites if bits < 8 and "output" in graph.all_readers(site.total)}
    formats = {site.var: GroupedInt(8 if site.var in heads else bits, group, symmetric) for site in sites}
    rewriter = _WeightOnly(program, {site.var: site for site in sites}, formats)
    after = rewriter.apply()
    context.table("quantized weights", rewriter.rows)
    context.matched(matmul=len(sites), heads_in_8_bits=len(heads))
    return after


@mutator
class _WeightOnly(relax.PyExprMutator):
    def __init__(self, program: Program, sites: Mapping[Any, Site], formats: Mapping[Any, GroupedInt]):
        super().__init__(program.module)
        self.program, self.sites, self.formats = program, sites, formats
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
        return weight_only_matmul(
            call.args[0],
            relax.const(np.ascontiguousarray(made.pack(encoded.codes)), "uint8"),
            relax.const(np.ascontiguousarray(encoded.scale[:, 0]), "float32"),
            zeros,
            bits=made.bits,
            group=made.group,
        )
