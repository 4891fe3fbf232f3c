"""The `tcompile` command: every verb, its exit code, and stdout apart from stderr."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnx_models
import pytest
import tcompile
from tcompile.compiler import compare
from tcompile.compiler.cli.main import VERBS, main
from tcompile.compiler.cli.verb_compile import compile_verb

X = np.linspace(-1, 1, 8, dtype="float32").reshape(2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """mlp.onnx, mlp.tcm compiled from it by the command, and x.npy."""
    folder = tmp_path_factory.mktemp("cli")
    path = onnx_models.saved_mlp(folder)
    np.save(folder / "x.npy", X)
    assert main([str(path), "-o", str(folder / "mlp.tcm")]) == 0
    return folder


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """Run the command in the folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def run(*arguments: str):
        capsys.readouterr()
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run


def test_compile_writes_next_to_the_caller(call, folder):
    code, out, err = call("mlp.onnx")
    assert code == 0 and out.startswith("mlp.tcm") and "x: float32[2, 4]" in out and err == ""
    code, out, _ = call("compile", "mlp.onnx", "--target", "cpu:haswell", "-o", "other.tcm", "--json")
    result = json.loads(out)
    assert result["output"] == "other.tcm" and result["manifest"]["target"]["text"] == "cpu:haswell"


def test_run(call, folder):
    code, out, err = call("run", "mlp.tcm", "--input", "x=x.npy", "--output", "result.npz", "--json")
    assert code == 0 and err == ""
    assert json.loads(out)["outputs"][0]["shape"] == [2, 3]
    result = np.load(folder / "result.npz")["y"]
    np.savez(folder / "feeds.npz", x=X)
    assert call("run", "mlp.onnx", "--input", "feeds.npz", "--output", "again.npz")[0] == 0
    np.testing.assert_array_equal(np.load(folder / "again.npz")["y"], result)
    assert "y" in call("run", "mlp.tcm", "--random")[1]


def test_verify(call, monkeypatch):
    code, out, _ = call("verify", "mlp.onnx", "--json")
    assert code == 0 and json.loads(out)["y"]["ok"]
    assert call("verify", "mlp.tcm", "--model", "mlp.onnx", "--input", "x=x.npy")[0] == 0
    agree = compare.agree
    monkeypatch.setattr(compare, "agree", lambda ours, theirs, **kinds: agree(ours + 1, theirs, **kinds))
    code, out, err = call("verify", "mlp.onnx")
    assert code == 5 and "DIFFERS" in out and "'y' at" in err


def test_bench(call):
    code, out, _ = call("bench", "mlp.onnx", "--against", "onnxruntime", "--rounds", "2", "--threads", "1", "--json")
    result = json.loads(out)
    assert code == 0 and result["threads"] == 1 and set(result["results"]) == {"tcompile", "onnxruntime"}
    assert result["results"]["tcompile"]["ratio"] == 1.0 and result["results"]["onnxruntime"]["rounds"] == 2
    assert "median ms" in call("bench", "mlp.tcm", "--rounds", "1")[1]


def test_inspect(call, folder):
    code, out, _ = call("inspect", "mlp.onnx", "--json")
    summary = json.loads(out)
    assert code == 0 and summary["operators"] == {"MatMul": 1, "Relu": 1} and summary["blockers"] == []
    code, out, _ = call("inspect", "mlp.tcm", "--check")
    assert code == 0 and "all hashes agree" in out and "weights.safetensors" in out
    onnx_models.unsupported(folder)
    code, out, err = call("inspect", "odd.onnx", "--json")
    assert code == 3 and len(json.loads(out)["blockers"]) == 2 and "first" in err and "second" in err


def test_targets_and_doctor(call):
    code, out, _ = call("targets", "--json")
    assert code == 0 and "cpu:haswell" in json.loads(out)
    code, out, _ = call("doctor", "--json")
    assert code == 0 and json.loads(out)["linker"]["ok"]


@pytest.mark.parametrize("verb", VERBS)
def test_help(call, verb):
    code, out, _ = call(verb, "--help")
    assert code == 0 and "--json" in out and "Example" in out and f"tcompile {verb if verb != 'compile' else ''}" in out


def test_flags_and_arguments_mirror_each_other():
    """Every flag of `compile` is an argument of tcompile.compile or a property of the command alone, and the other way round."""
    flags = {name for name in inspect.signature(compile_verb).parameters}
    arguments = {name for name in inspect.signature(tcompile.compile).parameters}
    assert flags - arguments == {"output", "shape", "dump_ir", "as_json"}  # shape: one of `shapes`
    later = {"target_latency", "restore_tokens", "generate"}
    assert arguments - flags == {"example_inputs", "shapes"} | later


def test_tables_are_compact(call):
    for verb in ("doctor", "targets"):
        lines = [line for line in call(verb)[1].splitlines() if line.strip()]
        assert lines[0].split()[0] in ("check", "target") and not lines[0].startswith("  ")
        assert max(len(line.rstrip()) for line in lines) <= 120
        assert all("  " * 12 not in line.rstrip() for line in lines if not line.startswith("   "))


def test_peers_that_cannot(call, folder):
    code, _, err = call("bench", "mlp.onnx", "--against", "onnxruntime,torch")
    assert code == 2 and ".pt2" in err and "torch.export.save" in err and "--model" in err
    twice = onnx.load(str(folder / "mlp.onnx"))
    for node in twice.graph.node:
        node.name = "same"  # which onnxruntime does not take
    onnx.save(twice, str(folder / "twice.onnx"))
    code, _, err = call("verify", "twice.onnx")
    assert code == 4 and "onnxruntime cannot run 'twice.onnx'" in err


def test_bench_with_a_file_for_each_peer(call, folder):
    torch = pytest.importorskip("torch")
    torch.export.save(torch.export.export(torch.nn.Linear(4, 3).eval(), (torch.ones(2, 4),)), str(folder / "linear.pt2"))
    code, out, _ = call("bench", "linear.pt2", "--against", "torch", "--rounds", "1", "--json")
    assert code == 0 and set(json.loads(out)["results"]) == {"tcompile", "torch"}


def test_bench_counts_the_rows_that_are_picked(call, folder):
    node = onnx.helper.make_node("Gather", ["w", "i"], ["y"], name="gather")
    model = onnx_models.small([node], {"i": ([3], onnx.TensorProto.INT64)}, ["y"], {"w": np.zeros((5000, 7), "float32")})
    onnx.save(model, folder / "table.onnx")
    code, out, _ = call("bench", "table.onnx", "--layers", "9", "--rounds", "1", "--json")
    kernels = [row for row in json.loads(out)["kernels"] if "gather" in row["nodes"]]
    assert code == 0 and kernels and all(3 * 8 <= row["bytes"] < 1000 for row in kernels)


def test_bench_sets_kernels_beside_the_roofline(call):
    code, out, _ = call("bench", "mlp.onnx", "--layers", "5", "--rounds", "1", "--json")
    (kernel,) = json.loads(out)["kernels"]
    # [2, 4] @ [4, 3] and a relu: two operations per multiply-add, and operands, weights (packed) and result once each
    assert code == 0 and kernel["template"] == "gemm" and kernel["flops"] == 2 * 2 * 4 * 3 + 2 * 3
    assert kernel["bytes"] >= 4 * (2 * 4 + 4 * 3 + 2 * 3) and kernel["measured_us"] > 0 and kernel["share"] == 1
    assert kernel["limit_us"] > 0
    code, out, _ = call("bench", "mlp.onnx", "--layers", "5", "--rounds", "1")
    assert code == 0 and "of the roofline" in out and "GFLOP/s" in out
    call("compile", "mlp.onnx", "-o", "mlp.tcm")
    code, _, err = call("bench", "mlp.tcm", "--layers", "5")
    assert code == 2 and "source model" in err


def test_version_and_bare_help(call):
    assert call("--version")[:2] == (0, tcompile.__version__ + "\n")
    code, out, _ = call("--help")
    assert code == 0 and "tcompile bench resnet50.onnx" in out


def test_python_m_and_closed_pipe(folder):
    done = subprocess.run([sys.executable, "-m", "tcompile", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == tcompile.__version__
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "tcompile", "inspect", "mlp.tcm", "--json"], cwd=folder, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.stderr == ""


def test_an_internal_fault_is_one_line_unless_debug(call, monkeypatch):
    monkeypatch.setattr("tcompile.compiler.api.compile_program", lambda *_: {}["missing"])
    code, _, err = call("mlp.onnx")
    assert code == 1 and "internal fault: KeyError" in err and "--debug" in err and err.count("\n") == 1
    code, _, err = call("mlp.onnx", "--debug")
    assert code == 1 and "Traceback" in err


@pytest.mark.sweep
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["code generation", "writing"])
def test_interrupted_compilation_leaves_nothing(tmp_path, name, moment):
    """The signal arrives while the named stage runs; an older artifact survives."""
    onnx_models.saved_mlp(tmp_path)
    (tmp_path / "mlp.tcm").mkdir()
    (tmp_path / "mlp.tcm" / "manifest.json").write_text("{}")
    code = f"""
import contextlib, sys, time
from tcompile.compiler import progress
from tcompile.compiler.cli.main import main
def pausing(name):
    if name == {moment!r}:
        print("here", flush=True)
        time.sleep(60)
    return contextlib.nullcontext()
progress._lines = pausing
sys.exit(main(["mlp.onnx"]))
"""
    if moment == "writing":  # in the middle of a file, not before the first
        code = code.replace("def pausing", "from tcompile.compiler import artifact_writer\ndef pausing").replace(
            "progress._lines = pausing",
            "progress._lines = contextlib.nullcontext\nartifact_writer._write_weights = lambda path, pieces: (path.write_bytes(b'half'), pausing('writing'))",
        )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "here\n", process.stderr and process.stderr.read()
    time.sleep(0.1)
    process.send_signal(name)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + name, err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.onnx", "mlp.tcm"]
    assert (tmp_path / "mlp.tcm" / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_of_tvm_is_not_swallowed(tmp_path, name):
    """TVM turns an exception of a Python callback into one of its own, which somebody may take for a failed attempt."""
    onnx_models.saved_mlp(tmp_path)
    code = f"""
import os, signal, sys, time
from tcompile.compiler.cli.main import main
from tcompile.targets.common import ops_linear
define = ops_linear.matmul
def signalled(*arguments):
    os.kill(os.getpid(), {int(name)})
    return define(*arguments)
ops_linear.matmul = signalled
sys.exit(main(["mlp.onnx"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 128 + name and "fault" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mlp.onnx"]
