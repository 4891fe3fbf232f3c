"""Give a freshly initialised network parameters that a wrong rewrite cannot hide behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .optional import require

if TYPE_CHECKING:
    from torch import nn


def perturb(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw (in place) every normalisation statistic, scale and bias anew, near its usual value.

    Initialisers set biases and means to 0, variances and scales to 1, and residual branches to almost 0: with those a dropped bias, a mis-folded
    batch norm or a whole lost branch would change nothing. Matrices and kernels stay as initialised, so activations stay in range.
    """
    torch = require("torch")
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale: float):
        return torch.randn(tensor.shape, generator=generator) * scale

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if parameter.ndim > 1 and leaf not in ("gamma", "layer_scale"):
                continue
            if leaf.endswith("bias"):
                parameter.copy_(normal(parameter, 0.05))
            elif leaf == "gamma" or "layer_scale" in name or name.rsplit(".", 2)[-2].startswith("ls"):
                parameter.copy_(0.3 + normal(parameter, 0.05).reshape(parameter.shape))
            else:
                parameter.copy_(0.8 + normal(parameter, 0.1))
        for name, buffer in module.named_buffers():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "running_mean":
                buffer.copy_(normal(buffer, 0.1))
            elif leaf == "running_var":
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.8)
    return module
