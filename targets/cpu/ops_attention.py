"""Definition of attention as tensor expressions, and the form in which a mask reaches the kernel."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ...compiler.dialect.attention import NAME, AttentionAttrs, AttentionDims, attrs_of, decompose, dims_of
from ...compiler.tvm import Constant, mutator, relax, relax_functions, te, tirx, tvm
from ..common.fused import WHOLE
from .attention_views import View, element, find_view, operand

#: the queries of a prepared mask are padded to a multiple of this, the widest vector
PAD = 16
#: Relax's pattern kind "opaque": nothing joins it
_OPAQUE = 8


def prepare_mask(mask: Any, queries: Any, fill: float) -> Any:
    """mask: [B|1, H|1, S|1, T|1] float or bool -> [B|1, H|1, T|1, S padded|1] float32: queries side by side, as the kernel's vectors hold them.

    A boolean mask becomes 0 where a key is seen and `fill` where it is not.
    """
    batch, heads, rows, columns = mask.shape
    padded = rows if _is_unit(rows) else (rows + (PAD - 1)) // PAD * PAD

    def element(b: Any, h: Any, t: Any, s: Any) -> Any:
        value = mask[b, h, s, t]
        if mask.dtype == "bool":
            value = tirx.Select(value, tirx.const(0, "float32"), tirx.const(fill, "float32"))
        return value if _is_unit(rows) else tirx.if_then_else(s < rows, value, tirx.const(0, "float32"))

    return te.compute((batch, heads, columns, padded), element, name="mask")


def _is_unit(dim: Any) -> bool:
    return isinstance(dim, tirx.IntImm) and int(dim) == 1


def attention(operands: Sequence[Any], mask: Any, about: Mapping[str, Any]) -> Any:
    """The operator's meaning, one stage after the other; operands: what holds q, k, v. mask: as `prepare_mask` makes it, None or added ("add") or put in place of scores
    where not 0 ("select"). about: see `attention_kernel`."""
    dims, kind = sizes(about, [operand.shape for operand in operands]), about["mask"]
    groups, scale = dims.heads // dims.kv_heads, tirx.const(about["scale"], "float32")

    def at(operand: int, b: Any, h: Any, s: Any, d: Any) -> Any:
        value = operands[operand][element(about["rows"][operand], b, h, s, d)]
        return value if value.dtype == "float32" else value.astype("float32")

    def score(b: Any, h: Any, s: Any, t: Any) -> Any:
        value = products(b, h, s, t) * scale
        for low, high, distance in ((t, s, 0 if about["causal"] else about["after"]), (s, t, about["before"])):
            value = tirx.Select(low <= high + distance, value, tirx.const(about["fill"], "float32")) if distance >= 0 else value
        if kind == "none":
            return value
        extra = mask(*(0 if _is_unit(dim) else index for dim, index in zip(mask.shape, (b, h, t, s), strict=True)))
        return value + extra if kind == "add" else tirx.Select(extra == tirx.const(0, "float32"), value, extra)

    shape = (dims.batch, dims.heads, dims.queries, dims.keys)
    low, zero = tirx.const(-math.inf, "float32"), tirx.const(0, "float32")
    greatest = te.comm_reducer(lambda a, b: tirx.Select(a > b, a, b), lambda dtype: tirx.const(-math.inf, dtype), name="greatest")
    d, t, u, w = (te.reduce_axis((0, size), name) for size, name in ((dims.depth, "d"), (dims.keys, "t"), (dims.keys, "u"), (dims.keys, "w")))
    products = te.compute(shape, lambda b, h, s, t: te.sum(at(0, b, h, s, d) * at(1, b, h // groups, t, d), axis=d), name="products")
    scores = te.compute(shape, score, name="scores")
    top = te.compute(shape[:3], lambda b, h, s: greatest(scores(b, h, s, t), axis=t), name="top")
    base = te.compute(shape[:3], lambda b, h, s: tirx.Select(top(b, h, s) == low, zero, top(b, h, s)), name="base")
    power = te.compute(shape, lambda b, h, s, t: te.exp(scores(b, h, s, t) - base(b, h, s)), name="power")
    total = te.compute(shape[:3], lambda b, h, s: te.sum(power(b, h, s, u), axis=u), name="total")
    one = tirx.const(1, "float32")

    def inverse(b: Any, h: Any, s: Any) -> Any:
        value = one / total(b, h, s)
        return tirx.Select(total(b, h, s) == zero, zero, value) if about["safe"] else value

    inverses = te.compute(shape[:3], inverse, name="inverse")
    weights = te.compute(shape, lambda b, h, s, t: power(b, h, s, t) * inverses(b, h, s), name="weights")

    def value(b: Any, h: Any, s: Any, e: Any) -> Any:
        return te.sum(weights(b, h, s, w) * at(2, b, h // groups, w, e), axis=w)

    if about["layouts"][3] == "BHSD":
        out = te.compute((*shape[:3], dims.width), value, name="attention")
    else:
        out = te.compute((dims.batch, dims.queries, dims.heads, dims.width), lambda b, s, h, e: value(b, h, s, e), name="attention")
    logsum = te.compute(shape[:3], lambda b, h, s: top(b, h, s) + te.log(total(b, h, s)), name="logsum")
    if not about["received"]:
        return [out, logsum] if about.get("logsum") else out
    h, s = te.reduce_axis((0, dims.heads), "h"), te.reduce_axis((0, dims.queries), "s")
    sums = te.compute((dims.batch, dims.keys), lambda b, t: te.sum(weights(b, h, s, t), axis=[h, s]), name="sums")
    count = tirx.Cast("float32", dims.heads * dims.queries)
    received = te.compute((dims.batch, dims.keys), lambda b, t: sums(b, t) / count, name="received")
    return [out, received, logsum] if about.get("logsum") else [out, received]


def legalize_attention(builder: Any, call: Any) -> Any:
    """One function for float32 or bfloat16 with known heads and widths and a mask that broadcasts in a known way; Relax operators for anything else."""
    made = attention_kernel(builder, call, [operand(x, layout) for x, layout in zip(call.args[:3], attrs_of(call).layouts, strict=False)])
    return decompose(builder, call) if made is None else made


def attention_kernel(builder: Any, call: Any, views: Sequence[View]) -> Any:
    """The call of one function over the tensors that hold q, k and v, None where there is no kernel.

    What the kernel has to know is in its attribute `WHOLE`: the attributes of the operator, "rows" of the three operands and the result, and "sizes", each a number or
    [operand, dim].
    """
    attrs = attrs_of(call)
    q, k, v = call.args[:3]
    dims = dims_of(list(q.ty.shape), list(k.ty.shape), list(v.ty.shape), attrs.layouts)
    known = all(isinstance(dim, tirx.IntImm) for dim in (dims.heads, dims.kv_heads, dims.depth, dims.width))
    types = {str(arg.ty.dtype) for arg in (q, k, v)}
    if not known or types not in ({"float32"}, {"bfloat16"}) or (types == {"bfloat16"} and int(dims.depth) % 2):
        return None
    prepared = masked(builder, call.args[3] if len(call.args) == 4 else None, dims, attrs.fill)
    if prepared is None:
        return None
    kind, mask = prepared
    about = described(attrs, q, views, kind)

    def define(*operands: Any) -> Any:
        return attention(operands[:3], operands[3] if len(operands) == 4 else None, about)

    operands = [view.tensor for view in views] + ([] if mask is None else [mask])
    attributes = {WHOLE: json.dumps(about, sort_keys=True), "op_pattern": _OPAQUE}
    return builder.call_te(define, *operands, primfunc_name_hint="attention", primfunc_attrs=attributes)


def described(attrs: AttentionAttrs, q: Any, views: Sequence[View], mask: str) -> dict[str, Any]:
    """What a kernel has to know whose operands lie in these views, and its result as q does. mask: what it does to the scores, as `masked` says."""
    places = {"batch": (0, 0), "heads": (0, 1), "kv_heads": (1, 1), "queries": (0, 2), "keys": (1, 2), "depth": (0, 3), "width": (2, 3)}
    about = {"op": "attention", "mask": mask, "outputs": 1 + attrs.received + attrs.logsum, **asdict(attrs), "layouts": attrs.layouts}
    about["sizes"] = {name: [of, *size] if isinstance(size := views[of].size(axis), list) else size for name, (of, axis) in places.items()}
    about["rows"] = [*(view.rows for view in views), operand(q, attrs.layouts[3]).rows]
    return about


def masked(builder: Any, mask: Any, dims: AttentionDims, fill: float) -> tuple[str, Any] | None:
    """(what it does to the scores, the mask as a kernel reads it, None without one); None where no kernel takes it."""
    if mask is None:
        return "none", None
    kind = "select" if str(mask.ty.dtype) == "bool" else "add"
    if str(mask.ty.dtype) not in ("bool", "float32") or (kind == "select" and fill == 0) or not _broadcasts(mask, dims):
        return None
    return kind, _prepared(builder, mask, dims.queries, fill)


def sizes(about: Mapping[str, Any], shapes: Sequence[Sequence[Any]]) -> AttentionDims:
    """The sizes of a kernel from the shapes of its operands."""

    def size(value: Any) -> Any:
        return shapes[value[0]][value[1]] if isinstance(value, list) else tirx.const(value, "int64")

    return AttentionDims(**{name: size(value) for name, value in about["sizes"].items()})


def _broadcasts(mask: relax.Expr, dims: Any) -> bool:
    """Every dim is 1 or provably the one it goes with."""
    analyzer = tvm.sym.Analyzer()
    own = [tirx.const(1, "int64")] * (4 - len(mask.ty.shape)) + list(mask.ty.shape)
    wanted = (dims.batch, dims.heads, dims.queries, dims.keys)
    return len(own) == 4 and all(_is_unit(dim) or analyzer.can_prove_equal(dim, size) for dim, size in zip(own, wanted, strict=True))


def _prepared(builder: Any, mask: relax.Expr, queries: Any, fill: float) -> relax.Expr:
    """A constant mask is prepared here, another by a small kernel of its own, one for all layers that share it."""
    shape = [tirx.const(1, "int64")] * (4 - len(mask.ty.shape)) + list(mask.ty.shape)
    if isinstance(mask, Constant):
        array = mask.value.numpy().reshape([int(dim) for dim in shape])
        values = np.where(array, 0.0, fill).astype("float32") if array.dtype == bool else array
        values = values.transpose(0, 1, 3, 2)
        if values.shape[3] > 1:
            values = np.pad(values, ((0, 0), (0, 0), (0, 0), (0, -values.shape[3] % PAD)))
        return relax.const(np.ascontiguousarray(values))
    whole = mask if len(mask.ty.shape) == 4 else builder.emit(relax.op.reshape(mask, shape))
    return builder.emit(builder.call_te(prepare_mask, whole, queries, fill, primfunc_name_hint="mask"))


@mutator
class ReadInPlace(relax.PyExprMutator):
    """Every attention whose operands are parts of other tensors becomes a kernel that reads those; the copies die."""

    def apply(self) -> Any:
        for variable, function in relax_functions(self.builder_.get()):
            self.cast: dict[Any, Any] = {}
            self.bindings = {binding.var: binding.value for block in function.body.blocks for binding in block.bindings}
            self.builder_.update_func(variable, self.visit_expr(function))
        return relax.transform.DeadCodeElimination()(self.builder_.get())

    def visit_call_(self, call: Any) -> Any:
        if getattr(call.op, "name", "") != NAME:
            return super().visit_call_(call)
        views = [find_view(self.bindings, x, layout) for x, layout in zip(call.args[:3], attrs_of(call).layouts, strict=False)]
        fresh = super().visit_call_(call)
        if all(view.tensor.same_as(x) for view, x in zip(views, call.args, strict=False)):
            return fresh
        made = attention_kernel(self.builder_, fresh, [replace(view, tensor=self._held(view.tensor, call.args[0].ty.dtype)) for view in views])
        return fresh if made is None else made

    def _held(self, tensor: Any, dtype: str) -> Any:
        """The tensor in the operands' type, cast once for all that read it."""
        if str(tensor.ty.dtype) == str(dtype):
            return self.visit_expr(tensor)
        if tensor not in self.cast:
            self.cast[tensor] = self.builder_.emit(relax.op.astype(self.visit_expr(tensor), str(dtype)))
        return self.cast[tensor]


#: for `targets.common.legalize`
OWN = {NAME: legalize_attention}
