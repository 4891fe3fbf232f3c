"""Attention over codes on CUDA: the emitted source, run thread by thread on the CPU, against numpy; what nvcc makes of it."""

from __future__ import annotations

import re
import shutil

import numpy as np
import onnx
import pytest
import tcompile
from cuda_models import artifact_of, compiled, emulation, program_of, run, templates
from onnx_microsoft import build as build_node
from onnx_microsoft import floats
from tcompile.compiler.dialect.attention_quantized import OPTIONAL, attention_quantized, reference
from tcompile.targets.cuda.machines import MACHINES
from test_attention_quantized import SIDES, operands
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")

#: sizes and options of `operands`: batch, heads, heads that share keys, queries, keys, depth, width
CASES = [
    ((1, 2, 2, 1, 1, 16, 8), {}),
    ((2, 8, 4, 1, 131, 64, 64), {"given": SIDES}),
    ((1, 4, 2, 3, 67, 64, 32), {"bits": (4, 4), "given": OPTIONAL}),
    ((1, 3, 1, 1, 300, 128, 96), {"bits": (4, 8), "given": (*SIDES, "v_zeros"), "signed": False}),
    ((2, 2, 1, 40, 70, 72, 64), {"bits": (8, 4), "given": ("v_scales", "mask")}),
    ((1, 6, 3, 25, 40, 24, 128), {"given": (*SIDES, "k_zeros"), "signed": False}),
]


def each(cases):
    """A graph of one attention for each case, inputs in the order of the cases; (graph, inputs, what numpy makes of them)."""
    inputs, expected, counts = {}, [], []
    for number, (sizes, options) in enumerate(cases):
        q, k, v, optional, attrs = operands(*sizes, **options)
        inputs |= {f"{name}{number}": array for name, array in {"q": q, "k": k, "v": v, **optional}.items()}
        expected.append(reference(q, k, v, optional, **attrs))
        counts.append((list(optional), attrs))

    def build(emit, *x):
        results, at = [], 0
        for names, attrs in counts:
            results.append(emit(attention_quantized(*x[at : at + 3], dict(zip(names, x[at + 3 :], strict=False)), **attrs)))
            at += 3 + len(names)
        return results

    return build, inputs, expected


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("fp32", 6e-6), pytest.param("tf32", 3e-4, marks=pytest.mark.networks), ("bf16", 2e-2), pytest.param("fp16", 2e-3, marks=pytest.mark.networks)],
)
def test_awkward_sizes(precision, tolerance):
    cases = CASES if precision == "fp32" else CASES[1:5]
    build, inputs, expected = each(cases)
    outputs, lowered = run(build, inputs, precision=precision)
    for out, exact in zip(outputs, expected, strict=True):
        assert np.abs(out - exact).max() / np.abs(exact).max() <= tolerance
    assert set(templates(lowered)) == {"attention codes"}


def test_a_long_cache_is_taken_in_parts():
    build, inputs, expected = each(
        [((1, 4, 4, 1, 1030, 32, 32), {"bits": (4, 4), "given": SIDES}), ((1, 3, 3, 9, 700, 32, 20), {"given": ("mask",)})]
    )
    outputs, lowered = run(build, inputs)
    for out, exact in zip(outputs, expected, strict=True):
        assert np.abs(out - exact).max() / np.abs(exact).max() <= 6e-6
    assert templates(lowered) == ["attention codes", "sums"] * 2


def test_heads_that_fill_no_words_are_dequantized():
    build, inputs, (exact,) = each([((1, 2, 1, 3, 9, 6, 16), {"given": SIDES})])
    (out,), lowered = run(build, inputs)
    assert np.abs(out - exact).max() / np.abs(exact).max() <= 6e-6
    assert "attention" in templates(lowered) and "attention codes" not in templates(lowered)


#: decoding and many queries with heads of 128 and 64, zeros known and per token
CODE = [
    ((1, 8, 4, 1, 1024, 128, 128), {"given": SIDES}),
    ((1, 8, 4, 1, 1024, 128, 128), {"bits": (4, 4), "given": OPTIONAL[:4]}),
    ((1, 8, 4, 64, 512, 128, 128), {"bits": (4, 4), "given": SIDES}),
    ((1, 8, 4, 64, 512, 64, 64), {"signed": False}),
]


def golden(arch, precision, cases, tmp_path):
    """Tensor cores, codes that are copied 16 bytes at a time and never converted, nothing in local memory."""
    build, inputs, _ = each(cases)
    lowered = compiled(program_of(build, inputs), f"cuda:{arch}", precision, emit_only=False)
    code = dict(part.partition("\n")[::2] for part in dump(lowered.library, tmp_path, "-sass").split("Function : ")[1:])
    code = {name.strip(): text for name, text in code.items()}
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump(lowered.library, tmp_path, "-res-usage"))
    rows = {f"k_{row['kernel']}": row for row in lowered.report["kernels"]}
    for name, registers, stack, _, local in usage:
        row, text = rows[name], code[name]
        assert int(stack) == int(local) == 0 and int(registers) * row["threads"] <= 65536 and not re.search(r"\b(LDL|STL)\b", text), row
        if row["template"] != "attention codes":
            continue
        assert row["shared_bytes"] <= MACHINES[arch].shared_bytes and not re.search(r"\b(I2F|F2I|I2FP|PRMT\.I2F)\b", text), row
        assert ("HMMA.16816.F32.BF16" if precision != "fp16" else "HMMA.16816.F32 ") in text and "LDGSTS.E.BYPASS.128" in text, row


@needs_nvcc
@needs_cuobjdump
def test_codes_become_numbers_in_registers(tmp_path):
    golden("sm_80", "fp32", CODE[1:3], tmp_path)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(("arch", "precision"), [("sm_90a", "fp32"), ("sm_80", "tf32"), ("sm_90a", "bf16"), ("sm_80", "fp16")])
def test_codes_become_numbers_in_registers_in_every_precision(arch, precision, tmp_path):
    golden(arch, precision, CODE, tmp_path)


def test_open_batch_and_keys():
    """One model for all lengths of a cache, short ones at once and long ones in parts."""
    sizes, options = (2, 4, 2, 1, 9, 32, 32), {"bits": (4, 8), "given": (*SIDES, "k_zeros")}
    q, k, v, optional, attrs = operands(*sizes, **options)
    shapes = {"q": ("b", *q.shape[1:]), **{name: ("b", 2, "t", *array.shape[3:]) for name, array in {"k": k, "v": v, **optional}.items()}}
    kinds = {name: (shapes[name], array.dtype.name) for name, array in {"q": q, "k": k, "v": v, **optional}.items()}

    def build(emit, *x):
        return [emit(attention_quantized(*x[:3], dict(zip(optional, x[3:], strict=True)), **attrs))]

    lowered = compiled(program_of(build, kinds))
    model = emulation(lowered)
    for batch, keys in ((2, 9), (1, 1500)):
        q, k, v, optional, _ = operands(batch, *sizes[1:4], keys, *sizes[5:], **options)
        (out,), exact = model(q, k, v, *optional.values()), reference(q, k, v, optional, **attrs)
        assert np.abs(out - exact).max() / np.abs(exact).max() <= 6e-6
    assert {row["template"] for row in lowered.report["kernels"]} == {"attention codes", "sums"}


def test_a_decoding_step_over_a_quantized_cache_agrees_with_the_cpu():
    """ONNX Runtime's operator from import on: new keys become codes, which join the cache, which the kernel reads."""
    cache = [np.random.default_rng(seed).integers(0, 256, (2, 2, 9, 8)).astype("uint8") for seed in (3, 4)]
    scales = [np.random.default_rng(seed).uniform(0.2, 0.4, (1, 2, 1, 16)).astype("float32") for seed in (5, 6)]
    inputs = [floats(2, 1, 64), floats(2, 1, 32, seed=1), floats(2, 1, 32, seed=2), *cache, np.array([6, 8], "int32"), np.array(9, "int32")]
    kinds = dict.fromkeys("kv", onnx.TensorProto.UINT8)
    attributes = {"num_heads": 4, "kv_num_heads": 2, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 4}
    model, feeds = build_node("GroupQueryAttention", [*inputs, *[None] * 5, *scales], "y k v", constant=(6, 12, 13), kinds=kinds, **attributes)
    artifact = artifact_of(model)
    assert "attention codes" in templates(artifact)
    for ours, theirs in zip(emulation(artifact)(*feeds.values()), tcompile.compile(model)(**feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
