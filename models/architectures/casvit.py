"""CAS-ViT: additive attention, the sum of contexts of q and of k in the place of their product; linear in the number of positions.

CAS-ViT: Convolutional additive self-attention vision transformers for efficient mobile applications. T. Zhang, L. Li, Y. Zhou, W. Liu, C. Qian, X. Ji. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import Skip, conv_norm


@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (16, 32)
    classes: int = 10


class SpatialContext(nn.Module):
    """x * sigmoid(one map for all channels). x: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.weights = nn.Sequential(conv_norm(width, width, 3, groups=width), nn.ReLU(), nn.Conv2d(width, 1, 1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class ChannelContext(nn.Module):
    """x * sigmoid(one number for each channel). x: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.weights = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.weights(x.mean((2, 3), keepdim=True)))


class AdditiveAttention(nn.Module):
    """proj(DW(Phi(q) + Phi(k)) * v), Phi = channel context of spatial context. x: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.phi_q, self.phi_k = (nn.Sequential(SpatialContext(width), ChannelContext(width)) for _ in range(2))
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.proj = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, 1)
        return self.proj(self.local(self.phi_q(q) + self.phi_k(k)) * v)


class LocalPerception(nn.Module):
    """Pointwise, depthwise and pointwise convolution. x: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(conv_norm(width, width), conv_norm(width, width, 3, groups=width), nn.GELU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class CASViT(nn.Module):
    """[B, 3, H, W] -> [B, classes]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        width = config.widths[0]
        layers: list[nn.Module] = [conv_norm(3, width // 2, 3, stride=2), nn.ReLU(), conv_norm(width // 2, width, 3, stride=2), nn.ReLU()]
        for wide in config.widths:
            if wide != width:
                layers.append(conv_norm(width, wide, 3, stride=2))
                width = wide
            attention = nn.Sequential(nn.BatchNorm2d(width), AdditiveAttention(width))
            mlp = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))
            layers += [Skip(LocalPerception(width)), Skip(attention), Skip(mlp)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))
