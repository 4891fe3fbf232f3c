"""mLSTM: the LSTM with a matrix for its memory and exponential gates, in stabilised form.

xLSTM: Extended long short-term memory. M. Beck, K. Poeppel, M. Spanring, A. Auer, O. Prudnikova, M. Kopp, G. Klambauer, J. Brandstetter, S. Hochreiter. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import Residual, ShortConvolution, distances, merge_heads, split_heads


@dataclass(frozen=True)
class Config:
    """form: "parallel" | "chunkwise" | "recurrent"."""

    width: int = 32
    heads: int = 2
    expansion: int = 2
    taps: int = 4
    chunk: int = 8
    layers: int = 1
    form: str = "parallel"


def recurrent(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """The state is C, n scaled by exp(-m), so that no gate overflows:

    m_t = max(log f_t + m_(t-1), i_t);  C_t = f' C_(t-1) + i' k_t v_t^T;  n_t = f' n_(t-1) + i' k_t;  f' = exp(log f_t + m_(t-1) - m_t),  i' = exp(i_t - m_t)
    h_t = C_t^T q_t / max(|n_t . q_t|, exp(-m_t))

    q (scaled by d^-1/2), k: [B, H, T, d], v: [B, H, T, e], i, f: [B, H, T] before exp and sigmoid -> [B, H, T, e].
    """
    memory = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    norm = q.new_zeros(*q.shape[:2], q.shape[-1], 1)
    top = q.new_zeros(*q.shape[:2])
    outputs = []
    for qt, kt, vt, it, ft in zip(q.unbind(2), k.unbind(2), v.unbind(2), i.unbind(2), F.logsigmoid(f).unbind(2), strict=True):
        before, top = top, torch.maximum(ft + top, it)
        keep, write = torch.exp(ft + before - top)[..., None, None], torch.exp(it - top)[..., None, None]
        memory = keep * memory + write * kt.unsqueeze(-1) * vt.unsqueeze(-2)
        norm = keep * norm + write * kt.unsqueeze(-1)
        row = qt.unsqueeze(-2)
        outputs.append(((row @ memory) / torch.maximum((row @ norm).abs(), torch.exp(-top)[..., None, None])).squeeze(-2))
    return torch.stack(outputs, 2)


def parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """As `recurrent`, all tokens at once: D_rj = exp(F_r - F_j + i_j - m_r) for j <= r, with F the running sum of log f, m_r the row's maximum."""
    total = F.logsigmoid(f).cumsum(-1)
    gates = torch.where(distances(q.shape[2]) >= 0, total.unsqueeze(-1) - total.unsqueeze(-2) + i.unsqueeze(-2), float("-inf"))
    top = gates.amax(-1, keepdim=True)
    weights = (q @ k.transpose(-1, -2)) * torch.exp(gates - top)
    return weights @ v / torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-top))


def chunkwise(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, chunk: int) -> Tensor:
    """As `recurrent`: inside of a chunk as `parallel`, between chunks through the state."""
    memory = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1] + 1)  # [C, n]
    top = q.new_zeros(*q.shape[:2], 1)
    outputs = []
    for qc, kc, vc, ic, fc in zip(*(x.split(chunk, 2) for x in (q, k, v, i, F.logsigmoid(f))), strict=True):
        total = fc.cumsum(-1)
        extended = torch.cat([vc, torch.ones_like(vc[..., :1])], -1)
        gates = torch.where(distances(qc.shape[2]) >= 0, total.unsqueeze(-1) - total.unsqueeze(-2) + ic.unsqueeze(-2), float("-inf"))
        carried = (total + top).unsqueeze(-1)
        row = torch.maximum(gates.amax(-1, keepdim=True), carried)
        weights = (qc @ kc.transpose(-1, -2)) * torch.exp(gates - row)
        sums = weights @ extended + torch.exp(carried - row) * (qc @ memory)
        outputs.append(sums[..., :-1] / torch.maximum(sums[..., -1:].abs(), torch.exp(-row)))
        # the state after the chunk, under a new maximum
        last = total[..., -1:]
        write = last - total + ic
        before, top = top, torch.maximum(last + top, write.amax(-1, keepdim=True))
        memory = torch.exp(last + before - top).unsqueeze(-1) * memory
        memory = memory + (torch.exp(write - top).unsqueeze(-1) * kc).transpose(-1, -2) @ extended
    return torch.cat(outputs, 2)


class MLSTMLayer(nn.Module):
    """The block around the cell: expand, convolve, cell, norm per head, skip, gate, contract. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config):
        super().__init__()
        inner, self.config = config.width * config.expansion, config
        self.up = nn.Linear(config.width, 2 * inner, bias=False)
        self.conv = ShortConvolution(inner, config.taps)
        self.q, self.k, self.v = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.gates = nn.Linear(inner, 2 * config.heads)
        self.norm = nn.LayerNorm(inner // config.heads, bias=False)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, config.width, bias=False)
        with torch.no_grad():  # forget gates start open
            self.gates.bias[config.heads :] += torch.linspace(3.0, 6.0, config.heads)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.config.heads
        cell, gate = self.up(x).chunk(2, -1)
        mixed = self.conv(cell)
        q, k, v = split_heads(self.q(mixed), heads), split_heads(self.k(mixed), heads), split_heads(self.v(cell), heads)
        i, f = self.gates(mixed).transpose(1, 2).chunk(2, 1)
        q = q * q.shape[-1] ** -0.5
        if self.config.form == "chunkwise":
            y = chunkwise(q, k, v, i, f, self.config.chunk)
        else:
            y = {"parallel": parallel, "recurrent": recurrent}[self.config.form](q, k, v, i, f)
        return self.down((merge_heads(self.norm(y)) + self.skip * mixed) * F.silu(gate))


class MLSTM(nn.Module):
    """x: [B, T, width] -> [B, T, width]."""

    def __init__(self, config: Config = Config()):
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(config.width, MLSTMLayer(config)) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))
