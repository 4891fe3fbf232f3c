"""Attention over codes: the operator against numpy, the pass that makes it of dequantised caches, and the CPU's kernel at awkward sizes."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import tcompile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import UNOPTIMIZED
from machines import HASWELL, runnable
from onnx import TensorProto, helper
from tcompile.compiler.dialect.attention import reference as attention_reference
from tcompile.compiler.dialect.attention_quantized import OPTIONAL, attention_quantized, reference
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.common.fused import analyze
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.attention_codes import AttentionCodes
from tcompile.targets.cpu.generic import schedule as generic
from tcompile.targets.cpu.lower import own_dims, tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tcompile.targets.cpu.ops_attention_codes import OWN


def operands(batch, heads, groups, queries, keys, depth, width, bits=(8, 8), given=(), signed=True):
    """(q, k, v, optional operands by name, attributes)"""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, heads, queries, depth)).astype("float32")
    codes, attrs = [], {"scale": (0.02 if bits[0] == 8 else 0.3) * depth**-0.5}
    for side, size, number in zip("kv", (depth, width), bits, strict=True):
        shape = (batch, heads // groups, keys, size * number // 8)
        attrs |= {f"{side}_bits": number, f"{side}_zero": 8 if number == 4 else 0 if signed else 131}
        codes.append(
            rng.integers(*((-128, 128) if signed and number == 8 else (0, 256)), shape).astype("int8" if signed and number == 8 else "uint8")
        )
    lead = (batch, heads // groups, keys)
    makers = {
        "k_scales": lambda: rng.uniform(0.5, 2, lead).astype("float32"),
        "v_scales": lambda: rng.uniform(0.5, 2, lead).astype("float32"),
        "k_zeros": lambda: rng.integers(0, 16, lead).astype(codes[0].dtype),
        "v_zeros": lambda: rng.integers(0, 16, lead).astype(codes[1].dtype),
        "mask": lambda: rng.random((batch, 1, queries, keys)) > 0.5,
    }
    return q, *codes, {name: makers[name]() for name in given}, attrs


def module(q, k, v, optional, attrs, keys=None):
    """One attention; keys: the symbol that stands for their number."""
    builder = relax.BlockBuilder()

    def declared(name, array):
        shape = [keys if keys is not None and size == k.shape[2] else size for size in array.shape]
        return relax.Var(name, relax.TensorType(shape, str(array.dtype)))

    params = [declared(name, array) for name, array in {"q": q, "k": k, "v": v, **optional}.items()]
    with builder.function("main", params):
        with builder.dataflow():
            call = builder.normalize(attention_quantized(*params[:3], dict(zip(optional, params[3:], strict=True)), **attrs))
            out = builder.emit_output(call)
        builder.emit_func_output(out)
    return builder.get()


def compiled(given, target, keys=None):
    made, template = legalize(module(*given, keys=keys), OWN), AttentionCodes()
    names = []
    for variable, func in list(made.functions_items()):
        if not isinstance(func, tirx.PrimFunc):
            continue
        names.append(variable.name_hint)
        if variable.name_hint == "attention_codes":
            fused = analyze(own_dims(func))
            workload = template.workload(fused, frozenset())
            (schedule,) = template.space(workload, target)
            made.update_func(variable, template.build(fused, workload, schedule, target).func)
        else:
            made.update_func(variable, generic(func, target).func)
    main = relax.VirtualMachine(relax.build(made, tvm_target(target), tir_pipeline=TIR_PIPELINE), tvm.cpu())["main"]
    return lambda *arrays: main(*(tvm.runtime.tensor(array) for array in arrays)).numpy(), names


def check(given, target, keys=None):
    q, k, v, optional, attrs = given
    main, names = compiled(given, target, keys)
    assert "attention_codes" in names
    want = reference(q, k, v, optional, **attrs)
    np.testing.assert_allclose(main(q, k, v, *optional.values()), want, rtol=3e-5, atol=2e-5 * np.abs(want).max())
    return main


SIDES = ("k_scales", "v_scales")
CASES = [
    ((1, 1, 1, 1, 1, 16, 16), {}),
    ((2, 6, 3, 1, 131, 32, 64), {"given": SIDES, "signed": False}),
    ((1, 4, 2, 3, 67, 64, 32), {"bits": (4, 4), "given": OPTIONAL}),
    ((1, 3, 1, 1, 257, 128, 96), {"bits": (4, 8), "given": (*SIDES, "k_zeros")}),
    ((2, 2, 1, 1, 70, 64, 64), {"bits": (8, 4), "given": ("v_scales", "mask")}),
]


@pytest.mark.sweep
@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_the_kernel_at_awkward_sizes(sizes, options, target):
    check(operands(*sizes, **options), target)


def test_a_cache_that_grows():
    main = check(operands(1, 4, 2, 1, 7, 32, 32, bits=(4, 4), given=SIDES), HASWELL, tirx.Var("t", "int64"))
    for size in (1, 64, 300):
        q, k, v, optional, attrs = operands(1, 4, 2, 1, size, 32, 32, bits=(4, 4), given=SIDES)
        want = reference(q, k, v, optional, **attrs)
        np.testing.assert_allclose(main(q, k, v, *optional.values()), want, rtol=3e-5, atol=2e-5 * np.abs(want).max())


def cached(scales, zeros=None, queries=1, heads=4, groups=2, block=False):
    """ONNX's Attention of q over codes that DequantizeLinear makes floats of. scales, zeros: of keys and of values; block: one for every token, and inputs of the model."""
    depth, keys, kind = 32, 70, TensorProto.UINT8 if zeros is not None else TensorProto.INT8
    inputs = [helper.make_tensor_value_info("q", TensorProto.FLOAT, (2, heads, queries, depth))]
    inputs += [helper.make_tensor_value_info(name, kind, (2, heads // groups, keys, depth)) for name in "kv"]
    nodes, constants = [], []
    for side, *both in zip("kv", scales, zeros or (None, None), strict=True):
        names = [side]
        for letter, array in zip("sz", both, strict=True):
            if array is None:
                continue
            names.append(side + letter)
            if block:
                inputs.append(helper.make_tensor_value_info(names[-1], helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
            else:
                constants.append(onnx.numpy_helper.from_array(array, names[-1]))
        axis = {"axis": 3, "block_size": depth} if block else {"axis": 3}
        nodes.append(helper.make_node("DequantizeLinear", names, [f"{side}f"], **axis))
    nodes.append(helper.make_node("Attention", ["q", "kf", "vf"], ["y"]))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, heads, queries, depth))
    return helper.make_model(helper.make_graph(nodes, "g", inputs, [out], constants), opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


RANDOM = np.random.default_rng(3)
FORMS = {
    "tensor": ([np.array(0.03, "float32"), np.array(0.02, "float32")], {}),
    "channel": ([RANDOM.uniform(0.01, 0.05, 32).astype("float32") for _ in "kv"], {}),
    "token": (
        [RANDOM.uniform(0.01, 0.05, (2, 2, 70, 1)).astype("float32") for _ in "kv"],
        {"zeros": [RANDOM.integers(100, 150, (2, 2, 70, 1)).astype("uint8") for _ in "kv"], "block": True},
    ),
    "tensor with zeros": ([np.array(0.03, "float32"), np.array(0.02, "float32")], {"zeros": [np.array(128, "uint8"), np.array(120, "uint8")]}),
}


@pytest.mark.sweep
@pytest.mark.parametrize("form", FORMS)
def test_a_dequantized_cache_is_read_as_codes(form):
    scales, options = FORMS[form]
    model = cached(scales, **options)
    feeds = {"q": RANDOM.standard_normal((2, 4, 1, 32)).astype("float32")}
    low, high, kind = (0, 256, "uint8") if "zeros" in options else (-128, 128, "int8")
    feeds |= {name: RANDOM.integers(low, high, (2, 2, 70, 32)).astype(kind) for name in "kv"}
    if "block" in options:
        feeds |= {side + letter: array for letter, both in (("s", scales), ("z", options["zeros"])) for side, array in zip("kv", both, strict=True)}
    ours = tcompile.compile(model)
    (step,) = [step for step in ours.report()["passes"] if step["name"] == "quantized-attention"]
    assert step["matches"] == {"attention": 1}
    kernels = {kernel["template"] for kernel in ours.report()["kernels"]}
    assert "attention_codes" in kernels and "attention" not in kernels
    assert ours.report()["memory"]["workspace_bytes"] < 2 * 2 * 70 * 32 * 4  # no dequantised cache
    np.testing.assert_allclose(ours(**feeds), expected(feeds, scales, options.get("zeros", (0, 0))), rtol=1e-4, atol=1e-5)


def expected(feeds, scales, zeros):
    floats = [(feeds[side].astype("float64") - zero) * scale for side, scale, zero in zip("kv", scales, zeros, strict=True)]
    return attention_reference(feeds["q"], *floats)


def test_two_codes_in_a_byte_are_recognized_as_onnx_parts_them():
    """Masks and shifts, halves side by side by Concat, as there is no operator that stacks."""
    shape, kind = (1, 2, 70, 16), TensorProto.UINT8
    inputs = [
        helper.make_tensor_value_info("q", TensorProto.FLOAT, (1, 4, 1, 32)),
        *(helper.make_tensor_value_info(name, kind, shape) for name in "kv"),
    ]
    constants = {
        "low": np.uint8(15),
        "four": np.uint8(4),
        "axis": np.array([4]),
        "whole": np.array([1, 2, 70, 32]),
        "zero": np.float32(8),
        "s": np.float32(0.3),
    }
    nodes = []
    for x in "kv":
        nodes += [helper.make_node("BitwiseAnd", [x, "low"], [f"{x}0"]), helper.make_node("BitShift", [x, "four"], [f"{x}1"], direction="RIGHT")]
        nodes += [helper.make_node("Unsqueeze", [f"{x}{i}", "axis"], [f"{x}{i}5"]) for i in range(2)]
        nodes += [helper.make_node("Concat", [f"{x}05", f"{x}15"], [f"{x}c"], axis=4), helper.make_node("Reshape", [f"{x}c", "whole"], [f"{x}w"])]
        nodes.append(helper.make_node("Cast", [f"{x}w"], [f"{x}f"], to=TensorProto.FLOAT))
        nodes += [helper.make_node("Sub", [f"{x}f", "zero"], [f"{x}z"]), helper.make_node("Mul", [f"{x}z", "s"], [f"{x}v"])]
    nodes.append(helper.make_node("Attention", ["q", "kv", "vv"], ["y"]))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 1, 32))
    graph = helper.make_graph(nodes, "g", inputs, [out], [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()])
    ours = tcompile.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    (kernel,) = [kernel for kernel in ours.report()["kernels"] if kernel["template"] == "attention_codes"]
    assert kernel["workload"].startswith("attention int4 int4 1x4/2x1x70")
    q, codes = RANDOM.standard_normal((1, 4, 1, 32)).astype("float32"), [RANDOM.integers(0, 256, shape).astype("uint8") for _ in "kv"]
    floats = [(np.stack([x & 15, x >> 4], -1).reshape(1, 2, 70, 32) - 8.0) * 0.3 for x in codes]
    np.testing.assert_allclose(ours(q, *codes), attention_reference(q, *floats), rtol=1e-4, atol=1e-5)


def test_many_queries_of_a_cpu_keep_the_dequantization():
    ours = tcompile.compile(cached(FORMS["tensor"][0], queries=9))
    (step,) = [step for step in ours.report()["passes"] if step["name"] == "quantized-attention"]
    assert not step["matches"] and "more than 8 queries" in step["notes"][0]


def test_decomposition_agrees_with_numpy():
    q, k, v, optional, attrs = operands(2, 4, 2, 3, 7, 8, 6, bits=(4, 4), given=OPTIONAL)
    made = relax.transform.LegalizeOps()(module(q, k, v, optional, attrs))
    main = relax.VirtualMachine(relax.build(made, UNOPTIMIZED), tvm.cpu())["main"]
    ours = main(*(tvm.runtime.tensor(array) for array in (q, k, v, *optional.values()))).numpy()
    np.testing.assert_allclose(ours, reference(q, k, v, optional, **attrs), rtol=1e-5, atol=1e-5)


def test_codes_become_floats_once_and_the_inner_loops_do_not_spill():
    """Four heads share keys: their codes are widened in one loop, and multiplied in loops of nothing but multiply-adds."""
    made = legalize(module(*operands(1, 4, 4, 1, 1024, 128, 128)), OWN)
    ((_, func),) = [(variable, func) for variable, func in made.functions_items() if isinstance(func, tirx.PrimFunc)]
    fused, template = analyze(own_dims(func)), AttentionCodes()
    workload = template.workload(fused, frozenset())
    func = template.build(fused, workload, template.space(workload, HASWELL)[0], HASWELL).func
    code = tvm.compile(func.with_attr("global_symbol", "f"), target=tvm_target(HASWELL), tir_pipeline=TIR_PIPELINE).mod.inspect_source("asm")
    loops = [re.split(r"\n\tj", block)[0] for block in re.split(r"\n\.LBB", code)]
    multiplied = [block for block in loops if len(re.findall(r"vfmadd\w+ps.*%ymm", block)) >= 16 and "vsubps" not in block]
    assert len(multiplied) >= 3 and not any(re.search(r"\(%rsp\).*%ymm", block) or "vcvt" in block or "call" in block for block in multiplied)
    assert any("vpmovsxbd" in block and "vcvtdq2ps" in block for block in loops)


@pytest.mark.networks
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (6, 6)]), st.integers(1, 8), st.integers(1, 200), st.sampled_from([16, 48, 128]), st.sampled_from([16, 80]),
    st.tuples(*[st.sampled_from([4, 8])] * 2), st.sets(st.sampled_from(OPTIONAL)), st.booleans(),
)  # fmt: skip
def test_any_sizes(batch, heads, queries, keys, depth, width, bits, given, signed):
    check(operands(batch, *heads, queries, keys, depth, width, bits, [name for name in OPTIONAL if name in given], signed), HASWELL)
