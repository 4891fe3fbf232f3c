"""Rewriting products by a scheme, and the program that a quantizer runs first, in which every layer has a switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...compiler.program import Program, TensorSpec
from ...compiler.tvm import mutator, relax
from ..products import Graph, Site
from ..rewriting import emit_as
from .formats import Affine, Covering
from .schemes import Codes, Scheme

op = relax.op


@mutator
class Quantizer(relax.PyExprMutator):
    """Rewrites chosen sites. ranges: by source variable, what its codes cover. chained: sources whose other readers take the codes too. flags: by site variable, for the simulation:
    where the flag holds, the site works on rounded values in float32."""

    def __init__(
        self,
        graph: Graph,
        scheme: Scheme,
        ranges: Mapping[Any, Covering],
        chosen: Sequence[Site],
        chained: frozenset[Any] = frozenset(),
        flags: Mapping[Any, Any] | None = None,
    ):
        super().__init__(graph.program.module)
        self.graph, self.scheme, self.ranges, self.chained, self.flags = graph, scheme, ranges, chained, flags
        self.sites = {(site.total if flags is None else site.var): site for site in chosen}
        self.coded = {site.var for site in chosen}
        self.codes: dict[Any, Codes] = {}
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
        if self.flags is None:
            value = self.scheme.product(self.emit, site, self._codes(site.x, site.source), self.ranges[site.source], self.scheme.weight(site))
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
            return self.scheme.decoded(self.emit, self._codes(var, var), self.ranges[var])
        plain = super().visit_dataflow_var_(var)
        flag = next((self.flags[site.var] for site in self.sites.values() if site.source.same_as(var)), None)
        return plain if flag is None else self.emit(op.where(flag, self._rounded(var, var), plain))

    def _plain(self, var: Any) -> Any:
        return super().visit_dataflow_var_(var) if isinstance(var, relax.DataflowVar) else self.visit_expr(var)

    def _codes(self, x: Any, source: Any) -> Codes:
        """The codes of `x`, a view of `source`."""
        if x not in self.codes:
            call = self.graph.bindings.get(x)
            pooled = self._pooled(x)
            if not x.same_as(source):
                inner = self._codes(call.args[0], source)
                self.codes[x] = replace(inner, expr=self.emit(relax.Call(call.op, [inner.expr, *call.args[1:]], call.attrs)))
            elif pooled is not None:
                inner = self.scheme.codes(self.emit, self._plain(pooled), self.ranges[source])
                self.codes[x] = replace(inner, expr=self.emit(relax.Call(call.op, [inner.expr], call.attrs)))
            else:
                self.codes[x] = self.scheme.codes(self.emit, self._plain(self._unclipped(x)), self.ranges[source])
        return self.codes[x]

    def _unclipped(self, x: Any) -> Any:
        """What a ReLU reads whose result is read as codes of no negative numbers alone: these clip as well."""
        relu = self.graph.defining(x, "relax.nn.relu")
        covering = self.ranges.get(x)
        if relu is None or not isinstance(covering, Affine) or covering.zero or not isinstance(relu.args[0], relax.Var):
            return x
        coded = x in self.chained or all(reader in self.coded for reader in self.graph.all_readers(x))
        return relu.args[0] if coded and self.flags is None else x

    def _pooled(self, x: Any) -> Any:
        """What a max-pool reads when nobody else does: the largest code is the code of the largest, so a quarter of the bytes are read."""
        pool = self.graph.defining(x, "relax.nn.max_pool2d") if self.scheme.chained else None
        inner = pool.args[0] if pool is not None else None
        return inner if isinstance(inner, relax.Var) and self.graph.single_reader(inner) is not None else None

    def _rounded(self, x: Any, source: Any) -> Any:
        """`x` through its codes and back, in float32."""
        if x not in self.rounded:
            self.rounded[x] = self.scheme.decoded(self.emit, self._codes(x, source), self.ranges[source])
        return self.rounded[x]

    def _simulated(self, site: Site) -> Any:
        weight = self.scheme.weight(site).decode()
        call = site.call
        exact = self.emit(relax.Call(call.op, [self.visit_expr(call.args[0]), call.args[1]], call.attrs))
        rounded = self.emit(relax.Call(call.op, [self._rounded(site.x, site.source), relax.const(weight, "float32")], call.attrs))
        assert self.flags is not None
        return self.emit(op.where(self.flags[site.var], rounded, exact))


def simulation(graph: Graph, scheme: Scheme, ranges: Mapping[Any, Covering], chosen: Sequence[Site], chained: frozenset[Any]) -> Program:
    """The program with one more input per site, `flag0`, `flag1`, ... [1] bool: whether that site works on rounded values."""
    flags = {site.var: relax.Var(f"flag{index}", relax.TensorType([1], "bool")) for index, site in enumerate(chosen)}
    return Quantizer(graph, scheme, ranges, chosen, chained, flags).apply()
