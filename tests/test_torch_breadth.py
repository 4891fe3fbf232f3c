"""Architectures of timm and transformers through the torch route, held against eager: artifacts of one size, and artifacts with open dims at several."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import tcompile
from tcompile.compiler.compare import ATOL, RTOL, agree

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is needed", allow_module_level=True)

from tcompile.compiler.errors import UnsupportedModel
from timm_networks import TIMM
from torch_networks import exact
from transformers_networks import REFUSED, REFUSED_OPEN, TRANSFORMERS

NETWORKS = {**TIMM, **TRANSFORMERS}
MODES = ("static", "dynamic")
#: (name, mode) -> why it is refused
REASONS = {
    **{(name, mode): reason for name, reason in REFUSED.items() for mode in MODES},
    **{(name, "dynamic"): reason for name, reason in REFUSED_OPEN.items()},
}
#: networks of timm of which artifacts of one size are tested, too: one per kind, as mostly the batch alone is open
STATIC = (
    *("resnet", "resnetv2", "densenet", "efficientnet", "efficientnet_gn", "nfnet", "convnext", "inceptionnext", "convmixer", "mlp_mixer"),
    *("vit", "beit", "swin", "cait", "xcit", "sequencer", "levit", "coatnet", "poolformer", "botnet"),
)
CASES = [
    (name, mode) for name in NETWORKS for mode in MODES if (name, mode) not in REASONS and (mode == "dynamic" or name in {*STATIC, *TRANSFORMERS})
]


def as_close_as_fp32_gets(ours, eager, exact):
    """Whether float64 confirms each row of the last axis within the tolerance and four times the error of PyTorch's own fp32 there.

    Mamba divides the state of each token by its norm: where that is small, rounding the weights once moves the result by more than the tolerance.
    """
    scale = np.abs(exact).max()
    allowed = ATOL + RTOL * np.abs(exact) / scale + 4 * np.abs(eager - exact).max(-1, keepdims=True) / scale
    return ours.dtype == eager.dtype and ours.shape == exact.shape and bool((np.abs(ours - exact) / scale <= allowed).all())


def through_export(name, mode):
    network = NETWORKS[name]
    module = network.build()
    example = tuple(network.example().values())
    with torch.no_grad():
        exported = torch.export.export(module, example, dynamic_shapes=network.dynamic_shapes() if mode == "dynamic" else None, strict=False)
    model = tcompile.compile(exported)
    for run in range(len(network.runs) if mode == "dynamic" else 1):
        inputs = network.example(run)
        with torch.no_grad():
            want = module(*inputs.values()).numpy()
        ours = np.asarray(model(*inputs.values()))
        agreement = agree(ours, want)
        assert agreement.ok or as_close_as_fp32_gets(ours, want, exact(module, inputs)), (network.runs[run], agreement)
        # neither the same everywhere nor for all of a batch, so that a wrong result shows
        scale = np.abs(want).max()
        assert want.std() > 1e-4 * scale
        assert len(want) == 1 or np.abs(want[0] - want[1]).max() > 1e-3 * scale


@pytest.mark.parametrize(
    ("name", "mode"), [("llama", "static"), *(pytest.param(name, "dynamic", marks=pytest.mark.slow) for name in ("llama", "vit"))]
)
def test_few(name, mode):
    through_export(name, mode)


@pytest.mark.networks
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_every_architecture(name, mode):
    through_export(name, mode)


@pytest.mark.networks
@pytest.mark.parametrize(("name", "mode"), REASONS)
def test_refusals_name_what_is_missing(name, mode):
    with pytest.raises(UnsupportedModel, match=REASONS[name, mode]):
        through_export(name, mode)


def test_there_are_enough_of_each_kind():
    assert len(TIMM) >= 40 and len(TRANSFORMERS) - len(REFUSED) >= 40
