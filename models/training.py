"""Training in under a minute, seeded, and a cache of what was trained."""

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

from .datasets import Split
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

    The version covers this module, the module of `train`, the data set's module and the version of torch.
    """
    torch = require("torch")
    from . import datasets
    from .export import default_cache

    sources = [inspect.getsource(module) for module in (sys.modules[train.__module__], sys.modules[__name__], datasets)]
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
