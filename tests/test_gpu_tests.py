"""What `make gpu-test` would do on an H100, by the emulation: each test can be called and expects of that GPU what holds there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import cuda_models
import numpy as np
import pytest

sys.path.append(str(Path(__file__).with_name("gpu")))
import test_gpu

pytestmark = [pytest.mark.networks, pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")]


@pytest.mark.parametrize(("module", "name", "arguments"), test_gpu.CASES, ids=test_gpu.IDS)
def test_kernels(monkeypatch, module, name, arguments):
    monkeypatch.setattr(cuda_models, "TARGETS", ["cuda:sm_90a"])
    monkeypatch.setattr(module, "RANDOM", np.random.default_rng(7))
    test_gpu.bound(getattr(module, name), arguments, monkeypatch)()


def test_every_template_is_sanitized():
    assert len(set(test_gpu.sanitized())) == len(test_gpu.SANITIZED)
