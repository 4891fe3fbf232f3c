"""All of it in one call, on a ViT trained on digits: fewer tokens, zeros in the weights, int8, measured loss and a report; from the command, from Python and from a recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tcompile
import tomli_w
from tcompile.compiler.cli.main import main
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.recipe import Recipe
from tcompile.models.datasets import mnist, mnist_grid
from tcompile.models.mnist import accuracy
from tcompile.models.zoo import ZOO
from tcompile.passes.quantization.quantize import Quantize
from tcompile.passes.sparsity.sparsify import Sparsify
from tcompile.passes.token_pruning.prune import TokenPruning

pytest.importorskip("torch")
pytestmark = pytest.mark.xdist_group("compression")  # one process makes `files`
SHAPE = "x=1x1x28x28"
FLAGS = ["--quantize", "int8", "--sparsity", "block:0.4", "--token-keep", "0.7"]
TEST = 200


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model, calibration data, and everything that one call of the command writes."""
    folder = tmp_path_factory.mktemp("compression")
    np.savez(folder / "data.npz", x=mnist()[0].x[:32])
    model = ZOO["mnist-vit"].onnx_path()
    code = main(
        [
            str(model),
            *FLAGS,
            "--shape",
            SHAPE,
            "--calibration",
            str(folder / "data.npz"),
            "--report",
            str(folder / "out.html"),
            "-o",
            str(folder / "vit.tcm"),
        ]
    )
    assert code == 0
    return folder


def right(model) -> float:
    """Share of held-out digits that a model of batch 1 gets right."""
    held_out = mnist()[1]
    logits = np.concatenate([model(held_out.x[index : index + 1]) for index in range(TEST)])
    return accuracy(logits, held_out.y[:TEST])


@pytest.mark.slow
def test_the_command_compresses_compiles_and_reports(files):
    model = tcompile.load(files / "vit.tcm")
    plain = tcompile.compile(ZOO["mnist-vit"].onnx_path(), shapes={"x": (1, 1, 28, 28)})
    report = model.report()
    steps = {entry["name"]: entry for entry in report["passes"]}
    order = [entry["name"] for entry in report["passes"] if entry.get("lossy")]
    # what is lost on digits that no pass has seen is what the report says of 32 others, give or take two standard errors; how much that is depends on the machine: it trains the model, and its
    # vectors are the width of a block of zeros
    assert right(plain) - right(model) <= steps[order[-1]]["loss"]["top1"] + 0.12
    assert right(model) > 0.8
    assert order == ["token-pruning", "sparsify", "quantize"]
    losses = [steps[name]["loss"]["cosine"] for name in order]
    assert all(0 < loss < 0.2 for loss in losses)
    assert report["weights_bytes"] < 0.5 * plain.report()["weights_bytes"]
    assert any("u8s8" in str(kernel["workload"]) for kernel in report["kernels"])


@pytest.mark.slow
def test_the_page_shows_every_step(files):
    text = (files / "out.html").read_text()
    for part in ("token-pruning", "sparsify", "quantize", "sparse layers", "quantized layers", "times as fast", "measured, us", "cosine"):
        assert part in text
    assert not any(mark in text for mark in ("http:", "https:", "src=", "@import", "<script"))


@pytest.mark.slow
def test_python_and_recipe_do_the_same(files, tmp_path):
    """Configured passes give the recipe that flags give; an artifact's recipe, taken back as TOML, gives the same weights and code."""
    recorded = json.loads((files / "vit.tcm" / "manifest.json").read_text())["recipe"]
    configured = {"quantize": Quantize("int8"), "sparsity": Sparsify("block:0.4"), "token_keep": TokenPruning(0.7)}
    assert json.loads(json.dumps(Recipe.of(CompileOptions(compression=configured)).to_dict())) == recorded

    model, shapes = ZOO["mnist-mlp"].onnx_path(), {"x": (4, 16)}
    data = [{"x": mnist_grid()[0].x[index : index + 4]} for index in range(0, 32, 4)]
    first = tcompile.compile(model, shapes=shapes, calibration=data, quantize="int8", sparsity="block:0.5")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        tomli_w.dumps({"pass": [{key: value for key, value in step.items() if value is not None} for step in first.manifest["recipe"]["pass"]]})
    )
    again = tcompile.compile(model, shapes=shapes, calibration=data, recipe=recipe)
    assert again.artifact.library == first.artifact.library
    assert {name: array.tobytes() for name, array in again.artifact.weights.items()} == {
        name: array.tobytes() for name, array in first.artifact.weights.items()
    }


def test_a_limit_that_cannot_hold_writes_nothing(tmp_path, capsys):
    output = tmp_path / "mlp.tcm"
    np.savez(tmp_path / "data.npz", x=mnist_grid()[0].x[:16])
    model, data = str(ZOO["mnist-mlp"].onnx_path()), str(tmp_path / "data.npz")
    arguments = [model, "--sparsity", "unstructured:0.9", "--shape", "x=4x16", "--calibration", data, "--max-drop", "1e-6"]
    assert main([*arguments, "-o", str(output)]) == 5
    assert "max-drop" in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (["--token-keep", "0"], 2, "(0, 1]"),
        (["--token-keep", "1.5"], 2, "(0, 1]"),
        (["--sparsity", "1.0"], 2, "below 1"),
        (["--sparsity", "block:x"], 2, "expected"),
        (["--quantize", "int5"], 2, "expected one of"),
        (["--quantize", "int8"], 2, "--calibration"),
        (["--calibration", "missing.npz"], 2, "no such file"),
        (["--max-drop", "0.1"], 2, "calibration"),
    ],
)
def test_bad_requests_are_refused_by_name(flags, code, reason, tmp_path, capsys):
    assert main([str(ZOO["mnist-vit"].onnx_path()), "--shape", SHAPE, *flags, "-o", str(tmp_path / "vit.tcm")]) == code
    assert reason in capsys.readouterr().err


def test_a_model_without_tokens_is_not_supported(tmp_path, capsys):
    assert main([str(ZOO["mnist-cnn"].onnx_path()), "--shape", SHAPE, "--token-keep", "0.7", "-o", str(tmp_path / "cnn.tcm")]) == 3
    assert "token" in capsys.readouterr().err
