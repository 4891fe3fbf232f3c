"""torch.compile(..., backend="tcompile"): weights are lifted, open sizes specialised, and nothing falls back to eager silently."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels import UNOPTIMIZED
from tcompile.compiler import dynamo
from tcompile.compiler.program import Program
from tcompile.compiler.tvm import relax, tvm


@pytest.fixture
def programs(monkeypatch) -> list[Program]:
    """The programs that the backend compiles, here with TVM's default pipeline in place of tcompile's."""
    seen: list[Program] = []

    def compile_program(program: Program, target: Any, options: Any) -> Any:
        seen.append(program)
        module = relax.transform.DecomposeOpsForInference()(program.module)
        machine = relax.VirtualMachine(tvm.compile(module, target=UNOPTIMIZED), tvm.cpu())

        def run(*inputs: Any) -> Any:
            result = machine["main"](*[tvm.runtime.tensor(value.numpy()) for value in inputs])
            return torch.from_numpy(result.numpy()) if hasattr(result, "numpy") else tuple(torch.from_numpy(item.numpy()) for item in result)

        return run

    api, options, base = ModuleType("api"), ModuleType("options"), ModuleType("base")
    api.compile_program, options.CompileOptions = compile_program, SimpleNamespace  # pyright: ignore[reportAttributeAccessIssue]
    base.Target = SimpleNamespace(parse=str)  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in {"compiler.api": api, "compiler.options": options, "targets.base": base}.items():
        monkeypatch.setitem(sys.modules, f"tcompile.{name}", module)
    torch._dynamo.reset()
    return seen


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x):
        features = self.norm(self.convolution(x)).relu().mean((2, 3))
        return self.head(features), features


def test_weights_are_lifted_and_results_agree(programs):
    net = Net().eval()
    compiled = torch.compile(net, backend=dynamo.backend)
    with torch.no_grad():
        for batch in (2, 2, 3, 7):
            x = torch.randn(batch, 3, 6, 5)
            for ours, expected in zip(compiled(x), net(x), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert [len(program.inputs) for program in programs] == [1, 1, 1]
    assert [program.inputs[0].shape[0] for program in programs] == [2, 3, 7]


def test_training_is_refused(programs):
    with pytest.raises(Exception, match="inference only"):
        torch.compile(Net(), backend=dynamo.backend)(torch.randn(1, 3, 6, 5))
    assert not programs


def test_no_silent_fall_back(programs):
    def function(x):
        return torch.linalg.det(x @ x)

    with torch.no_grad(), pytest.raises(Exception, match=r"_linalg_det\.default"):
        torch.compile(function, backend=dynamo.backend)(torch.randn(3, 3))
    assert not programs
