"""Real networks for the CUDA target: what they become, and, run thread by thread on the CPU (minutes), whether they agree with onnxruntime."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import tcompile
from cuda_models import emulation
from tcompile.compiler.api import import_model
from tcompile.compiler.compare import agree
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.pipeline import lower
from tcompile.models import text
from tcompile.models.zoo import ZOO
from tcompile.passes.token_pruning.prune import TokenPruning
from tcompile.targets.base import Target
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc
from test_cuda_weight_only import check_code

#: network -> dims, calls of each tensor-core template
NETWORKS = {
    "minilm": ({"seq": 128}, {"gemm": 36, "attention": 6}),
    "vit-s16": ({}, {"conv2d": 1, "gemm": 49, "attention": 12}),
    "resnet50": ({}, {"conv2d": 53, "gemm": 1}),
    "smollm2": ({"seq": 16}, {"gemm": 211, "attention": 30}),
}


def lowered(name):
    entry = ZOO[name]
    feeds = entry.example_inputs(**NETWORKS[name][0])
    program = import_model(str(entry.onnx_path()), shapes={key: value.shape for key, value in feeds.items()})
    return lower(program, Target.parse("cuda:sm_90a"), CompileOptions(emit_only=True)), feeds


def check_templates(name, code):
    calls = Counter()
    for row in code.report["kernels"]:
        calls[row["template"]] += row["calls"]
        # what is not a product is no matrix multiplication in disguise: its rows are walked once
        assert "matmul" not in row["kernel"] or row["template"] in ("gemm", "sums"), row
    assert {kind: calls[kind] for kind in ("gemm", "conv2d", "attention") if calls[kind]} == NETWORKS[name][1]
    assert code.report["memory"]["workspace_bytes"] < code.report["memory"]["unshared_bytes"] / 3


def test_minilm_has_every_product_on_tensor_cores():
    check_templates("minilm", lowered("minilm")[0])


@pytest.mark.networks
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_onnxruntime(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    code, feeds = lowered(name)
    check_templates(name, code)
    ours = emulation(code)(*feeds.values())
    session = onnxruntime.InferenceSession(str(ZOO[name].onnx_path()))
    for mine, want in zip(ours, session.run([spec.name for spec in code.outputs], feeds), strict=True):
        assert agree(mine, np.asarray(want)).ok


@pytest.mark.networks
def test_minilm_in_int8_has_every_product_on_integer_tensor_cores():
    feeds = ZOO["minilm"].example_inputs(seq=16)
    options = {"shapes": {name: value.shape for name, value in feeds.items()}, "quantize": "int8", "calibration": [feeds]}
    code = tcompile.compile(str(ZOO["minilm"].onnx_path()), target="cuda:sm_80", emit_only=True, **options)
    calls = Counter((row["template"], "U8S8" in row["workload"]) for row in code.report()["kernels"] for _ in range(row["calls"]))
    assert calls["gemm", True] == 36 and calls["gemm", False] == 0
    ours, exact = emulation(code.artifact)(*feeds.values())[0], tcompile.compile(str(ZOO["minilm"].onnx_path()))(**feeds)
    exact = exact[0] if isinstance(exact, tuple) else exact
    assert (ours * exact).sum() / np.sqrt((ours**2).sum() * (exact**2).sum()) > 0.98


@pytest.mark.networks
@pytest.mark.parametrize(
    ("name", "seq", "target"),
    [
        ("minilm", 16, "cuda:sm_80"),
        ("mobilenetv3-l", None, "cuda:sm_80"),
        ("minilm", 256, "cuda:sm_90a"),
        ("vit-s16", None, "cuda:sm_90a"),
        ("resnet50", None, "cuda:sm_90a"),
    ],
)
def test_networks_in_bf16_agree_with_the_cpu_target(name, seq, target):
    """The same pass rounds for both, so what differs is the order of sums, and what that rounds the other way."""
    entry = ZOO[name]
    feeds = entry.example_inputs(**({"seq": seq} if seq else {}))
    options = {"shapes": {key: value.shape for key, value in feeds.items()}, "precision": "bf16"}
    code = tcompile.compile(str(entry.onnx_path()), target=target, emit_only=True, **options)
    products = [row for row in code.report()["kernels"] if row["template"].split()[0] in ("gemm", "conv2d", "attention")]
    assert any("hopper" in row["template"] for row in products) == (target == "cuda:sm_90a")
    assert all("Bf16x2" in row["workload"] for row in products)
    ours = emulation(code.artifact)(*feeds.values())[0].astype("float64")
    same, exact = (
        np.asarray(tcompile.compile(str(entry.onnx_path()), **(options | {"precision": precision}))(**feeds)) for precision in ("bf16", "fp32")
    )
    assert np.linalg.norm(ours - same) < np.linalg.norm(same - exact)
    assert np.linalg.norm(ours - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.networks
def test_fewer_tokens_are_those_of_the_cpu_target():
    """ViT-S with 70 % of its tokens in each of three layers: one token chosen otherwise would show."""
    entry = ZOO["vit-s16"]
    feeds = entry.example_inputs()
    options = {"shapes": {name: value.shape for name, value in feeds.items()}, "token_keep": TokenPruning(0.7, "drop")}
    code = tcompile.compile(str(entry.onnx_path()), target="cuda:sm_80", emit_only=True, **options)
    same, full = (np.asarray(tcompile.compile(str(entry.onnx_path()), **(options | more))(**feeds)) for more in ({}, {"token_keep": None}))
    assert agree(emulation(code.artifact)(*feeds.values())[0], same).ok
    assert np.abs(same - full).max() > 1e-3 * np.abs(full).max()


@pytest.mark.networks
@pytest.mark.parametrize("name", ["deberta", "mixtral", "regnet", "sequencer", "seresnet"])
def test_small_networks_agree_with_pytorch(name):
    """Masks of truth values, experts that are sorted and scattered to, groups, recurrent layers, and gates beside a shortcut."""
    torch = pytest.importorskip("torch")
    from timm_networks import TIMM
    from transformers_networks import TRANSFORMERS

    network = {**TIMM, **TRANSFORMERS}[name]
    module, inputs = network.build(), network.example()
    code = tcompile.compile(module, example_inputs=tuple(inputs.values()), target="cuda:sm_80", emit_only=True)
    assert not any(row["template"].startswith("rows") and "conv2d" in row["kernel"] for row in code.report()["kernels"])
    with torch.no_grad():
        want = module(*inputs.values()).numpy()
    assert agree(emulation(code.artifact)(*(value.numpy() for value in inputs.values()))[0], want).ok


@functools.cache
def decoding():
    """SmolLM2's decoding step behind a cache of 7 tokens, what it is called with, and what the CPU target makes of it with weights of 4 bits."""
    torch = pytest.importorskip("torch")
    decoder = text.smollm2()
    sizes = decoder.model.config
    shape = (sizes.num_hidden_layers, 1, sizes.num_key_value_heads, 7, sizes.hidden_size // sizes.num_attention_heads)
    keys, values = (torch.from_numpy(0.3 * np.random.default_rng(seed).standard_normal(shape).astype("float32")) for seed in (0, 1))
    step, inputs = text.decode_step(decoder), (torch.tensor([[504]]), keys, values)
    feeds = [value.numpy() for value in inputs]
    return step, inputs, feeds, tcompile.compile(step, example_inputs=inputs, quantize="w4")(*feeds)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_smollm2_decodes_with_weights_of_4_bits(arch, tmp_path):
    step, inputs, feeds, same = decoding()
    artifact = tcompile.compile(step, example_inputs=inputs, target=f"cuda:{arch}", quantize="w4").artifact
    rows = {f"k_{row['kernel']}": row for row in artifact.report["kernels"]}
    assert sum(row["calls"] for row in rows.values() if row["template"] == "weight only") == 30 * 7 + 1
    for part in dump(artifact.library, tmp_path, "-sass").split("Function : ")[1:]:
        check_code(rows[part.partition("\n")[0].strip()], part, "BF16")
    for mine, want in zip(emulation(artifact)(*feeds), same, strict=True):
        assert np.abs(mine - want).max() < 1e-5 * np.abs(want).max()
