"""What several architectures share: heads, causal masks, short convolutions and the gated feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)


def distances(length: int) -> Tensor:
    """[T, T] int64: how far key j lies before query i, i - j (negative: it lies after)."""
    positions = torch.arange(length)
    return positions[:, None] - positions[None, :]


class GatedMLP(nn.Module):
    """SwiGLU: W_d(silu(W_g x) * W_u x). x: [..., width] -> [..., width]."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, hidden, bias=False),
            nn.Linear(width, hidden, bias=False),
            nn.Linear(hidden, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time, then silu. x: [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.taps = taps
        self.conv = nn.Conv1d(width, width, taps, groups=width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(F.pad(x.transpose(1, 2), (self.taps - 1, 0))).transpose(1, 2))


class Residual(nn.Module):
    """x + layer(norm(x)) for each layer in turn, with RMS norms."""

    def __init__(self, width: int, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class Skip(nn.Module):
    """x + layer(x)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def conv_norm(inputs: int, outputs: int, taps: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm, [B, inputs, H, W] -> [B, outputs, H / stride, W / stride] rounded up."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, taps, stride, taps // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs))
