"""The FPGA parts that `fpga:NAME` takes, with the resources a plan may use."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...compiler.errors import UsageError


@dataclass(frozen=True)
class Resources:
    """Counts of one design or one part. bram36: blocks of 36 kbit (a half block counts 0.5); lut, ff: six-input tables and flip-flops."""

    dsp: float = 0
    bram36: float = 0
    lut: float = 0
    ff: float = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.dsp + other.dsp, self.bram36 + other.bram36, self.lut + other.lut, self.ff + other.ff)

    def scaled(self, factor: float) -> Resources:
        return Resources(self.dsp * factor, self.bram36 * factor, self.lut * factor, self.ff * factor)

    def over(self, limit: Resources) -> list[str]:
        """Names of the resources of which this needs more than `limit` has."""
        return [name for name, need in asdict(self).items() if need > getattr(limit, name)]

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 1) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Part:
    """vendor: the part number that Vitis HLS takes. yosys: family of `synth_xilinx`. uram: blocks of 288 kbit, which weights cannot use (they have no
    initial content). Counts are those of the vendor's product tables (DS890, DS891, DS180).
    """

    name: str
    vendor: str
    yosys: str
    resources: Resources
    uram: int = 0


PARTS = {
    part.name: part
    for part in (
        Part("xcu280", "xcu280-fsvh2892-2L-e", "xcup", Resources(9024, 2016, 1_303_680, 2_607_360), uram=960),
        Part("xcu250", "xcu250-figd2104-2L-e", "xcup", Resources(12_288, 2688, 1_728_000, 3_456_000), uram=1280),
        Part("xcu50", "xcu50-fsvh2104-2-e", "xcup", Resources(5952, 1344, 872_000, 1_743_000), uram=640),
        Part("xczu9eg", "xczu9eg-ffvb1156-2-e", "xcup", Resources(2520, 912, 274_080, 548_160)),
        Part("xczu7ev", "xczu7ev-ffvc1156-2-e", "xcup", Resources(1728, 312, 230_400, 460_800), uram=96),
        Part("xczu3eg", "xczu3eg-sbva484-1-e", "xcup", Resources(360, 216, 70_560, 141_120)),
        Part("xc7z020", "xc7z020clg400-1", "xc7", Resources(220, 140, 53_200, 106_400)),
        Part("xc7a100t", "xc7a100tcsg324-1", "xc7", Resources(240, 135, 63_400, 126_800)),
        Part("xc7a35t", "xc7a35tcpg236-1", "xc7", Resources(90, 50, 20_800, 41_600)),
        Part("xc7s6", "xc7s6cpga196-1", "xc7", Resources(10, 5, 3750, 7500)),
    )
}
DEFAULT = "xcu280"


def part(name: str) -> Part:
    """The manifest of a part; UsageError lists the names."""
    if name not in PARTS:
        raise UsageError(f"unknown FPGA part 'fpga:{name}': expected one of {', '.join(sorted(PARTS))}")
    return PARTS[name]
