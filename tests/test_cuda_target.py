"""The CUDA target around its kernels: artifacts, toolchain, memory plan, what is refused, and facts of the machine code."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import tcompile
from cuda_models import compiled, emulation, program_of
from onnx_models import mlp
from tcompile.compiler.dialect.attention import attention
from tcompile.compiler.errors import ToolchainError, UnsupportedModel, UsageError
from tcompile.compiler.tvm import relax
from tcompile.compiler.tvm_runtime import load_library
from tcompile.targets.base import Target
from tcompile.targets.cuda import toolchain
from tcompile.targets.cuda.machines import EMIT_ONLY, MACHINES, name_for
from tcompile.targets.cuda.schedule import GemmShape, best_tile, space

op = relax.op
RANDOM = np.random.default_rng(3)


def _nvcc():
    try:
        return toolchain.find_nvcc()
    except ToolchainError:
        return None


def _cuobjdump():
    """cuobjdump with nvdisasm beside it: of a toolkit or of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    folders = [str(path.parent) for root in (spec.submodule_search_locations or [] if spec else []) for path in Path(root).glob("cu*/bin/cuobjdump")]
    found = shutil.which("cuobjdump") or (f"{folders[0]}/cuobjdump" if folders else None)
    return Path(found) if found else None


needs_nvcc = pytest.mark.skipif(_nvcc() is None, reason="nvcc is not installed")
needs_cuobjdump = pytest.mark.skipif(
    _cuobjdump() is None, reason="cuobjdump is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
)
ARCHS = ["sm_80", "sm_90a"]


def network():
    """GEMMs with an epilogue, of computed and of constant operands, a convolution, an attention, a softmax, a gather, an integer GEMM, a sort, merges and both ways to scatter: one kernel of each kind."""
    codes = relax.const(RANDOM.integers(-128, 128, (96, 72), "int8"))
    weight = relax.const(RANDOM.standard_normal((96, 80)).astype("float32"))
    shapes = {"x": (64, 96), "w": (96, 128), "image": (1, 14, 14, 16), "kernel": (3, 3, 16, 32), "q": (1, 2, 64, 64)}
    inputs = {name: RANDOM.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    inputs["bytes"] = RANDOM.integers(0, 256, (64, 96), "uint8")
    inputs["long"] = RANDOM.integers(0, 90, 5000)

    def build(emit, x, w, image, kernel, q, octets, long):
        return [
            emit(op.nn.gelu(emit(op.matmul(x, w)))),
            emit(op.nn.relu(emit(op.nn.conv2d(image, kernel, 1, 1, 1, 1, "NHWC", "HWIO", "NHWC")))),
            emit(attention(q, q, q, causal=True)),
            emit(op.nn.softmax(x)),
            emit(op.sin(x)),
            emit(op.matmul(octets, codes, out_dtype="int32")),
            emit(op.nn.silu(emit(op.matmul(x, weight)))),
            emit(op.topk(x, 5, ret_type="values")),
            emit(op.argsort(long)),
            emit(op.scatter_elements(emit(op.zeros((90,), "float32")), long, emit(op.astype(long, "float32")), 0, "add")),
            emit(op.scatter_nd(x, relax.const(np.array([[3], [9]])), emit(op.strided_slice(x, [0], [0], [2])), "max")),
        ]

    return program_of(build, inputs), inputs


@functools.cache
def built(arch, precision):
    return compiled(network()[0], f"cuda:{arch}", precision, emit_only=False)


def dump(library, folder, *flags):
    """What cuobjdump says of a library; it finds nvdisasm in its own folder."""
    path = folder / "lib.so"
    path.write_bytes(library)
    tool = _cuobjdump()
    environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    return subprocess.run([tool, *flags, path], capture_output=True, text=True, env=environment, check=True).stdout


@pytest.mark.sweep
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(("precision", "arch"), [("fp32", "sm_80"), ("fp32", "sm_90a"), ("bf16", "sm_80"), ("fp16", "sm_90a")])
def test_products_are_on_tensor_cores_and_nothing_spills(arch, precision, tmp_path):
    lowered = built(arch, precision)
    code = {}
    for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        code[name.strip()] = text
    floats = {"fp32": "HMMA.1688.F32.TF32", "fp16": "HMMA.16816.F32 ", "bf16": "HMMA.16816.F32.BF16"}[precision]
    for row in lowered.report["kernels"]:
        text = code[f"k_{row['kernel']}"]
        instruction = "IMMA.16832.U8.S8" if "U8S8" in row["workload"] else floats
        assert (instruction in text) == (row["template"] in ("gemm", "conv2d", "attention")), row
        assert not re.search(r"\b(LDL|STL)\b", text), row  # local memory: spills and indexed registers
        assert ("LDGSTS" in text) == (instruction in text)  # asynchronous copies feed the tensor cores
        if (
            "16x2" in row["workload"]
        ):  # numbers of 16 bits in memory: eight in a copy; those of attention's values are parted on their way to the registers
            assert "LDGSTS.E.BYPASS.128" in text and ("LDSM.16.MT88.4" in text) == (row["template"] == "attention")
    assert sum("16x2" in row["workload"] for row in lowered.report["kernels"]) == (2 if precision in ("fp16", "bf16") else 0)
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump(lowered.library, tmp_path, "-res-usage"))
    assert {name for name, *_ in usage} == set(code)
    limit = Target.parse(f"cuda:{arch}").shared_bytes
    shared = {f"k_{row['kernel']}": (row["shared_bytes"], row["threads"]) for row in lowered.report["kernels"]}
    for name, registers, stack, static_bytes, local in usage:
        assert int(stack) == int(local) == 0
        assert int(static_bytes) + shared[name][0] <= limit
        assert int(registers) * shared[name][1] <= 65536


@needs_nvcc
def test_the_library_loads_without_a_gpu_and_refuses_other_tensors():
    lowered = built("sm_80", "fp32")
    main = load_library(lowered.library)["main"]
    with pytest.raises(RuntimeError, match="expected 21 tensors, got 0"):
        main()
    sizes = [lowered.report["memory"]["workspace_bytes"], lowered.report["weights_bytes"]]
    tensors = [np.zeros(size, np.uint8) for size in sizes] + [np.zeros(1, np.int32)]
    tensors += [np.zeros(spec.shape, spec.dtype) for spec in (*lowered.inputs, *lowered.outputs)]
    from tcompile.compiler.tvm_runtime import from_dlpack

    with pytest.raises(RuntimeError, match="workspace: expected a tensor on a CUDA device"):
        main(*map(from_dlpack, tensors))


@needs_nvcc
def test_equal_compilations_give_equal_bytes():
    again = compiled(network()[0], "cuda:sm_80", "fp32", emit_only=False)
    assert again.sources == built("sm_80", "fp32").sources
    assert again.library == built("sm_80", "fp32").library


@pytest.mark.parametrize("target", ["cuda", "cuda:sm_80", "cuda:sm_90a"])
def test_an_artifact_of_sources_is_saved_loaded_and_says_what_it_needs(tmp_path, target, monkeypatch):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: pytest.fail("--emit-only needs no nvcc"))
    model = tcompile.compile(mlp(5, layers=2), target=target, emit_only=True)
    path = model.save(tmp_path / "mlp.tcm")
    text = (path / "source" / "model.cu").read_text()
    assert "tc::gemm<tc::Fp32" in text and "nvcc -shared" in text and "__tvm_ffi_main" in text
    assert [row["template"] for row in model.report()["kernels"]] == ["gemm", "gemm"]
    assert model.report()["precision"]["name"] == "fp32"
    with pytest.raises(ToolchainError, match="holds sources alone"):
        tcompile.load(path)
    with pytest.raises(ToolchainError):
        model(np.zeros((5, 4), np.float32))


def test_an_emulated_model_agrees_with_the_cpu_target():
    if shutil.which("g++") is None:
        pytest.skip("the emulation needs g++")
    x = RANDOM.standard_normal((5, 4)).astype("float32")
    (ours,) = emulation(tcompile.compile(mlp(5, layers=3), target="cuda", emit_only=True).artifact)(x)
    np.testing.assert_allclose(ours, tcompile.compile(mlp(5, layers=3))(x), rtol=1e-5, atol=1e-6)


def test_loading_where_there_is_no_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    artifact = tcompile.compile(mlp(), target="cuda", emit_only=True).artifact
    from dataclasses import replace

    from tcompile.compiler.cuda_runtime import GpuModel

    with pytest.raises(ToolchainError, match="the artifact is for cuda:sm_80, and torch .* finds no CUDA device here"):
        GpuModel(replace(artifact, library=b"x"))


def test_devices_that_run_an_artifact():
    from types import SimpleNamespace

    from tcompile.compiler.cuda_runtime import require_capability

    def ask(target, capability):
        require_capability(SimpleNamespace(manifest={"target": {"text": target}}), capability)

    ask("cuda:sm_80", (8, 0))
    ask("cuda:sm_80", (8, 6))
    ask("cuda:sm_86", (8, 9))
    ask("cuda:sm_90a", (9, 0))
    for target, capability in (("cuda:sm_80", (9, 0)), ("cuda:sm_89", (8, 6)), ("cuda:sm_90a", (10, 0)), ("cuda:sm_80", (7, 5))):
        with pytest.raises(ToolchainError, match="compute capability"):
            ask(target, capability)


def test_without_nvcc_the_packages_are_named(monkeypatch):
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain, "_packaged", lambda: [])
    monkeypatch.setattr(toolchain, "TOOLKITS", ())
    with pytest.raises(ToolchainError, match="nvcc is not installed: pip install nvidia-cuda-nvcc"):
        tcompile.compile(mlp(), target="cuda")


def test_nvcc_of_the_package_is_found(monkeypatch, tmp_path):
    tool = tmp_path / "cu13" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain, "TOOLKITS", ())
    monkeypatch.setattr(toolchain, "_packaged", lambda: [tmp_path / "cu13"])
    assert toolchain.find_nvcc() == tool


def test_what_nvcc_says_is_shown(tmp_path):
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\necho 'model.cu(7): error: no such thing' >&2\nexit 2\n")
    tool.chmod(0o755)
    with pytest.raises(ToolchainError, match="no such thing"):
        toolchain.build({"model.cu": "x"}, "sm_80", tool)


def test_every_gpu_has_sources():
    """sm_100a those alone; the tiles of the others fit into what a block may have of their shared memory."""
    program = network()[0]
    for arch, target in MACHINES.items():
        lowered = compiled(program, f"cuda:{arch}", emit_only=True)
        assert all(row["shared_bytes"] <= target.shared_bytes for row in lowered.report["kernels"])
    for arch in EMIT_ONLY:
        with pytest.raises(UsageError, match="--emit-only"):
            compiled(program, f"cuda:{arch}", emit_only=False)


def test_the_gpu_of_this_machine():
    wanted = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): None, (7, 5): None}
    assert {capability: name_for(*capability) for capability in wanted} == wanted
    assert Target.parse("cuda").name in MACHINES


def test_bad_requests():
    with pytest.raises(UsageError, match="unknown GPU 'cuda:sm_75': expected one of sm_100a, sm_80, sm_86, sm_89, sm_90a"):
        Target.parse("cuda:sm_75")
    with pytest.raises(UsageError, match="expected one of fp32, tf32, fp16, bf16"):
        tcompile.compile(mlp(), target="cuda", precision="fp8", emit_only=True)
    with pytest.raises(UsageError, match="--emit-only is for CUDA targets"):
        tcompile.compile(mlp(), target="cpu", emit_only=True)


def test_what_has_no_kernel_is_refused_by_name():
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3, 3])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Det", ["x"], ["y"], name="volume")], "determinant", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(UnsupportedModel, match="tcompile.determinant has no CUDA kernel"):
        tcompile.compile(model, target="cuda", emit_only=True)


@pytest.mark.parametrize("arch", sorted(MACHINES))
def test_schedules_fit_the_machine(arch):
    target = Target.parse(f"cuda:{arch}")
    for many, most in ((False, 32), (True, 64)):
        for tile in space(target, many):
            assert tile.shared_bytes <= target.shared_bytes and tile.threads <= 1024
            assert tile.bm * tile.bn // tile.threads <= most  # accumulators a thread
    small, large = (best_tile(GemmShape(1, size, size, size), target, "Fp32") for size in (128, 4096))
    assert small.bm * small.bn < large.bm * large.bn  # few blocks want small tiles, many want to read less
    short = best_tile(GemmShape(1, 4096, 2048, 4096), target, "Bf16x2")
    assert short.bm * short.bn // short.threads == 64 or target.shared_bytes < 100 << 10  # where its stages fit twice
