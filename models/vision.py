"""Image networks from timm with seeded random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .entry import BATCH, Entry, Input
from .fills import photo
from .optional import require, without_torchvision
from .perturb import perturb

if TYPE_CHECKING:
    from torch import nn

#: name in the zoo -> name in timm
_TIMM = {
    "vit-s16": "vit_small_patch16_224",
    "deit-t": "deit_tiny_patch16_224",
    "resnet50": "resnet50",
    "mobilenetv3-l": "mobilenetv3_large_100",
    "efficientformer-l1": "efficientformer_l1",
    "swin-t": "swin_tiny_patch4_window7_224",
}


def timm_network(architecture: str, **options: Any) -> nn.Module:
    """A timm classifier, x: [N, 3, 224, 224] float32 -> logits: [N, 1000]; `options` go to timm (depth=2, num_classes=10, ...)."""
    torch = require("torch")
    with without_torchvision():
        timm = require("timm")
    torch.manual_seed(0)
    return perturb(timm.create_model(architecture, pretrained=False, **options))


def _entry(name: str, architecture: str) -> Entry:
    def build(**options: Any) -> nn.Module:
        return timm_network(architecture, **options)

    image = Input("x", ("batch", 3, 224, 224), photo)
    return Entry(name, "vision", (image,), ("logits",), {"batch": BATCH}, "random", ("torch", "timm"), build=build)


ENTRIES = tuple(_entry(name, architecture) for name, architecture in _TIMM.items())
