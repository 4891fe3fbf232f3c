"""The zoo: complete, reproducible, honest about missing packages; its ONNX files say what its torch modules say."""

from __future__ import annotations

import numpy as np
import pytest
from tcompile.compiler.errors import ToolchainError, UsageError
from tcompile.models import optional
from tcompile.models.__main__ import main
from tcompile.models.entry import Dim, Entry
from tcompile.models.export import content_version, export
from tcompile.models.zoo import ZOO

EXPECTED = {
    *("ppocr-rec", "ppocr-det", "ppocr-cls", "magika", "minilm", "smollm2", "bert-base", "gpt2"),
    *("vit-s16", "deit-t", "resnet50", "mobilenetv3-l", "efficientformer-l1", "swin-t", "t5-encoder"),
    *("mnist-vit", "mnist-cnn", "mnist-mlp"),
}


def test_registry_is_complete():
    assert set(ZOO) == EXPECTED
    for name, entry in ZOO.items():
        assert entry.name == name
        assert (entry.build is None) != (entry.onnx_file is None)
        assert all(axes[0] == "batch" for axes in entry.dynamic_dims.values())
        assert {dim for axes in entry.dynamic_dims.values() for dim in axes.values()} == set(entry.dims)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_inputs(name):
    entry = ZOO[name]
    first, again, other = entry.example_inputs(batch=2), entry.example_inputs(batch=2), entry.example_inputs(batch=2, seed=1)
    for spec in entry.inputs:
        assert first[spec.name].shape == tuple(
            2 if dim == "batch" else entry.dims[dim].default if isinstance(dim, str) else dim for dim in spec.shape
        )
        np.testing.assert_array_equal(first[spec.name], again[spec.name])
    assert any((first[key] != other[key]).any() for key in first)


def test_text_inputs_stay_in_range():
    inputs = ZOO["bert-base"].example_inputs(batch=5, seq=33)
    assert inputs["input_ids"].min() >= 0 and inputs["input_ids"].max() < 30522
    lengths = inputs["attention_mask"].sum(axis=1)
    assert lengths[0] == 33 and (lengths >= 16).all()


@pytest.mark.parametrize("dims", [{"seq": 513}, {"batch": 0}, {"width": 3}])
def test_wrong_dims_are_refused(dims):
    with pytest.raises(UsageError, match="bert-base"):
        ZOO["bert-base"].example_inputs(**dims)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(optional.REQUIREMENTS, "no-such-package", "no-such-package==1.2")
    with pytest.raises(ToolchainError, match=r"pip install no-such-package==1\.2"):
        optional.require("no_such_package", "no-such-package")
    with pytest.raises(ToolchainError, match=r"tcompile\[bench\]"):
        optional.package_file("no-such-package", "x.onnx")


def test_list(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in EXPECTED)
    assert main(["export", "nothing"]) == 2


def _small(name: str, **options) -> Entry:
    """The entry with a smaller network behind it."""
    from dataclasses import replace

    entry = ZOO[name]
    assert entry.build is not None
    build = entry.build
    dims = {key: Dim(min(dim.default, 9), dim.min, dim.max) for key, dim in entry.dims.items()}
    small = replace(entry, build=lambda: build(**options), dims=dims)
    return small


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "options"),
    [("bert-base", {"layers": 1, "hidden": 32, "heads": 2}), ("vit-s16", {"depth": 1, "embed_dim": 48, "num_heads": 3})],
)
def test_onnx_agrees_with_torch(name, options, tmp_path):
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")
    if not optional.version(ZOO[name].packages[-1]):
        pytest.skip(f"{ZOO[name].packages[-1]} is not installed")
    entry = _small(name, **options)
    export(entry, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [output.name for output in session.get_outputs()] == list(entry.outputs)
    module = entry.torch_module()
    assert module is not None
    for batch in (1, 3):
        inputs = entry.example_inputs(batch=batch)
        with torch.no_grad():
            expected = module(*map(torch.from_numpy, inputs.values()))
        for ours, reference in zip(session.run(None, inputs), expected if isinstance(expected, tuple) else (expected,), strict=True):
            np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-4, atol=1e-5)


def test_random_networks_are_reproducible():
    pytest.importorskip("transformers")
    build = ZOO["t5-encoder"].build
    assert build is not None
    first, second = (build(layers=1, hidden=16, heads=2, vocabulary=50).state_dict() for _ in range(2))
    assert all((first[key] == second[key]).all() for key in first)
    assert len(content_version(ZOO["t5-encoder"])) == 12 and content_version(ZOO["gpt2"]) != content_version(ZOO["t5-encoder"])
