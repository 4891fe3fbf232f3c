"""TokenPruning: from given blocks on, a transformer runs on fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from ...compiler.errors import Blocker, UnsupportedModel, UsageError
from ...compiler.program import Program
from ...compiler.tvm import relax, tirx
from ..base import Pass, PassContext
from .axes import shown
from .blocks import Block, find_blocks
from .rewrite import Pruner

METHODS = ("drop", "merge")


@dataclass(frozen=True)
class TokenPruning(Pass):
    """Keep ceil(keep * n) of n tokens at each of some blocks, the first token always and all in their order.

    keep: in (0, 1]; 1.0 changes nothing. method: "drop" the tokens that receive the least attention, from all queries and heads of the block (as Evo-ViT and EViT do from the
    class token alone; models without one have no such query), or "merge" pairs of similar ones (ToMe). blocks: numbers of the attention blocks, from 0, between whose attention
    and MLP the tokens leave; () means three places, after a quarter, half and three quarters of the blocks (DynamicViT, EViT).

    Raises UsageError for options out of range, UnsupportedModel for a model without a token axis or with an operator that cannot be rewritten.
    """

    name: ClassVar[str] = "token-pruning"
    lossy: ClassVar[bool] = True
    flag: ClassVar[str] = "token_keep"
    keep: float = 1.0
    method: str = "drop"
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise UsageError(f"token-pruning: keep must be a share of the tokens in (0, 1], not {self.keep!r}")
        if self.method not in METHODS:
            raise UsageError(f"token-pruning: unknown method {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.method == "merge" and self.keep < 0.5:
            raise UsageError(
                f"token-pruning: merging pairs can halve the tokens at most, keep {self.keep} is less than 0.5; use more blocks, or method 'drop'"
            )
        places = self.blocks
        if not isinstance(places, Sequence) or isinstance(places, str) or not all(type(place) is int and place >= 0 for place in places):
            raise UsageError(f"token-pruning: blocks must be numbers of attention blocks from 0, not {places!r}")
        if len(set(places)) < len(places):
            raise UsageError(f"token-pruning: blocks names a block twice: {tuple(places)}")
        object.__setattr__(self, "blocks", tuple(sorted(places)))

    @classmethod
    def from_flag(cls, value: Any) -> Pass:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise UsageError(f"token_keep takes a share of the tokens in (0, 1], not {value!r}") from None
        return super().from_flag(value)

    def run(self, program: Program, context: PassContext) -> Program:
        if self.keep == 1:
            return program
        found, reasons = find_blocks(program.main, program.node)
        if not found:
            raise UnsupportedModel(reasons or [Blocker("", "", "token-pruning: the model has no attention operator, so it has no axis of tokens")])
        chosen = self._chosen(found)
        keep = Fraction(str(self.keep))
        pruner = Pruner(program.module, chosen, keep, self.method == "merge", program.node)
        module = pruner.apply()
        context.matched(blocks=len(found), **pruner.counts)
        for place, stage in zip((found.index(block) for block in chosen), pruner.stages[1:], strict=True):
            context.note(f"{shown(stage.tokens)} tokens after the attention of block {place}")
        for reason in reasons:
            context.note(f"not an attention block to prune at: {reason}")
        return replace(program, module=module, outputs=_outputs(program, module["main"]))

    def _chosen(self, found: list[Block]) -> list[Block]:
        depth = len(found)
        if wrong := [place for place in self.blocks if place >= depth]:
            raise UsageError(f"token-pruning: there is no attention block {wrong[0]}: the model has {depth}, numbered 0..{depth - 1}")
        return [found[place] for place in self.blocks or sorted({depth // 4, depth // 2, 3 * depth // 4})]


def _outputs(program: Program, main: Any) -> tuple[Any, ...]:
    """The output specs with the shapes that `main` returns now."""
    kind = main.ret_ty
    kinds = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
    return tuple(
        replace(spec, shape=tuple(int(dim) if isinstance(dim, tirx.IntImm) else shown(dim) for dim in kind.shape)) if kind.shape is not None else spec
        for spec, kind in zip(program.outputs, kinds, strict=True)
    )
