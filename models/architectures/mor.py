"""Mixture-of-Recursions: one block, applied again and again to fewer and fewer tokens, which a router picks.

Mixture-of-Recursions: Learning dynamic recursive depths for adaptive token-level computation. S. Bae, Y. Kim, R. Bayat, S. Kim, J. Ha, T. Schuster, A. Fisch,
H. Harutyunyan, Z. Ji, A. Courville, S.-Y. Yun. 2025.

Expert-choice routing: each recursion picks the tokens of the highest scores among those that the recursion before picked. In a form for export: the capacity of
every recursion is a fixed part of the (fixed) length, and picked tokens are marked by a mask instead of gathered. The numbers are those of gathered tokens;
the work that these save is not saved. Ties in the score are all picked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import GatedMLP, distances, merge_heads, split_heads


@dataclass(frozen=True)
class Config:
    """recursions: R; recursion r (from 0) takes ceil((R - r) / R * length) tokens. factor: scale of the router's sigmoid."""

    width: int = 32
    heads: int = 2
    hidden: int = 64
    recursions: int = 3
    factor: float = 0.1


class MaskedBlock(nn.Module):
    """Causal attention among the picked tokens, and a feed-forward network: what is added to x. x: [B, T, width], picked: [B, T] bool."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.norms = nn.ModuleList(nn.RMSNorm(config.width, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp = GatedMLP(config.width, config.hidden)

    def forward(self, x: Tensor, picked: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        behind = distances(x.shape[1])
        # a token that was not picked sees itself: its row must not be empty, and its result is dropped
        mask = (picked[:, None, None, :] & (behind >= 0)) | (behind == 0)
        attended = self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return attended + self.mlp(self.norms[1](x + attended))


class MixtureOfRecursions(nn.Module):
    """x: [B, T, width] -> [B, T, width].

    g = factor * sigmoid(w_r . x); H <- H + g f(H) for the picked tokens, H for the others.
    """

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.config = config
        self.block = MaskedBlock(config)
        self.routers = nn.ModuleList(nn.Linear(config.width, 1, bias=False) for _ in range(config.recursions))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        length, total = x.shape[1], self.config.recursions
        picked = torch.ones_like(x[..., 0]) > 0
        for r, router in enumerate(self.routers):
            score = torch.sigmoid(router(x)).squeeze(-1)
            eligible = torch.where(picked, score, -1.0)
            least = eligible.topk(-(-(total - r) * length // total), -1).values[:, -1:]
            picked = picked & (eligible >= least)
            x = torch.where(picked.unsqueeze(-1), x + (self.config.factor * score).unsqueeze(-1) * self.block(x, picked), x)
        return self.norm(x)
