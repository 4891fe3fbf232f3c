"""The registry of architectures: `ARCHITECTURES["kda"].build(form="recurrent")`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..optional import require
from ..perturb import perturb

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """One architecture: the module of this package and the class in it, and what the network takes.

    shape: of the input, float32; "batch" is dynamic, and "length" is, in the forms of `any_length` (in others a loop over time is unrolled by the export).
    forms: values of the configuration's `form`, that compute the same; () without such a choice.
    """

    name: str
    network: str
    shape: tuple[int | str, ...]
    forms: tuple[str, ...] = ()
    any_length: tuple[str | None, ...] = ()

    def config(self, **options: Any) -> Any:
        """The default configuration, which is small, with some fields changed."""
        require("torch")
        return importlib.import_module(f".{self.name}", __package__).Config(**options)

    def build(self, seed: int = 0, **options: Any) -> nn.Module:
        """The network in eval mode with seeded weights; options are fields of its Config. ToolchainError without torch."""
        torch = require("torch")
        config = self.config(**options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = getattr(importlib.import_module(f".{self.name}", __package__), self.network)(config)
        return perturb(network, seed).eval()

    def example(self, seed: int = 0, **sizes: int) -> Tensor:
        """A seeded normal input, e.g. `example(batch=2, length=13)`."""
        torch = require("torch")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn([sizes[dim] if isinstance(dim, str) else dim for dim in self.shape], generator=generator)


_SEQUENCE = ("batch", "length", 32)
_IMAGE = ("batch", 3, 32, 32)
_THREE = ("parallel", "chunkwise", "recurrent")

ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture("based", "Based", _SEQUENCE, _THREE, ("parallel",)),
        Architecture("lightning", "TransNormer", _SEQUENCE, _THREE, ("parallel",)),
        Architecture("kda", "KimiLinear", _SEQUENCE, ("chunkwise", "recurrent")),
        Architecture("mlstm", "MLSTM", _SEQUENCE, _THREE, ("parallel",)),
        Architecture("matmul_free", "MatMulFree", _SEQUENCE, ("chunkwise", "recurrent")),
        Architecture("spacetime", "SpaceTime", _SEQUENCE, ("parallel", "recurrent")),
        Architecture("moe_plus_plus", "MoEPlusPlus", _SEQUENCE, any_length=(None,)),
        Architecture("mor", "MixtureOfRecursions", _SEQUENCE),
        Architecture("efficientvit", "EfficientViT", _IMAGE),
        Architecture("hilo", "HiLo", _IMAGE),
        Architecture("casvit", "CASViT", _IMAGE),
        Architecture("flatformer", "FlatFormer", ("batch", 24, 4)),
    )
}
