"""Kimi Delta Attention: the delta rule, with a decay of its own for every channel of the key.

Kimi Linear: An expressive, efficient attention architecture. Kimi Team. 2025. Chunks as in Parallelizing linear transformers with the delta rule over
sequence length (S. Yang, B. Wang, Y. Zhang, Y. Shen, Y. Kim. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import GatedMLP, Residual, ShortConvolution, distances, merge_heads, split_heads


@dataclass(frozen=True)
class Config:
    """rank: width of the low-rank decay and output gates. form: "chunkwise" | "recurrent"."""

    width: int = 32
    heads: int = 2
    rank: int = 8
    taps: int = 4
    chunk: int = 8
    layers: int = 1
    hidden: int = 64
    form: str = "chunkwise"


def inverse_unit_lower(a: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A [..., n, n] by halves: as stable as substitution, and products only.

    inv([[P, 0], [R, Q]]) = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]].
    """
    n = a.shape[-1]
    if n == 1:
        return torch.ones_like(a)
    half = n // 2
    top, bottom = inverse_unit_lower(a[..., :half, :half]), inverse_unit_lower(a[..., half:, half:])
    corner = -(bottom @ a[..., half:, :half] @ top)
    upper = torch.zeros_like(a[..., :half, half:])
    return torch.cat([torch.cat([top, upper], -1), torch.cat([corner, bottom], -1)], -2)


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_(t-1) + beta_t k_t v_t^T; o_t = S_t^T q_t; alpha = exp(log_decay).

    q, k, log_decay: [B, H, T, d], v: [B, H, T, e], beta: [B, H, T] -> [B, H, T, e].
    """
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for qt, kt, vt, gt, bt in zip(q.unbind(2), k.unbind(2), v.unbind(2), log_decay.unbind(2), beta.unbind(2), strict=True):
        state = torch.exp(gt).unsqueeze(-1) * state
        # what the memory holds under k_t is replaced by v_t, to the degree beta_t
        update = bt.unsqueeze(-1) * (vt - (kt.unsqueeze(-2) @ state).squeeze(-2))
        state = state + kt.unsqueeze(-1) * update.unsqueeze(-2)
        outputs.append((qt.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 2)


def chunkwise(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, chunk: int) -> Tensor:
    """As `recurrent`. With G_r the product of the alphas of a chunk up to r, and u_r the update that token r writes under k_r:

    S_r = Diag(G_r) S_0 + sum_(i <= r) Diag(G_r / G_i) k_i u_i^T
    u_r = beta_r (v_r - (G_r k_r)^T S_0 - sum_(i < r) A_ri u_i),  A_ri = k_r^T Diag(G_r / G_i) k_i,  a unit lower triangular system
    o_r = (G_r q_r)^T S_0 + sum_(i <= r) (q_r^T Diag(G_r / G_i) k_i) u_i

    The ratios come from differences of logarithms, pair by pair: 1 / G_i alone would overflow.
    """
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for qc, kc, vc, gc, bc in zip(*(x.split(chunk, 2) for x in (q, k, v, log_decay, beta)), strict=True):
        total = gc.cumsum(2)  # log G
        behind = distances(qc.shape[2])
        difference = total.unsqueeze(3) - total.unsqueeze(2)  # [B, H, r, i, d]
        ratio = torch.where((behind >= 0)[:, :, None], torch.exp(torch.where((behind >= 0)[:, :, None], difference, 0.0)), 0.0)
        decayed = ratio * kc.unsqueeze(2)  # Diag(G_r / G_i) k_i
        keys = (decayed @ kc.unsqueeze(-1)).squeeze(-1)
        queries = (decayed @ qc.unsqueeze(-1)).squeeze(-1)
        system = torch.where(behind > 0, bc.unsqueeze(-1) * keys, 0.0)
        grown = torch.exp(total)
        update = inverse_unit_lower(system) @ (bc.unsqueeze(-1) * (vc - (grown * kc) @ state))
        outputs.append((grown * qc) @ state + queries @ update)
        last = total[:, :, -1:]
        state = torch.exp(last).transpose(-1, -2) * state + (torch.exp(last - total) * kc).transpose(-1, -2) @ update
    return torch.cat(outputs, 2)


class KimiDeltaAttention(nn.Module):
    """x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config):
        super().__init__()
        w, self.config = config.width, config
        self.q, self.k, self.v = (nn.Sequential(nn.Linear(w, w, bias=False), ShortConvolution(w, config.taps)) for _ in range(3))
        self.decay = nn.Sequential(nn.Linear(w, config.rank, bias=False), nn.Linear(config.rank, w))
        self.rate = nn.Parameter(torch.linspace(0.0, 1.0, config.heads))  # the logarithm of each head's rate
        self.beta = nn.Linear(w, config.heads, bias=False)
        self.gate = nn.Sequential(nn.Linear(w, config.rank, bias=False), nn.Linear(config.rank, w))
        self.norm = nn.RMSNorm(w // config.heads, eps=1e-6)
        self.out = nn.Linear(w, w, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.config.heads
        q, k, v = (split_heads(layer(x), heads) for layer in (self.q, self.k, self.v))
        q, k = F.normalize(q, dim=-1) * q.shape[-1] ** -0.5, F.normalize(k, dim=-1)
        log_decay = -torch.exp(self.rate)[:, None, None] * F.softplus(split_heads(self.decay(x), heads))
        beta = torch.sigmoid(self.beta(x)).transpose(1, 2)
        if self.config.form == "chunkwise":
            y = chunkwise(q, k, v, log_decay, beta, self.config.chunk)
        else:
            y = recurrent(q, k, v, log_decay, beta)
        return self.out(merge_heads(self.norm(y)) * torch.sigmoid(self.gate(x)))


class KimiLinear(nn.Module):
    """Layers of Kimi Delta Attention and feed-forward networks. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        w = config.width
        self.blocks = nn.Sequential(*(Residual(w, KimiDeltaAttention(config), GatedMLP(w, config.hidden)) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(w, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))
