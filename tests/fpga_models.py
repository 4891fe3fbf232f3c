"""Networks of the FPGA tests, as programs and as plans."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tcompile.compiler.api import import_model
from tcompile.compiler.program import Program
from tcompile.compiler.recipe import Recipe
from tcompile.passes.base import PassContext
from tcompile.targets.base import Target
from tcompile.targets.fpga import parts, plan
from tcompile.targets.fpga.calibrate import quantise
from tcompile.targets.fpga.graph import lower_to_nodes
from tcompile.targets.fpga.plan import DataflowPlan

Linear, ReLU = torch.nn.Linear, torch.nn.ReLU


def _mlp() -> torch.nn.Module:
    return torch.nn.Sequential(Linear(16, 64), ReLU(), Linear(64, 32), ReLU(), Linear(32, 32), ReLU(), Linear(32, 5))


def _cnn() -> torch.nn.Module:
    conv = torch.nn.Conv2d
    body = [conv(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), ReLU(), torch.nn.MaxPool2d(3, 2, padding=1), conv(4, 6, 3, stride=2), ReLU()]
    return torch.nn.Sequential(*body, torch.nn.AvgPool2d(2), torch.nn.Flatten(), Linear(6, 10))


def _encoder() -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")


NETWORKS = {"mlp": (_mlp, (1, 16)), "cnn": (_cnn, (1, 1, 11, 11)), "encoder": (_encoder, (1, 6, 16))}


@cache
def module(name: str) -> torch.nn.Module:
    """Seeded weights."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def samples(name: str, count: int = 8) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.standard_normal(NETWORKS[name][1], dtype=np.float32) for _ in range(count)]


@cache
def program(name: str) -> Program:
    imported = import_model(module(name), example_inputs=(torch.from_numpy(samples(name)[0]),))
    for step in Recipe.default().passes:
        imported = step.run(imported, PassContext(Target.parse("fpga")))
    return imported


@cache
def planned(name: str, interval: int | None = None) -> DataflowPlan:
    network, _ = quantise(lower_to_nodes(program(name)), samples(name), name)
    return plan.make(network, parts.part("xcu280"), interval=interval)
