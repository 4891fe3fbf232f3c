"""Convolutions that run as conv2d on our kernels (over one and three axes, and transposed ones), max-pools over three axes, and onnxruntime: processor time, float32, one thread.

python benchmarks/convolutions.py [NAME ...] [--rounds 60]     layers whose names contain a NAME; prints a Markdown table

The two take turns within one process; a ReLU follows every layer, as most have one. Inputs and outputs are channels first, so ours count their transposition.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import tcompile
import torch
from tcompile.compiler.peers import prepare
from tcompile.compiler.timing import interleaved
from torch import nn

#: name: (layer, shape of its input)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "transposed 4x4/2 64-32@28": (nn.ConvTranspose2d(64, 32, 4, 2, 1), (1, 64, 28, 28)),
    "transposed 3x3/2 64-32@14": (nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), (1, 64, 14, 14)),
    "transposed 3x3/2 64-64@28": (nn.ConvTranspose2d(64, 64, 3, 2, 1, 1), (1, 64, 28, 28)),
    "transposed 2x2/2 64-32@28": (nn.ConvTranspose2d(64, 32, 2, 2), (1, 64, 28, 28)),
    "transposed depthwise 4x4/2 64@28": (nn.ConvTranspose2d(64, 64, 4, 2, 1, groups=64), (1, 64, 28, 28)),
    "transposed 16/8 64-32@100": (nn.ConvTranspose1d(64, 32, 16, 8, 4), (1, 64, 100)),
    "video stem 3x7x7 3-64@8x112": (nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3)), (1, 3, 8, 112, 112)),
    "video 3x3x3 64-64@8x28": (nn.Conv3d(64, 64, 3, 1, 1), (1, 64, 8, 28, 28)),
    "video 3x1x1 64-64@8x28": (nn.Conv3d(64, 64, (3, 1, 1), 1, (1, 0, 0)), (1, 64, 8, 28, 28)),
    "video depthwise 3x3x3 64@8x28": (nn.Conv3d(64, 64, 3, 1, 1, groups=64), (1, 64, 8, 28, 28)),
    "video 4 groups 3x3x3 64-64@8x28": (nn.Conv3d(64, 64, 3, 1, 1, groups=4), (1, 64, 8, 28, 28)),
    "video max-pool 3x3x3/2 64@8x28": (nn.MaxPool3d(3, 2, 1), (1, 64, 8, 28, 28)),
    "one axis 5 64-64@400": (nn.Conv1d(64, 64, 5, 1, 2), (1, 64, 400)),
}


def row(name: str, rounds: int) -> str:
    layer, shape = LAYERS[name]
    net, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(shape)
    ours = tcompile.compile(net, example_inputs=(x,), threads=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        torch.onnx.export(net, (x,), str(path), input_names=["x"], dynamo=False)
        peer = prepare("onnxruntime", path, {"x": x.numpy()}, 1)
        got, want = np.asarray(ours(x.numpy())), peer()[0]
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
        found = interleaved({"ours": lambda: ours(x.numpy()), "peer": peer}, rounds=rounds, clock=time.process_time)
        times = {label: timing.median * 1e6 for label, timing in found.items()}
    return f"| {name} | {times['ours']:.0f} | {times['peer']:.0f} | {times['peer'] / times['ours']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of layers")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| median us | ours | onnxruntime | onnxruntime / ours |\n|---|---|---|---|")
    for name in LAYERS:
        if not options.names or any(text in name for text in options.names):
            print(row(name, options.rounds), flush=True)


if __name__ == "__main__":
    main()
