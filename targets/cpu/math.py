"""Vector mathematics: the float32 functions (exp, erf, tanh, ...) as polynomials that LLVM vectorises; `math_lowering` puts them in the place of calls.

The polynomials are least-squares fits on Chebyshev nodes, weighted by the relative error (Lawson's iteration for the rational ones); the errors below are measured
over the whole range by tests/test_cpu_math.py. Range reduction follows Cody and Waite, "Software Manual for the Elementary Functions" (1980).

    log, log1p, pow 1 ulp; exp, log2, sin, cos 2 ulp (sin, cos for |x| < 2^40); sigmoid 3 ulp for x > -87, 3e-39 absolute below; tanh 5 ulp; erf 6 ulp, 3 in vectors of sixteen;
    gelu, gelu_tanh in vectors of sixteen 3 ulp for x > 0, relative 6e-7 down to -2, 5e-4 to -5, 2e-12 absolute below -7; others as the formula with erf or tanh

Denormal arguments and results are exact to the same bounds; infinities, NaN and signed zeros follow IEEE 754 and C99's annex F. Other precisions keep their calls.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

from ...compiler.tvm import T, tirx, tvm
from .math_pieces import ERF, GELU_BELL, GELU_TANH_BELL, LANES, Pieces, chosen

#: 1.5 * 2^23: adding it rounds a float32 of magnitude below 2^22 to an integer, which then stands in the low bits of the sum
ROUND32 = 12582912.0
#: the same for float64
ROUND64 = 6755399441055744.0

LN2_HIGH, LN2_LOW = 0.693145751953125, 1.42860677e-6
#: (e^r - 1 - r) / r^2 on [-ln 2, ln 2]
EXP = (0.5000003455933478, 0.16666614281965308, 0.0416612769111975, 0.008336098379459776, 0.001410429665492409, 0.00019611817011219376)
#: 2^f on [-1/2, 1/2]
EXP2_HALF = (1.0000001192092896, 0.6931469440460205, 0.24022120237350464, 0.05550713092088699, 0.009675540961325169, 0.001327647129073739)
LOG = (
    0.3333331089896389, -0.2500001627905827, 0.20002204183610234, -0.16667643716103692, 0.14217891534661792,
    -0.12411268686874026, 0.11904712128779407, -0.11646434415873085, 0.06675271890576213,
)  # fmt: skip
ERF_P = (1.12837915, 1.90593300e-1, 5.27690107e-2, 3.77246007e-3, 2.84829854e-4, 2.04588489e-6)
ERF_Q = (1.0, 5.02241646e-1, 1.14182325e-1, 1.49830375e-2, 1.16381349e-3, 3.80455666e-5)
TANH_P = (9.99999979e-1, 1.33796962e-1, 3.49400793e-3, 2.05830217e-5, 1.33184124e-8)
TANH_Q = (1.0, 4.67130114e-1, 2.58709738e-2, 3.28304824e-4, 7.76175345e-7)
SIN = (-0.1666665467846208, 0.008332165757588623, -0.00019515952804988884)
COS = (0.041666646236693014, -0.001388734148653151, 2.443585173557514e-05)
LOG2 = (2.8853900817778495, 0.961796694113209, 0.5770779423993074, 0.412209249385445, 0.31990580094433413, 0.28289891515917653)
EXP2 = (
    0.999999999959549, 0.6931471805459296, 0.24022651213595497, 0.05550410941217376,
    0.009618025602908045, 0.0013333450558563407, 0.00015469731993500435, 1.5310081624455056e-05,
)  # fmt: skip


#: before the name of a function whose call is kept for `math_lowering`
MARK = "tcompile."


class Names:
    """Names values while a statement is expanded, so that one used twice is computed once; `statements` go before the statement.

    A name is a small buffer, not a binding: TVM's code generator simplifies every binding with the earlier ones put in, which takes minutes on a chain in which
    each is used twice. LLVM makes registers of the buffers.
    """

    def __init__(self) -> None:
        self.statements: list[Any] = []

    def __call__(self, value: Any) -> Any:
        """What stands for `value` from here on."""
        lanes = lanes_of(value)
        buffer = tirx.decl_buffer((lanes,), str(value.ty.dtype).split("x")[0], f"t{len(self.statements) // 2}")
        index = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes) if lanes > 1 else tirx.const(0, "int32")
        self.statements += [tirx.AllocBuffer(buffer), tirx.BufferStore(buffer, value, [index])]
        return tirx.BufferLoad(buffer, [index])


def _f32(value: float) -> Any:
    return tirx.FloatImm("float32", struct.unpack("f", struct.pack("f", value))[0])


def _f64(value: float) -> Any:
    return tirx.FloatImm("float64", value)


def lanes_of(x: Any) -> int:
    return tvm.DataType(str(x.ty.dtype)).lanes


def _typed(kind: str, like: Any) -> str:
    """The dtype `kind` with as many lanes as `like`."""
    return f"{kind}x{lanes_of(like)}" if lanes_of(like) > 1 else kind


def cast(kind: str, x: Any) -> Any:
    return tirx.Cast(_typed(kind, x), x)


def reinterpret(kind: str, x: Any) -> Any:
    return T.reinterpret(_typed(kind, x), x)


def select(condition: Any, yes: Any, no: Any) -> Any:
    """Select with scalars spread over the lanes of the condition, as the arithmetic operators do by themselves."""
    condition = condition.asobject() if hasattr(condition, "asobject") else condition
    lanes = lanes_of(condition)

    def spread(x: Any) -> Any:
        return tirx.Broadcast(x, lanes) if lanes > 1 and lanes_of(x) == 1 else x

    return tirx.Select(condition, spread(yes), spread(no))


def constant_of(x: Any) -> float | None:
    """The value of a constant, or of a vector of one constant."""
    x = x.value if isinstance(x, tirx.Broadcast) else x
    return float(x.value) if isinstance(x, tirx.FloatImm) else None


def _horner(x: Any, coefficients: Sequence[float], constant: Callable[[float], Any] = _f32) -> Any:
    """Polynomial in x, lowest coefficient first."""
    result: Any = constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + constant(coefficient)
    return result


def _at_least(x: Any, low: Any) -> Any:
    """max(x, low) that keeps a NaN of x; one instruction on x86, whose max returns its second operand on NaN."""
    return select(low > x, low, x)


def _at_most(x: Any, high: Any) -> Any:
    return select(high < x, high, x)


def _bits(x: Any) -> Any:
    return reinterpret("int32", x)


def _power_of_two(exponent: Any) -> Any:
    """2^exponent as float32 for an int32 exponent in -126..127."""
    return reinterpret("float32", (exponent + T.int32(127)) << T.int32(23))


def _scale(name: Names, value: Any, exponent: Any) -> Any:
    """value * 2^exponent in two steps, so that results down to the denormals and up to infinity come out rounded once."""
    half = name(exponent >> T.int32(1))
    return value * _power_of_two(half) * _power_of_two(exponent - half)


def _with_sign(magnitude: Any, sign_of: Any) -> Any:
    return reinterpret("float32", _bits(magnitude) | (_bits(sign_of) & T.int32(-(2**31))))


def exp(name: Names, x: Any) -> Any:
    """e^x = e^r s s with s = 2^n and |r| <= ln 2: the two products round once, down to the denormals and up to infinity."""
    x = name(_at_most(_at_least(x, _f32(-104.0)), _f32(89.0)))
    # the exponent's bias rides on the rounding constant, so that the low bits of the sum are those of 2^n, ready to shift
    shifted = name(x * _f32(0.5 * math.log2(math.e)) + _f32(ROUND32 + 127.0))
    n = name(shifted - _f32(ROUND32 + 127.0))
    r = name((x - n * _f32(2.0 * LN2_HIGH)) - n * _f32(2.0 * LN2_LOW))
    value = name((r * r) * _horner(r, EXP) + r + _f32(1.0))
    s = name(reinterpret("float32", _bits(shifted) << T.int32(23)))
    return value * s * s


def exp_nonpositive(name: Names, x: Any) -> Any:
    """e^x for x <= 0 in half the instructions, as a softmax has it: relative error 3e-7 down to x = -5, 1.4e-6 where results are near 1e-38; 0 below, NaN for NaN."""
    x = name(x)
    shifted = name(x * _f32(math.log2(math.e)) + _f32(ROUND32 + 127.0))
    minus_n = name(_f32(ROUND32 + 127.0) - shifted)
    f = name(x * _f32(math.log2(math.e)) + minus_n)
    value = _horner(f, EXP2_HALF) * reinterpret("float32", _bits(shifted) << T.int32(23))
    return select(x < _f32(-87.0), _f32(0.0), value)


def call_exp_nonpositive(x: Any, dtype: str) -> Any:
    """The call that `vector_math` turns into `exp_nonpositive`."""
    return tirx.call_pure_extern(dtype, f"{MARK}exp_nonpositive", x)


def _split(name: Names, x: Any) -> tuple[Any, Any]:
    """Positive x = m * 2^e with m in [sqrt(1/2), sqrt(2)): (m, e as float32); denormals are scaled up first."""
    small = x < _f32(2.0**-126)  # booleans stay unbound: TVM's interval analysis cannot hold a vector of them
    bits = name(_bits(select(small, x * _f32(2.0**23), x)))
    e = name((bits - T.int32(0x3F3504F3)) >> T.int32(23))
    m = reinterpret("float32", bits - (e << T.int32(23)))
    return name(m), name(cast("float32", e) - select(small, _f32(23.0), _f32(0.0)))


def _log_edges(x: Any, value: Any) -> Any:
    """What a logarithm is at 0, infinity, below 0 and at NaN."""
    value = select(x == _f32(0.0), _f32(-math.inf), value)
    value = select(x < _f32(math.inf), value, x)
    return select(x < _f32(0.0), _f32(math.nan), value)


def _log_finite(name: Names, x: Any) -> Any:
    m, e = _split(name, x)
    f = name(m - _f32(1.0))
    square = name(f * f)
    tail = name((f * square) * _horner(f, LOG) + e * _f32(LN2_LOW))
    return (tail - square * _f32(0.5)) + f + e * _f32(LN2_HIGH)


def log(name: Names, x: Any) -> Any:
    x = name(x)
    return _log_edges(x, _log_finite(name, x))


def log2(name: Names, x: Any) -> Any:
    """Exact at powers of two."""
    x = name(x)
    m, e = _split(name, x)
    f = name(m - _f32(1.0))
    square = name(f * f)
    tail = name((f * square) * _horner(f, LOG) - square * _f32(0.5))
    # log2(e) = 1 + .4427: the parts of f and tail that need no product come last
    return _log_edges(x, (tail * _f32(0.44269504) + f * _f32(0.44269504) + tail) + f + e)


def log1p(name: Names, x: Any) -> Any:
    """log(u) + (x - (u - 1)) / u with u = 1 + x: the second term restores what rounding u lost (Goldberg 1991, theorem 4)."""
    x = name(x)
    u = name(x + _f32(1.0))
    value = name(_log_finite(name, u) + (x - (u - _f32(1.0))) / u)
    return select(T.fabs(x) < _f32(2.0**-24), x, _log_edges(u, value))


def _quotient(name: Names, dividend: Any, divisor: Any) -> Any:
    """dividend / divisor for divisors of common size, 1 ulp. A division of sixteen floats keeps a port busy for 16 cycles on Intel's cores: there an estimate of 14 bits and two steps of
    Newton's iteration, the second on the quotient itself, take its place."""
    if lanes_of(divisor) != 16:
        return dividend / divisor
    dividend, divisor = name(dividend), name(divisor)
    minus = name(_f32(0.0) - divisor)
    arguments = divisor, tirx.Broadcast(_f32(0.0), 16), T.int16(-1)
    estimate = name(T.call_llvm_pure_intrin("float32x16", T.llvm_lookup_intrinsic_id("llvm.x86.avx512.rcp14.ps.512"), *arguments))
    inverse = name(estimate * (minus * estimate + _f32(1.0)) + estimate)
    quotient = name(dividend * inverse)
    return inverse * (minus * quotient + dividend) + quotient


def _odd_rational(name: Names, x: Any, bound: float, p: Sequence[float], q: Sequence[float]) -> Any:
    """x P(x^2) / Q(x^2), held within [-1, 1], x beyond the bound where the function rounds to 1."""
    clamped = name(_at_most(_at_least(x, _f32(-bound)), _f32(bound)))
    square = name(clamped * clamped)
    value = name(_quotient(name, clamped * _horner(square, p), _horner(square, q)))
    return _at_most(_at_least(value, _f32(-1.0)), _f32(1.0))


def _piecewise(name: Names, size: Any, pieces: Pieces) -> Any:
    """See `math_pieces`; size: up to half a width beyond `pieces.last`."""
    shifted = name(size + _f32(pieces.shift))
    apart, place = name(size - (shifted - _f32(pieces.shift))), name(_bits(shifted))
    *lower, value = (chosen(values, place) for values in pieces.coefficients)
    for coefficient in reversed(lower):
        value = value * apart + coefficient
    return value


def _odd_pieces(name: Names, x: Any, pieces: Pieces) -> Any:
    """x p(|x|), held within [-1, 1]."""
    bound = pieces.last + pieces.width / 2
    clamped = name(_at_most(_at_least(x, _f32(-bound)), _f32(bound)))
    value = name(clamped * _piecewise(name, name(T.fabs(clamped)), pieces))
    return _at_most(_at_least(value, _f32(-1.0)), _f32(1.0))


def erf(name: Names, x: Any) -> Any:
    return _odd_pieces(name, x, ERF) if lanes_of(x) == LANES else _odd_rational(name, x, 3.925, ERF_P, ERF_Q)


def _less_bell(name: Names, x: Any, pieces: Pieces) -> Any:
    """max(x, 0) - p(|x|), with a p that is 0 from `pieces.last` on."""
    x = name(x)
    size = name(_at_most(name(T.fabs(x)), _f32(pieces.last)))
    return _at_least(x, _f32(0.0)) - _piecewise(name, size, pieces)


#: from here on 1 + erf is 0 but for its last bit, which would be multiplied by x
_GELU_FROM = -8.0


def gelu(name: Names, x: Any) -> Any:
    """x Phi(x)."""
    if lanes_of(x) == LANES:
        return _less_bell(name, x, GELU_BELL)
    x = name(_at_least(x, _f32(_GELU_FROM)))
    return x * (erf(name, x * _f32(math.sqrt(0.5))) * _f32(0.5) + _f32(0.5))


def gelu_tanh(name: Names, x: Any) -> Any:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    if lanes_of(x) == LANES:
        return _less_bell(name, x, GELU_TANH_BELL)
    x = name(_at_least(x, _f32(_GELU_FROM)))
    root = math.sqrt(2.0 / math.pi)
    inner = name(x * (x * x * _f32(0.044715 * root) + _f32(root)))
    return x * (tanh(name, inner) * _f32(0.5) + _f32(0.5))


def tanh(name: Names, x: Any) -> Any:
    return _odd_rational(name, x, 9.02, TANH_P, TANH_Q)


def sigmoid(name: Names, x: Any) -> Any:
    return _f32(1.0) / (_f32(1.0) + exp(name, _f32(0.0) - x))


def _trigonometric(name: Names, x: Any, quadrants: int) -> Any:
    """sin(x + quadrants * pi/2). The argument is reduced in float64, by pi/2 in two parts."""
    wide = name(cast("float64", x))
    shifted = name(wide * _f64(2.0 / math.pi) + _f64(ROUND64))
    n = name(shifted - _f64(ROUND64))
    r = name(cast("float32", (wide - n * _f64(math.pi / 2)) - n * _f64(6.123233995736766e-17)))
    quadrant = name(cast("int32", reinterpret("int64", shifted) & T.int64(3)) + T.int32(quadrants))
    square = name(r * r)
    sine = name((r * square) * _horner(square, SIN) + r)
    cosine = name((square * square) * _horner(square, COS) - square * _f32(0.5) + _f32(1.0))
    value = name(select((quadrant & T.int32(1)) == T.int32(1), cosine, sine))
    return reinterpret("float32", _bits(value) ^ ((quadrant & T.int32(2)) << T.int32(30)))


def sin(name: Names, x: Any) -> Any:
    return _trigonometric(name, x, 0)


def cos(name: Names, x: Any) -> Any:
    return _trigonometric(name, x, 1)


def _small_power(name: Names, x: Any, exponent: float) -> Any | None:
    """x^exponent by products and a square root where that is exact to an ulp or two."""
    if exponent == 0.0:
        return tirx.Broadcast(_f32(1.0), lanes_of(x)) if lanes_of(x) > 1 else _f32(1.0)
    if exponent == 0.5:
        # pow(-0, .5) = +0 and pow(-inf, .5) = inf, unlike sqrt
        x = name(x)
        return select(x == _f32(-math.inf), _f32(math.inf), T.sqrt(x + _f32(0.0)))
    if exponent != int(exponent) or abs(exponent) > 4:
        return None
    x = name(x)
    count = abs(int(exponent))
    square = name(x * x) if count > 1 else x
    result = {1: x, 2: square, 3: square * x, 4: square * square}[count]
    return result if exponent > 0 else _f32(1.0) / result


def power(name: Names, x: Any, y: Any) -> Any:
    """x^y = 2^(y log2 |x|), the exponent in float64 so that the product keeps enough digits; the edges are C99's."""
    if constant_of(y) is not None:
        small = _small_power(name, x, constant_of(y))
        if small is not None:
            return small
    x, y = name(x), name(y)
    magnitude = name(T.fabs(x))
    m, e = _split(name, magnitude)
    wide = name(cast("float64", m))
    s = name((wide - _f64(1.0)) / (wide + _f64(1.0)))
    logarithm = name(s * _horner(name(s * s), LOG2, _f64) + cast("float64", e))
    edge = select(magnitude == _f32(0.0), _f64(-math.inf), select(magnitude < _f32(math.inf), logarithm, cast("float64", magnitude)))
    t = name(cast("float64", y) * edge)
    t = name(select(_f64(-152.0) > t, _f64(-152.0), t))
    t = name(select(_f64(130.0) < t, _f64(130.0), t))
    shifted = name(t + _f64(ROUND64))
    r = name(t - (shifted - _f64(ROUND64)))
    exponent = name(cast("int32", reinterpret("int64", shifted)))
    result = name(_scale(name, cast("float32", _horner(r, EXP2, _f64)), exponent))
    integer = T.floor(y) == y
    odd = tirx.And(integer, T.floor(y * _f32(0.5)) * _f32(2.0) != y)
    negative = _bits(x) < T.int32(0)
    signed = select(tirx.And(negative, odd), reinterpret("float32", _bits(result) | T.int32(-(2**31))), result)
    invalid = tirx.And(tirx.And(x < _f32(0.0), magnitude < _f32(math.inf)), tirx.Not(integer))
    result = name(select(invalid, _f32(math.nan), signed))
    # 1^y and x^0 are 1 even for NaN; (-1)^(+-inf) is 1
    one = tirx.Or(tirx.Or(x == _f32(1.0), y == _f32(0.0)), tirx.And(magnitude == _f32(1.0), T.fabs(y) == _f32(math.inf)))
    return select(one, _f32(1.0), result)
