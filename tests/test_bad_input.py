"""Bad input to the command and the API: a clear message, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx_models
import pytest
import tcompile
from onnx import load, save_model
from tcompile.compiler.cli.main import main


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """Run the command in an empty folder; returns (exit code, stderr) after checking that stdout and the folder stayed as they were."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        before = sorted(os.listdir(tmp_path))
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err and "internal fault" not in err
        assert sorted(os.listdir(tmp_path)) == before
        return code, err

    return run


@pytest.fixture
def model(tmp_path):
    return onnx_models.saved_mlp(tmp_path).name


@pytest.mark.parametrize("verb", [[], ["inspect"], ["verify"], ["bench"], ["run", "--random"]], ids=lambda verb: verb[0] if verb else "compile")
@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text", "truncated", "noise"])
def test_not_a_model(call, tmp_path, model, verb, kind):
    path = tmp_path / "bad.onnx"
    good = (tmp_path / model).read_bytes()
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        contents = {"empty": b"", "text": b"hello\n", "truncated": good[: len(good) * 2 // 3], "noise": np.random.default_rng(0).bytes(5000)}
        path.write_bytes(contents[kind])
    code, err = call(*verb, "bad.onnx")
    assert code in (2, 3) and "bad.onnx" in err


def test_every_unsupported_node_is_listed(call, tmp_path):
    onnx_models.unsupported(tmp_path)
    code, err = call("odd.onnx")
    assert code == 3 and "first" in err and "second" in err and "acme" in err
    with pytest.raises(tcompile.UnsupportedModel) as caught:
        tcompile.compile(tmp_path / "odd.onnx")
    assert len(caught.value.blockers) == 2


@pytest.mark.parametrize("location", ["missing.bin", "../outside.bin", "/etc/hostname", "link.bin"])
def test_external_data_is_contained(call, tmp_path, location):
    model = onnx_models.mlp()
    save_model(model, str(tmp_path / "ext.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=0)
    stored = load(str(tmp_path / "ext.onnx"), load_external_data=False)
    for entry in stored.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    (tmp_path / "ext.onnx").write_bytes(stored.SerializeToString())
    (tmp_path.parent / "outside.bin").write_bytes(bytes(1000))
    (tmp_path / "link.bin").symlink_to(tmp_path.parent / "outside.bin")
    code, err = call("ext.onnx")
    assert code in (2, 3) and (location in err or "external" in err)


@pytest.mark.parametrize("target", ["gpu", "cpu:pentium", "", "cpu:../x"])
def test_unknown_target(call, model, target):
    code, err = call(model, "--target", target)
    assert code == 2 and "expected one of" in err


@pytest.mark.parametrize("shape", ["x", "x=", "=1x3", "x=axb", "x=1x", "x=3..2x4", "x=0x4", "x=-1x4", "x=1..2..3..4x4", "x=2x4x4", "nobody=2x4"])
def test_malformed_shape(call, model, shape):
    code, err = call(model, "--shape", shape)
    assert code == 2 and err


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "out"],
        ["-o", "nowhere/out.tcm"],
        ["-o", "mlp.onnx"],
        ["--recipe", "missing.toml"],
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--threads", "0"],
        ["--unknown"],
        ["extra"],
        ["--dump-ir", "mlp.onnx"],
    ],
    ids=" ".join,
)
def test_bad_flags(call, model, arguments):
    code, err = call(model, *arguments)
    assert code == 2 and err


def test_bad_run(call, tmp_path, model):
    assert main([model, "-o", "good.tcm"]) == 0
    np.save(tmp_path / "x.npy", np.zeros((2, 4), "float32"))
    np.save(tmp_path / "wrong.npy", np.zeros((2, 5), "float32"))
    np.save(tmp_path / "double.npy", np.zeros((2, 4)))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    (tmp_path / "noise.npy").write_bytes(b"noise")
    for arguments, words in [
        (["--input", "x=wrong.npy"], ["'x'", "[2, 4]", "[2, 5]"]),
        (["--input", "x=double.npy"], ["'x'", "float32", "float64"]),
        (["--input", "z=x.npy"], ["'z'"]),
        (["--input", "x=object.npy"], ["object.npy"]),
        (["--input", "x=noise.npy"], ["noise.npy"]),
        (["--input", "x=missing.npy"], ["missing.npy"]),
        (["--input", "x.npy"], ["NAME=FILE"]),
        (["--random", "--output", "out.txt"], [".npz"]),
        (["--random", "--input", "x=x.npy"], ["one of the two"]),
        (["--random", "--threads", "9999"], ["threads"]),
    ]:
        code, err = call("run", "good.tcm", *arguments)
        assert code == 2 and all(word in err for word in words), err
    for arguments in (["verify", "good.tcm"], ["bench", "good.tcm", "--against", "onnxruntime"], ["bench", model, "--against", "nobody"]):
        assert call(*arguments)[0] == 2
    assert call("bench", model, "--against", "torch")[0] == 2


def test_tampered_artifact(call, tmp_path, model):
    assert main([model, "-o", "good.tcm"]) == 0
    content = bytearray((tmp_path / "good.tcm" / "lib.so").read_bytes())
    content[-1] ^= 1
    (tmp_path / "good.tcm" / "lib.so").write_bytes(content)
    for arguments in (["run", "good.tcm", "--random"], ["inspect", "good.tcm", "--check"], ["bench", "good.tcm"]):
        code, err = call(*arguments)
        assert code == 5 and "lib.so" in err
    shutil.rmtree(tmp_path / "good.tcm")
    assert call("run", "good.tcm", "--random")[0] == 2


def test_options_of_later_issues_are_refused_by_name(tmp_path, model):
    for name, value in {"generate": True, "target_latency": 3.0}.items():
        with pytest.raises(tcompile.UsageError, match=f"not available yet: {name}"):
            tcompile.compile(tmp_path / model, **{name: value})
    with pytest.raises(tcompile.UsageError, match="cannot compile a dict"):
        tcompile.compile({})
