"""The attention kernel of one query: awkward numbers of keys, shared heads, masks, places of the operands; and when it is chosen."""

from __future__ import annotations

import math
import re

import ml_dtypes  # noqa: F401  numpy knows bfloat16
import numpy as np
import pytest
import tcompile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import attention_module
from machines import HASWELL, runnable
from tcompile.compiler.dialect.attention import reference
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Unfusable, analyze
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.attention_few import AttentionFew
from tcompile.targets.cpu.generic import schedule as generic
from tcompile.targets.cpu.lower import own_dims, tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tcompile.targets.cpu.ops_attention import OWN


def compiled(types, target, **attrs):
    """The main function of one attention, its kernel from the template."""
    module, template = legalize(attention_module(types, **attrs), OWN), AttentionFew()
    for variable, func in list(module.functions_items()):
        if isinstance(func, tirx.PrimFunc) and variable.name_hint == "attention":
            fused = analyze(own_dims(func))
            workload = template.workload(fused, frozenset())
            (schedule,) = template.space(workload, target)
            module.update_func(variable, template.build(fused, workload, schedule, target).func)
        elif isinstance(func, tirx.PrimFunc):
            module.update_func(variable, generic(func, target).func)
    main = relax.VirtualMachine(relax.build(module, tvm_target(target), tir_pipeline=TIR_PIPELINE), tvm.cpu())["main"]

    def call(*arrays):
        result = main(*(tvm.runtime.tensor(array) for array in arrays))
        return tuple(part.numpy() for part in result) if attrs.get("logsum") else result.numpy()

    return call


def operands(batch, heads, groups, queries, keys, depth, width, mask="none", layout="BHSD", dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(batch, heads, queries, depth), (batch, heads // groups, keys, depth), (batch, heads // groups, keys, width)]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    arrays = [array if layout == "BHSD" else np.ascontiguousarray(array.transpose(0, 2, 1, 3)) for array in arrays]
    masks = {
        "none": lambda: [],
        "rows": lambda: [rng.standard_normal((1, heads, queries, keys)).astype("float32")],
        "past": lambda: [np.where(np.tri(queries, keys, keys - queries), 0, -3.4028235e38).astype("float32")[None, None]],
        "padding": lambda: [np.where(np.arange(keys) < max(1, keys - 2), 0, -3.4028235e38).astype("float32").reshape(1, 1, 1, keys)],
        "bool": lambda: [rng.random((batch, 1, queries, keys)) > 0.6],
    }
    return arrays + masks[mask]()


def check(arrays, target, **attrs):
    ours = compiled([(array.shape, str(array.dtype)) for array in arrays], target, **attrs)(*arrays)
    want = reference(*(array if array.dtype == bool else array.astype("float32") for array in arrays), **attrs)
    for mine, theirs in zip(ours, want, strict=True) if attrs.get("logsum") else [(ours, want)]:
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize(("sizes", "mask", "dtype", "attrs"), [
    ((1, 1, 1, 1, 1, 16, 16), "none", "bfloat16", {}),
    ((2, 9, 3, 1, 131, 64, 32), "padding", "float32", {}),
    ((1, 6, 1, 1, 257, 32, 80), "rows", "float32", {"layout": "BSHD"}),
    ((1, 8, 8, 2, 67, 128, 96), "past", "bfloat16", {"layout": "BSHD"}),
    ((2, 7, 7, 5, 300, 16, 80), "bool", "float32", {"fill": -1e4, "logsum": True}),
])  # fmt: skip
def test_awkward_sizes(sizes, mask, dtype, attrs, target):
    check(operands(*sizes, mask, attrs.get("layout", "BHSD"), dtype), target, **attrs)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (5, 5)]), st.integers(1, 8), st.integers(1, 200), st.sampled_from([12, 40, 64]),
    st.sampled_from([8, 72]), st.sampled_from(["none", "rows", "padding", "bool"]), st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_any_sizes(batch, heads, queries, keys, depth, width, mask, dtype):
    depth = depth if dtype == "float32" else 2 * depth
    check(operands(batch, *heads, queries, keys, depth, width, mask, dtype=dtype), HASWELL)


@pytest.mark.parametrize("target", runnable())
def test_a_cache_that_grows(target):
    """One kernel for every number of keys; a query that sees nothing gives zeros, one that is not a number nothing else."""
    keys = tirx.Var("t", "int64")
    types = [((1, 6, 1, 16), "float32"), ((1, 2, keys, 16), "float32"), ((1, 2, keys, 16), "float32"), ((1, 1, 1, keys), "bool")]
    main = compiled(types, target)
    for size in (1, 7, 8, 63, 64, 300):
        arrays = operands(1, 6, 3, 1, size, 16, 16, "bool")
        np.testing.assert_allclose(main(*arrays), reference(*arrays), rtol=2e-5, atol=1e-5)
    arrays[3][:] = False
    np.testing.assert_array_equal(main(*arrays), 0)
    arrays[3][:] = True
    arrays[0][0, 4, 0, 3] = math.nan
    out = main(*arrays)
    assert np.isnan(out[0, 4]).all() and np.isnan(out).sum() == 16


@pytest.mark.parametrize(("queries", "depth", "attrs"), [(9, 16, {}), (1, 13, {}), (1, 16, {"causal": True}), (1, 16, {"received": True})])
def test_refused(queries, depth, attrs):
    types = [((1, 2, queries, depth), "float32"), ((1, 2, 9, depth), "float32"), ((1, 2, 9, 16), "float32")]
    with pytest.raises(Unfusable):
        compiled(types, HASWELL, **attrs)


@pytest.mark.parametrize(("machine", "register", "sums"), [("haswell", "ymm", 8), ("cascadelake", "zmm", 4)])
def test_inner_loops_are_fma_without_spills(machine, register, sums):
    """The scores of a vector of keys are one unrolled loop body, the sums a loop over keys."""
    target, template = Target.parse(f"cpu:{machine}"), AttentionFew()
    module = legalize(attention_module([((1, 12, keys, 64), "float32") for keys in (1, 512, 512)]), OWN)
    ((_, func),) = [(variable, func) for variable, func in module.functions_items() if variable.name_hint == "attention"]
    fused = analyze(own_dims(func))
    workload = template.workload(fused, frozenset())
    func = template.build(fused, workload, template.space(workload, target)[0], target).func
    code = tvm.compile(func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE).mod.inspect_source("asm")
    loops = [re.split(r"\n\tj", block)[0] for block in re.split(r"\n\.LBB", code)]
    loops = [block for block in loops if "vsubps" not in block]  # not the exponential
    hot = sorted(loops, key=lambda block: -len(re.findall(rf"vfmadd\w+ps.*%{register}", block)))[:2]
    for block, count in zip(hot, (64, sums), strict=True):
        assert len(re.findall(rf"vfmadd\w+ps.*%{register}", block)) >= count
        assert not re.search(rf"\(%rsp\).*%{register}", block) and "call" not in block


@pytest.mark.parametrize(("queries", "chosen"), [(1, "attention_few"), (64, "attention")])
def test_the_kernel_is_chosen_by_the_number_of_queries(queries, chosen):
    shapes = ((1, 6, queries, 64), (1, 2, 300, 64), (1, 2, 300, 64))
    model = tcompile.compile(Cached().eval(), example_inputs=tuple(torch.ones(shape) for shape in shapes))
    assert [kernel["template"] for kernel in model.report()["kernels"] if "attention" in kernel["kernel"]] == [chosen]


class Cached(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
