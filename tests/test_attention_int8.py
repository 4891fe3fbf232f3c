"""Scores of attention by 8-bit codes: the kernel against numpy's codes on awkward sizes, sums at their limits, the instructions, and the pass before and after."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import tcompile
import torch
from kernels import attention_module
from machines import HASWELL, runnable
from tcompile.compiler.dialect.attention import reference as exact
from tcompile.compiler.dialect.attention_int8 import SHORT, reference
from tcompile.compiler.errors import UsageError
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.passes.attention.scores import Int8Scores
from tcompile.passes.base import PassContext
from tcompile.targets.base import Target
from tcompile.targets.common.fused import analyze
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu import ops_attention, ops_attention_int8
from tcompile.targets.cpu.attention import Attention, AttentionSchedule
from tcompile.targets.cpu.generic import schedule as generic
from tcompile.targets.cpu.lower import own_dims, tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE

RANDOM = np.random.default_rng(0)
VNNI = Target.parse("cpu:cascadelake")


def passed(types, target=HASWELL, smooth=False, **attrs):
    """(the module of one attention over operands of these (shape, dtype) after the pass, its context)."""
    module = attention_module(types, **attrs)
    specs = tuple(TensorSpec(param.name, (), "float32") for param in module["main"].params)
    context = PassContext(target)
    return Int8Scores(smooth=smooth).run(Program(module, specs, specs[:1], Provenance("test", "relax")), context).module, context


def scheduled(module, target, schedule=None, pick=0.5):
    """Functions of TIR: the attention by the template, the others by the generic scheduler."""
    module = legalize(module, {**ops_attention.OWN, **ops_attention_int8.OWN})
    kernels = []
    for variable, func in list(module.functions_items()):
        if not isinstance(func, tirx.PrimFunc):
            continue
        if variable.name_hint == "attention":
            fused, template = analyze(own_dims(func)), Attention()
            workload = template.workload(fused, frozenset())
            space = template.space(workload, target)
            kernels.append(template.build(fused, workload, schedule or space[int(pick * (len(space) - 1))], target).func)
            module.update_func(variable, kernels[-1])
        else:
            module.update_func(variable, generic(func, target).func)
    return module, kernels


def run(arrays, target, schedule=None, pick=0.5, types=None, **attrs):
    module, kernels = scheduled(passed(types or [(array.shape, str(array.dtype)) for array in arrays], target, **attrs)[0], target, schedule, pick)
    assert len(kernels) == 1
    main = relax.VirtualMachine(relax.build(module, tvm_target(target), tir_pipeline=TIR_PIPELINE), tvm.cpu())["main"]
    result = main(*(tvm.runtime.tensor(array) for array in arrays))
    return tuple(part.numpy() for part in result) if attrs.get("received") or attrs.get("logsum") else (result.numpy(),)


def largest(target):
    return 127 if "int8" in target.formats else SHORT


def operands(batch, heads, groups, queries, keys, depth, width, mask="none", layout="BHSD"):
    shapes = [(batch, heads, queries, depth), (batch, heads // groups, keys, depth), (batch, heads // groups, keys, width)]
    arrays = [RANDOM.standard_normal(shape).astype("float32") for shape in shapes]
    arrays = [array if layout == "BHSD" else np.ascontiguousarray(array.transpose(0, 2, 1, 3)) for array in arrays]
    masks = {
        "none": lambda: [],
        "rows": lambda: [RANDOM.standard_normal((batch, 1, queries, keys)).astype("float32")],
        "bool": lambda: [RANDOM.random((queries, keys)) > 0.6],
    }
    return arrays + masks[mask]()


@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize(("sizes", "mask", "attrs", "pick"), [
    ((1, 1, 1, 16, 1, 4, 1), "none", {}, 0),
    ((2, 2, 1, 17, 13, 8, 5), "rows", {"causal": True}, 1),
    ((1, 4, 2, 37, 3, 16, 17), "bool", {"received": True}, 0.5),
    ((1, 6, 3, 17, 131, 36, 80), "bool", {"logsum": True, "scale": 0.3}, 0),
    ((2, 1, 1, 79, 67, 80, 64), "rows", {"layout": "BSHD"}, 1),
    ((1, 2, 1, 131, 300, 64, 64), "none", {"causal": True, "layout": "BSHD"}, 0.9),
    ((1, 2, 1, 131, 37, 16, 17), "none", {"before": 7, "causal": True, "received": True}, 1),  # queries that see nothing
])  # fmt: skip
@pytest.mark.sweep
def test_awkward_sizes(sizes, mask, attrs, pick, target):
    arrays = operands(*sizes, mask, attrs.get("layout", "BHSD"))
    found = run(arrays, target, pick=pick, **attrs)
    want = reference(*arrays, largest=largest(target), **attrs)
    for ours, theirs in zip(found, want if isinstance(want, tuple) else (want,), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("target", runnable())
def test_sums_at_their_limits(target):
    """All codes are the largest, of one sign or of both: nothing saturates."""
    for signs in ((1, 1), (1, -1), (-1, -1)):
        q, k = np.full((1, 1, 16, 64), signs[0], "float32"), np.full((1, 1, 40, 64), signs[1], "float32")
        k[:, :, ::3] *= -1
        v = RANDOM.standard_normal((1, 1, 40, 8)).astype("float32")
        np.testing.assert_allclose(run([q, k, v], target)[0], exact(q, k, v), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("target", runnable())
def test_lengths_known_at_run_time(target):
    rows, columns = (tirx.Var(name, "int64") for name in "st")
    types = [((1, 4, rows, 20), "float32"), ((1, 2, columns, 20), "float32"), ((1, 2, columns, 24), "float32")]
    module, _ = scheduled(passed(types, target, causal=True)[0], target)
    main = relax.VirtualMachine(relax.build(module, tvm_target(target), tir_pipeline=TIR_PIPELINE), tvm.cpu())["main"]
    for queries, keys in ((1, 1), (5, 3), (67, 131), (130, 7)):
        arrays = operands(1, 4, 2, queries, keys, 20, 24)
        want = reference(*arrays, largest=largest(target), causal=True)
        np.testing.assert_allclose(main(*(tvm.runtime.tensor(array) for array in arrays)).numpy(), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("target", "schedule", "instruction"), [
    (HASWELL, (3, 8, 3, 6, 2, 64), r"vpmaddubsw.*%ymm"),
    (VNNI, (4, 16, 6, 6, 4, 128), r"vpdpbusd.*%zmm"),
])  # fmt: skip
def test_products_of_bytes_without_spills(target, schedule, instruction):
    module, (kernel,) = scheduled(passed([((1, 12, 256, 64), "float32")] * 3, target)[0], target, AttentionSchedule(*schedule))
    code = tvm.compile(kernel.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE).mod.inspect_source("asm")
    loops = [re.split(r"\n\tj", block)[0] for block in re.split(r"\n\.LBB", code)]
    hot = min((block for block in loops if len(re.findall(instruction, block)) == schedule[0] * schedule[2]), key=len)
    register = instruction[-3:]
    assert not re.search(rf"\(%rsp\).*%{register}", hot) and not re.search(rf"%{register}\d+, .*\(%rsp\)", hot)


def test_what_is_left_alone():
    shape = (1, 2, 40, 16)
    for types, attrs, reason in (
        ([((1, 2, 3, 16), "float32"), (shape, "float32"), (shape, "float32")], {}, "fewer than 16 queries"),
        ([((1, 2, 40, 18), "float32")] * 3, {}, "multiple of four"),
        ([(shape, "bfloat16")] * 3, {}, "not float32"),
    ):
        module, context = passed(types, **attrs)
        assert not context.report.matches and any(reason in note for note in context.report.notes)
        assert "attention_int8" not in str(module)
    assert passed([(shape, "float32")] * 3)[1].report.matches == {"attention": 1}
    with pytest.raises(UsageError, match="cuda:sm_80"):
        passed([(shape, "float32")] * 3, Target.parse("cuda:sm_80"))
    with pytest.raises(UsageError, match="int4"):
        Int8Scores("int4")


def test_the_operator_without_a_kernel():
    """Codes of the full range on a machine without VNNI, as the definition's stages; and by operators, where no target takes the operator."""
    arrays = operands(1, 4, 2, 37, 29, 16, 17, "bool")
    types, full = [(array.shape, str(array.dtype)) for array in arrays], replace(HASWELL, formats=HASWELL.formats | {"int8"})
    want = reference(*arrays, causal=True)
    for own in ({**ops_attention.OWN, **ops_attention_int8.OWN}, {}):
        module = legalize(passed(types, full, causal=True)[0], own)
        for variable, func in list(module.functions_items()):
            if not isinstance(func, tirx.PrimFunc):
                continue
            if variable.name_hint == "attention":
                fused = analyze(own_dims(func))
                assert Attention().space(Attention().workload(fused, frozenset()), HASWELL) == []
            module.update_func(variable, generic(func, HASWELL).func)
        main = relax.VirtualMachine(relax.build(module, tvm_target(HASWELL), tir_pipeline=TIR_PIPELINE), tvm.cpu())["main"]
        np.testing.assert_allclose(main(*(tvm.runtime.tensor(array) for array in arrays)).numpy(), want, rtol=2e-5, atol=1e-5)


class Layer(torch.nn.Module):
    """Keys have large components that all of them share, as those of trained models do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("common", 20 * torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(1)))

    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k + self.common, v)


def test_the_mean_key_is_taken_away_first():
    inputs = tuple(torch.randn(1, 4, 70, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    want = Layer()(*inputs).numpy()
    errors = {}
    for option in (Int8Scores(), Int8Scores(smooth=False), "none"):
        compiled = tcompile.compile(Layer().eval(), example_inputs=inputs, attention_scores=option)
        errors[option] = float(np.abs(compiled(*(x.numpy() for x in inputs)) - want).max() / np.abs(want).max())
        assert any("u8s8" in entry["workload"] for entry in compiled.report()["kernels"]) == (option != "none")
    assert errors["none"] < 1e-5 < errors[Int8Scores()] < 0.02 < errors[Int8Scores(smooth=False)]
    # where hidden scores are finite numbers a shift of the others would show
    attrs = {"causal": True, "fill": -10.0}
    module, _ = passed([((1, 2, 40, 16), "float32")] * 3, smooth=True, **attrs)
    assert "R.mean" not in str(module) and "R.mean" in str(passed([((1, 2, 40, 16), "float32")] * 3, smooth=True)[0])
