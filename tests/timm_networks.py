"""Architectures of timm with few layers, small images and seeded random weights: what the torch route is tested on."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from tcompile.models.optional import require, without_torchvision
from tcompile.models.perturb import perturb
from torch_networks import Network


def _timm(architecture: str, size: int = 64, grow: bool = False, **options: Any) -> Network:
    """A classifier of images of `size` x `size`; grow: of any size in a range, else of this one only. architecture: a name, or "module.Class" in timm.models."""

    def build() -> torch.nn.Module:
        with without_torchvision():
            timm = require("timm")
            module, _, name = architecture.rpartition(".")
            make = getattr(importlib.import_module(f"timm.models.{module}"), name) if module else timm.create_model
        torch.manual_seed(0)
        return _settled(perturb(make(*(() if module else (name,)), num_classes=10, **options)).eval(), size)

    if not grow:
        return Network(build, {"x": ("batch", 3, size, size)}, {"batch": (1, 8)}, [{"batch": 2}, {"batch": 1}, {"batch": 5}])
    runs = [
        {"batch": 2, "height": size, "width": size + 32},
        {"batch": 1, "height": 97, "width": size},
        {"batch": 3, "height": 79, "width": 131},
    ]
    return Network(build, {"x": ("batch", 3, "height", "width")}, {"batch": (1, 8), "height": (64, 256), "width": (64, 256)}, runs)


def _settled(module: torch.nn.Module, size: int) -> torch.nn.Module:
    """The module (changed in place), such that its result depends on the image: batch norms have the statistics of random images, and no matrix is all but zero."""
    norms = [part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    images = torch.randn((8, 3, size, size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2 and parameter.std() < 1e-3:
                parameter.normal_(std=0.1)
        momenta = [part.momentum for part in norms]
        for part in norms:
            part.train().momentum = 1.0
        module(images)
        for part, momentum in zip(norms, momenta, strict=True):
            part.eval().momentum = momentum
            part.running_var.clamp_(min=0.01)
    return module


_FOUR = {"depths": (1, 1, 1, 1)}
_VIT = {"img_size": 48, "depth": 2, "embed_dim": 48, "num_heads": 3}
TIMM = {
    "resnet": _timm("resnet18", grow=True, layers=(1, 1, 1, 1), channels=(16, 24, 32, 48)),
    "resnext": _timm("resnext50_32x4d", layers=(1, 1, 1, 1)),
    "seresnet": _timm("seresnet50", layers=(1, 1, 1, 1)),
    "resnetv2": _timm("resnetv2_50", layers=(1, 1, 1, 1)),
    "res2net": _timm("res2net50_26w_4s", layers=(1, 1, 1, 1)),
    "resnest": _timm("resnest14d"),
    "sknet": _timm("skresnet18", layers=(1, 1, 1, 1)),
    "ecaresnet": _timm("ecaresnet26t", layers=(1, 1, 1, 1)),
    "densenet": _timm("densenet121", block_config=(2, 2, 2, 2)),
    "efficientnet": _timm("test_efficientnet"),
    "efficientnet_gn": _timm("test_efficientnet_gn"),
    "efficientnet_evos": _timm("test_efficientnet_evos"),
    "nfnet": _timm("test_nfnet"),
    "byobnet": _timm("test_byobnet"),
    "mobilenetv2": _timm("mobilenetv2_050"),
    "mobilenetv3": _timm("mobilenetv3_small_050"),
    "mobilenetv4": _timm("mobilenetv4_conv_small_035"),
    "mixnet": _timm("mixnet_s"),
    "convnext": _timm("convnext_atto", head_init_scale=1.0, **_FOUR),
    "convnextv2": _timm("convnextv2_atto", head_init_scale=1.0, **_FOUR),
    "regnet": _timm("regnetx_002"),
    "regnety": _timm("regnety_002"),
    "ghostnet": _timm("ghostnet_050"),
    "inceptionnext": _timm("inception_next_atto", **_FOUR),
    "vgg": _timm("vgg11_bn", mlp_ratio=0.05),
    "repvgg": _timm("repvgg_a0"),
    "repvit": _timm("repvit.RepVit", embed_dim=(24, 32), depth=(2, 2)),
    "darknet": _timm("cs3darknet_focus_s"),
    "vovnet": _timm("ese_vovnet19b_slim"),
    "fasternet": _timm("fasternet_t0", depths=(1, 1, 1, 1), feature_dim=64),
    "starnet": _timm("starnet.StarNet", base_dim=16, depths=(1, 1, 1, 1)),
    "mambaout": _timm("mambaout_femto", **_FOUR),
    "convmixer": _timm("convmixer.ConvMixer", dim=32, depth=2),
    "focalnet": _timm("focalnet.FocalNet", embed_dim=24, depths=(1, 1, 1, 1)),
    "mlp_mixer": _timm("mixer_s32_224", img_size=64),
    "resmlp": _timm("resmlp_12_224", img_size=64),
    "vit": _timm("vit_tiny_patch16_224", size=48, **_VIT),
    "deit": _timm("deit_tiny_distilled_patch16_224", size=48, **_VIT),
    "deit3": _timm("deit3_small_patch16_224", size=48, **_VIT),
    "beit": _timm("beit_base_patch16_224", size=48, head_init_scale=1.0, **_VIT),
    "eva02": _timm("eva02_tiny_patch14_224", size=56, img_size=56, depth=2, embed_dim=48, num_heads=3, head_init_scale=1.0),
    "swin": _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    "swinv2": _timm("swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    "swinv2_cr": _timm("swinv2_cr_tiny_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    "pvt": _timm("pvt_v2_b0", **_FOUR),
    "cait": _timm("cait_xxs24_224", img_size=48, depth=2, embed_dim=48, num_heads=3, size=48),
    "xcit": _timm("xcit_nano_12_p16_224", img_size=64, depth=2),
    "twins": _timm("twins.Twins", img_size=64, embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), depths=(2, 2, 1, 1), wss=(7, 7, 7, 7)),
    "tnt": _timm("tnt_s_legacy_patch16_224", img_size=64, depth=2),
    "coat": _timm("coat.CoaT", img_size=64, patch_size=4, embed_dims=(16, 24, 32, 48), serial_depths=(1, 1, 1, 1)),
    "convit": _timm("convit_tiny", img_size=64, depth=2),
    "davit": _timm("davit.DaVit", embed_dims=(24, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(2, 2, 3, 4)),
    "hiera": _timm("hiera.Hiera", img_size=64, embed_dim=24, stages=(1, 1, 1, 1), head_init_scale=1.0),
    "mvitv2": _timm("mvitv2_tiny", img_size=64),
    "nest": _timm("nest.Nest", img_size=64, embed_dims=(24, 32, 48), num_heads=(2, 2, 3), depths=(1, 1, 1)),
    "sequencer": _timm("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(24, 32, 32, 32), hidden_sizes=(8, 12, 12, 12)),
    "vit_relpos": _timm("vit_relpos_small_patch16_224", size=48, **_VIT),
    "vit_sam": _timm("samvit_base_patch16", img_size=64, depth=2, embed_dim=48, num_heads=3),
    "levit": _timm("levit.Levit", img_size=64, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(2, 3)),
    "efficientformer": _timm("efficientformer.EfficientFormer", size=224, embed_dims=(16, 24, 32, 48), depths=(1, 1, 1, 2), num_vit=1),
    "coatnet": _timm("test_coatnet", img_size=64),
    "maxvit": _timm("test_maxvit", img_size=64),
    "mobilevit": _timm("mobilevit_xxs"),
    "mobilevitv2": _timm("mobilevitv2_050"),
    "edgenext": _timm("edgenext.EdgeNeXt", depths=(1, 1, 2, 1)),
    "efficientvit_mit": _timm("efficientvit_b0"),
    "fastvit": _timm("fastvit_t8"),
    "poolformer": _timm("metaformer.MetaFormer", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    "caformer": _timm("caformer_s18"),
    "swiftformer": _timm("swiftformer_xs", layers=(1, 1, 1, 1)),
    "iformer": _timm("iformer_t"),
    "shvit": _timm("shvit.SHViT", embed_dim=(32, 48, 64), partial_dim=(8, 16, 24), depth=(1, 1, 1), types=("i", "s", "s")),
    "botnet": _timm("botnet26t_256", img_size=64),
    "lambdanet": _timm("lambda_resnet26t"),
}
