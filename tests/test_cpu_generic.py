"""The generic scheduler against torch: element-wise code, data movement, reductions, pooling, rows; awkward sizes, dynamic sizes, NaN, and the code it emits."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import tcompile
import torch
import torch.nn.functional as F
from machines import HASWELL, each_machine  # noqa: F401  (a fixture)
from onnx import helper
from onnx_models import small
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.generic import schedule
from tcompile.targets.cpu.lower import code_generation, tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tvm.relax.backend import DispatchSortScan
from tvm.relax.backend.cpu_generic.pipeline import dataflow_lower_passes, finalize_passes

op = relax.op


TARGET = HASWELL


def compiled(define: Callable, *params: tuple[tuple, str]):
    """(executable, {function: rule}) of one Relax expression, fused and scheduled for the test's machine."""
    llvm = tvm_target(TARGET)
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, (shape, dtype) in enumerate(params)]
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(builder.normalize(define(builder.emit, *inputs)))
        builder.emit_func_output(output)
    with llvm:
        module = legalize(DispatchSortScan()(builder.get()))
        before = ["AnnotateTIROpPattern", "FuseOps", "FuseTIR", "RewriteDataflowReshape", "DeadCodeElimination"]
        module = tvm.transform.Sequential([getattr(relax.transform, name)() for name in before])(module)
        rules = {}
        for name, function in list(module.functions.items()):
            if isinstance(function, tirx.PrimFunc):
                scheduled = schedule(function, TARGET)
                rules[name.name_hint] = scheduled.rule
                assert scheduled.func.attrs["tcompile.scheduled"]
                module.update_func(name, scheduled.func)
        module = tvm.transform.Sequential(dataflow_lower_passes(llvm) + finalize_passes(llvm))(module)
        with code_generation():
            return relax.build(module, llvm, relax_pipeline=None, tir_pipeline=TIR_PIPELINE), rules


def check(define: Callable, reference: Callable, *arrays: np.ndarray, shapes: list[tuple] | None = None, tolerance: float = 2e-5) -> dict[str, str]:
    shapes = shapes or [array.shape for array in arrays]
    executable, rules = compiled(define, *((shape, str(array.dtype)) for shape, array in zip(shapes, arrays, strict=True)))
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(array) for array in arrays)).numpy()
    expected = np.asarray(reference(*(torch.from_numpy(array) for array in arrays)))
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)
    return rules


def data(*shape: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(sum(shape) + len(shape))
    return rng.standard_normal(shape).astype(dtype) if dtype.startswith("float") else rng.integers(0, 5, shape).astype(dtype)


ONE = (1,), (7,), (8,), (3, 37), (5, 1, 13), (2, 3, 64), (1, 128, 768)


@pytest.mark.parametrize("shape", ONE, ids=str)
def test_elementwise(shape):
    x = data(*shape)
    assert set(check(lambda emit, a: op.nn.gelu(emit(op.multiply(a, a))), lambda a: F.gelu(a * a), x).values()) == {"map"}


@pytest.mark.parametrize(("a", "b"), [((3, 1, 9), (7, 1)), ((5, 33), (33,)), ((5, 33), (5, 1)), ((4, 5, 6), (1, 5, 1))], ids=str)
def test_broadcast(a, b):
    check(lambda emit, x, y: op.add(x, y), lambda x, y: x + y, data(*a), data(*b))


@pytest.mark.sweep
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2), (3, 2, 1, 0), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 3, 7), (2, 32, 12, 64), (1, 17, 19, 23)], ids=str)
def test_transpose(shape, order):
    check(lambda emit, x: op.permute_dims(x, order), lambda x: x.permute(order), data(*shape))


def test_heads():
    split = check(
        lambda emit, x: op.permute_dims(emit(op.reshape(x, (1, 128, 12, 64))), [0, 2, 1, 3]),
        lambda x: x.reshape(1, 128, 12, 64).permute(0, 2, 1, 3),
        data(128, 768),
    )
    merged = check(
        lambda emit, x: op.reshape(emit(op.permute_dims(x, [0, 2, 1, 3])), (1, 128, 768)),
        lambda x: x.permute(0, 2, 1, 3).reshape(1, 128, 768),
        data(1, 12, 128, 64),
    )
    assert set(split.values()) | set(merged.values()) == {"map"}


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis):
    arrays = [data(*(size if position == axis % 3 else 7 for position in range(3))) for size in (17, 22, 8)]
    check(lambda emit, *x: op.concat(list(x), axis=axis), lambda *x: torch.cat(x, axis), *arrays)


def test_pad_slice_cast_compare():
    check(lambda emit, x: op.nn.pad(x, (0, 0, 1, 1, 2, 1, 0, 0)), lambda x: F.pad(x, (0, 0, 2, 1, 1, 1)), data(1, 9, 11, 16))
    check(lambda emit, x: op.nn.pad(x, (2, 3, 1, 7)), lambda x: F.pad(x, (1, 7, 2, 3)), data(9, 21))
    check(lambda emit, x: op.strided_slice(x, [1], [3], [30], [2]), lambda x: x[:, 3:30:2], data(3, 37, 9))
    check(lambda emit, x: op.astype(x, "int64"), lambda x: x.long(), data(3, 37))
    check(lambda emit, x, y: op.greater(x, y), lambda x, y: x > y, data(3, 37), data(3, 37)[::-1].copy())
    check(lambda emit, x, y: op.where(emit(op.greater(x, y)), x, y), torch.maximum, data(3, 37), data(3, 37)[::-1].copy())


def test_gather_and_resize():
    check(lambda emit, x, i: op.take(x, i, axis=0), lambda x, i: x[i], data(50, 77), data(2, 9, dtype="int64"))
    check(
        lambda emit, x: op.image.resize2d(x, (10, 18), layout="NHWC", method="linear", coordinate_transformation_mode="half_pixel"),
        lambda x: F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1),
        data(1, 5, 9, 12),
    )


@pytest.mark.sweep
@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(5, 13, 77), (1, 3, 5), (64, 2, 8)], ids=str)
def test_sum(shape, axis, keepdims):
    check(lambda emit, x: op.sum(x, axis=axis, keepdims=keepdims), lambda x: x.sum(axis, keepdim=keepdims), data(*shape), tolerance=1e-4)


@pytest.mark.sweep
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_other_reductions(axis):
    x = data(5, 13, 77)
    check(lambda emit, a: op.max(a, axis=axis), lambda a: a.amax(axis), x)
    check(lambda emit, a: op.min(a, axis=axis), lambda a: a.amin(axis), x)
    check(lambda emit, a: op.mean(emit(op.exp(a)), axis=axis), lambda a: a.exp().mean(axis), x)
    check(lambda emit, a: op.variance(a, axis=axis), lambda a: a.var(axis, unbiased=False), x)
    check(lambda emit, a: op.argmax(a, axis=axis), lambda a: a.argmax(axis), x)
    check(lambda emit, a: op.argmin(a, axis=axis, keepdims=True), lambda a: a.argmin(axis, keepdim=True), x)


def test_reductions_keep_nan():
    x = data(3, 5, 37)
    x[1, 2, 3] = x[0, 0, 36] = np.nan
    for axis in (0, 1, -1):
        check(lambda emit, a: op.max(a, axis=axis), lambda a: a.amax(axis), x)  # noqa: B023
        check(lambda emit, a: op.argmax(a, axis=axis), lambda a: torch.from_numpy(np.argmax(a.numpy(), axis)), x)  # noqa: B023
    check(lambda emit, a: op.nn.softmax(a, axis=-1), lambda a: a.softmax(-1), x)
    check(lambda emit, a: op.clip(a, -0.5, 0.5), lambda a: a.clip(-0.5, 0.5), x)


@pytest.mark.parametrize("axis", [0, 1, (0, 1)], ids=str)
def test_extrema_of_infinities(axis):
    for value in (np.inf, -np.inf):
        x = np.full((5, 37), value, "float32")
        check(lambda emit, a: op.max(a, axis=axis), lambda a: a.amax(axis), x)
        check(lambda emit, a: op.min(a, axis=axis), lambda a: a.amin(axis), x)


@pytest.mark.sweep
@pytest.mark.parametrize("channels", [1, 5, 64, 100])
def test_pooling(channels):
    x = data(1, 15, 16, channels)
    pool = lambda function: lambda a: function(a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # noqa: E731
    check(lambda emit, a: op.nn.max_pool2d(a, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC"), pool(lambda a: F.max_pool2d(a, 3, 2, 1)), x)
    check(
        lambda emit, a: op.nn.avg_pool2d(a, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC", count_include_pad=False),
        pool(lambda a: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False)),
        x,
    )
    check(lambda emit, a: op.mean(a, axis=[1, 2], keepdims=True), lambda a: a.mean((1, 2), keepdim=True), x)
    check(lambda emit, a: op.nn.max_pool2d(a, (3, 3), (2, 2), (1, 1, 1, 1), layout="NCHW"), lambda a: F.max_pool2d(a, 3, 2, 1), x)


ROWS = (1, 3, 5), (3, 7, 197), (2, 1, 33), (4, 128), (2, 5, 1000), (1, 1)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape):
    x, width = data(*shape), shape[-1]
    gamma, beta = data(width), data(width) + 1
    for axis in range(len(shape)):
        check(lambda emit, a: op.nn.softmax(a, axis=axis), lambda a: a.softmax(axis), x)  # noqa: B023
        check(lambda emit, a: op.nn.log_softmax(a, axis=axis), lambda a: a.log_softmax(axis), x)  # noqa: B023
    rules = check(lambda emit, a, g, b: op.nn.layer_norm(a, g, b, axes=[-1]), lambda a, g, b: F.layer_norm(a, (width,), g, b), x, gamma, beta)
    rules |= check(lambda emit, a, g: op.nn.rms_norm(a, g, axes=[-1]), lambda a, g: F.rms_norm(a, (width,), g, 1e-5), x, gamma)
    assert len(set(rules.values())) == 1


def test_channel_norms():
    x, gamma, beta = data(2, 12, 7, 9), data(12), data(12) + 1
    groups = lambda emit, a, g, b: op.nn.group_norm(a, g, b, num_groups=3, channel_axis=1, axes=[2, 3])  # noqa: E731
    check(groups, lambda a, g, b: F.group_norm(a, 3, g, b), x, gamma, beta)
    instances = lambda emit, a, g, b: op.nn.instance_norm(a, g, b, channel_axis=1, axes=[2, 3])  # noqa: E731
    check(instances, lambda a, g, b: F.instance_norm(a, weight=g, bias=b), x, gamma, beta)
    last = lambda emit, a, g, b: op.nn.group_norm(a, g, b, num_groups=4, channel_axis=3, axes=[1, 2])  # noqa: E731
    reference = lambda a, g, b: F.group_norm(a.permute(0, 3, 1, 2), 4, g, b).permute(0, 2, 3, 1)  # noqa: E731
    check(last, reference, data(2, 5, 7, 12), gamma, beta)


def test_layer_norm_with_a_large_mean():
    """The variance is not a difference of squares."""
    x = data(4, 64) + 1000
    check(
        lambda emit, a, g, b: op.nn.layer_norm(a, g, b, axes=[-1]),
        lambda a, g, b: F.layer_norm(a, (64,), g, b),
        x,
        data(64),
        data(64),
        tolerance=1e-3,
    )


def test_epilogue_joins_the_row():
    def define(emit, a):
        return op.nn.gelu(emit(op.add(emit(op.nn.softmax(a, axis=-1)), relax.const(0.125, "float32"))))

    rules = check(define, lambda a: F.gelu(a.softmax(-1) + 0.125), data(6, 50))
    assert list(rules.values()) == ["row reduction"]


@pytest.mark.sweep
@pytest.mark.parametrize("size", [1, 5, 8, 37])
def test_dynamic(size):
    n = tirx.Var("n", "int64")
    check(lambda emit, a: op.exp(a), lambda a: a.exp(), data(size, 37), shapes=[(n, 37)])
    check(lambda emit, a: op.nn.softmax(a, axis=-1), lambda a: a.softmax(-1), data(3, size), shapes=[(3, n)])
    check(lambda emit, a: op.sum(a, axis=0), lambda a: a.sum(0), data(size, 33), shapes=[(n, 33)])
    check(lambda emit, a: op.nn.softmax(a, axis=0), lambda a: a.softmax(0), data(5, size), shapes=[(5, n)])
    check(lambda emit, a: op.permute_dims(a, [0, 2, 1]), lambda a: a.permute(0, 2, 1), data(3, size, 5), shapes=[(3, n, 5)])
    check(lambda emit, a, b: op.concat([a, b], axis=1), lambda a, b: torch.cat([a, b], 1), data(3, size), data(3, 5), shapes=[(3, n), (3, 5)])
    check(
        lambda emit, a: op.permute_dims(emit(op.reshape(a, (n, 12, 64))), [1, 0, 2]),
        lambda a: a.reshape(-1, 12, 64).permute(1, 0, 2),
        data(size, 768),
        shapes=[(n, 768)],
    )


def test_what_cannot_be_read_is_left_alone():
    for define, reference in (
        (lambda emit, a: op.cumsum(a, axis=1), lambda a: a.cumsum(1)),
        (lambda emit, a: op.sort(a, axis=1), lambda a: a.sort(1)[0]),
        (lambda emit, a: op.topk(a, 5, axis=1, ret_type="values"), lambda a: a.topk(5, 1)[0]),
    ):
        assert all(rule.startswith(("as is", "parallel loops")) for rule in check(define, reference, data(3, 37)).values())


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int64", "int8"])
def test_other_types(dtype):
    check(lambda emit, a: op.add(a, a), lambda a: a + a, data(3, 37, dtype=dtype))
    if dtype.startswith("float"):
        check(lambda emit, a: op.exp(a), lambda a: a.exp(), data(3, 37, dtype=dtype), tolerance=2e-3 if dtype == "float16" else 1e-6)


def test_code_is_vector_code():
    executable, _ = compiled(lambda emit, a: op.nn.softmax(a, axis=-1), ((512, 197), "float32"))
    assembly = executable.mod.imports[0].inspect_source("asm")
    register = {256: "ymm", 512: "zmm"}[TARGET.vector_bits]
    assert len(re.findall(rf"vfmadd\w*ps.*{register}", assembly)) > 10
    assert not re.search(r"call\w*\s+\*?\w*expf", assembly)


def test_temporaries_are_not_computed_in_place():
    """Rows of 7 in vectors of 8: a last vector that overlaps the one before it would read what a computation in place has changed."""

    def define(emit, x, z):
        return op.multiply(emit(op.slice_scatter(emit(op.add(x, relax.const(1.0))), z, 2, 5, 1, 1)), relax.const(2.0))

    def reference(x, z):
        y = x + 1
        y[:, 2:5] = z
        return y * 2

    check(define, reference, data(5, 7), data(5, 3))


def test_a_dynamic_axis_of_whole_vectors():
    """Its length is n * 16: shorter than a vector means empty, and an index that is divided by n is not to be looked at under n = 0."""
    sizes = {"four": np.array([4, 2, 4, -1]), "one": np.array([1]), "two": np.array([2]), "zero": np.array([0])}
    nodes = [helper.make_node("Reshape", ["x", "four"], ["r"]), helper.make_node("Slice", ["r", "one", "two", "zero"], ["y"])]
    model = tcompile.compile(small(nodes, {"x": ["N", 64]}, ["y"], sizes), shapes={"x": "0..1..x64"}, target=TARGET)
    for rows in (1, 3, 0):
        x = data(rows, 64)
        np.testing.assert_array_equal(model(x=x), x.reshape(4, 2, 4, 2 * rows)[1:2])
