"""Odd functions that run into +-1, in vectors of sixteen float32: x times a polynomial in |x|, whose coefficients a permutation takes from registers, by the interval that |x| lies in.

A rational function over the whole range needs twice as many coefficients and a division. Least-squares fits on Chebyshev nodes, weighted by the relative error (Lawson's iteration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import T, tirx

LANES = 16


@dataclass(frozen=True)
class Pieces:
    """f(x) / x = sum over p of coefficients[p][i] * (|x| - i * width)^p where |x| is nearest to i * width; width is a power of two, and f rounds to 1 from (i + 1/2) * width of the last i on."""

    width: float
    coefficients: Sequence[Sequence[float]]

    @property
    def bound(self) -> float:
        return (LANES - 0.5) * self.width

    @property
    def shift(self) -> float:
        """Adding it rounds a float32 to a multiple of `width`, of which the number then stands in the low bits of the sum."""
        return 1.5 * 2**23 * self.width


def table(values: Sequence[float]) -> Any:
    """A vector of constants."""
    return tirx.Shuffle([tirx.FloatImm("float32", value) for value in values], [T.int32(lane) for lane in range(LANES)])


def chosen(values: Sequence[float], places: Any) -> Any:
    """values[place & 15] for a vector of places."""
    permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.sf.512")
    return T.call_llvm_pure_intrin(f"float32x{LANES}", permute, table(values), places)


#: erf: 3 ulp
ERF = Pieces(
    0.25,
    (
        (
            1.12837923, 1.10530555, 1.04099977, 0.948207498, 0.842700779, 0.738320112, 0.644070089, 0.563812375,
            0.497661144, 0.44379434, 0.399837226, 0.363599777, 0.333325982, 0.307690978, 0.28571406, 0.266666651,
        ),
        (
            2.23206882e-07, -0.181162998, -0.324430555, -0.407032371, -0.427592337, -0.401439816, -0.350094497, -0.292022496,
            -0.238497749, -0.194067836, -0.159063607, -0.132004857, -0.111062169, -0.0946651101, -0.0816310123, -0.0711108446,
        ),
        (
            -0.376139522, -0.335346878, -0.229911983, -0.100218304, 0.012483201, 0.0846276656, 0.114463754, 0.114094086,
            0.0985818654, 0.0791103095, 0.0614473782, 0.0474156067, 0.0368815213, 0.0290985536, 0.0233177505, 0.0189620107,
        ),
        (
            0.000257576641, 0.104022853, 0.165925577, 0.168604374, 0.125639006, 0.0664911494, 0.0165237505, -0.0133854635,
            -0.0250061452, -0.0254365765, -0.0212302543, -0.0162520446, -0.012047979, -0.00890717562, -0.00666017365, -0.00506132329,
        ),
        (
            0.111089073, 0.0884894952, 0.0322391614, -0.0246014129, -0.0562826544, -0.0576748066, -0.0404136218, -0.0197042637,
            -0.00471416861, 0.00278839888, 0.00501268031, 0.0047085858, 0.003661111, 0.00265026325, 0.00188294589, 0.00134585286,
        ),
    ),
)  # fmt: skip
