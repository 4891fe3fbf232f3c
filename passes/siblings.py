"""Products of one tensor by several constant weights as one product: Q, K and V of self-attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from ..compiler.dialect import attention, attention_quantized
from ..compiler.program import Program
from ..compiler.tvm import is_constant, mutator, relax
from .base import Pass, PassContext
from .products import VIEWS, Graph, constant_value, graph_of, operator
from .rewriting import emit_as

#: what may follow a product within its kernel, element by element
BINARY = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.maximum", "relax.minimum")
UNARY = ("relax.astype", "relax.round", "relax.clip")
#: what reads parts of a tensor where they lie; scores in int8 would copy them
ATTENTION = (attention.NAME, attention_quantized.NAME)
#: what moves elements anyway, so that it may as well take them out of a larger tensor
MOVES = ("relax.permute_dims", "relax.split", "relax.strided_slice", "relax.concat")
#: with more zeros than this a weight may have a kernel of its own pattern
ZEROS = 0.1


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """Concatenates the weights of products that read the same tensor, and what is done to their results by constants per column, where the results then go on in views: the parts of the one
    result are read where they lie. One kernel instead of three: threads meet once, the operand is packed once, and there are more columns to divide.

    Results that go on element by element (a gate and what it opens) stay apart: the epilogue that joins them saves a pass over memory.
    """

    name: ClassVar[str] = "merge_siblings"

    def run(self, program: Program, context: PassContext) -> Program:
        graph = graph_of(program)
        groups: dict[Hashable, list[_Chain]] = defaultdict(list)
        for var, value in graph.bindings.items():
            chain = _chain(graph, var, value)
            if chain is not None:
                groups[chain.key].append(chain)
        found = [group for group in groups.values() if len(group) > 1 and not any(map(_is_sparse, group))]
        if not found:
            return program
        context.matched(products=sum(map(len, found)), merged=len(found))
        return _Rewriter(program, found).apply()


@dataclass(eq=False)
class _Chain:
    """A product and what follows in its kernel. steps: the variables from the product to the end of its kernel, with their calls; addends: per step behind the product the operand that is not the
    step before, values per column [N] or one value [1]."""

    columns: int
    steps: list[tuple[Any, Any]]
    addends: list[Any] = field(default_factory=list)
    key: tuple[Hashable, ...] = ()

    @property
    def last(self) -> Any:
        return self.steps[-1][0]


def _chain(graph: Graph, var: Any, call: Any) -> _Chain | None:
    if operator(call) != "relax.matmul" or not isinstance(call.args[0], relax.Var) or not is_constant(call.args[1]):
        return None
    weight = call.args[1]
    shape = [int(dim) for dim in weight.ty.shape]
    if len(shape) != 2 or call.args[0].ty.ndim < 2:
        return None
    chain = _Chain(shape[1], [(var, call)])
    key: list[Hashable] = [call.args[0], shape[0], str(weight.ty.dtype), str(call.ty.dtype)]
    while (reader := graph.single_reader(chain.last)) is not None:
        step = graph.bindings[reader]
        addend = _addend(step, chain.last, chain.columns)
        if addend is None:
            break
        key += [operator(step), str(step.ty.dtype), step.args[0].same_as(chain.last), _text(step, addend)]
        chain.steps.append((reader, step))
        chain.addends.append(addend)
    if not _goes_on_in_place(graph, chain.last):
        return None
    chain.key = tuple(key)
    return chain


def _goes_on_in_place(graph: Graph, var: Any) -> bool:
    """Whether nobody needs a part of a larger tensor copied: attention and what moves elements find it there, and behind a view, where no product's epilogue reaches, so does what goes element by element."""

    def names(readers: Iterable[Any]) -> list[str]:
        return [operator(graph.bindings.get(reader)) for reader in readers]

    direct, behind = names(graph.readers.get(var, ["output"])), names(graph.all_readers(var))
    return all(name in (*ATTENTION, *MOVES, *VIEWS) for name in direct) and all(name in (*ATTENTION, *MOVES, *BINARY, *UNARY) for name in behind)


def _text(step: Any, addend: Any) -> str:
    """What has to agree besides the operator: the type of an operand, the bounds of a clip."""
    return str(addend.dtype) if isinstance(addend, np.ndarray) else str(step.args[1:])


_NOTHING = object()


def _addend(step: Any, before: Any, columns: int) -> Any:
    """The other operand of a step, `_NOTHING` of a unary one; None for a step that is not taken along."""
    if operator(step) in UNARY:
        return _NOTHING
    if operator(step) not in BINARY:
        return None
    other = step.args[1] if step.args[0].same_as(before) else step.args[0]
    value = constant_value(other)
    if value is None or value.ndim > before.ty.ndim:
        return None
    return value.reshape(-1) if value.size == 1 or value.size == value.shape[-1] == columns else None


def _is_sparse(chain: _Chain) -> bool:
    weight = chain.steps[0][1].args[1].value.numpy()
    return bool(np.count_nonzero(weight) < (1 - ZEROS) * weight.size)


@mutator
class _Rewriter(relax.PyExprMutator):
    """Every group becomes one product where its first one stood; its members become slices of it."""

    def __init__(self, program: Program, groups: Sequence[Sequence[_Chain]]):
        super().__init__(program.module)
        self.program = program
        self.origins = dict(program.origins)
        self.group = {chain.steps[0][0]: group for group in groups for chain in group}
        self.last = {chain.last: chain for group in groups for chain in group}
        self.inside = {var for chain in self.last.values() for var, _ in chain.steps}
        self.parts: dict[_Chain, Any] = {}

    def apply(self) -> Program:
        main = self.visit_expr(self.program.main)
        return replace(self.program.with_main(main), origins=self.origins)

    def visit_var_binding_(self, binding: Any) -> None:
        if binding.var not in self.inside:
            super().visit_var_binding_(binding)
            return
        group = self.group.get(binding.var)
        if group is not None and group[0] not in self.parts:
            self._merge(group)
        chain = self.last.get(binding.var)
        if chain is not None:
            self.set_var_remap(binding.var, emit_as(self.builder_, binding.var, self.parts[chain]))

    def _merge(self, group: Sequence[_Chain]) -> None:
        first = group[0]
        call = first.steps[0][1]
        weight = np.concatenate([chain.steps[0][1].args[1].value.numpy() for chain in group], axis=1)
        value = self._emit(relax.Call(call.op, [self.visit_expr(call.args[0]), _constant(weight, call.args[1])], call.attrs), group, 0)
        for place, (before, (_, step)) in enumerate(zip(first.steps, first.steps[1:], strict=False)):
            addends = [chain.addends[place] for chain in group]
            operands = [value, *step.args[1:]]
            if addends[0] is not _NOTHING:
                on_left = step.args[0].same_as(before[0])
                other = self._joined(group, addends, step.args[1 if on_left else 0])
                operands = [value, other] if on_left else [other, value]
            value = self._emit(relax.Call(step.op, operands, step.attrs), group, place + 1)
        axis, ends = value.ty.ndim - 1, np.cumsum([chain.columns for chain in group])
        for chain, end in zip(group, ends, strict=True):
            self.parts[chain] = relax.op.strided_slice(value, [axis], [int(end) - chain.columns], [int(end)])

    def _emit(self, value: Any, group: Sequence[_Chain], place: int) -> Any:
        """Bind a step of all chains under the names of all their nodes."""
        names = [chain.steps[place][0].name for chain in group]
        var = self.builder_.emit(value, "_".join(names))
        known = [node for name in names if (node := self.program.node(name)) != name]
        if known:
            self.origins[var.name] = " + ".join(dict.fromkeys(known))
        return var

    def _joined(self, group: Sequence[_Chain], addends: Sequence[Any], like: Any) -> Any:
        if all(addend.size == 1 and addend == addends[0] for addend in addends):
            return _constant(addends[0].reshape(()), like)
        return _constant(np.concatenate([np.broadcast_to(addend, chain.columns) for chain, addend in zip(group, addends, strict=True)]), like)


def _constant(value: np.ndarray, like: Any) -> Any:
    return relax.const(np.ascontiguousarray(value), str(like.ty.dtype))
