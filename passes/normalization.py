"""Recognise operators that exports spell out: layer-norm, RMS-norm, softmax, GELU (both forms), SiLU.

A single operator is one kernel that keeps its row in cache; spelled out, it is several reductions and broadcasts. Matching goes from the inputs to the outputs, one call at a time:
the division of a layer-norm becomes a `layer_norm` without affine part, the multiplication and addition that follow are then absorbed into it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.element_types import numpy_dtype
from ..compiler.program import Program
from ..compiler.tvm import is_constant, relax, tvm
from .base import Pass, PassContext
from .rewriting import same_dims


@dataclass(frozen=True)
class RecognizeNormalizations(Pass):
    """Replace spelled-out normalisations and activations by the single operators. Exact up to rounding; float32 only."""

    name: ClassVar[str] = "recognize-normalizations"

    def run(self, program: Program, context: PassContext) -> Program:
        rewriter = _Recognizer(program.module)
        main = rewriter.visit_expr(program.main)
        if not rewriter.found:
            return program
        context.matched(**rewriter.found)
        return program.with_module(relax.transform.DeadCodeElimination()(program.with_main(main).module))


@relax.expr_functor.mutator
class _Recognizer(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule):
        super().__init__(module)
        self.found: Counter[str] = Counter()

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)  # pyright: ignore[reportAssignmentType]
        name = getattr(call.op, "name", "")
        if name not in ("relax.multiply", "relax.add", "relax.divide") or str(_dtype(call)) != "float32":
            return call
        for kind, recognize in RULES.get(name, ()):
            replacement = recognize(_View(self.builder_), call)
            if replacement is not None:
                if kind:
                    self.found[kind] += 1
                return replacement
        return call


def _dtype(expr: relax.Expr) -> Any:
    """The element type of a tensor, taken from the first argument of a call whose type is not inferred yet."""
    while isinstance(expr, relax.Call) and not isinstance(expr.ty, relax.TensorType):
        expr = expr.args[0]
    return getattr(expr.ty, "dtype", None)


@dataclass(frozen=True)
class _View:
    """What the matchers see: calls through their variables."""

    builder: Any

    def call(self, expr: relax.Expr, *names: str) -> relax.Call | None:
        """The call that computes `expr`, if it is one of the named operators."""
        seen = expr
        while isinstance(seen, relax.Var):
            seen = self.builder.lookup_binding(seen)
        if isinstance(seen, relax.Call) and getattr(seen.op, "name", "") in {f"relax.{name}" for name in names}:
            return seen
        return None

    def same(self, a: relax.Expr, b: relax.Expr) -> bool:
        """The same value: the same variable, or variables bound to one another."""
        return self._root(a).same_as(self._root(b))

    def _root(self, expr: relax.Expr) -> relax.Expr:
        while isinstance(expr, relax.Var):
            bound = self.builder.lookup_binding(expr)
            if not isinstance(bound, relax.Var):
                return expr
            expr = bound
        return expr

    def pairs(self, call: relax.Call) -> Iterator[tuple[relax.Expr, relax.Expr]]:
        """The operands of a commutative call in both orders."""
        a, b = call.args
        yield a, b
        yield b, a

    def factors(self, expr: relax.Expr) -> tuple[float, list[relax.Expr]]:
        """A product as its constant scale and its other factors; division by a constant counts as scale."""
        value = _scalar(expr)
        if value is not None:
            return value, []
        product = self.call(expr, "multiply")
        if product is not None:
            (s, a), (t, b) = self.factors(product.args[0]), self.factors(product.args[1])
            return s * t, a + b
        quotient = self.call(expr, "divide")
        divisor = _scalar(quotient.args[1]) if quotient is not None else None
        if divisor:
            scale, rest = self.factors(quotient.args[0])
            return scale / divisor, rest
        return 1.0, [expr]

    def plus(self, expr: relax.Expr) -> tuple[float, relax.Expr] | None:
        """(constant, other) of a sum with a constant."""
        total = self.call(expr, "add")
        for a, b in self.pairs(total) if total is not None else ():
            value = _scalar(a)
            if value is not None:
                return value, b
        return None

    def square_of(self, expr: relax.Expr) -> relax.Expr | None:
        """x of x * x, x ** 2 or square(x)."""
        power = self.call(expr, "power")
        if power is not None and _scalar(power.args[1]) == 2.0:
            return power.args[0]
        square = self.call(expr, "square")
        if square is not None:
            return square.args[0]
        product = self.call(expr, "multiply")
        return product.args[0] if product is not None and self.same(*product.args) else None

    def mean_of(self, expr: relax.Expr) -> tuple[relax.Expr, tuple[int, ...]] | None:
        """(x, axes) of mean(x, axes, keepdims=True)."""
        mean = self.call(expr, "mean")
        if mean is None or not mean.attrs.keepdims or mean.attrs.axis is None:
            return None
        rank = len(mean.args[0].ty.shape)
        return mean.args[0], tuple(sorted(int(axis) % rank for axis in mean.attrs.axis))

    def root_mean_square(self, expr: relax.Expr) -> tuple[relax.Expr, tuple[int, ...], float] | None:
        """(x, axes, epsilon) of sqrt(mean(x^2, axes) + epsilon)."""
        root = self.call(expr, "sqrt")
        return self._deviation(root.args[0]) if root is not None else None

    def inverse_root_mean_square(self, expr: relax.Expr) -> tuple[relax.Expr, tuple[int, ...], float] | None:
        """(x, axes, epsilon) of 1 / sqrt(mean(x^2, axes) + epsilon)."""
        root = self.call(expr, "rsqrt")
        if root is not None:
            return self._deviation(root.args[0])
        quotient = self.call(expr, "divide")
        if quotient is not None and _scalar(quotient.args[0]) == 1.0:
            return self.root_mean_square(quotient.args[1])
        power = self.call(expr, "power")
        return self._deviation(power.args[0]) if power is not None and _scalar(power.args[1]) == -0.5 else None

    def _deviation(self, expr: relax.Expr) -> tuple[relax.Expr, tuple[int, ...], float] | None:
        total = self.plus(expr)
        mean = self.mean_of(total[1]) if total is not None else None
        if total is None or mean is None:
            return None
        x = self.square_of(mean[0])
        return (x, mean[1], total[0]) if x is not None else None


def _scalar(expr: relax.Expr) -> float | None:
    """The value of a constant of one element."""
    if not is_constant(expr):
        return None
    value = expr.value.numpy()
    return float(value.reshape(-1)[0]) if value.size == 1 else None


def _normalized(view: _View, x: relax.Expr, rms: tuple[relax.Expr, tuple[int, ...], float]) -> relax.Expr | None:
    """x / sqrt(mean(d^2) + eps): a layer-norm when x = d = y - mean(y), an RMS-norm when x = d; neither has its affine part yet."""
    d, axes, epsilon = rms
    if not view.same(x, d):
        return None
    dims = [x.ty.shape[axis] for axis in axes]
    if not all(isinstance(dim, tvm.tirx.IntImm) for dim in dims):
        return None
    dtype = str(x.ty.dtype)
    ones, zeros = (relax.const(make([int(dim) for dim in dims], numpy_dtype(dtype)), dtype) for make in (np.ones, np.zeros))
    centered = view.call(x, "subtract")
    mean = view.mean_of(centered.args[1]) if centered is not None else None
    if centered is not None and mean is not None and mean[1] == axes and view.same(mean[0], centered.args[0]):
        return relax.op.nn.layer_norm(centered.args[0], ones, zeros, axes=list(axes), epsilon=epsilon, center=False, scale=False)
    return relax.op.nn.rms_norm(x, ones, axes=list(axes), epsilon=epsilon)


def _norm_by_division(view: _View, call: relax.Call) -> relax.Expr | None:
    rms = view.root_mean_square(call.args[1])
    return _normalized(view, call.args[0], rms) if rms is not None else None


def _norm_by_product(view: _View, call: relax.Call) -> relax.Expr | None:
    for x, scale in view.pairs(call):
        rms = view.inverse_root_mean_square(scale)
        if rms is not None:
            return _normalized(view, x, rms)
    return None


def _fits(weight: relax.Expr, norm: relax.Call) -> bool:
    shape = [norm.args[0].ty.shape[int(axis)] for axis in norm.attrs.axes]
    return isinstance(weight.ty, relax.TensorType) and same_dims(weight.ty.shape, shape)


def _absorb_scale(view: _View, call: relax.Call) -> relax.Expr | None:
    for value, weight in view.pairs(call):
        norm = view.call(value, "nn.layer_norm", "nn.rms_norm")
        if norm is None or not _fits(weight, norm):
            continue
        axes, epsilon = [int(axis) for axis in norm.attrs.axes], float(norm.attrs.epsilon)
        if norm.op.name == "relax.nn.rms_norm":
            if is_constant(norm.args[1]) and np.all(norm.args[1].value.numpy() == 1):
                return relax.op.nn.rms_norm(norm.args[0], weight, axes=axes, epsilon=epsilon)
        elif not norm.attrs.scale and not norm.attrs.center:
            return relax.op.nn.layer_norm(norm.args[0], weight, norm.args[2], axes=axes, epsilon=epsilon, center=False, scale=True)
    return None


def _absorb_shift(view: _View, call: relax.Call) -> relax.Expr | None:
    for value, bias in view.pairs(call):
        norm = view.call(value, "nn.layer_norm")
        if norm is not None and not norm.attrs.center and _fits(bias, norm):
            axes, scale = [int(axis) for axis in norm.attrs.axes], bool(norm.attrs.scale)
            return relax.op.nn.layer_norm(norm.args[0], norm.args[1], bias, axes=axes, epsilon=float(norm.attrs.epsilon), center=True, scale=scale)
    return None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)


def _gelu(view: _View, call: relax.Call) -> relax.Expr | None:
    """0.5 x (1 + erf(x / sqrt 2)), the product in any order."""
    scale, rest = view.factors(call)
    if not _close(scale, 0.5) or len(rest) != 2:
        return None
    for x, other in (rest, rest[::-1]):
        total = view.plus(other)
        error = view.call(total[1], "erf") if total is not None and total[0] == 1.0 else None
        if error is not None:
            inner, argument = view.factors(error.args[0])
            if _close(inner, math.sqrt(0.5)) and len(argument) == 1 and view.same(argument[0], x):
                return relax.op.nn.gelu(x)
    return None


def _gelu_tanh(view: _View, call: relax.Call) -> relax.Expr | None:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    scale, rest = view.factors(call)
    if not _close(scale, 0.5) or len(rest) != 2:
        return None
    for x, other in (rest, rest[::-1]):
        total = view.plus(other)
        tanh = view.call(total[1], "tanh") if total is not None and total[0] == 1.0 else None
        if tanh is None:
            continue
        inner, argument = view.factors(tanh.args[0])
        cubic = view.call(argument[0], "add") if len(argument) == 1 and _close(inner, math.sqrt(2 / math.pi)) else None
        for a, b in view.pairs(cubic) if cubic is not None else ():
            if view.same(a, x) and _is_cube(view, b, x):
                return relax.op.nn.gelu_tanh(x)
    return None


def _is_cube(view: _View, expr: relax.Expr, x: relax.Expr) -> bool:
    """0.044715 x^3 as a power or a product."""
    scale, factors = view.factors(expr)
    degree = 0
    for factor in factors:
        power = view.call(factor, "power")
        if view.same(factor, x):
            degree += 1
        elif power is not None and view.same(power.args[0], x) and _scalar(power.args[1]) in (2.0, 3.0):
            degree += int(_scalar(power.args[1]) or 0)
        else:
            return False
    return degree == 3 and _close(scale, 0.044715)


def _silu(view: _View, call: relax.Call) -> relax.Expr | None:
    for x, gate in view.pairs(call):
        sigmoid = view.call(gate, "sigmoid")
        if sigmoid is not None and view.same(sigmoid.args[0], x):
            return relax.op.nn.silu(x)
    return None


def _softmax(view: _View, call: relax.Call) -> relax.Expr | None:
    """exp(x - max(x)) / sum(exp(x - max(x)))."""
    power, total = view.call(call.args[0], "exp"), view.call(call.args[1], "sum")
    if power is None or total is None or not view.same(total.args[0], call.args[0]) or not total.attrs.keepdims:
        return None
    shifted = view.call(power.args[0], "subtract")
    top = view.call(shifted.args[1], "max") if shifted is not None else None
    axes = [total.attrs.axis, top.attrs.axis if top is not None else None]
    if shifted is None or top is None or None in axes or not view.same(top.args[0], shifted.args[0]) or not top.attrs.keepdims:
        return None
    rank = len(shifted.args[0].ty.shape)
    reduced = [[int(axis) % rank for axis in each] for each in axes]
    if len(reduced[0]) != 1 or reduced[0] != reduced[1]:
        return None
    return relax.op.nn.softmax(shifted.args[0], axis=reduced[0][0])


#: by the operator at which a pattern ends: (what is counted, matcher); absorbing an affine part counts nothing
RULES = {
    "relax.divide": (("softmax", _softmax), ("normalization", _norm_by_division), ("gelu", _gelu), ("gelu_tanh", _gelu_tanh)),
    "relax.multiply": (
        ("", _absorb_scale),
        ("normalization", _norm_by_product),
        ("silu", _silu),
        ("gelu", _gelu),
        ("gelu_tanh", _gelu_tanh),
    ),
    "relax.add": (("", _absorb_shift),),
}
