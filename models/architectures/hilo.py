"""HiLo attention (LITv2): some heads look at detail inside of small windows, the others at the whole picture through averaged windows.

Fast vision transformers with HiLo attention. Z. Pan, J. Cai, B. Zhuang. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """low: how many of the heads attend to averaged windows. window: its side; sides of the map of patches are multiples of it."""

    width: int = 32
    heads: int = 4
    low: int = 2
    window: int = 2
    patch: int = 4
    hidden: int = 64
    layers: int = 2
    classes: int = 10


class HighFrequency(nn.Module):
    """Attention within each window of s x s. x: [B, H, W, C] -> [B, H, W, heads * d]."""

    def __init__(self, width: int, heads: int, d: int, window: int):
        super().__init__()
        self.heads, self.d, self.window = heads, d, window
        self.qkv, self.proj = nn.Linear(width, 3 * heads * d), nn.Linear(heads * d, heads * d)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        s = self.window
        windows = self.qkv(x).reshape(b, h // s, s, w // s, s, 3, self.heads, self.d)
        q, k, v = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, self.heads, s * s, self.d).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).reshape(b, h // s, w // s, self.heads, s, s, self.d)
        return self.proj(y.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, w, self.heads * self.d))


class LowFrequency(nn.Module):
    """Attention of all positions to the averages of the windows. x: [B, H, W, C] -> [B, H, W, heads * d]."""

    def __init__(self, width: int, heads: int, d: int, window: int):
        super().__init__()
        self.heads, self.d, self.window = heads, d, window
        self.q, self.kv, self.proj = nn.Linear(width, heads * d), nn.Linear(width, 2 * heads * d), nn.Linear(heads * d, heads * d)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        q = self.q(x).reshape(b, h * w, self.heads, self.d).transpose(1, 2)
        averages = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window).flatten(2).transpose(1, 2)
        k, v = self.kv(averages).reshape(b, -1, 2, self.heads, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, self.heads * self.d))


class HiLoBlock(nn.Module):
    """x + [Hi(x), Lo(x)], then the feed-forward network, both after layer norms. x: [B, H, W, width] -> [B, H, W, width]."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.width // config.heads
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.high = HighFrequency(config.width, config.heads - config.low, d, config.window)
        self.low = LowFrequency(config.width, config.low, d, config.window)
        self.mlp = nn.Sequential(nn.Linear(config.width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + cat([self.high(y), self.low(y)], -1)
        return x + self.mlp(self.norms[1](x))


class HiLo(nn.Module):
    """[B, 3, H, W] -> [B, classes]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.patches = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.blocks = nn.Sequential(*(HiLoBlock(config) for _ in range(config.layers)))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).permute(0, 2, 3, 1))).mean((1, 2)))
