"""Shortcuts of residual blocks in 16 bits: which, where they are rounded, and that nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
import torch


class Block(torch.nn.Module):
    """Two branches of convolutions, added. kept: the shortcut is returned as well; squared: it is multiplied with itself, so that it has two readers."""

    def __init__(self, kept: bool = False, relu: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept, self.relu = kept, relu
        self.stem, self.long, self.short = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.Conv2d(16, 32, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.stem(x))
        short = torch.relu(self.short(x)) if self.relu else self.short(x)
        total = torch.relu(self.long(x) + short)
        return (total, short) if self.kept else total


def compiled(module: torch.nn.Module, target: str, image: torch.Tensor, **options: Any) -> Any:
    return tcompile.compile(module.eval(), example_inputs=(image,), target=target, **options)


def shortcuts(model: Any) -> dict[str, int]:
    return next(step["matches"] for step in model.report()["passes"] if step["name"] == "short_shortcuts")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_branches_of_convolutions_meet_in_16_bits(compression: str, relu: bool) -> None:
    """One kernel writes bfloat16, one reads it; both are products, and the result is as close to float32 as rounding once allows."""
    image, block = torch.randn(1, 3, 13, 11), Block(relu=relu)
    options: dict[str, Any] = {"precision": "bf16"} if compression == "bf16" else {"quantize": "int8", "calibration": [(image,)]}
    model = compiled(block, "cpu:znver4", image, **options)
    assert shortcuts(model) == {"shortcuts": 1}
    kernels = [row for row in model.report()["kernels"] if "conv" in row["workload"]]
    assert len(kernels) == 3 and all(row["template"] != "generic" for row in kernels)
    # conversions alone in a kernel are those of the input
    alone = [row["kernel"] for row in model.report()["kernels"] if "cast" in row["kernel"] and "conv" not in row["workload"]]
    assert len(alone) <= 1, alone
    native = compiled(block, "cpu", image, **options)
    with torch.no_grad():
        want = block(image).numpy()
    np.testing.assert_allclose(native(image.numpy()), want, rtol=0, atol=(0.02 if compression == "bf16" else 0.05) * np.abs(want).max())


@pytest.mark.parametrize(
    ("module", "target", "options"),
    [
        (Block(kept=True), "cpu:znver4", {"precision": "bf16"}),
        (Block(), "cpu:znver4", {}),
        (Block(), "cpu:skylake-avx512", {"precision": "bf16"}),
    ],
    ids=["returned as well", "float32", "no instruction"],
)
def test_others_stay_as_they_are(module: torch.nn.Module, target: str, options: dict[str, Any]) -> None:
    model = compiled(module, target, torch.randn(1, 3, 9, 7), **options)
    assert shortcuts(model) == {}
