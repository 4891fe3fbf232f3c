"""Code for another machine: it runs here where this host has what it needs, gives the same numbers, and holds no instruction of a wider machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
import tcompile
from tcompile.compiler.api import import_model
from tcompile.compiler.artifact import build
from tcompile.compiler.compare import agree
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.pipeline import lower
from tcompile.compiler.runtime import CompiledModel
from tcompile.compiler.tvm import tvm
from tcompile.models.zoo import ZOO
from tcompile.targets.base import Target
from tcompile.targets.cpu.host import FLAGS, host_features
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.machines import MACHINES

onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

FOREIGN = {
    "haswell": r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])|\{%k|vpdpbusd|vdpbf16",
    "skylake-avx512": r"vpdpbusd|vpdpwssd|vdpbf16ps|vcvtne\w*bf16|vpermb\b|vpermi2b|vpshld|vpopcnt[bwdq]|gf2p8",
}


def network(name: str):
    """(program, feeds, reference outputs): PP-OCR's classifier beside onnxruntime, or two layers of BERT-base beside torch."""
    entry = ZOO[name]
    if name == "ppocr-cls":
        feeds = entry.example_inputs()
        program = import_model(entry.onnx_path(), shapes={key: value.shape for key, value in feeds.items()})
        return program, feeds, onnxruntime.InferenceSession(str(entry.onnx_path())).run(None, feeds)
    module, feeds = entry.torch_module(layers=2), entry.example_inputs(seq=24)
    with torch.inference_mode():
        result = module(**{key: torch.from_numpy(value) for key, value in feeds.items()})
    values = result if isinstance(result, tuple) else tuple(result.values()) if hasattr(result, "values") else (result,)
    return import_model(module, example_inputs=feeds), feeds, [value.numpy() for value in values]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("machine", "name"), [pytest.param("haswell", "ppocr-cls", marks=pytest.mark.networks), ("haswell", "bert-base"), ("skylake-avx512", "bert-base")]
)
def test_runs_here_and_is_pure(name, machine):
    target = Target.parse(f"cpu:{machine}")
    program, feeds, want = network(name)
    lowered = lower(program, target, CompileOptions(threads=1))
    artifact = build(lowered)
    assembly = disassembled(artifact.library)
    assert re.search("vfmadd.*%zmm" if machine != "haswell" else "vfmadd.*%ymm", assembly)
    assert not (found := re.search(rf".*({FOREIGN[machine]}).*", assembly)), found[0]
    if missing := target.features - host_features():
        pytest.skip(f"the code was checked but not run: this host lacks {', '.join(sorted(missing))}")
    result = CompiledModel(artifact)(**feeds)
    for ours, theirs in zip(result if isinstance(result, tuple) else (result,), want, strict=True):
        agreement = agree(ours, theirs)
        assert agreement.ok, agreement


def disassembled(library: bytes) -> str:
    """All code of a shared library, by the binutils that linked it."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed (apt install binutils)")
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        return subprocess.run(["objdump", "-d", "--no-show-raw-insn", file.name], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", MACHINES)
def test_manifest_names_what_llvm_will_use(name):
    """An artifact is refused where the host lacks a feature of its manifest; so none that LLVM takes for granted may be left out of it."""
    enabled = {str(feature) for feature in tvm.target.codegen.llvm_get_cpu_features(tvm_target(MACHINES[name]))}
    assert MACHINES[name].features == enabled & set(FLAGS.values())


def test_code_for_a_machine_this_host_is_not(tmp_path):
    """Compiles and saves; loading it is refused by name where a feature is missing."""
    import onnx_models

    exotic = [machine for machine in MACHINES.values() if machine.features - host_features()]
    if not exotic:
        pytest.skip("this host has the features of every machine")
    path = tcompile.compile(onnx_models.saved_mlp(tmp_path), target=exotic[-1].text).save(tmp_path / "x.tcm")
    with pytest.raises(tcompile.ToolchainError, match=sorted(exotic[-1].features - host_features())[0]):
        tcompile.load(path)
    assert np.isfinite(tcompile.compile(onnx_models.saved_mlp(tmp_path))(np.ones((2, 4), "float32"))).all()
