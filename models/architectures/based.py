"""BASED: linear attention by the second-order Taylor series of exp, beside softmax attention in a sliding window.

Simple linear attention language models balance the recall-throughput tradeoff. S. Arora, S. Eyuboglu, M. Zhang, A. Timalsina, S. Alberti, D. Zinsley,
J. Zou, A. Rudra, C. Re. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import GatedMLP, Residual, distances, merge_heads, split_heads


@dataclass(frozen=True)
class Config:
    """features: width of q and k per head before the feature map. form: "parallel" | "chunkwise" | "recurrent"."""

    width: int = 32
    heads: int = 2
    features: int = 6
    window: int = 5
    chunk: int = 8
    layers: int = 1
    hidden: int = 64
    form: str = "parallel"


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = [1, x / d^(1/4), vec(x x^T) / sqrt(2 d)], so that phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d). [..., d] -> [..., 1 + d + d^2]."""
    d = x.shape[-1]
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2 * d)
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, square], -1)


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k: [B, H, T, d], v: [B, H, T, e] -> [B, H, T, e]. The features are never formed: their products have a closed form."""
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = torch.where(distances(q.shape[-2]) >= 0, 1 + s + s * s / 2, 0.0)
    return weights @ v / weights.sum(-1, keepdim=True)


def chunkwise(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """As `parallel`, in chunks with a state between them: S += phi(K)^T [V, 1]; the column of ones carries the denominator."""
    state = q.new_zeros(*q.shape[:2], 1 + q.shape[-1] + q.shape[-1] ** 2, v.shape[-1] + 1)
    outputs = []
    for qc, kc, vc in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        s = qc @ kc.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = torch.where(distances(qc.shape[-2]) >= 0, 1 + s + s * s / 2, 0.0)
        extended = torch.cat([vc, torch.ones_like(vc[..., :1])], -1)
        total = weights @ extended + feature_map(qc) @ state
        outputs.append(total[..., :-1] / total[..., -1:])
        state = state + feature_map(kc).transpose(-1, -2) @ extended
    return torch.cat(outputs, 2)


def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `parallel`, token by token: S_t = S_(t-1) + phi(k_t) [v_t, 1]^T; [o_t, z_t] = phi(q_t)^T S_t; o_t / z_t."""
    state = q.new_zeros(*q.shape[:2], 1 + q.shape[-1] + q.shape[-1] ** 2, v.shape[-1] + 1)
    outputs = []
    for qt, kt, vt in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        extended = torch.cat([vt, torch.ones_like(vt[..., :1])], -1)
        state = state + feature_map(kt).unsqueeze(-1) * extended.unsqueeze(-2)
        total = (feature_map(qt).unsqueeze(-2) @ state).squeeze(-2)
        outputs.append(total[..., :-1] / total[..., -1:])
    return torch.stack(outputs, 2)


class TaylorAttention(nn.Module):
    """Linear attention. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.width, config.heads * config.features, bias=False)
        self.k = nn.Linear(config.width, config.heads * config.features, bias=False)
        self.v = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x), self.config.heads) for layer in (self.q, self.k, self.v))
        if self.config.form == "chunkwise":
            y = chunkwise(q, k, v, self.config.chunk)
        else:
            y = {"parallel": parallel, "recurrent": recurrent}[self.config.form](q, k, v)
        return self.out(merge_heads(y))


class WindowAttention(nn.Module):
    """Softmax attention to the last `window` tokens, the own one included. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.config.heads) for part in self.qkv(x).chunk(3, -1))
        behind = distances(x.shape[1])
        mask = (behind >= 0) & (behind < self.config.window)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class Based(nn.Module):
    """Layers of Taylor attention, window attention and their feed-forward networks. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        w, h = config.width, config.hidden
        self.blocks = nn.Sequential(
            *(Residual(w, TaylorAttention(config), GatedMLP(w, h), WindowAttention(config), GatedMLP(w, h)) for _ in range(config.layers))
        )
        self.norm = nn.RMSNorm(w, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))
