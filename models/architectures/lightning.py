"""Lightning attention: linear attention with one decay per head, in the block of TransNormerLLM.

TransNormerLLM: A faster and better large language model with improved TransNormer. Z. Qin, D. Li, W. Sun, W. Sun, X. Shen, X. Han, Y. Wei, B. Lv, X. Luo,
Y. Qiao, Y. Zhong. 2023. The chunk-wise form is that of Lightning Attention-2 (Z. Qin, W. Sun, D. Li, X. Shen, W. Sun, Y. Zhong. 2024), and of
Retentive network (Y. Sun, L. Dong, S. Huang, S. Ma, Y. Xia, J. Xue, J. Wang, F. Wei. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import Residual, distances, merge_heads, split_heads


@dataclass(frozen=True)
class Config:
    """form: "parallel" | "chunkwise" | "recurrent"."""

    width: int = 32
    heads: int = 2
    layers: int = 2
    hidden: int = 64
    chunk: int = 8
    form: str = "parallel"


def decay_mask(length: int, slopes: Tensor) -> Tensor:
    """slopes: [H] -> [H, T, T]: lambda^(i - j) for j <= i, else 0; lambda = exp(-slope)."""
    behind = distances(length)
    return torch.where(behind >= 0, torch.exp(-slopes[:, None, None] * behind.clamp(min=0)), 0.0)


def parallel(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """O = ((Q K^T) * M) V. q, k: [B, H, T, d], v: [B, H, T, e], slopes: [H] -> [B, H, T, e]."""
    return (q @ k.transpose(-1, -2) * decay_mask(q.shape[-2], slopes)) @ v


def chunkwise(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, chunk: int) -> Tensor:
    """As `parallel`, with the state of a chunk of C tokens: O = ((Q K^T) * M) V + lambda^(i+1) Q S; S = lambda^C S + (lambda^(C-1-j) K)^T V."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for qc, kc, vc in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        length = qc.shape[-2]
        position = torch.arange(length)[:, None]
        slope = slopes[:, None, None]
        outputs.append(parallel(qc, kc, vc, slopes) + (qc * torch.exp(-slope * (position + 1))) @ state)
        state = torch.exp(-slope * length) * state + (kc * torch.exp(-slope * (length - 1 - position))).transpose(-1, -2) @ vc
    return torch.cat(outputs, 2)


def recurrent(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """As `parallel`, token by token: S_t = lambda S_(t-1) + k_t v_t^T; o_t = q_t^T S_t."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for qt, kt, vt in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        state = torch.exp(-slopes[:, None, None]) * state + kt.unsqueeze(-1) * vt.unsqueeze(-2)
        outputs.append((qt.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 2)


class GatedLinearAttention(nn.Module):
    """norm(decayed attention of silu(q), silu(k), v) * sigmoid gate. x: [B, T, width] -> [B, T, width].

    Head h (from 1) of layer l decays with slope 8 h / H * (1 - l / L): the last layer sees everything.
    """

    slopes: Tensor

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.gate = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm = nn.RMSNorm(config.width, eps=1e-6, elementwise_affine=False)
        heads = torch.arange(1, config.heads + 1, dtype=torch.float32)
        self.register_buffer("slopes", 8 * heads / config.heads * (1 - layer / config.layers))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.config.heads) for part in self.qkv(x).chunk(3, -1))
        q, k = F.silu(q), F.silu(k)
        if self.config.form == "chunkwise":
            y = chunkwise(q, k, v, self.slopes, self.config.chunk)
        else:
            y = {"parallel": parallel, "recurrent": recurrent}[self.config.form](q, k, v, self.slopes)
        return self.out(self.norm(merge_heads(y)) * torch.sigmoid(self.gate(x)))


class SimpleGatedMLP(nn.Module):
    """SGLU, a gated linear unit without activation: W_o(W_v x * W_u x)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.v, self.u, self.out = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.v(x) * self.u(x))


class TransNormer(nn.Module):
    """x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        w = config.width
        self.blocks = nn.Sequential(*(Residual(w, GatedLinearAttention(config, i), SimpleGatedMLP(w, config.hidden)) for i in range(config.layers)))
        self.norm = nn.RMSNorm(w, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))
