"""An integer dataflow network: stages that take streams of numbers and give one, with their meaning in numpy.

A stream carries the elements of one tensor in row-major order, images channels-last. `reference` of a stage maps flat int64 arrays to one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import integer


@dataclass(frozen=True)
class Requant:
    """u8 = clip(round(acc * multiplier / 2^shift) + zero, low, high); multiplier: one number, or [N] by channel."""

    multiplier: np.ndarray
    shift: int
    zero: int
    low: int = 0
    high: int = 255

    def __call__(self, acc: np.ndarray) -> np.ndarray:
        return integer.requantise(acc, self.multiplier, self.shift, self.zero, self.low, self.high)


@dataclass(frozen=True)
class Stage:
    """name: a C identifier. inputs: names of the stages it reads, "" for the network's input. source: the model's node, for reports."""

    name: str
    inputs: tuple[str, ...]
    source: str

    @property
    def n_out(self) -> int:
        """Elements that the stage gives for one inference."""
        raise NotImplementedError

    def n_in(self, port: int) -> int:
        """Elements that it takes at a port; as many as it gives, unless a kind of stage says otherwise."""
        return self.n_out

    @property
    def raw(self) -> bool:
        """True when the elements are int32 accumulators instead of u8."""
        return False

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class MatVec(Stage):
    """y[r, n] = requant(bias[n] + sum over k of x[r, k] * weights[n, k]); requant None gives the int32 sums. x: u8, zero points are in the bias.

    pattern: (n, m) when of every m consecutive weights of a row at most n are non-zero and only those are stored, None for dense.
    """

    rows: int
    weights: np.ndarray
    bias: np.ndarray
    requant: Requant | None
    pattern: tuple[int, int] | None = None

    @property
    def k(self) -> int:
        return self.weights.shape[1]

    @property
    def n(self) -> int:
        return self.weights.shape[0]

    @property
    def n_out(self) -> int:
        return self.rows * self.n

    def n_in(self, port: int) -> int:
        return self.rows * self.k

    @property
    def raw(self) -> bool:
        return self.requant is None

    @property
    def slots(self) -> int:
        """Products per output."""
        return self.k if self.pattern is None else self.k // self.pattern[1] * self.pattern[0]

    @property
    def acc_bits(self) -> int:
        """Bits that hold every partial sum in any order."""
        bound = int((np.abs(self.weights.astype(np.int64)).sum(axis=1) * 255 + np.abs(self.bias.astype(np.int64))).max())
        return bound.bit_length() + 1

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        acc = streams[0].reshape(self.rows, self.k) @ self.weights.astype(np.int64).T + self.bias
        return (acc if self.requant is None else self.requant(acc)).ravel()


@dataclass(frozen=True)
class Spatial(Stage):
    """Common to stages over an image [H, W, C]. pads: top, left, bottom, right."""

    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]

    @property
    def out_hw(self) -> tuple[int, int]:
        (kh, kw), (sh, sw), (top, left, bottom, right) = self.kernel, self.stride, self.pads
        return (self.height + top + bottom - kh) // sh + 1, (self.width + left + right - kw) // sw + 1

    def n_in(self, port: int) -> int:
        return self.height * self.width * self.channels

    def windows(self, stream: np.ndarray, fill: int) -> np.ndarray:
        """[Ho, Wo, kh, kw, C]; out of the image there is `fill`."""
        (kh, kw), (sh, sw), (top, left, bottom, right) = self.kernel, self.stride, self.pads
        image = np.pad(stream.reshape(self.height, self.width, self.channels), ((top, bottom), (left, right), (0, 0)), constant_values=fill)
        view = np.lib.stride_tricks.sliding_window_view(image, (kh, kw), axis=(0, 1))
        return view[::sh, ::sw].transpose(0, 1, 3, 4, 2)


@dataclass(frozen=True)
class Window(Spatial):
    """The windows of a convolution, one after the other: [Ho, Wo, kh, kw, C]; `zero` pads."""

    zero: int = 0

    @property
    def n_out(self) -> int:
        height, width = self.out_hw
        return height * width * self.kernel[0] * self.kernel[1] * self.channels

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        return self.windows(streams[0], self.zero).ravel()


@dataclass(frozen=True)
class Pool(Spatial):
    """Maximum over windows (requant None, no padding counts), or requant(sum over a window + bias): an average; it has no padding."""

    requant: Requant | None = None
    bias: int = 0

    @property
    def n_out(self) -> int:
        height, width = self.out_hw
        return height * width * self.channels

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        windows = self.windows(streams[0], 0)
        if self.requant is None:
            return windows.max(axis=(2, 3)).ravel()
        return self.requant(windows.sum(axis=(2, 3)) + self.bias).ravel()


@dataclass(frozen=True)
class Add(Stage):
    """u8 = clip(((a - zero_a) * multiplier_a + (b - zero_b) * multiplier_b) / 2^shift, rounded, + zero, low, high)."""

    count: int
    zeros: tuple[int, int]
    multipliers: tuple[int, int]
    shift: int
    zero: int
    low: int = 0
    high: int = 255

    @property
    def n_out(self) -> int:
        return self.count

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        total = sum((x.astype(np.int64) - z) * m for x, z, m in zip(streams, self.zeros, self.multipliers, strict=True))
        return np.clip(integer.rounded_shift(np.asarray(total), self.shift) + self.zero, self.low, self.high)


@dataclass(frozen=True)
class Table(Stage):
    """u8 = values[x]: any function of one number."""

    count: int
    values: np.ndarray

    @property
    def n_out(self) -> int:
        return self.count

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        return self.values[streams[0]]


@dataclass(frozen=True)
class MatMul(Stage):
    """y[b, m, n] = requant(sum over k of (A[b, m, k] - zeros[0]) * (B[b, n, k] - zeros[1])): both operands are streams, the second is kept whole."""

    batch: int
    m: int
    n: int
    k: int
    zeros: tuple[int, int]
    requant: Requant

    @property
    def n_out(self) -> int:
        return self.batch * self.m * self.n

    def n_in(self, port: int) -> int:
        return self.batch * self.k * (self.n if port else self.m)

    @property
    def acc_bits(self) -> int:
        return (255 * 255 * self.k).bit_length() + 1

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        a = streams[0].reshape(self.batch, self.m, self.k).astype(np.int64) - self.zeros[0]
        b = streams[1].reshape(self.batch, self.n, self.k).astype(np.int64) - self.zeros[1]
        return self.requant(a @ b.transpose(0, 2, 1)).ravel()


@dataclass(frozen=True)
class Softmax(Stage):
    """Over rows of `length`; the result has scale 1/255, zero 0."""

    rows: int
    length: int
    table: np.ndarray

    @property
    def n_out(self) -> int:
        return self.rows * self.length

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        return integer.softmax(streams[0].reshape(self.rows, self.length), self.table).ravel()


@dataclass(frozen=True)
class LayerNorm(Stage):
    """See `integer.layer_norm`. gamma, beta: [D] integers."""

    rows: int
    gamma: np.ndarray
    beta: np.ndarray
    epsilon: int
    shift: int
    zero: int

    @property
    def length(self) -> int:
        return len(self.gamma)

    @property
    def n_out(self) -> int:
        return self.rows * self.length

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        x = streams[0].reshape(self.rows, self.length)
        return integer.layer_norm(x, self.gamma, self.beta, self.epsilon, self.shift, self.zero).ravel()


@dataclass(frozen=True)
class Reorder(Stage):
    """out[i] = x[index[i]]: the tensor is kept whole and read through a table of addresses (transposes, slices)."""

    count: int
    index: np.ndarray

    @property
    def n_out(self) -> int:
        return len(self.index)

    def n_in(self, port: int) -> int:
        return self.count

    def reference(self, *streams: np.ndarray) -> np.ndarray:
        return streams[0][self.index]


@dataclass(frozen=True)
class Port:
    """The network's input or output as the caller sees it. real = scale * (q - zero); scale: one number, or one per last dim of `shape`."""

    name: str
    shape: tuple[int, ...]
    scale: np.ndarray
    zero: int
    raw: bool = False

    def quantise(self, array: np.ndarray) -> np.ndarray:
        """float [shape] -> u8 in stream order."""
        return np.clip(np.rint(array.astype(np.float64) / self.scale) + self.zero, 0, 255).astype(np.int64).ravel()

    def dequantise(self, stream: np.ndarray) -> np.ndarray:
        return ((stream.reshape(self.shape).astype(np.float64) - self.zero) * self.scale).astype(np.float32)


@dataclass(frozen=True)
class Network:
    """Stages in an order in which each comes after what it reads. The last one is the output."""

    name: str
    stages: tuple[Stage, ...]
    input: Port
    output: Port
    notes: tuple[str, ...] = field(default=())

    def run(self, stream: np.ndarray) -> np.ndarray:
        """The integer reference: u8 stream of one inference -> the output's integers, flat."""
        values: dict[str, np.ndarray] = {"": np.asarray(stream, np.int64).ravel()}
        for stage in self.stages:
            values[stage.name] = stage.reference(*(values[name] for name in stage.inputs))
        return values[self.stages[-1].name]

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """float [input.shape] -> float [output.shape] through the integer reference."""
        return self.output.dequantise(self.run(self.input.quantise(array)))
