"""The memory plan: tensors that are alive together never overlap, and real networks take little more than what is alive at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tcompile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.cli.main import main as command
from tcompile.compiler.workspace import Lifetime, aligned, plan
from tcompile.models import text
from tcompile.models.zoo import ZOO

lifetimes = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=25)


@settings(deadline=None)
@given(lifetimes, st.sampled_from([64, 256]))
def test_tensors_alive_together_never_overlap(entries, alignment):
    lives = {key: Lifetime(size, first, first + length) for key, (size, first, length) in enumerate(entries)}
    found = plan(lives, alignment)
    for a, one in lives.items():
        assert found.offsets[a] % alignment == 0 and found.offsets[a] + one.size_bytes <= found.size_bytes
        for b, other in lives.items():
            if a < b and one.first <= other.last and other.first <= one.last:
                assert found.offsets[a] + one.size_bytes <= found.offsets[b] or found.offsets[b] + other.size_bytes <= found.offsets[a]
    alive = [sum(aligned(one.size_bytes, alignment) for one in lives.values() if one.first <= step <= one.last) for step in range(27)]
    assert found.lower_bound_bytes == max(alive) <= found.size_bytes <= found.unshared_bytes


def test_known_plans():
    """Two large tensors that never meet share their place, the small one that meets both lies behind them."""
    found = plan({0: Lifetime(1000, 0, 1), 1: Lifetime(100, 1, 2), 2: Lifetime(900, 2, 3)}, 64)
    assert found.offsets == {0: 0, 1: 1024, 2: 0}
    assert found.report() == {"workspace_bytes": 1152, "lower_bound_bytes": 1152, "unshared_bytes": 2112}
    assert plan({}, 64).report() == dict.fromkeys(found.report(), 0)


class Chain(torch.nn.Module):
    """Views and tensors of many sizes that are read again long after they were made."""

    def forward(self, x):
        y = torch.softmax(x @ x.transpose(-1, -2), -1)
        z = y.reshape(-1, 2, y.shape[-1] // 2).flip(1)
        w = (y @ x).cumsum(-1)
        u = torch.cat([w, x], -1).sort(-1).values
        return (z.reshape(y.shape) @ w).cumsum(0), u[..., : w.shape[-1]] * w, z


@pytest.mark.parametrize("sizes", [(1, 2, 1), (3, 6, 17)])
def test_numbers_with_tensors_side_by_side(sizes):
    module, x = Chain().eval(), torch.randn(*sizes, generator=torch.Generator().manual_seed(0))
    model = tcompile.compile(module, example_inputs=(x,))
    for _ in range(2):
        for have, want in zip(model(x), module(x), strict=True):
            np.testing.assert_allclose(have, want.numpy(), rtol=1e-4, atol=1e-5)


def test_results_outlive_the_next_call():
    """Outputs lie in memory of their own."""
    model = tcompile.compile(Chain().eval(), example_inputs=(torch.ones(2, 4, 3),))
    first = model(torch.ones(2, 4, 3))
    before = [np.array(value) for value in first]
    model(torch.zeros(2, 4, 3))
    for now, then in zip(first, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_report_and_command_line(tmp_path, capsys):
    model = tcompile.compile(text.bert(layers=2, hidden=48, heads=3, vocabulary=64).eval(), example_inputs=(torch.ones(1, 7, dtype=torch.int64),) * 2)
    memory = model.report()["memory"]
    assert memory["lower_bound_bytes"] <= memory["workspace_bytes"] <= 1.02 * memory["lower_bound_bytes"] < memory["unshared_bytes"]
    model.save(tmp_path / "bert.tcm")
    command(["inspect", str(tmp_path / "bert.tcm"), "--json"])
    assert json.loads(capsys.readouterr().out)["memory"] == memory
    command(["inspect", str(tmp_path / "bert.tcm")])
    assert f"{memory['workspace_bytes']} bytes for intermediate tensors" in capsys.readouterr().out


@pytest.mark.networks
@pytest.mark.parametrize("name", ["minilm", "bert-base", "vit-s16", "resnet50", "mobilenetv3-l", "swin-t", "ppocr-det"])
def test_networks_are_near_the_bound(name):
    feeds = ZOO[name].example_inputs()
    memory = tcompile.compile(ZOO[name].onnx_path(), shapes={key: value.shape for key, value in feeds.items()}).report()["memory"]
    assert memory["workspace_bytes"] <= 1.02 * memory["lower_bound_bytes"]
