"""MoE++: a mixture of experts some of which cost nothing: zero, copy and constant experts beside feed-forward ones.

MoE++: Accelerating mixture-of-experts methods with zero-computation experts. P. Jin, B. Zhu, L. Yuan, S. Yan. 2024.

Routing is dense here, for export: every expert runs on every token and a mask of gates, zero but for the chosen, weights them. What is computed is what the
paper computes without a limit of capacity; the work that it saves is not saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import GatedMLP


@dataclass(frozen=True)
class Config:
    """experts: feed-forward ones; constants: constant ones; besides one zero and one copy expert. chosen: experts per token."""

    width: int = 32
    hidden: int = 32
    experts: int = 3
    constants: int = 2
    chosen: int = 2
    layers: int = 2


class ConstantExpert(nn.Module):
    """a_1 x + a_2 v, [a_1, a_2] = softmax(W x). x: [..., width] -> [..., width]."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Linear(width, 2, bias=False)
        self.value = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        share = self.mix(x).softmax(-1)
        return share[..., :1] * x + share[..., 1:] * self.value


class MixtureLayer(nn.Module):
    """x: [..., width], scores of the layer before: [..., N] or None -> (output, scores)."""

    def __init__(self, config: Config, first: bool):
        super().__init__()
        self.chosen = config.chosen
        self.experts = nn.ModuleList(
            [
                *(GatedMLP(config.width, config.hidden) for _ in range(config.experts)),
                *(ConstantExpert(config.width) for _ in range(config.constants)),
                nn.Identity(),  # copy; the zero expert, the last of the N, adds nothing
            ]
        )
        count = len(self.experts) + 1
        self.router = nn.Linear(config.width, count, bias=False)
        self.residual = None if first else nn.Linear(count, count, bias=False)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        # gating residuals: a token's path so far has a say, G(x) = W x + W_g G_before
        scores = self.router(x)
        if self.residual is not None and before is not None:
            scores = scores + self.residual(before)
        best, index = scores.softmax(-1).topk(self.chosen, -1)
        places = torch.arange(scores.shape[-1])
        gates = ((index.unsqueeze(-1) == places) * best.unsqueeze(-1)).sum(-2)
        parts = [expert(x) * gates[..., number : number + 1] for number, expert in enumerate(self.experts)]
        return torch.stack(parts).sum(0), scores


class MoEPlusPlus(nn.Module):
    """Mixture layers with residuals; attention is left out, it is as anywhere. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.layers = nn.ModuleList(MixtureLayer(config, i == 0) for i in range(config.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(config.width, eps=1e-6) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        scores = None
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y, scores = layer(norm(x), scores)
            x = x + y
        return x
