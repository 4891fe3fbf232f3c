"""Modelled cycles and resources of a stage at a folding. The constants for matrix-vector stages are fitted to yosys counts of library/tc_mvau.sv
(`rtl.corpus` measures them again); those of the other stages are sums over what their loops hold, and no tool has confirmed them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .integer import MULTIPLIER_BITS
from .network import Add, LayerNorm, MatMul, MatVec, Pool, Reorder, Softmax, Spatial, Stage, Table, Window
from .parts import Resources

#: widths and depths of half a block RAM (18 kbit)
_HALF_BLOCKS = ((1, 16384), (2, 8192), (4, 4096), (9, 2048), (18, 1024), (36, 512))
#: memories of at most this many words lie in LUTs
LUT_MEMORY = 64
#: cycles of one integer division and one square root (modelled)
DIVISION, ROOT = 44, 28
#: products and words of one stage side by side: what HLS tools unroll without trouble
MAX_PRODUCTS, MAX_LANES = 256, 64


@dataclass(frozen=True)
class Folding:
    """pe: results side by side, simd: products per result and cycle (stored ones in N:M stages). Stages without products have simd = pe = lanes."""

    pe: int
    simd: int


def divisors(number: int, limit: int = MAX_LANES) -> list[int]:
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def foldings(stage: Stage) -> list[Folding]:
    """Every folding that the stage's dims allow."""
    if isinstance(stage, MatVec):
        return [Folding(pe, simd) for pe in divisors(stage.n) for simd in _simds(stage) if pe * simd <= MAX_PRODUCTS]
    if isinstance(stage, MatMul):
        return [Folding(pe, simd) for pe in divisors(stage.n) for simd in divisors(stage.k) if pe * simd <= MAX_PRODUCTS]
    return [Folding(lanes, lanes) for lanes in divisors(_row(stage))]


def _simds(stage: MatVec) -> list[int]:
    if stage.pattern is None:
        return divisors(stage.k)
    keep, of = stage.pattern
    groups = [groups * keep for groups in divisors(stage.k // of) if groups * of <= MAX_LANES]
    return sorted({*divisors(keep), *groups})


def _row(stage: Stage) -> int:
    """Elements over which the lanes of a stage without products may spread."""
    if isinstance(stage, Spatial):
        return stage.channels
    if isinstance(stage, Softmax):
        return stage.length
    if isinstance(stage, LayerNorm):
        return stage.length
    if isinstance(stage, Reorder):
        return _run_length(stage)
    return stage.n_out


def _run_length(stage: Reorder) -> int:
    """The longest words that move as a whole."""
    size = math.gcd(stage.count, len(stage.index))
    for lanes in sorted(divisors(size), reverse=True):
        words = stage.index.reshape(-1, lanes)
        if (words[:, 0] % lanes == 0).all() and (words - words[:, :1] == range(lanes)).all():
            return lanes
    return 1


def lanes_in(stage: Stage, folding: Folding) -> int:
    """Elements per word at each input."""
    if isinstance(stage, MatVec) and stage.pattern is not None:
        keep, of = stage.pattern
        return max(1, folding.simd // keep) * of
    return folding.simd


def cycles(stage: Stage, folding: Folding) -> int:
    """Clock cycles between two inferences of this stage alone (modelled)."""
    pe, simd = folding.pe, folding.simd
    if isinstance(stage, MatVec):
        return stage.rows * (stage.n // pe) * (stage.slots // simd)
    if isinstance(stage, MatMul):
        return stage.batch * (stage.n * stage.k // simd + stage.m * (stage.n // pe) * (stage.k // simd))
    if isinstance(stage, Window):
        return (stage.n_in(0) + stage.n_out) // pe
    if isinstance(stage, Pool):
        return (stage.n_in(0) + stage.n_out * stage.kernel[0] * stage.kernel[1]) // pe
    if isinstance(stage, Softmax):
        return stage.rows * (3 * stage.length // pe + DIVISION)
    if isinstance(stage, LayerNorm):
        return stage.rows * (2 * stage.length // pe + ROOT + DIVISION)
    if isinstance(stage, Reorder):
        return (stage.count + stage.n_out) // pe
    return stage.n_out // pe


def first_output(stage: Stage, folding: Folding) -> int:
    """Clock cycles from the first input word to the first output word (modelled)."""
    pe, simd = folding.pe, folding.simd
    if isinstance(stage, MatVec):
        return stage.slots // simd + 8
    if isinstance(stage, MatMul):
        return stage.n * stage.k // simd + stage.k // simd + 8
    if isinstance(stage, Spatial):
        return stage.width * stage.channels * max(1, stage.kernel[0] - stage.pads[0]) // pe + 3
    if isinstance(stage, Softmax):
        return 2 * stage.length // pe + DIVISION
    if isinstance(stage, LayerNorm):
        return stage.length // pe + ROOT + DIVISION
    if isinstance(stage, Reorder):
        return stage.count // pe + 2
    return 3


def tail(stage: Stage, folding: Folding) -> int:
    """Clock cycles from the last input word to the last output word (modelled)."""
    pe, simd = folding.pe, folding.simd
    if isinstance(stage, MatVec):
        return (stage.n // pe - 1) * (stage.slots // simd) + 9
    if isinstance(stage, MatMul):
        return (stage.n // pe - 1) * (stage.k // simd) + 9
    if isinstance(stage, Spatial):
        rows = 1 + stage.pads[2] // stage.stride[0]
        return rows * stage.out_hw[1] * stage.kernel[0] * stage.kernel[1] * stage.channels // pe + 3
    if isinstance(stage, Softmax):
        return 2 * stage.length // pe + DIVISION
    if isinstance(stage, LayerNorm):
        return stage.length // pe + ROOT + DIVISION
    if isinstance(stage, Reorder):
        return stage.n_out // pe + 2
    return 3


def memory(width: int, depth: int) -> Resources:
    """A memory of `depth` words of `width` bits."""
    if width <= 0 or depth <= 1:
        return Resources()
    if depth <= LUT_MEMORY:
        return Resources(lut=width * math.ceil(depth / 64))
    halves = min(math.ceil(width / w) * math.ceil(depth / d) for w, d in _HALF_BLOCKS)
    return Resources(bram36=halves / 2)


def fifo(bits: int, depth: int) -> Resources:
    """A first-in first-out buffer; up to 32 words in shift registers."""
    if depth <= 2:
        return Resources(lut=bits / 2 + 4, ff=2 * bits + 3)
    if depth <= 32:
        return Resources(lut=bits + 12, ff=bits + 8)
    return memory(bits, max(depth, LUT_MEMORY + 1)) + Resources(lut=40, ff=bits + 2 * depth.bit_length())


def entry_bits(stage: MatVec) -> int:
    """Bits of a stored weight with the place of its input."""
    return 8 if stage.pattern is None else 8 + (stage.pattern[1] - 1).bit_length()


def resources(stage: Stage, folding: Folding) -> Resources:
    """DSP, block RAM, LUT and FF of a stage (modelled)."""
    pe, simd = folding.pe, folding.simd
    if isinstance(stage, MatVec):
        return matvec_resources(stage, folding)
    if isinstance(stage, MatMul):
        kept = memory(8 * pe * simd, stage.n * stage.k // (pe * simd))
        requant = pe * (1 if stage.acc_bits <= 27 else 2)
        row = memory(8 * simd, stage.k // simd)
        return kept + row + Resources(dsp=pe * simd + requant, lut=150 + 11 * pe * simd + 55 * pe, ff=200 + 18 * pe * simd + 100 * pe)
    if isinstance(stage, Window):
        return _line_buffer(stage, pe) + Resources(dsp=1, lut=250 + 8 * pe, ff=200 + 16 * pe)
    if isinstance(stage, Pool):
        requant = pe if stage.requant is not None else 0
        return _line_buffer(stage, pe) + Resources(dsp=1 + 2 * requant, lut=250 + 30 * pe + 60 * requant, ff=200 + 32 * pe + 80 * requant)
    if isinstance(stage, Add):
        return Resources(dsp=2 * pe, lut=60 + 60 * pe, ff=60 + 110 * pe)
    if isinstance(stage, Table):
        return Resources(bram36=0.5 * math.ceil(pe / 2), lut=40, ff=30 + 16 * pe)
    if isinstance(stage, Softmax):
        return memory(8 * pe, stage.length // pe) + Resources(2 * pe, 0.5 * pe, 1500 + 60 * pe, 2200 + 120 * pe)
    if isinstance(stage, LayerNorm):
        vectors = memory(60 * pe, stage.length // pe) + memory(8 * pe, stage.length // pe)
        return vectors + Resources(dsp=12 + 6 * pe, lut=3000 + 250 * pe, ff=3800 + 300 * pe)
    assert isinstance(stage, Reorder)
    words, reads = stage.count // pe, stage.n_out // pe
    return memory(8 * pe, words) + memory((words - 1).bit_length(), reads) + Resources(lut=60, ff=60 + 8 * pe)


def _line_buffer(stage: Spatial, lanes: int) -> Resources:
    return memory(8 * lanes, stage.kernel[0] * stage.width * stage.channels // lanes)


def matvec_resources(stage: MatVec, folding: Folding) -> Resources:
    """One DSP per product and one (two above 27 bits) per requantised result; weights in block RAM, or in LUTs when there are few words.

    LUT and FF: least squares over the points of `measure.CONFIGS` (xcup); there DSP and block RAM are equal, FF within 5 %, LUT within 26 %. Synthesis finds three
    quarters of a constant table's LUTs unneeded; sums of more than two products are compressed in LUTs before they are carried.
    """
    pe, simd = folding.pe, folding.simd
    folds, steps = stage.n // pe, stage.slots // simd
    lanes = lanes_in(stage, folding)
    weights = memory(pe * simd * entry_bits(stage), folds * steps)
    others = memory(pe * stage.acc_bits, folds) + (Resources() if stage.raw else memory(pe * MULTIPLIER_BITS, folds))
    tables = weights + others + memory(8 * lanes, stage.k // lanes)
    requant = 0 if stage.raw else pe * (1 if stage.acc_bits <= 27 else 2)
    choices = 0 if stage.pattern is None else stage.pattern[1] - 1
    lut = 0.29 * tables.lut + 74 + pe * simd * (26 + 2.1 * choices) + 1.15 * pe * max(0, simd - 2) * stage.acc_bits + 42 * lanes
    ff = 79 + 73 * pe + 26 * pe * simd + 30 * lanes + (1.1 * pe * simd * entry_bits(stage) if folds * steps <= LUT_MEMORY else 0)
    return Resources(dsp=pe * simd + requant, bram36=tables.bram36, lut=lut, ff=ff)
