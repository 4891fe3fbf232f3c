"""EfficientViT: one attention between feed-forward networks, whose heads see parts of the channels, each with the result of the head before.

EfficientViT: Memory efficient vision transformer with cascaded group attention. X. Liu, H. Peng, N. Zheng, Y. Yang, H. Hu, Y. Yuan. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import Skip, conv_norm


@dataclass(frozen=True)
class Config:
    """widths, heads: of each stage; a stage has half the resolution of the one before. key: channels of q and k per head. resolution: of the image."""

    widths: tuple[int, ...] = (16, 32)
    heads: tuple[int, ...] = (2, 4)
    key: int = 8
    resolution: int = 32
    classes: int = 10


class CascadedGroupAttention(nn.Module):
    """x: [B, C, H, W] -> [B, C, H, W].

    X'_h = X_h + O_(h-1); O_h = softmax(q k^T / sqrt(d) + b) v with q, k, v from X'_h, q through a depthwise convolution; proj(relu([O_1 .. O_H])).
    b: a learned bias by |difference| of the positions.
    """

    index: Tensor

    def __init__(self, width: int, heads: int, key: int, resolution: int):
        super().__init__()
        self.part, self.key, self.heads = width // heads, key, heads
        self.qkv = nn.ModuleList(conv_norm(self.part, 2 * key + self.part) for _ in range(heads))
        self.local = nn.ModuleList(conv_norm(key, key, 3, groups=key) for _ in range(heads))
        self.proj = nn.Sequential(nn.ReLU(), conv_norm(width, width))
        place = torch.arange(resolution)
        rows = (place[:, None] - place[None, :]).abs()
        index = rows[:, None, :, None] * resolution + rows[None, :, None, :]
        self.register_buffer("index", index.reshape(resolution**2, resolution**2))
        self.bias = nn.Parameter(torch.randn(heads, resolution**2))

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for head, (part, qkv, local) in enumerate(zip(x.chunk(self.heads, 1), self.qkv, self.local, strict=True)):
            q, k, v = qkv(part + outputs[-1] if outputs else part).split([self.key, self.key, self.part], 1)
            q, k, v = (value.flatten(2).transpose(1, 2).unsqueeze(1) for value in (local(q), k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[head][self.index])
            outputs.append(y.squeeze(1).transpose(1, 2).reshape(part.shape))
        return self.proj(torch.cat(outputs, 1))


def _mixer(width: int) -> list[nn.Module]:
    """Depthwise token interaction, then a feed-forward network."""
    feed_forward = nn.Sequential(conv_norm(width, 2 * width), nn.ReLU(), conv_norm(2 * width, width))
    return [Skip(conv_norm(width, width, 3, groups=width)), Skip(feed_forward)]


class EfficientViT(nn.Module):
    """Overlapping patches of 4 x 4, then in each stage the sandwich: mixers, one attention, mixers. [B, 3, R, R] -> [B, classes]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        width, side = config.widths[0], config.resolution // 4
        layers: list[nn.Module] = [conv_norm(3, width // 2, 3, stride=2), nn.ReLU(), conv_norm(width // 2, width, 3, stride=2)]
        for stage, (wide, heads) in enumerate(zip(config.widths, config.heads, strict=True)):
            if stage:
                layers.append(conv_norm(width, wide, 3, stride=2))
                width, side = wide, (side + 1) // 2
            layers += [*_mixer(width), Skip(CascadedGroupAttention(width, heads, config.key, side)), *_mixer(width)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))
