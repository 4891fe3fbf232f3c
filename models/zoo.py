"""The registry of networks: `ZOO["bert-base"].onnx_path()`, `ZOO["resnet50"].torch_module()`."""

from __future__ import annotations

from . import mnist, packaged, text, vision
from .entry import Entry

ZOO: dict[str, Entry] = {entry.name: entry for entry in (*packaged.ENTRIES, *text.ENTRIES, *vision.ENTRIES, *mnist.ENTRIES)}
