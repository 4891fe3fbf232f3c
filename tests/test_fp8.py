"""Products in float8_e4m3fn on the CPU: rounding bit by bit against ml_dtypes, layers against numpy on rounded operands, what is measured and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
import torch
from cuda_models import program_of
from tcompile import UsageError
from tcompile.compiler.api import compile_program
from tcompile.compiler.element_types import FLOAT8, numpy_dtype
from tcompile.compiler.tvm import relax
from tcompile.passes.base import PassContext, PassReport
from tcompile.passes.quantization.formats import Float8, ScaledFloat8, float8
from tcompile.passes.quantization.quantize import Quantize
from tcompile.targets.base import Target
from test_quantize import Mlp, Separable, compiled, data, quantize_report, relative

RNG = np.random.default_rng(5)
op = relax.op


def awkward_numbers() -> np.ndarray:
    """Every number of the type, the middles between neighbours and their own neighbours in float32, all of either sign; what is too large, infinite or NaN; and numbers of all sizes."""
    values = np.arange(0x7F, dtype=np.uint8).view(numpy_dtype(FLOAT8)).astype(np.float32)
    middles = (values[1:] + values[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    large = np.array([448, 449, 463.9, 464, 465, 480, 1e9, 3e38, np.inf, np.nan, 1e-45, 1e-38, 2.0**-10], np.float32)
    sizes = RNG.standard_normal(3000).astype(np.float32) * np.float32(2) ** RNG.integers(-20, 12, 3000).astype(np.float32)
    positive = np.concatenate([values, middles, *beside, large, np.abs(sizes)])
    return np.concatenate([positive, -positive])


def cast_there_and_back(emit: Any, x: Any, dtype: str = FLOAT8) -> list[Any]:
    return [emit(op.astype(emit(op.astype(x, dtype)), "float32"))]


def same_bits(got: np.ndarray, x: np.ndarray) -> None:
    exact = np.clip(x, -448, 448).astype(numpy_dtype(FLOAT8)).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    number = ~np.isnan(x)
    np.testing.assert_array_equal(got[number].view(np.uint32), exact[number].view(np.uint32))


def test_rounding_is_that_of_ml_dtypes() -> None:
    x = awkward_numbers()
    same_bits(float8(x).astype(np.float32), x)
    same_bits(compile_program(program_of(cast_there_and_back, {"x": x}), Target.parse("cpu"))(x), x)
    # so is that to bfloat16, in which the numbers are held
    halves = compile_program(program_of(lambda emit, x: cast_there_and_back(emit, x, "bfloat16"), {"x": x}), Target.parse("cpu"))(x)
    exact = x.astype(numpy_dtype("bfloat16")).astype(np.float32)
    # vcvtneps2bf16 takes denormal numbers for zeros (docs/quantization.md)
    flushed = ("avx512bf16" in Target.parse("cpu").features) & (np.abs(x) < np.finfo(np.float32).tiny) & (halves == 0)
    np.testing.assert_array_equal(halves[~flushed], exact[~flushed])


def test_layers_are_products_of_rounded_numbers() -> None:
    """A scale per tensor with data, one per row without; one row has NaN, which stays there, one only zeros."""
    net, samples = torch.nn.Linear(37, 11), data((9, 37), 3)
    w, bias = net.weight.detach().numpy().T, net.bias.detach().numpy()
    weight = Float8(1).encode(w)
    top = max(np.abs(sample["x"]).max() for sample in samples)
    static, x = ScaledFloat8.of_range(-top, top), samples[1]["x"]
    exact = static.encode(x).astype(np.float64) @ weight.codes.astype(np.float64) * (static.scale * weight.scale) + bias
    model = compiled(net, samples, "fp8")
    np.testing.assert_allclose(model(x), exact, rtol=1e-5, atol=1e-5)
    report = quantize_report(model)
    assert report["matches"] == {"matmul": 1} and report["loss"]["cosine"] < 1e-3 and report["tables"]["quantized layers"][0]["runs in"] == "fp8"
    assert any("no instruction for fp8" in note for note in report["notes"])

    x = x.copy()
    x[2, 5], x[3] = np.nan, 0
    x[4] *= 1e6
    rows = Float8(0).encode(x)
    exact = rows.codes.astype(np.float64) @ weight.codes.astype(np.float64) * rows.scale * weight.scale + bias
    model = tcompile.compile(net, example_inputs=(torch.from_numpy(x),), quantize="fp8", shapes={"input": "1..8..64x37"})
    out = model(x)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
    size = np.abs(exact).max(axis=1, keepdims=True)
    np.testing.assert_allclose(out / size, exact / size, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model(x[:2]), out[:2])  # a row does not depend on the others
    assert quantize_report(model)["tables"]["quantized layers"][0]["scale"] == "per row"


@pytest.mark.networks
@pytest.mark.parametrize("observer", ["dynamic", "mse"])
def test_convolutions_but_depthwise_ones(observer: str) -> None:
    samples, net = data((2, 3, 13, 11)), Separable()
    model = compiled(net, samples, Quantize("fp8", observer=observer))
    report = quantize_report(model)
    assert report["matches"] == {"conv2d": 2}
    rows = report["tables"]["quantized layers"]
    assert report["loss"]["relative"] < 0.08  # scales stay out of the weights when the program goes through the passes again
    assert all(row["sqnr_db"] > 25 for row in rows) and (rows[0]["scale"] == "per image") == (observer == "dynamic")
    x = samples[2]["x"]
    assert relative(model(x), net(torch.from_numpy(x)).detach().numpy()) < 0.08
    assert sum(" bf16 " in kernel["workload"] for kernel in model.report()["kernels"]) == 2


@pytest.mark.networks
def test_the_worst_layers_fall_back_until_the_limit_holds() -> None:
    net, samples = Mlp(), data((5, 20))
    free = quantize_report(compiled(net, samples, "fp8"))["loss"]["relative"]
    report = quantize_report(compiled(net, samples, "fp8", metric="relative", max_drop=free * 0.8))
    assert report["loss"]["relative"] <= free * 0.8 and 1 <= report["matches"]["fallback"] <= 2


def test_refusals() -> None:
    with pytest.raises(UsageError, match="observer dynamic is for fp8, not for int8"):
        Quantize("int8", observer="dynamic")
    for options in ({"observer": "mse"}, {"smooth": 0.5}):
        with pytest.raises(UsageError, match="fp8 needs data.*observer minmax or dynamic"):
            tcompile.compile(Mlp().eval(), "cpu", example_inputs=(torch.zeros(5, 20),), quantize=Quantize("fp8", **options))
    with pytest.raises(UsageError, match=r"fpga:\S+ computes in int8, not in fp8; try int8"):
        Quantize("fp8").run(None, PassContext(Target.parse("fpga"), report=PassReport("quantize")))  # type: ignore[arg-type]
