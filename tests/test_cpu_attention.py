"""The attention kernel against numpy: awkward sizes under several schedules, masks, shared heads, what keys receive; and the instructions it compiles to."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import attention_module
from machines import HASWELL, runnable
from tcompile.compiler.dialect.attention import reference
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import analyze
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.attention import Attention, AttentionSchedule
from tcompile.targets.cpu.generic import schedule as generic
from tcompile.targets.cpu.lower import own_dims, tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tcompile.targets.cpu.ops_attention import OWN


def legalized(types, **attrs):
    """The module of one attention over operands of these (shape, dtype), as functions of TIR."""
    return legalize(attention_module(types, **attrs), OWN)


def kernel_of(module, target, schedule=None, pick=1.0, template=None):
    """(variable, PrimFunc) of the attention in a module, scheduled by the template."""
    ((variable, func),) = [(variable, func) for variable, func in module.functions_items() if variable.name_hint == "attention"]
    fused, template = analyze(own_dims(func)), template or Attention()
    workload = template.workload(fused, frozenset())
    space = list(template.space(workload, target))
    return variable, template.build(fused, workload, schedule or space[int(pick * (len(space) - 1))], target).func


def run(arrays, target, schedule=None, pick=1.0, types=None, template=None, **attrs):
    module = legalized(types or [(array.shape, str(array.dtype)) for array in arrays], **attrs)
    module.update_func(*kernel_of(module, target, schedule, pick, template))
    for variable, func in list(module.functions_items()):
        if isinstance(func, tirx.PrimFunc) and variable.name_hint != "attention":
            module.update_func(variable, generic(func, target).func)
    executable = relax.build(module, tvm_target(target), tir_pipeline=TIR_PIPELINE)
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(array) for array in arrays))
    return tuple(part.numpy() for part in result) if attrs.get("received") or attrs.get("logsum") else (result.numpy(),)


def check(arrays, target, schedule=None, pick=1.0, types=None, **attrs):
    want = reference(*arrays, **attrs)
    for ours, theirs in zip(run(arrays, target, schedule, pick, types, **attrs), want if isinstance(want, tuple) else (want,), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6 if attrs.get("received") and ours.ndim == 2 else 1e-5)


def operands(batch, heads, groups, queries, keys, depth, width, mask="none", layouts=("BHSD",) * 4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, heads, queries, depth), (batch, heads // groups, keys, depth), (batch, heads // groups, keys, width)]
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    arrays = [array if own == "BHSD" else np.ascontiguousarray(array.transpose(0, 2, 1, 3)) for array, own in zip(arrays, layouts, strict=False)]
    masks = {
        "none": lambda: [],
        "rows": lambda: [rng.standard_normal((batch, 1, queries, keys)).astype("float32")],
        "padding": lambda: [np.where(np.arange(keys) < max(1, keys - 2), 0, -3.4028235e38).astype("float32").reshape(1, 1, 1, keys)],
        "bool": lambda: [rng.random((queries, keys)) > 0.6],
    }
    return arrays + masks[mask]()


AWKWARD = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 1, 1, 13, 7, 5),
    (1, 4, 2, 37, 3, 16, 17),
    (1, 6, 3, 17, 131, 33, 80),
    (2, 1, 1, 79, 67, 80, 64),
    (1, 2, 1, 64, 128, 64, 64),
]


@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize(("sizes", "mask", "attrs", "pick"), [
    (AWKWARD[0], "none", {}, 0),
    (AWKWARD[1], "rows", {"causal": True}, 1),
    (AWKWARD[2], "bool", {"received": True}, 1),
    (AWKWARD[3], "bool", {"logsum": True}, 0),
    (AWKWARD[4], "rows", {"received": True, "logsum": True}, 1),
    (AWKWARD[3], "padding", {}, 0),
    (AWKWARD[3], "none", {"causal": True, "received": True}, 1),
    (AWKWARD[4], "rows", {"received": True, "layout": "BSHD"}, 0.5),
    (AWKWARD[4], "bool", {"fill": -1e4}, 0),
    (AWKWARD[5], "none", {"causal": True, "layout": "BHSD,BHSD,BSHD,BSHD"}, 0.7),
    (AWKWARD[0], "none", {"before": 0, "after": 0}, 0),
    (AWKWARD[4], "bool", {"before": 20, "causal": True, "received": True}, 0),
    (AWKWARD[5], "rows", {"before": 100, "after": 3}, 0.5),
    ((1, 2, 1, 131, 37, 16, 17), "none", {"before": 7, "causal": True}, 1),  # queries that see nothing
    ((1, 2, 1, 131, 37, 16, 17), "rows", {"before": 7, "after": 90, "fill": -60.0}, 0),
])  # fmt: skip
@pytest.mark.sweep
def test_awkward_sizes(sizes, mask, attrs, pick, target):
    layouts = (attrs.get("layout", "BHSD").split(",") * 4)[:4]
    check(operands(*sizes, mask, layouts), target, pick=pick, **attrs)


@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize(("sizes", "mask", "attrs", "nv", "group"), [
    ((1, 4, 2, 131, 300, 16, 17), "rows", {"causal": True, "received": True}, 2, 3),
    ((2, 2, 1, 150, 290, 64, 64), "bool", {"before": 40, "after": 30}, 3, 4),
    (AWKWARD[4], "padding", {"logsum": True}, 1, 12),
    ((1, 2, 1, 131, 37, 16, 17), "none", {"before": 7, "causal": True}, 2, 4),  # queries that see nothing
    (AWKWARD[5], "none", {"causal": True, "fill": -1e4}, 1, 3),
    (AWKWARD[3], "none", {}, 1, 2),
])  # fmt: skip
@pytest.mark.sweep
def test_tiles_that_share_a_copy_of_values(sizes, mask, attrs, nv, group, target):
    layouts = ("BSHD",) * 4
    check(operands(*sizes, mask, layouts), target, AttentionSchedule(nv, target.lanes(), 2, 3, 2, 64, group), layout="BSHD", **attrs)


def test_rows_of_other_heads_between():
    """They are prefetched, and tiles may share a copy; one head, or heads that lie one after the other, need neither."""
    for layout, heads, apart in (("BSHD", 12, True), ("BHSD", 12, False), ("BSHD", 1, False)):
        shape = (1, 512, heads, 64) if layout == "BSHD" else (1, heads, 512, 64)
        module = legalized([(shape, "float32")] * 3, layout=layout)
        ((_, func),) = [(variable, func) for variable, func in module.functions_items() if variable.name_hint == "attention"]
        fused, template = analyze(own_dims(func)), Attention()
        workload = template.workload(fused, frozenset())
        space = template.space(workload, HASWELL)
        assert workload.apart == apart == (max(schedule.group for schedule in space) > 1)
        assert ("llvm.prefetch" in str(template.build(fused, workload, space[0], HASWELL).func)) == apart


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 70), st.integers(1, 150), st.integers(1, 80), st.integers(1, 80),
    st.sampled_from(["none", "rows", "padding", "bool"]), st.booleans(), st.integers(-1, 80), st.integers(-1, 80), st.booleans(), st.floats(0, 1),
)  # fmt: skip
def test_any_sizes(batch, heads, queries, keys, depth, width, mask, causal, before, after, received, pick):
    window = {"causal": causal, "before": before, "after": after}
    check(operands(batch, *heads, queries, keys, depth, width, mask), HASWELL, pick=pick, received=received, **window)


@pytest.mark.sweep
@pytest.mark.parametrize("target", runnable())
def test_symbolic_lengths(target):
    """One kernel for all lengths, those below a tile of keys and below a vector of queries too."""
    batch, rows, columns = (tirx.Var(name, "int64") for name in "bst")
    types = [
        ((batch, 4, rows, 20), "float32"),
        ((batch, 2, columns, 20), "float32"),
        ((batch, 2, columns, 24), "float32"),
        ((batch, 1, rows, columns), "float32"),
    ]
    module = legalized(types, causal=target is HASWELL, received=target is not HASWELL)
    module.update_func(*kernel_of(module, target, AttentionSchedule(2, target.lanes(), 2, 3, 2, 64, 3) if target is HASWELL else None))
    for variable, func in list(module.functions_items()):
        if isinstance(func, tirx.PrimFunc) and variable.name_hint != "attention":
            module.update_func(variable, generic(func, target).func)
    main = relax.VirtualMachine(relax.build(module, tvm_target(target), tir_pipeline=TIR_PIPELINE), tvm.cpu())["main"]
    for sizes in [(1, 1, 1), (2, 5, 3), (1, 67, 131), (3, 16, 64), (1, 130, 7)]:
        arrays = operands(sizes[0], 4, 2, sizes[1], sizes[2], 20, 24, "rows")
        result = main(*(tvm.runtime.tensor(array) for array in arrays))
        if target is HASWELL:
            np.testing.assert_allclose(result.numpy(), reference(*arrays, causal=True), rtol=2e-5, atol=1e-5)
            continue
        want = reference(*arrays, received=True)
        np.testing.assert_allclose(result[0].numpy(), want[0], rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(result[1].numpy(), want[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("target", runnable())
def test_hidden_rows_and_nan(target):
    """Rows without a visible key are zeros, or NaN when not safe; NaN stays in its own row; a row hidden by a finite fill is the mean of v."""
    arrays = operands(1, 2, 1, 20, 70, 8, 8)
    mask = np.ones((20, 70), bool)
    mask[3] = False
    check([*arrays, mask], target)
    assert np.isnan(run([*arrays, mask], target, safe=False)[0][:, :, 3]).all()
    (out,) = run([*arrays, mask], target, safe=False, fill=-3.4028235e38)
    np.testing.assert_allclose(out[:, :, 3], arrays[2].mean(2), rtol=1e-5, atol=1e-5)
    arrays[0][0, 1, 5, 2] = math.nan
    (out,) = run(arrays, target)
    assert np.isnan(out[0, 1, 5]).all() and np.isnan(out).sum() == 8


def test_definition_is_the_kernel():
    """The stages that define the operator, run by the generic scheduler, give what the kernel gives."""
    arrays = operands(1, 4, 2, 9, 11, 8, 6, "bool")
    module = legalized([(array.shape, str(array.dtype)) for array in arrays], causal=True, received=True)
    for variable, func in list(module.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            module.update_func(variable, generic(func, HASWELL).func)
    main = relax.VirtualMachine(relax.build(module, tvm_target(HASWELL), tir_pipeline=TIR_PIPELINE), tvm.cpu())["main"]
    for ours, theirs in zip(main(*(tvm.runtime.tensor(array) for array in arrays)), reference(*arrays, causal=True, received=True), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("machine", "schedule", "register"), [("haswell", (3, 8, 4, 6, 2, 64), "ymm"), ("cascadelake", (4, 16, 6, 6, 4, 128), "zmm")]
)
def test_inner_loops_are_fma_without_spills(machine, schedule, register):
    target = Target.parse(f"cpu:{machine}")
    module = legalized([((1, 12, 256, 64), "float32")] * 3)
    _, func = kernel_of(module, target, AttentionSchedule(*schedule))
    code = tvm.compile(func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE).mod.inspect_source("asm")
    loops = [re.split(r"\n\tj", block)[0] for block in re.split(r"\n\.LBB", code)]
    loops = [block for block in loops if "vsubps" not in block]  # not the exponential
    hot = sorted(loops, key=lambda block: -len(re.findall(rf"vfmadd\w+ps.*%{register}", block)))[:2]
    for block, count in zip(hot, sorted((schedule[0] * schedule[2], schedule[3] * schedule[4]), reverse=True), strict=True):
        assert len(re.findall(rf"vfmadd\w+ps.*%{register}", block)) >= count
        assert not re.search(rf"\(%rsp\).*%{register}", block) and not re.search(rf"%{register}\d+, .*\(%rsp\)", block)
        assert "call" not in block


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", [size for size in AWKWARD if size[5] % 2 == 0] + [(1, 2, 1, 33, 129, 34, 40)], ids=str)
@pytest.mark.parametrize(("mask", "attrs"), [("none", {}), ("padding", {"layout": "BSHD"}), ("bool", {"scale": 0.3}), ("none", {"causal": True})])
@pytest.mark.parametrize("target", runnable())
def test_bfloat16(sizes, mask, attrs, target):
    check_bfloat16(sizes, mask, attrs, target, 0.6)


def check_bfloat16(sizes, mask, attrs, target, pick, template=None):
    """Scores are those of the rounded operands, probabilities lose eight bits."""
    layouts = (attrs.get("layout", "BHSD"),) * 4
    arrays = operands(*sizes, mask=mask, layouts=layouts)
    arrays = [array.astype(ml_dtypes.bfloat16) if place < 3 else array for place, array in enumerate(arrays)]
    (found,) = run(arrays, target, pick=pick, template=template, **attrs)
    assert found.dtype == np.float32
    q, k, v, *rest = (array if array.dtype == bool else array.astype(np.float64) for array in arrays)
    error = np.abs(found - reference(q, k, v, *rest, **attrs))
    assert (error <= 2**-8 * reference(q, k, np.abs(v), *rest, **attrs) + 1e-5).all()
