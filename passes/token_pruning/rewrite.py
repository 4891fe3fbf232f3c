"""Rewriting a program to fewer tokens.

Every value has a stage: how often tokens had left when it was made. An operator runs at the latest stage of its operands; the others are brought there by taking the same
tokens of them (position biases, masks, anything with an axis that the operator lines up with the tokens). Shapes are inferred anew and compared with what the axes promise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...compiler.dialect import attention
from ...compiler.dialect.tokens import match_tokens, select_tokens, take_tokens
from ...compiler.errors import Blocker, UnsupportedModel
from ...compiler.tvm import is_constant, mutator, relax
from .axes import Axis, Unfollowable, dims, follow, layouts, name_of, operands, same, shown, sliced
from .blocks import Block
from .merging import Merging

op = relax.op


@dataclass(frozen=True)
class Value:
    """A tensor of the new program with an axis of tokens. batch: its axes that hold the batch."""

    expr: Any
    axes: dict[int, Axis]
    stage: int
    batch: dict[int, Axis]


@dataclass
class Stage:
    """After tokens left: their number, and where they stood in the stage before, indices [B, tokens]."""

    tokens: Any
    indices: Any = None


@mutator
class Pruner(relax.PyExprMutator):
    """Rewrites `main`. counts: what was done, for the report."""

    def __init__(self, module: Any, blocks: list[Block], keep: Fraction, merge: bool, source: Callable[[str], str]):
        super().__init__(module)
        self.module, self.keep, self.source = module, keep, source
        self.merging = Merging(self.builder_) if merge else None
        self.attentions = {block.attention: block for block in blocks}
        self.joins = {block.joined: block for block in blocks}
        self.stages = [Stage(blocks[0].tokens)]
        self.batch_size = dims(blocks[0].joined)[0]
        self.values: dict[Any, Value] = {}
        self.tuples: dict[Any, list[Value]] = {}
        #: per block: the scores [B, N] of the tokens when it drops, the keys when it merges
        self.scores: dict[Block, Any] = {}
        #: sums over the tokens: a division by a constant would be one by their old number
        self.sums: set[Any] = set()
        self.made: dict[tuple[Any, int, int], Any] = {}
        self.counts: dict[str, int] = {}
        self.name = ""
        self.refusal: UnsupportedModel | None = None

    def apply(self) -> Any:
        main = self.module.get_global_var("main")
        try:
            self.builder_.update_func(main, self.visit_expr(self.module["main"]))
        except Exception:
            if self.refusal is None:
                raise
            raise self.refusal from None  # TVM has made another error of it on the way
        return relax.transform.DeadCodeElimination()(self.builder_.get())

    # -- bindings

    def visit_var_binding_(self, binding: Any) -> None:
        self.name = binding.var.name
        value = binding.value
        try:
            new = self._bound(binding.var, value)
        except Unfollowable as reason:
            raise self._refused(name_of(value).removeprefix("relax."), str(reason)) from None
        if new is None:
            super().visit_var_binding_(binding)
        elif isinstance(new, list):
            self.tuples[binding.var] = new
        else:
            self._keep(binding.var, new)
        if binding.var in self.joins:
            self._leave(binding.var)

    def visit_match_cast_(self, binding: Any) -> None:
        known = self.values.get(binding.value)
        if known is None:
            super().visit_match_cast_(binding)
        else:
            self._keep(binding.var, known)

    def visit_var_(self, var: Any) -> Any:
        return self.values[var].expr if var in self.values else super().visit_var_(var)

    def visit_dataflow_var_(self, var: Any) -> Any:
        return self.values[var].expr if var in self.values else super().visit_dataflow_var_(var)

    def _keep(self, var: Any, value: Value) -> None:
        if isinstance(var, relax.DataflowVar):
            self.values[var] = value
        else:
            out = self.builder_.emit_output(value.expr, self.name) if self.builder_.current_block_is_dataflow() else value.expr
            self.values[var] = Value(out, value.axes, value.stage, value.batch)

    def _bound(self, var: Any, value: Any) -> Value | list[Value] | None:
        """The new value of a binding; None where it holds no tokens that left."""
        if isinstance(value, relax.Var):
            return self.values.get(value)
        if isinstance(value, relax.TupleGetItem):
            fields = self.tuples.get(value.tuple_value)
            return fields[value.index] if fields else None
        if isinstance(value, relax.Tuple):
            known = [self.values.get(field) for field in value.fields]
            if any(item is not None and item.axes for item in known) and isinstance(var, relax.DataflowVar):
                raise Unfollowable("it packs tokens into a tuple")
            return None  # its fields are replaced one by one
        if not isinstance(value, relax.Call):
            return None
        self._refuse_old_mean(value)
        known = [self.values.get(expr) for expr in operands(value)]
        if var not in self.attentions and not any(item is not None and item.axes for item in known):
            return None
        return self._call(var, value, known)

    # -- operators

    def _call(self, var: Any, call: Any, known: list[Value | None]) -> Value | list[Value]:
        tagged = [item.axes if item else {} for item in known]
        stage = max((item.stage for item in known if item and item.axes), default=0)
        followed = follow(call, tagged, self.stages[0].tokens)
        try:
            batch = follow(call, [item.batch if item and item.axes else {} for item in known], self.batch_size)
        except Unfollowable:
            batch = None
        new = []
        for place, (expr, item) in enumerate(zip(operands(call), known, strict=True)):
            value = self._brought(item, stage) if item and item.axes else self.visit_expr(expr)
            if wanted := followed.wanted[place]:
                value = self._taken(value, wanted, stage, None if batch is None else batch.wanted[place])
            new.append(value)
        self._watch_sums(var, call, known)
        results = self._rebuilt(var, call, new, followed.results, stage)
        values = [
            Value(self._checked(expr, old, axes, stage), axes, stage, batch.results[at] if batch and at < len(batch.results) else {})
            for at, (expr, old, axes) in enumerate(zip(results, _types(call), followed.results, strict=False))
        ]
        return values if isinstance(call.ty, relax.TupleType) else values[0]

    def _rebuilt(self, var: Any, call: Any, new: list[Any], axes: list[dict[int, Axis]], stage: int) -> list[Any]:
        """The results of `call` on other operands."""
        name, count = name_of(call), self.stages[stage].tokens
        if name in _SHAPED or name == "relax.broadcast_to":
            shape = [axes[0][at].size(count) if at in axes[0] else dim for at, dim in enumerate(dims(call))]
            return [self._emit((op.broadcast_to if name == "relax.broadcast_to" else op.reshape)(new[0], shape))]
        if name == "relax.strided_slice":
            bounds = sliced(call)
            ends = [axes[0][at].size(count) + begin if at in axes[0] else end for at, begin, end, _ in bounds]
            places, begins, strides = ([item[field] for item in bounds] for field in (0, 1, 3))
            return [self._emit(op.strided_slice(new[0], places, begins, ends, strides))]
        if name == attention.NAME:
            return self._attention(var, call, new, stage)
        rest, args = iter(new), []
        for arg in call.args:
            if isinstance(arg, relax.Tuple):
                args.append(relax.Tuple([next(rest) for _ in arg.fields]))
            else:
                args.append(next(rest) if isinstance(arg.ty, relax.TensorType) else arg)
        made = self._emit(relax.Call(call.op, args, call.attrs, call.ty_args))
        if isinstance(call.ty, relax.TupleType):
            return [self._emit(relax.TupleGetItem(made, at)) for at in range(len(call.ty.fields))]
        return [made]

    def _attention(self, var: Any, call: Any, new: list[Any], stage: int) -> list[Any]:
        attrs = attention.attrs_of(call)
        block = self.attentions.get(var)
        options = {**vars(attrs)}
        if self.merging is not None:
            if block is not None:
                self.scores[block] = self.merging.watched(new, layouts(call)[1])
            new = self.merging.proportional(new, attrs, stage)
            return [self._emit(attention.attention(*new, **options))]
        if block is None:
            return [self._emit(attention.attention(*new, **options))]
        both = self._emit(attention.attention(*new, **{**options, "received": True}))
        self.scores[block] = self._emit(relax.TupleGetItem(both, 1))
        return [self._emit(relax.TupleGetItem(both, 0))]

    def _leave(self, var: Any) -> None:
        """Tokens leave after `var` [B, N, C]: all that reads it from here on reads the shorter one."""
        block = self.joins[var]
        known = self.values.get(var) or Value(self.visit_expr(var), {1: Axis()}, 0, {0: Axis()})
        whole = known.axes.get(1) == Axis() and known.stage == len(self.stages) - 1 and known.batch.get(0) == Axis()
        if not whole or block not in self.scores or not isinstance(var, relax.DataflowVar):
            raise self._refused("add", "the blocks chosen do not follow one another on one residual stream")
        if self.merging is None:
            indices = self._emit(select_tokens(self.scores[block], self.keep))
            shorter = self._emit(take_tokens(known.expr, indices, 1))
        else:
            indices, shorter = self.merging.merged(known.expr, *self.scores[block], self.keep, match_tokens)
        self.stages.append(Stage(dims(indices)[1], indices))
        self.values[var] = Value(shorter, {1: Axis()}, known.stage + 1, {0: Axis()})
        self.counts["places"] = self.counts.get("places", 0) + 1

    # -- operands

    def _brought(self, item: Value, stage: int) -> Any:
        """A value with the tokens of a later stage."""
        if item.stage == stage:
            return item.expr
        if not all(axis.plain for axis in item.axes.values()) or item.batch.get(0) != Axis():
            raise Unfollowable("it brings tokens from before and after a place where tokens leave together, in a form that cannot be shortened")
        return self._shortened(item.expr, item.axes, item.stage, stage)

    def _taken(self, expr: Any, wanted: set[int], stage: int, batch: set[int] | None) -> Any:
        """A value that holds something per token, with the tokens of `stage`."""
        shape = dims(expr)
        if batch is None or len(batch) > 1 or any(not same(shape[at], self.stages[0].tokens) for at in wanted):
            raise Unfollowable(f"it lines the tokens up with a tensor {[shown(dim) for dim in shape]} that cannot be shortened alike")
        if not batch and (0 in wanted or not same(shape[0], 1)):
            expr, wanted = self._emit(op.reshape(expr, [1, *shape])), {at + 1 for at in wanted}
        elif batch and batch != {0}:
            raise Unfollowable("it lines the tokens up with a tensor whose batch is not its first dim")
        return self._shortened(expr, wanted, 0, stage)

    def _shortened(self, expr: Any, axes: Any, first: int, last: int) -> Any:
        for at in sorted(axes):
            for stage in range(first + 1, last + 1):
                key = (expr, at, stage)
                if key not in self.made:
                    self.made[key] = self._emit(take_tokens(expr, self.stages[stage].indices, at))
                    self.counts["gathers"] = self.counts.get("gathers", 0) + 1
                expr = self.made[key]
        return expr

    # -- checks

    def _watch_sums(self, var: Any, call: Any, known: list[Value | None]) -> None:
        """Remember the sums over tokens."""
        if name_of(call) == "relax.sum" and known[0] is not None:
            rank, over = len(dims(call.args[0])), call.attrs.axis
            if over is None or {int(axis) % rank for axis in over} & set(known[0].axes):
                self.sums.add(var)

    def _refuse_old_mean(self, value: Any) -> None:
        """A sum over tokens that is divided by a constant is a mean over as many tokens as there were."""
        if name_of(value) in ("relax.divide", "relax.multiply") and self.sums and self.sums & set(value.args) and any(map(is_constant, value.args)):
            raise Unfollowable("it scales a sum over the tokens by a constant, which may be their number before tokens left")

    def _checked(self, expr: Any, old: Any, axes: dict[int, Axis], stage: int) -> Any:
        """`expr`, if its shape is the old one with fewer tokens."""
        shape = getattr(expr.ty, "shape", None)
        expected = [axes[at].size(self.stages[stage].tokens) if at in axes else dim for at, dim in enumerate(old.shape)]
        if shape is None or len(shape) != len(expected) or not all(map(same, shape, expected)):
            raise Unfollowable(f"with fewer tokens its result is {expr.ty}, where {[shown(dim) for dim in expected]} was expected")
        return expr

    def _refused(self, operator: str, reason: str) -> UnsupportedModel:
        self.refusal = UnsupportedModel([Blocker(self.source(self.name), operator, f"token-pruning: {reason}")])
        return self.refusal

    def _emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr, self.name)


_SHAPED = ("relax.reshape", "relax.flatten", "relax.expand_dims", "relax.squeeze")


def _types(call: Any) -> list[Any]:
    return list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
