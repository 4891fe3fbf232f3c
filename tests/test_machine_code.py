"""Objects of kernels: made once, never taken for another's, gone when there are too many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_models
import pytest
import tcompile
from onnx import helper
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.pipeline import lower
from tcompile.compiler.tvm import IRBuilder, T, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.cpu import machine_code
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE


@pytest.fixture
def made(monkeypatch):
    """Names of the functions that LLVM was given, library by library; nothing is kept from before."""
    found, generate = [], machine_code._generated

    def watched(lowered, target, optimize=True):
        found.append(sorted(str(func.attrs["global_symbol"]) for _, func in lowered.functions_items()))
        return generate(lowered, target, optimize)

    monkeypatch.setattr(machine_code, "_kept", machine_code._Kept(1 << 20))
    monkeypatch.setattr(machine_code, "_generated", watched)
    return found


def kernels(found):
    return [name for names in found for name in names if "fused_" in name]


def test_kernels_are_made_once(made):
    model = onnx_models.mlp(5, layers=2)
    first = tcompile.compile(model)
    names = kernels(made)
    assert len(names) >= 2 and len(set(names)) == len(names)
    second = tcompile.compile(model)
    assert kernels(made) == names and second.artifact.library == first.artifact.library
    # other sizes and another machine are other kernels
    tcompile.compile(onnx_models.mlp(6, layers=2))
    other = len(kernels(made))
    assert other > len(names)
    lower(tcompile.compiler.api.import_model(model), Target.parse("cpu:haswell"), CompileOptions(threads=1))
    lower(tcompile.compiler.api.import_model(model), replace(Target.parse("cpu:haswell"), disabled=("avx2",)), CompileOptions(threads=1))
    assert len(kernels(made)) >= other + len(names)


def test_equal_hashes_are_told_apart(made, monkeypatch):
    monkeypatch.setattr(machine_code, "structural_hash", lambda func: 1)
    x = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)
    models = [onnx_models.mlp(5, layers=layers) for layers in (1, 2, 3)]
    results = [tcompile.compile(model)(x) for model in models]
    again = [tcompile.compile(model)(x) for model in models]
    for one, other in zip(results, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(results[0], results[1])


def test_the_first_ones_go_when_there_are_too_many(made, monkeypatch):
    model = onnx_models.mlp(5, layers=3)
    tcompile.compile(model)
    names = kernels(made)
    kept = machine_code._Kept(1)
    monkeypatch.setattr(machine_code, "_kept", kept)
    tcompile.compile(model)
    tcompile.compile(model)
    assert len(kernels(made)) == 3 * len(names) and kept.size == 0 and not kept._objects


def test_many_kernels_share_objects(made, monkeypatch):
    monkeypatch.setattr(machine_code, "_MOST_OBJECTS", 1)
    model = onnx_models.mlp(5, layers=2)
    x = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)
    found = tcompile.compile(model)(x)
    assert sum(bool(kernels([names])) for names in made) == 1 and len(kernels(made)) == 2
    monkeypatch.setattr(machine_code, "_MOST_OBJECTS", 256)
    np.testing.assert_array_equal(tcompile.compile(model)(x), found)


def test_a_kernel_refuses_tensors_of_other_sizes():
    n = tirx.Var("n", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "f"})
        x, out = T.arg("x", T.buffer((n, 3), "float32")), T.arg("out", T.buffer((n + 1,), "float32"))
        with T.serial(n) as i:
            T.buffer_store(out, x[i, 0] + x[i, 2], [i])
    kernel = tvm.compile(builder.get(), target=tvm_target(Target.parse("cpu")), tir_pipeline=TIR_PIPELINE)["f"]

    def run(x_shape: tuple[int, ...], size: int) -> np.ndarray:
        result = tvm.runtime.tensor(np.zeros(size, "float32"))
        kernel(tvm.runtime.tensor(np.arange(np.prod(x_shape), dtype="float32").reshape(x_shape)), result)
        return result.numpy()

    np.testing.assert_array_equal(run((2, 3), 3), [2, 8, 0])
    for x_shape, size in (((2, 3), 2), ((2, 4), 3), ((3, 3), 3)):
        with pytest.raises(ValueError, match="f: a tensor has another size"):
            run(x_shape, size)


def test_small_kernels_share_objects(made):
    x = np.linspace(-1, 1, 15, dtype="float32").reshape(3, 5)
    model = onnx_models.small(
        [
            helper.make_node("CumSum", ["x", "axis"], ["y"]),
            helper.make_node("Transpose", ["y"], ["z"]),
            helper.make_node("CumSum", ["z", "axis"], ["w"]),
        ],
        {"x": ([3, 5], onnx.TensorProto.FLOAT)},
        ["w"],
        {"axis": np.array(1)},
        17,
    )
    found = tcompile.compile(model)(x)
    np.testing.assert_allclose(found, np.cumsum(np.cumsum(x, 1).T, 1), rtol=1e-5, atol=1e-6)
    assert any(sum("cumsum" in name or "transpose" in name for name in names) >= 2 for names in made), made
