"""`tcompile.attention`: softmax(scale * q k^T, masked) v, without the score matrix as a tensor of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax, tirx, tvm

NAME = "tcompile.attention"
#: from one layout to the other
SWAPPED = (0, 2, 1, 3)


@dataclass(frozen=True)
class AttentionAttrs:
    """scale: factor of the scores. causal: query s sees keys 0..s only, whatever S and T are (torch's is_causal).

    before, after: a window, query s sees keys s - before .. s + after only; -1: no limit on that side. `causal` is after=0, so a causal sliding window of w keys, the query's own among
    them, is causal and before=w - 1; encoders that look w to both sides have before=after=w.

    fill: the score of a position that a boolean mask, `causal` or the window hides, before the softmax. safe: a query whose scores are all -inf gives zeros, as in torch's
    scaled_dot_product_attention, instead of NaN. received, logsum: further outputs. layout: order of the dims of q, k, v and the result, "BHSD" or "BSHD", or one for each
    of the four, joined by commas. dtype: of the result; by default that of q, float32 for bfloat16.
    """

    scale: float = 1.0
    causal: bool = False
    before: int = -1
    after: int = -1
    fill: float = -math.inf
    safe: bool = True
    received: bool = False
    logsum: bool = False
    layout: str = "BHSD"
    dtype: str = ""

    @property
    def layouts(self) -> tuple[str, ...]:
        """Layouts of q, k, v and the result."""
        parts = tuple(self.layout.split(","))
        return parts * 4 if len(parts) == 1 else parts

    @property
    def window(self) -> tuple[int | None, int | None]:
        """(before, after), `causal` included; None where there is no limit."""
        return (None if self.before < 0 else self.before, 0 if self.causal else None if self.after < 0 else self.after)

    def within(self, before: int | None, after: int | None) -> AttentionAttrs:
        """With a window besides: a key has to be in both."""
        least = [min((limit for limit in limits if limit is not None), default=-1) for limits in zip(self.window, (before, after), strict=True)]
        return replace(self, causal=least[1] == 0, before=least[0], after=least[1] if least[1] else -1)


def attention(q: relax.Expr, k: relax.Expr, v: relax.Expr, mask: relax.Expr | None = None, **attrs: Any) -> relax.Call:
    """q: [B, H, S, D], k: [B, Hk, T, D], v: [B, Hk, T, E] -> [B, H, S, E]; H is a multiple of Hk, each head of k and v serves H / Hk of q in a row.

    mask: broadcasts to [B, H, S, T]; float: added to the scores; bool: True where a key is seen. attrs: fields of AttentionAttrs; `scale` is 1 / sqrt(D) by default.
    With received=True the result is a tuple (out, received [B, T]): the attention that each key receives, the mean of its probabilities over heads and queries. With logsum=True
    it ends with logsum [B, H, S]: the logarithm of the sum of exponentials of each query's masked scores, -inf where it sees nothing; attentions of one query to parts of its keys
    are joined by it.
    With layout="BSHD" q, k, v and out have their second and third dims swapped. Operands of bfloat16 are multiplied as such, the probabilities rounded to it; scores, sums and
    out are float32.
    """
    if "scale" not in attrs:
        attrs["scale"] = 1.0 / math.sqrt(int(q.ty.shape[3]))
    attrs["fill"] = float(np.float32(attrs.get("fill", -math.inf)))
    options = AttentionAttrs(**attrs)
    if min(options.before, options.after) < -1:
        raise ValueError(f"attention: a window of {options.before} before and {options.after} after; sizes are -1 or more")
    options = options.within(None, None)
    if len(options.layouts) != 4 or not set(options.layouts) <= {"BHSD", "BSHD"}:
        raise ValueError(f"attention: layout '{options.layout}' is neither BHSD nor BSHD, nor four of them")
    return relax.Call(OPERATOR, [q, k, v] if mask is None else [q, k, v, mask], operator_attrs(**asdict(options)))


def attrs_of(call: relax.Call) -> AttentionAttrs:
    """The attributes of an attention call."""
    return AttentionAttrs(**{name: type(default)(call.attrs[name]) for name, default in asdict(AttentionAttrs()).items()})  # pyright: ignore[reportOptionalSubscript]


#: most queries of decoding, a token's or a few: of them each key is read for so few products that memory is the limit
FEW_QUERIES = 8


@dataclass(frozen=True)
class AttentionDims:
    """Sizes of an attention; expressions where they are symbolic."""

    batch: Any
    heads: Any
    kv_heads: Any
    queries: Any
    keys: Any
    depth: Any
    width: Any


def dims_of(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any], layouts: Sequence[str]) -> AttentionDims:
    """Sizes from the shapes of q, k and v and their layouts."""
    q, k, v = (dims if layout == "BHSD" else [dims[axis] for axis in SWAPPED] for dims, layout in zip((q, k, v), layouts, strict=False))
    return AttentionDims(q[0], q[1], k[1], q[2], k[2], q[3], v[3])


def are_few(queries: Any) -> bool:
    """Whether a number of queries is known and that of decoding."""
    return isinstance(queries, tirx.IntImm) and int(queries) <= FEW_QUERIES


def _infer(builder: Any, call: Any) -> Any:
    if len(call.args) not in (3, 4):
        raise ValueError(f"{NAME}: expected q, k, v and at most a mask, got {len(call.args)} operands")
    for name, arg in zip("qkv", call.args, strict=False):
        if not isinstance(arg.ty, relax.TensorType) or arg.ty.ndim != 4 or arg.ty.shape is None:
            raise ValueError(f"{NAME}: {name} has to be a tensor of four known dims, is {arg.ty}")
    attrs = attrs_of(call)
    return infer(NAME, call.args[:3], attrs, attrs.dtype or working_dtype(call.args[0]))


def infer(name: str, operands: Sequence[relax.Expr], attrs: AttentionAttrs, dtype: str) -> Any:
    """The type of the result of an attention over these q, k and v; ValueError, which begins with `name`, where they do not go together."""
    q, k, v = (_plain(list(arg.ty.shape), layout) for arg, layout in zip(operands, attrs.layouts, strict=False))
    analyzer = tvm.sym.Analyzer()

    def agree(what: str, one: Any, other: Any) -> None:
        if isinstance(one, tirx.IntImm) and isinstance(other, tirx.IntImm) and not analyzer.can_prove_equal(one, other):
            raise ValueError(f"{name}: {what} differ: {int(one)} and {int(other)}")

    agree("batch sizes of q and k", q[0], k[0])
    agree("depths of q and k", q[3], k[3])
    for position, what in enumerate(("batch sizes", "heads", "lengths")):
        agree(f"{what} of k and v", k[position], v[position])
    if isinstance(q[1], tirx.IntImm) and isinstance(k[1], tirx.IntImm) and int(q[1]) % int(k[1]):
        raise ValueError(f"{name}: {int(q[1])} heads of q cannot share {int(k[1])} heads of k")
    out = relax.TensorType(_plain([*q[:3], v[3]], attrs.layouts[3]), dtype)
    further = [relax.TensorType([q[0], k[2]], dtype)] if attrs.received else []
    further += [relax.TensorType(q[:3], dtype)] if attrs.logsum else []
    return relax.TupleType([out, *further]) if further else out


def working_dtype(q: relax.Expr) -> str:
    """The type in which `decompose` computes: float32 for operands of bfloat16, the operands' own for all others."""
    return "float32" if str(q.ty.dtype) == "bfloat16" else str(q.ty.dtype)


def _plain(dims: list[Any], layout: str) -> list[Any]:
    """Dims in the other order if the layout is not BHSD; its own inverse."""
    return dims if layout == "BHSD" else [dims[axis] for axis in SWAPPED]


def decompose(builder: Any, call: Any) -> relax.Expr:
    """The same by Relax operators, with a tensor of scores; what a target without a kernel runs."""
    attrs, emit, op = attrs_of(call), builder.emit, relax.op
    q, k, v = call.args[:3]
    mask = call.args[3] if len(call.args) == 4 else None
    q, k, v = (x if layout == "BHSD" else emit(op.permute_dims(x, SWAPPED)) for x, layout in zip((q, k, v), attrs.layouts, strict=False))
    dtype = working_dtype(q)
    q, k, v = (x if str(x.ty.dtype) == dtype else emit(op.astype(x, dtype)) for x in (q, k, v))
    dims = dims_of(*(list(x.ty.shape) for x in (q, k, v)), ("BHSD",) * 3)
    k, v = (_repeat(emit, x, dims.heads) for x in (k, v))
    scores = emit(op.multiply(emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2])))), relax.const(attrs.scale, dtype)))
    fill = relax.const(attrs.fill, dtype)
    before, after = attrs.window
    if before is not None or after is not None:
        row, column = (
            emit(op.reshape(emit(op.arange(0, size, 1, "int64")), shape)) for size, shape in ((dims.queries, [-1, 1]), (dims.keys, [1, -1]))
        )
        for low, high, distance in ((column, row, after), (row, column, before)):
            if distance is not None:
                high = emit(op.add(high, relax.const(distance, "int64"))) if distance else high
                scores = emit(op.where(emit(op.less_equal(low, high)), scores, fill))
    if mask is not None and str(mask.ty.dtype) == "bool":
        scores = emit(op.where(mask, scores, fill))
    elif mask is not None:
        scores = emit(op.add(scores, mask))
    if attrs.safe:
        # a finite row for the softmax where there is none, and zeros in its place after it; TVM's max over -inf alone is not -inf
        zero = relax.const(0.0, dtype)
        seen = emit(op.astype(emit(op.not_equal(scores, relax.const(-math.inf, dtype))), dtype))
        empty = emit(op.equal(emit(op.max(seen, axis=-1, keepdims=True)), zero))
        weights = emit(op.where(empty, zero, emit(op.nn.softmax(emit(op.where(empty, zero, scores)), axis=-1))))
    else:
        weights = emit(op.nn.softmax(scores, axis=-1))
    out = emit(op.matmul(weights, v))
    if attrs.dtype not in ("", dtype):
        out = emit(op.astype(out, attrs.dtype))
    if attrs.layouts[3] == "BSHD":
        out = emit(op.permute_dims(out, SWAPPED))
    further = [emit(op.mean(weights, axis=[1, 2]))] if attrs.received else []
    further += [_logsum(emit, scores, dtype)] if attrs.logsum else []
    return relax.Tuple([out, *further]) if further else out


def _logsum(emit: Any, scores: relax.Expr, dtype: str) -> relax.Expr:
    """log(sum(exp(scores))) over the keys; TVM's max over -inf alone is not -inf."""
    op, low = relax.op, relax.const(-math.inf, dtype)
    seen = emit(op.astype(emit(op.not_equal(scores, low)), dtype))
    empty = emit(op.equal(emit(op.max(seen, axis=-1)), relax.const(0.0, dtype)))
    top = emit(op.where(empty, relax.const(0.0, dtype), emit(op.max(scores, axis=-1))))
    powers = emit(op.exp(emit(op.subtract(scores, emit(op.expand_dims(top, -1))))))
    return emit(op.where(empty, low, emit(op.add(top, emit(op.log(emit(op.sum(powers, axis=-1))))))))


def _repeat(emit: Any, x: relax.Expr, heads: Any) -> relax.Expr:
    """[B, Hk, T, D] -> [B, H, T, D]."""
    batch, own, length, width = x.ty.shape
    if tvm.sym.Analyzer().can_prove_equal(own, heads):  # dims of the batch that were folded into the heads may be symbols
        return x
    groups = tvm.sym.Analyzer().simplify(tirx.floordiv(heads, own))
    spread = emit(relax.op.broadcast_to(emit(relax.op.reshape(x, [batch, own, 1, length, width])), [batch, own, groups, length, width]))
    return emit(relax.op.reshape(spread, [batch, heads, length, width]))


def in_window(attrs: AttentionAttrs, queries: int, keys: int) -> np.ndarray:
    """bool [queries, keys]: whether `causal` and the window let a query see a key."""
    before, after = attrs.window
    ahead = np.arange(keys) - np.arange(queries)[:, None]
    return (ahead >= -(queries if before is None else before)) & (ahead <= (keys if after is None else after))


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None, **attrs: Any) -> Any:
    """The operator in numpy, in float64: what every kernel is held against. Arguments and result as those of `attention`."""
    attrs.setdefault("scale", 1.0 / math.sqrt(q.shape[3]))
    options = AttentionAttrs(**attrs)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    q, k, v = (x if layout == "BHSD" else x.transpose(SWAPPED) for x, layout in zip((q, k, v), options.layouts, strict=False))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * options.scale
    scores = np.where(in_window(options, *scores.shape[2:]), scores, options.fill)
    if mask is not None:
        scores = np.where(mask, scores, options.fill) if mask.dtype == bool else scores + mask
    with np.errstate(invalid="ignore"):
        top = scores.max(-1, keepdims=True)
        empty = top == -math.inf
        weights = np.exp(scores - top)
        weights /= weights.sum(-1, keepdims=True)
    if options.safe:
        weights = np.where(empty, 0.0, weights)
    out = weights @ v
    out = out.transpose(SWAPPED) if options.layouts[3] == "BSHD" else out
    with np.errstate(invalid="ignore", divide="ignore"):
        base = np.where(empty, 0.0, top)
        logsum = (base + np.log(np.exp(scores - base).sum(-1, keepdims=True)))[..., 0]
    further = ([weights.mean((1, 2))] if options.received else []) + ([logsum] if options.logsum else [])
    return (out, *further) if further else out


OPERATOR = register_operator(NAME, ("q", "k", "v", "mask"), _infer, decompose)
