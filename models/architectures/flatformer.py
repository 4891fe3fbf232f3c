"""FlatFormer: attention among points in groups of equal size, cut from a list sorted by windows, instead of in windows of unequal size.

FlatFormer: Flattened window attention for efficient point cloud transformer. Z. Liu, X. Yang, H. Tang, S. Yang, S. Han. 2023.

The number of points is fixed and a multiple of the group's size (a scene is padded to it); the order depends on the data, by a sort and a gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import merge_heads, split_heads


@dataclass(frozen=True)
class Config:
    """window: side of a window; extent: coordinates lie within -extent .. extent (outside of it they only sort less well). group: points per group."""

    channels: int = 4
    width: int = 32
    heads: int = 2
    hidden: int = 64
    window: float = 0.75
    extent: float = 8.0
    group: int = 8
    layers: int = 2


def order(coordinates: Tensor, window: float, extent: float, axis: int, shifted: bool) -> Tensor:
    """The permutation that sorts points by window, then by place within it, `axis` first. coordinates: [B, P, 2] -> [B, P] int64.

    Every other layer shifts the windows by half of one, so that the groups of the next layer mix those of this.
    """
    scaled = (coordinates + extent + (window / 2 if shifted else 0.0)) / window
    cell = torch.floor(scaled)
    inner = scaled - cell
    first, second = cell[..., axis], cell[..., 1 - axis]
    across = float(int(2 * extent / window) + 2)
    # the key's integer part is the window; the place within it is the fraction: 32 rows of 32 columns
    rows, columns = torch.floor(inner[..., axis] * 32), torch.floor(inner[..., 1 - axis] * 32)
    key = (first * across + second) * 1024 + rows * 32 + columns
    # points of one place keep their order: no two keys are the same, so that any sort is a stable one
    count = key.shape[-1]
    return torch.sort(key.to(torch.int64) * count + torch.arange(count), dim=-1).indices


class FlattenedWindowAttention(nn.Module):
    """A pre-norm transformer layer in groups. x: [B, P, width], permutation: [B, P] -> [B, P, width]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.mlp = nn.Sequential(nn.Linear(config.width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width))

    def forward(self, x: Tensor, permutation: Tensor) -> Tensor:
        places = permutation.unsqueeze(-1).expand(-1, -1, self.config.width)
        sorted_points = x.gather(1, places)
        groups = self.norms[0](sorted_points).reshape(-1, self.config.group, self.config.width)
        q, k, v = (split_heads(part, self.config.heads) for part in self.qkv(groups).chunk(3, -1))
        y = sorted_points + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v))).reshape(x.shape)
        y = y + self.mlp(self.norms[1](y))
        # back to the order of the input: the inverse permutation is what sorts the permutation
        back = torch.sort(permutation, dim=-1).indices
        return y.gather(1, back.unsqueeze(-1).expand(-1, -1, self.config.width))


class FlatFormer(nn.Module):
    """points: [B, P, channels], the first two of which are the coordinates -> [B, P, width]. Layers alternate in the axis, pairs of them in the shift."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.channels, config.width)
        self.layers = nn.ModuleList(FlattenedWindowAttention(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, points: Tensor) -> Tensor:
        x = self.embed(points)
        for i, layer in enumerate(self.layers):
            x = layer(x, order(points[..., :2], self.config.window, self.config.extent, i % 2, i // 2 % 2 == 1))
        return self.norm(x)
