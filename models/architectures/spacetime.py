"""SpaceTime: a state-space model whose matrix is a companion matrix, as a convolution or as a recurrence.

Effectively modeling time series with simple discrete state spaces. M. Zhang, K. K. Saab, M. Poli, T. Dao, K. Goel, C. Re. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import GatedMLP, Residual, distances


@dataclass(frozen=True)
class Config:
    """state: size of the companion matrix of each channel. form: "parallel" | "recurrent"."""

    width: int = 32
    state: int = 5
    layers: int = 1
    hidden: int = 64
    form: str = "parallel"


def companion(a: Tensor) -> Tensor:
    """a: [H, d] -> [H, d, d]: ones below the diagonal, a as last column. a = 0 is a shift register (a filter of d taps)."""
    shift = (distances(a.shape[-1]) == 1).to(a.dtype)
    last = (torch.arange(a.shape[-1]) == a.shape[-1] - 1).to(a.dtype)
    return shift + a.unsqueeze(-1) * last


def kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """[H, T]: C A^t B for t < T, by doubling: [B, AB], then A^2 times that, ..., log2 T products of matrices. a, b, c: [H, d]."""
    power, columns = companion(a), b.unsqueeze(-1)
    while columns.shape[-1] < length:
        columns = torch.cat([columns, power @ columns], -1)
        power = power @ power
    return (c.unsqueeze(-2) @ columns[..., :length]).squeeze(-2)


def parallel(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """y_t = sum_(j <= t) C A^(t-j) B u_j + D u_t as a product with a Toeplitz matrix. u: [B, T, H], a, b, c: [H, n], d: [H] -> [B, T, H]."""
    behind = distances(u.shape[1])
    taps = kernel(a, b, c, u.shape[1])[:, behind.clamp(min=0)]  # [H, T, T]
    toeplitz = torch.where(behind >= 0, taps, 0.0)
    return (toeplitz @ u.permute(2, 1, 0)).permute(2, 1, 0) + d * u


def recurrent(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """As `parallel`: x_t = A x_(t-1) + B u_t; y_t = C x_t + D u_t. A x is a shift and one multiple of a: 2 n operations, not n^2."""
    x = torch.zeros_like(u[:, 0, :, None] * b)
    outputs = []
    for ut in u.unbind(1):
        x = F.pad(x[..., :-1], (1, 0)) + a * x[..., -1:] + b * ut.unsqueeze(-1)
        outputs.append((c * x).sum(-1) + d * ut)
    return torch.stack(outputs, 1)


class CompanionSSM(nn.Module):
    """One companion matrix per channel, then a mixing of the channels. u: [B, T, width] -> [B, T, width].

    The coefficients a are divided by the sum of their magnitudes: no power of A grows.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.a, self.b, self.c = (nn.Parameter(torch.randn(config.width, config.state) * config.state**-0.5) for _ in range(3))
        self.d = nn.Parameter(torch.randn(config.width))
        self.out = nn.Linear(config.width, config.width)

    def forward(self, u: Tensor) -> Tensor:
        a = self.a / self.a.abs().sum(-1, keepdim=True).clamp(min=1e-6)
        form = {"parallel": parallel, "recurrent": recurrent}[self.config.form]
        return self.out(F.gelu(form(u, a, self.b, self.c, self.d)))


class SpaceTime(nn.Module):
    """The encoder: layers of companion state spaces and feed-forward networks. u: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        w = config.width
        self.blocks = nn.Sequential(*(Residual(w, CompanionSSM(config), GatedMLP(w, config.hidden)) for _ in range(config.layers)))

    def forward(self, u: Tensor) -> Tensor:
        return self.blocks(u)
