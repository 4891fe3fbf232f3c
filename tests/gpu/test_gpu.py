"""On a GPU: every test of the kernels again, whole networks against onnxruntime, streams, graphs and bad indices. `make gpu-test`."""

from __future__ import annotations

import functools
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_models
import numpy as np
import pytest
import tcompile
import test_cuda_attention_hopper
import test_cuda_blocks
import test_cuda_depthwise
import test_cuda_dynamic
import test_cuda_half
import test_cuda_hopper
import test_cuda_kernels
import test_cuda_recurrent
import test_cuda_selection
import test_cuda_sparse
import test_cuda_weight_only
import test_cuda_weight_only_hopper
from tcompile.compiler import artifact
from tcompile.compiler.compare import agree
from tcompile.compiler.cuda_runtime import GpuModel
from tcompile.models.zoo import ZOO

NETWORKS = {
    "minilm": {"input_ids": (1, 128), "attention_mask": (1, 128)},
    "vit-s16": {"x": (1, 3, 224, 224)},
    "resnet50": {"x": (1, 3, 224, 224)},
    "smollm2": {"input_ids": (1, 128)},
}


class _OnGpu:
    """A lowered program, or an artifact, on the GPU, as the emulation is called."""

    def __init__(self, lowered):
        self._inputs = lowered.inputs
        self._model = GpuModel(lowered if isinstance(lowered, artifact.Artifact) else artifact.build(lowered))
        self.error = 0

    def __call__(self, *values):
        import torch

        tensors = [self._model._tensor(np.asarray(value), spec, torch.device("cuda")) for value, spec in zip(values, self._inputs, strict=True)]
        results = self._model(tensors, self._inputs)
        self.error = max(int(word.item()) for word in self._model._errors.values())
        return tuple(self._model._array(item.cpu()) for item in (results if isinstance(results, tuple) else (results,)))


KERNEL_TESTS = [
    (module, name, [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"])
    for module in (test_cuda_kernels, test_cuda_half, test_cuda_selection, test_cuda_depthwise, test_cuda_recurrent)
    for name, test in sorted(vars(module).items())
    if name.startswith("test_") and "tmp_path" not in inspect.signature(test).parameters  # that look at code alone
]
CASES = [
    (module, name, case if isinstance(case, tuple) else (case,))
    for module, name, marks in KERNEL_TESTS
    for case in (marks[0].args[1] if marks else [()])
]
IDS = [f"{name}-{case[0]}" if case else name for _, name, case in CASES]


def bound(test, arguments, monkeypatch):
    """The test with its arguments, and the one fixture that some of them take. Raises TypeError where it takes others."""
    more = {"monkeypatch": monkeypatch} if "monkeypatch" in inspect.signature(test).parameters else {}
    inspect.signature(test).bind(*arguments, **more)
    return functools.partial(test, *arguments, **more)


@pytest.fixture
def on_gpu(gpu, monkeypatch):
    """The target of the GPU, on which the kernels' own checks run now."""
    monkeypatch.setattr(cuda_models, "RUNNERS", [_OnGpu])
    monkeypatch.setattr(cuda_models, "TARGETS", [gpu])
    return gpu


@pytest.fixture
def on_hopper(on_gpu):
    """The same where it has wgmma."""
    if on_gpu != test_cuda_hopper.TARGET:
        pytest.skip(f"no wgmma on {on_gpu}")
    return on_gpu


@pytest.mark.parametrize(("module", "name", "arguments"), CASES, ids=IDS)
def test_kernels(on_gpu, monkeypatch, module, name, arguments):
    monkeypatch.setattr(module, "RANDOM", np.random.default_rng(7))
    bound(getattr(module, name), arguments, monkeypatch)()


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (test_cuda_hopper.test_products_of_awkward_sizes, (test_cuda_hopper.PRODUCTS,)),
        (test_cuda_hopper.test_batches_epilogues_and_bytes, ()),
        (test_cuda_hopper.test_windows_of_convolutions, ()),
    ],
)
def test_hopper(on_hopper, monkeypatch, test, arguments):
    test(test_cuda_hopper.forced_tiles(monkeypatch), *arguments)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("test", [test_cuda_attention_hopper.test_awkward_sizes, test_cuda_attention_hopper.test_blocks_take_several_pieces_of_work])
def test_attention_hopper(on_hopper, monkeypatch, test, precision):
    arguments = (test_cuda_attention_hopper.CASES,) if "cases" in inspect.signature(test).parameters else ()
    test(monkeypatch, *arguments, precision=precision)


@pytest.mark.parametrize("tokens", [4096, 8192])
@pytest.mark.parametrize("causal", [False, True])
def test_long_attention(gpu, tokens, causal):
    """As prefill has it; on sm_90a the Hopper template's, whose blocks take many pieces of work."""
    import onnx
    import torch

    shape, kind = (1, 16, tokens, 128), onnx.TensorProto.FLOAT16
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name in "qkvy"]
    node = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(causal))
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "attention", values[:3], values[3:]), opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11
    )
    model = tcompile.compile(model, target=gpu, precision="fp16")
    assert gpu != test_cuda_hopper.TARGET or model.report()["kernels"][0]["template"] == "attention hopper"
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().cuda() for seed in range(3))
    y = model(q, k, v).double()
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal).double()
    assert ((y - exact).norm() / exact.norm()).item() < 2e-3


@pytest.mark.parametrize(
    "test",
    [
        test_cuda_dynamic.test_products_with_open_rows_batches_columns_and_depth,
        test_cuda_dynamic.test_attention_with_open_batch_queries_and_keys,
        test_cuda_dynamic.test_everything_else_with_open_sizes,
        test_cuda_dynamic.test_the_workspace_grows_with_the_sizes_and_tensors_share_it,
        test_cuda_dynamic.test_sizes_that_do_not_fit_raise,
    ],
)
def test_open_sizes(on_gpu, monkeypatch, test):
    test()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_weight_only(on_gpu, monkeypatch, precision):
    test_cuda_weight_only.check(test_cuda_weight_only.CASES, precision, monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weight_only_hopper(on_hopper, monkeypatch, precision):
    test_cuda_weight_only_hopper.check(test_cuda_weight_only_hopper.CASES, precision, monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sparse(on_gpu, monkeypatch, precision):
    test_cuda_sparse.check(precision, monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "int8"])
def test_sparse_blocks(on_gpu, monkeypatch, precision):
    test_cuda_blocks.check(test_cuda_blocks.blocks.BlockGemm, test_cuda_blocks.CASES, precision, monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_sparse_blocks_on_hopper(on_hopper, monkeypatch, precision):
    test_cuda_blocks.check_on_hopper(test_cuda_blocks.ON_HOPPER, precision, monkeypatch)


@pytest.mark.networks
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(gpu, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    entry = ZOO[name]
    feeds = {key: value for key, value in entry.example_inputs(**({"seq": 128} if "seq" in entry.dims else {})).items()}
    model = tcompile.compile(str(entry.onnx_path()), target=gpu, shapes=NETWORKS[name])
    ours = model(**feeds)
    session = onnxruntime.InferenceSession(str(entry.onnx_path()))
    for mine, want in zip(ours if isinstance(ours, tuple) else (ours,), session.run([spec.name for spec in model.outputs], feeds), strict=True):
        assert agree(mine, want).ok


def _mlp(gpu):
    from onnx_models import mlp

    return tcompile.compile(mlp(5, layers=3), target=gpu), tcompile.compile(mlp(5, layers=3))


def test_cuda_tensors_stay_on_the_device_and_follow_torchs_stream(gpu):
    import torch

    model, plain = _mlp(gpu)
    x = torch.randn(5, 4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = model(x.cuda())
    stream.synchronize()
    assert y.is_cuda
    np.testing.assert_allclose(y.cpu().numpy(), plain(x.numpy()), rtol=1e-5, atol=1e-6)


def _replayed(model, x, later):
    """What a captured call of the model gives once x holds other values."""
    import torch

    model(x)  # weights on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    x.copy_(later)
    graph.replay()
    torch.cuda.synchronize()
    return y


def test_a_call_can_be_captured_in_a_graph(gpu):
    import torch

    model, plain = _mlp(gpu)
    x = torch.randn(5, 4, device="cuda")
    y = _replayed(model, x, torch.randn(5, 4))
    np.testing.assert_allclose(y.cpu().numpy(), plain(x.cpu().numpy()), rtol=1e-5, atol=1e-6)


def test_one_artifact_takes_several_sizes_and_each_can_be_captured(gpu):
    import torch
    from onnx_models import mlp

    model, plain = tcompile.compile(mlp("n", layers=3), target=gpu), tcompile.compile(mlp("n", layers=3))
    for n in (1, 5, 300):
        x = torch.randn(n, 4)
        np.testing.assert_allclose(model(x.cuda()).cpu().numpy(), plain(x.numpy()), rtol=1e-5, atol=1e-6)
    for n in (5, 300):
        x = torch.randn(n, 4, device="cuda")
        y = _replayed(model, x, torch.randn(n, 4))
        np.testing.assert_allclose(y.cpu().numpy(), plain(x.cpu().numpy()), rtol=1e-5, atol=1e-6)


def test_a_large_product_can_be_captured_in_a_graph(gpu):
    """On sm_90a the Hopper template's, whose tensor maps are parameters of the launch."""
    import onnx
    import torch

    w = (torch.randn(1024, 2048) / 32).half()
    sizes = (("x", [1024, 1024]), ("y", [1024, 2048]))
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, dims) for name, dims in sizes)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [onnx.numpy_helper.from_array(w.numpy(), "w")]
    )
    model = tcompile.compile(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), target=gpu)
    assert gpu != test_cuda_hopper.TARGET or [row["template"] for row in model.report()["kernels"]] == ["gemm hopper"]
    x = torch.randn(1024, 1024).half().cuda()
    y = _replayed(model, x, torch.randn(1024, 1024))
    exact = x.cpu().double() @ w.double()
    assert ((y.cpu().double() - exact).norm() / exact.norm()).item() < 1e-3


def test_an_index_out_of_range_is_found_by_check(gpu):
    import onnx

    nodes = [onnx.helper.make_node("Gather", ["x", "i"], ["y"], name="pick")]
    x, i = (onnx.helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in (("x", 1, [4, 3]), ("i", 7, [2])))
    graph = onnx.helper.make_graph(nodes, "gather", [x, i], [onnx.helper.make_tensor_value_info("y", 1, [2, 3])])
    model = tcompile.compile(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), target=gpu)
    with pytest.raises(tcompile.TcompileError, match="index out of range.*pick"):
        model(np.zeros((4, 3), np.float32), np.array([1, 9]))
    model(np.zeros((4, 3), np.float32), np.array([1, 3]))


#: tests that reach every template, each with its first case
SANITIZED = (
    "gemm_of_awkward",
    "few_rows",
    "convolution_is",
    "integer_products",
    "attention_with",
    "few_queries",
    "everything_else",
    "attention_reads_16",
    "sorting_of",
    "scattering_in",
    "depthwise_tiles",
    "grouped_convolutions",
    "layers_of_awkward",
    "test_hopper",
    "attention_hopper[test_blocks",
    "weight_only",
    "sparse",
)


def sanitized():
    """Names of those tests."""
    names = [f"test_kernels[{key}]" for key in IDS] + [
        "test_hopper[test_products_of_awkward_sizes]",
        "test_attention_hopper[test_blocks_take_several_pieces_of_work-fp16]",
        "test_weight_only[fp16]",
        "test_sparse[fp16]",
    ]
    return [next(name for name in names if part in name) for part in SANITIZED]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(gpu, tool):
    """Every template under one tool after the other, in a process of its own."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
    here = Path(__file__)
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(here.parents[2]),
        *(f"{here}::{name}" for name in sanitized()),
    ]
    done = subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "86", *run], capture_output=True, text=True, cwd=here.parents[2])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
