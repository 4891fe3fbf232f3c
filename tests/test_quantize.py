"""Static int8 and weight-only quantization: what the graph becomes, and how far the numbers are from a reference in numpy and from the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tcompile
import tomli_w
import torch
from tcompile import UsageError, VerificationError
from tcompile.compiler.api import accuracy_on
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.recipe import Recipe
from tcompile.compiler.tvm import relax
from tcompile.passes.base import PassContext, PassReport
from tcompile.passes.quantization.formats import Affine, Int8, scale_for_16_bits
from tcompile.passes.quantization.quantize import Quantize
from tcompile.targets.base import Target

RNG = np.random.default_rng(0)
#: this machine, also where it multiplies integers by pairs only
CPU = replace(Target.parse("cpu"), formats=Target.parse("cpu").formats | {"int8"})


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b, self.c = (
            torch.nn.LayerNorm(20),
            torch.nn.Linear(20, 33),
            torch.nn.Linear(20, 33, bias=False),
            torch.nn.Linear(33, 7),
        )

    def forward(self, x):
        y = self.norm(x)
        return self.c(torch.relu(self.a(y)) * self.b(y))


class Separable(torch.nn.Module):
    """Depthwise with a multiplier of one and of two, grouped, all with padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.point, self.depth = torch.nn.Conv2d(3, 12, 1), torch.nn.Conv2d(12, 12, 3, 2, 1, groups=12)
        self.twice, self.grouped = (
            torch.nn.Conv2d(12, 24, (5, 1), padding=(2, 0), groups=12),
            torch.nn.Conv2d(24, 20, 3, padding=2, dilation=2, groups=4),
        )

    def forward(self, x):
        x = torch.nn.functional.hardswish(self.depth(torch.relu(self.point(x))))
        return self.grouped(torch.sigmoid(self.twice(x)))


class Residual(torch.nn.Module):
    """branch: the shortcut is a convolution as well."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Conv2d(16, 16, 3, 1, 1), torch.nn.Conv2d(16, 16, 3, 1, 1)
        self.pool, self.last = torch.nn.MaxPool2d(3, 2, 1), torch.nn.Conv2d(16, 8, 1)
        self.short = torch.nn.Conv2d(16, 16, 1) if branch else torch.nn.Identity()

    def forward(self, x):
        y = self.pool(torch.relu(self.stem(x)))
        y = torch.relu(self.short(y) + self.two(torch.nn.functional.silu(self.one(y))))
        return self.last(y).mean((2, 3))


def data(shape: tuple[int, ...], count: int = 6) -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def compiled(net: torch.nn.Module, samples: list[dict[str, np.ndarray]], quantize: Any, **options: Any) -> Any:
    calls = [(x["x"],) for x in samples]
    return tcompile.compile(net.eval(), CPU, example_inputs=(torch.from_numpy(samples[0]["x"]),), quantize=quantize, calibration=calls, **options)


def quantize_report(model: Any) -> dict[str, Any]:
    return next(entry for entry in model.report()["passes"] if entry["name"] == "quantize")


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.sweep
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_mlp(observer: str) -> None:
    samples = data((5, 20))
    net = Mlp()
    model = compiled(net, samples, Quantize("int8", observer=observer))
    report = quantize_report(model)
    assert report["matches"] == {"matmul": 3}
    rows = report["tables"]["quantized layers"]
    assert len(rows) == 3 and all(row["sqnr_db"] > 25 for row in rows)
    # a and b read the same tensor: the same codes
    assert rows[0]["scale"] == rows[1]["scale"] or rows[1]["scale"] == rows[2]["scale"]
    x = samples[0]["x"]
    assert relative(model(x), net(torch.from_numpy(x)).detach().numpy()) < 0.05
    assert report["loss"]["cosine"] < 1e-3


@pytest.mark.parametrize("short", [False, True])
def test_one_product_is_exact_against_the_integer_reference(short) -> None:
    net, samples = torch.nn.Linear(37, 11), data((9, 37), 3)
    model = compiled(net, samples, Quantize(short_sums=short))
    x = samples[1]["x"]
    w, bias = net.weight.detach().numpy().T, net.bias.detach().numpy()
    everything = np.concatenate([sample["x"] for sample in samples])
    affine, weight = Affine.of_range(everything.min(), everything.max()), Int8(1).encode(w, scale_for_16_bits(w) if short else 0.0)
    scale = np.float32(affine.scale) * weight.scale[0]
    acc = (affine.encode(x).astype(np.int32) - affine.zero) @ weight.codes.astype(np.int32) + np.rint(bias / scale).astype(np.int32)
    np.testing.assert_array_equal(model(x), acc.astype(np.float32) * scale)


@pytest.mark.parametrize("branch", [False, True], ids=["identity", "convolution"])
def test_convolutions_and_residual_stay_in_codes(branch: bool) -> None:
    samples = data((2, 3, 21, 18))
    net = Residual(branch)
    model = compiled(net, samples, "int8")
    report = quantize_report(model)
    assert report["matches"] == {"conv2d": 4 + branch}
    x = samples[2]["x"]
    assert relative(model(x), net(torch.from_numpy(x)).detach().numpy()) < 0.06
    # results that only codes of no negative numbers are made of need no ReLU, which these are all that clips
    assert sum("relu" in kernel["kernel"] for kernel in model.report()["kernels"]) == 1
    # no kernel but the input's does nothing but make codes: they are made where the values are
    alone = [kernel["kernel"] for kernel in model.report()["kernels"] if "round" in kernel["kernel"] and "conv2d" not in kernel["kernel"]]
    assert len(alone) == 1, alone


def test_grouped_and_depthwise_convolutions() -> None:
    samples, net = data((2, 3, 13, 11)), Separable()
    model = compiled(net, samples, "int8")
    report = quantize_report(model)
    assert report["matches"] == {"conv2d": 4}
    assert all(row["sqnr_db"] > 30 for row in report["tables"]["quantized layers"])
    depthwise = report["tables"]["quantized layers"][1]
    assert depthwise["weight"] == "12x1x3x3" and depthwise["int8_bound_us"] == depthwise["fp32_bound_us"]
    x = samples[2]["x"]
    assert relative(model(x), net(torch.from_numpy(x)).detach().numpy()) < 0.04
    assert sum("u8s8" in kernel["workload"] for kernel in model.report()["kernels"]) == 4
    assert any(kernel["template"] == "conv_depthwise" for kernel in model.report()["kernels"])


def test_smoothing_moves_outliers_into_the_weights() -> None:
    net, samples = Mlp(), data((16, 20))
    with torch.no_grad():
        net.norm.weight[3] *= 60
        net.a.weight[:, 3] /= 60
        net.b.weight[:, 3] /= 60
    plain, smooth = (compiled(net, samples, Quantize("int8", smooth=strength)) for strength in (0.0, 0.5))
    assert quantize_report(smooth)["matches"]["smoothed"] >= 1
    losses = [quantize_report(model)["loss"]["relative"] for model in (plain, smooth)]
    assert losses[1] < losses[0] / 3


def test_the_worst_layers_fall_back_until_the_limit_holds() -> None:
    net, samples = Mlp(), data((5, 20))
    with torch.no_grad():
        net.c.weight[:, 0] *= 3000  # one input of the last layer needs more digits than codes have
    limit = 0.9 * quantize_report(compiled(net, samples, "int8"))["loss"]["relative"]
    report = quantize_report(compiled(net, samples, "int8", metric="relative", max_drop=limit))
    rows = {row["layer"]: row for row in report["tables"]["quantized layers"]}
    assert report["loss"]["relative"] <= limit
    assert report["matches"]["fallback"] >= 1
    left = [row["drop_alone"] for row in rows.values() if row["runs in"] == "float32"]
    assert min(left) >= max(row["drop_alone"] for row in rows.values() if row["runs in"] == "int8")


def test_a_limit_that_no_layer_meets_is_a_failed_verification() -> None:
    with pytest.raises(VerificationError, match="no layer can run in int8 within max_drop 1e-12.*worst layers alone"):
        compiled(Mlp(), data((5, 20)), "int8", max_drop=1e-12)


def test_without_calibration() -> None:
    with pytest.raises(UsageError, match="--calibration"):
        tcompile.compile(Mlp().eval(), CPU, example_inputs=(torch.zeros(5, 20),), quantize="int8")


def test_empty_calibration() -> None:
    with pytest.raises(UsageError, match="no samples"):
        compiled_on = data((5, 20), 1)
        tcompile.compile(Mlp().eval(), example_inputs=(torch.from_numpy(compiled_on[0]["x"]),), quantize="int8", calibration=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int3"}, "expected one of none, int8, fp8, w1 .. w8, w1a8 .. w8a8, w1fp8 .. w8fp8"),
        ({"observer": "median"}, "expected one of minmax, percentile, mse"),
        ({"smooth": 1.5}, "within 0..1"),
        ({"percentile": 40}, "above 50"),
        ({"group": 7}, "even number"),
        ({"max_drop": -1}, "at least 0"),
        ({"metric": "bleu"}, "unknown metric"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Quantize(**options)


def test_unknown_layer_to_skip() -> None:
    with pytest.raises(UsageError, match="skip names no layer nowhere; there are"):
        compiled(Mlp(), data((5, 20)), Quantize(skip=("nowhere",)))


def test_a_target_without_int8_says_what_it_has() -> None:
    with pytest.raises(UsageError, match="float32, not in int8; try w8 or w4"):
        Quantize().run(None, PassContext(Target("fpga", "old"), report=PassReport("quantize")))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), [("w4a8", "int8"), ("w2fp8", "float8_e4m3fn")])
def test_a_target_without_activations_in_few_bits_says_so(name: str, dtype: str) -> None:
    with pytest.raises(UsageError, match=f"float32, not by activations of {dtype}; try w"):
        Quantize(name).run(None, PassContext(Target("fpga", "old"), report=PassReport("quantize")))  # type: ignore[arg-type]


def test_none_is_the_identity() -> None:
    program = object()
    assert Quantize("none").run(program, PassContext(CPU)) is program  # type: ignore[arg-type]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("quantize", "loss"), [("w8", 0.01), ("w4", 0.15), ("w3", 0.3), ("w1", 0.8), (Quantize("w4", group=8, symmetric=False), 0.1)]
)
def test_weights_alone(quantize: Any, loss: float) -> None:
    net, samples = Mlp(), data((5, 20))
    model = compiled(net, samples, quantize)
    report = quantize_report(model)
    heads = 0 if quantize == "w8" else 1
    assert report["matches"] == {"matmul": 3, **({"heads_in_8_bits": heads} if heads else {})}
    rows = report["tables"]["quantized weights"]
    assert [row["bits"] for row in rows].count(8) == (heads or 3)
    assert all(row["bytes_after"] < row["bytes_before"] for row in rows)
    x = samples[0]["x"]
    assert 0 < relative(model(x), net(torch.from_numpy(x)).detach().numpy()) < loss


def test_a_model_without_products_stays(capsys: Any) -> None:
    net: Callable[..., Any] = torch.nn.Softmax(-1)
    model = compiled(net, data((3, 4)), "int8")  # type: ignore[arg-type]
    assert quantize_report(model)["notes"] == ["no product by constant weights was found"]


BEFORE = """
        with R.dataflow():
            lv: R.Tensor((2, 4), dtype="float32") = R.matmul(x, metadata["ir.GenericConst"][0], out_dtype=None)
            lv1: R.Tensor((2, 4), dtype="float32") = R.add(lv, metadata["ir.GenericConst"][1])
            lv2: R.Tensor((2, 4), dtype="float32") = R.nn.relu(lv1)
            gv: R.Tensor((2, 2), dtype="float32") = R.matmul(lv2, metadata["ir.GenericConst"][2], out_dtype=None)
"""
AFTER = """
        with R.dataflow():
            lv: R.Tensor((2, 4), dtype="float32") = R.multiply(x, metadata["ir.GenericConst"][0])
            lv1: R.Tensor((2, 4), dtype="float32") = R.round(lv)
            lv2: R.Tensor((2, 4), dtype="float32") = R.add(lv1, metadata["ir.GenericConst"][1])
            lv3: R.Tensor((2, 4), dtype="float32") = R.clip(lv2, 0, 255)
            lv4: R.Tensor((2, 4), dtype="uint8") = R.astype(lv3, dtype="uint8")
            lv5: R.Tensor((2, 4), dtype="int32") = R.matmul(lv4, metadata["ir.GenericConst"][2], out_dtype="int32")
            lv6: R.Tensor((2, 4), dtype="int32") = R.add(lv5, metadata["ir.GenericConst"][3])
            lv7: R.Tensor((2, 4), dtype="float32") = R.astype(lv6, dtype="float32")
            lv1_1: R.Tensor((2, 4), dtype="float32") = R.multiply(lv7, metadata["ir.GenericConst"][4])
            lv8: R.Tensor((2, 4), dtype="float32") = R.multiply(lv1_1, metadata["ir.GenericConst"][5])
            lv9: R.Tensor((2, 4), dtype="float32") = R.round(lv8)
            lv10: R.Tensor((2, 4), dtype="float32") = R.clip(lv9, 0, 255)
            lv11: R.Tensor((2, 4), dtype="uint8") = R.astype(lv10, dtype="uint8")
            lv12: R.Tensor((2, 2), dtype="int32") = R.matmul(lv11, metadata["ir.GenericConst"][6], out_dtype="int32")
            lv13: R.Tensor((2, 2), dtype="float32") = R.astype(lv12, dtype="float32")
            gv: R.Tensor((2, 2), dtype="float32") = R.multiply(lv13, metadata["ir.GenericConst"][7])
"""


def body(text: str) -> list[str]:
    """The dataflow block, variables by position."""
    lines = [line.strip() for line in text.splitlines() if ": R.Tensor" in line and " = R." in line]
    names: dict[str, str] = {}
    for line in lines:
        names.setdefault(line.split(":")[0], f"v{len(names)}")
    return [re.sub(r"\b(?:lv|gv)[\d_]*\b", lambda found: names.get(found[0], found[0]), line) for line in lines]


def test_before_and_after() -> None:
    x = relax.Var("x", relax.TensorType([2, 4], "float32"))
    builder, op = relax.BlockBuilder(), relax.op
    constants = [
        relax.const(floats) for floats in (RNG.standard_normal((4, 4)).astype("f"), np.ones(4, "f"), RNG.standard_normal((4, 2)).astype("f"))
    ]
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.relu(builder.emit(op.add(builder.emit(op.matmul(x, constants[0])), constants[1]))))
            out = builder.emit_output(op.matmul(y, constants[2]))
        builder.emit_func_output(out)
    specs = TensorSpec("x", (2, 4), "float32"), TensorSpec("y", (2, 2), "float32")
    before = Program(builder.get(), specs[:1], specs[1:], Provenance("test", "test"))
    accuracy = accuracy_on(before, [{"x": np.linspace(-1, 1, 8, dtype="f").reshape(2, 4)}])
    after = Quantize().run(before, PassContext(CPU, accuracy=accuracy))
    relax.analysis.well_formed(after.module)
    assert body(before.module.script(show_meta=False)) == body(BEFORE)
    assert body(after.module.script(show_meta=False)) == body(AFTER)


def test_dynamic_rows() -> None:
    net, samples = Mlp().eval(), data((60, 20), 3)
    samples[1]["x"] = RNG.standard_normal((9, 20)).astype(np.float32)
    dims = {"x": "1..8..64x20"}
    model = compiled(net, samples, "int8", shapes=dims)
    for rows in (1, 5, 13):
        x = RNG.standard_normal((rows, 20)).astype(np.float32).clip(-2, 2)
        assert relative(model(x), net(torch.from_numpy(x)).detach().numpy()) < 0.1


def test_a_recipe_with_the_pass_reads_back(tmp_path: Path) -> None:
    step = Quantize("int8", observer="mse", skip=("first",))
    recipe = Recipe.default().having(step)
    path = tmp_path / "recipe.toml"
    entries = [{key: value for key, value in entry.items() if value is not None} for entry in recipe.to_dict()["pass"]]
    path.write_text(tomli_w.dumps({"pass": entries}))
    assert Recipe.load(path).passes == recipe.passes
