"""Spelled-out normalisations and activations, as exports write them, become single operators with the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kernels import UNOPTIMIZED
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.tvm import relax, tvm
from tcompile.passes.base import PassContext
from tcompile.passes.normalization import RecognizeNormalizations
from tcompile.targets.base import Target

HIDDEN = 20


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-6) * weight + bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))


def gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_bert(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x * (torch.erf(x * math.sqrt(0.5)) + 1.0) * 0.5


def gelu_tanh(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


CASES = {
    layer_norm: ("normalization", "relax.nn.layer_norm"),
    rms_norm: ("normalization", "relax.nn.rms_norm"),
    gelu: ("gelu", "relax.nn.gelu"),
    gelu_bert: ("gelu", "relax.nn.gelu"),
    gelu_tanh: ("gelu_tanh", "relax.nn.gelu_tanh"),
    silu: ("silu", "relax.nn.silu"),
}


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN))
        self.bias = torch.nn.Parameter(torch.linspace(-0.1, 0.1, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, self.bias)


def exported(function) -> Program:
    from tvm.relax.frontend.torch import from_exported_program

    with torch.no_grad():
        module = from_exported_program(torch.export.export(Wrapped(function).eval(), (torch.zeros(2, 3, HIDDEN),)), unwrap_unit_return_tuple=True)
    spec = (TensorSpec("x", (2, 3, HIDDEN), "float32"),)
    return Program(module, spec, (TensorSpec("y", (2, 3, HIDDEN), "float32"),), Provenance("test", "torch"))


def operators(program: Program) -> list[str]:
    found: list[str] = []
    relax.analysis.post_order_visit(program.main, lambda e: found.append(e.op.name) if isinstance(e, relax.Call) and hasattr(e.op, "name") else None)
    return found


def execute(program: Program, x: np.ndarray) -> np.ndarray:
    executable = relax.build(program.module, UNOPTIMIZED)
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


@pytest.mark.sweep
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_recognized(function):
    kind, operator = CASES[function]
    program = exported(function)
    context = PassContext(Target("cpu", "test"))
    rewritten = RecognizeNormalizations().run(program, context)
    assert operators(rewritten) == [operator]
    assert context.report.matches == {kind: 1}
    x = np.random.default_rng(0).standard_normal((2, 3, HIDDEN)).astype("float32")
    np.testing.assert_allclose(execute(rewritten, x), execute(program, x), rtol=1e-4, atol=1e-6)


def test_softmax():
    """Built by hand: TVM's torch importer does not know amax."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, HIDDEN), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            power = builder.emit(relax.op.exp(builder.emit(relax.op.subtract(x, builder.emit(relax.op.max(x, axis=-1, keepdims=True))))))
            output = builder.emit_output(relax.op.divide(power, builder.emit(relax.op.sum(power, axis=-1, keepdims=True))))
        builder.emit_func_output(output)
    spec = (TensorSpec("x", (2, 3, HIDDEN), "float32"),)
    program = Program(builder.get(), spec, spec, Provenance("test", "relax"))
    rewritten = RecognizeNormalizations().run(program, PassContext(Target("cpu", "test")))
    assert operators(rewritten) == ["relax.nn.softmax"]


def test_nothing_found_returns_the_same_program():
    program = exported(lambda x, weight, bias: x * weight + torch.sigmoid(bias))
    assert RecognizeNormalizations().run(program, PassContext(Target("cpu", "test"))) is program


def test_wrong_constants_are_left_alone():
    program = exported(lambda x, weight, bias: x * 0.5 * (1.0 + torch.erf(x / 1.5)))
    assert RecognizeNormalizations().run(program, PassContext(Target("cpu", "test"))) is program
