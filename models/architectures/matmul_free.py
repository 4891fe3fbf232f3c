"""MatMul-free language model block: ternary weights everywhere, a gated recurrence for mixing over time.

Scalable MatMul-free language modeling. R.-J. Zhu, Y. Zhang, E. Sifferman, T. Sheaves, Y. Wang, D. Richmond, P. Zhou, J. K. Eshraghian. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import distances


@dataclass(frozen=True)
class Config:
    """form: "chunkwise" | "recurrent"."""

    width: int = 32
    hidden: int = 64
    chunk: int = 8
    layers: int = 1
    form: str = "chunkwise"


class BitLinear(nn.Module):
    """A product with weights of -1, 0 and 1 and 8-bit activations: x -> Q(norm(x)) W^T. x: [..., n] -> [..., m].

    Activations are rounded to 127 steps of the token's largest magnitude, weights to the mean magnitude's multiples -1, 0, 1 (as in BitNet b1.58).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm = nn.RMSNorm(inputs, eps=1e-6)
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        mean = self.weight.abs().mean().clamp(min=1e-5)
        ternary = torch.round(self.weight / mean).clamp(-1, 1)
        return F.linear(torch.round(x / step).clamp(-128, 127), ternary) * (step * mean)


def recurrent(f: Tensor, c: Tensor) -> Tensor:
    """h_t = sigma(f_t) * h_(t-1) + (1 - sigma(f_t)) * c_t. f (before the sigmoid), c: [B, T, d] -> [B, T, d]."""
    state = torch.zeros_like(c[:, 0])
    outputs = []
    for ft, ct in zip(torch.sigmoid(f).unbind(1), c.unbind(1), strict=True):
        state = ft * state + (1 - ft) * ct
        outputs.append(state)
    return torch.stack(outputs, 1)


def chunkwise(f: Tensor, c: Tensor, chunk: int) -> Tensor:
    """As `recurrent`. In a chunk, with F the running sum of log sigma(f): h_r = exp(F_r) h_0 + sum_(j <= r) exp(F_r - F_j) (1 - sigma(f_j)) c_j."""
    state = torch.zeros_like(c[:, :1])
    outputs = []
    for fc, cc in zip(f.split(chunk, 1), c.split(chunk, 1), strict=True):
        total = F.logsigmoid(fc).cumsum(1)
        causal = (distances(fc.shape[1]) >= 0)[:, :, None]
        difference = torch.where(causal, total.unsqueeze(2) - total.unsqueeze(1), 0.0)  # [B, r, j, d]
        weights = torch.where(causal, torch.exp(difference), 0.0)
        hidden = torch.exp(total) * state + (weights * (torch.sigmoid(-fc) * cc).unsqueeze(1)).sum(2)
        outputs.append(hidden)
        state = hidden[:, -1:]
    return torch.cat(outputs, 1)


class MLGRU(nn.Module):
    """The token mixer: a GRU without products of states, so that it is linear in them. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.f, self.c, self.g, self.out = (BitLinear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        f, c = self.f(x), F.silu(self.c(x))
        h = chunkwise(f, c, self.config.chunk) if self.config.form == "chunkwise" else recurrent(f, c)
        return self.out(self.g(x) * torch.sigmoid(h))


class BitGLU(nn.Module):
    """The channel mixer: W_d(silu(W_g x) * W_u x). x: [..., width] -> [..., width]."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate, self.up = BitLinear(config.width, config.hidden), BitLinear(config.width, config.hidden)
        self.down = BitLinear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MatMulFree(nn.Module):
    """x + MLGRU(x), then x + GLU(x), in every layer; the norms are in the BitLinears. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.layers = nn.ModuleList(layer for _ in range(config.layers) for layer in (MLGRU(config), BitGLU(config)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x
