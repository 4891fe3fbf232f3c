"""Grouped products: the operator's kernels against numpy over awkward sizes and ends, and the importers' use of it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tcompile
import torch
from cuda_models import program_of
from machines import runnable
from tcompile.compiler.api import compile_program
from tcompile.compiler.dialect.grouped import grouped_matmul, reference
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import analyze
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.grouped import GroupedGemm
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE

RANDOM = np.random.default_rng(3)


def ends_of(rows: int, experts: int) -> dict[str, np.ndarray]:
    """Ends by what is particular about them."""
    return {
        "spread": np.sort(RANDOM.integers(0, rows + 1, experts)),
        "all in one": np.where(np.arange(experts) < experts // 2, 0, rows),
        "none": np.zeros(experts, int),
        "unsorted and out of range": RANDOM.integers(-2 * rows, 3 * rows, experts),
    }


def fused(rows, experts, k, n):
    """relu(grouped(x, w, owner) * g) as Relax fuses it."""
    builder = relax.BlockBuilder()
    x, w, ends, gates = (
        relax.Var(name, relax.TensorType(shape, dtype))
        for name, shape, dtype in (
            ("x", (rows, k), "float32"),
            ("w", (experts, k, n), "float32"),
            ("ends", (experts,), "int64"),
            ("g", (rows, 1), "float32"),
        )
    )
    with builder.function("main", [x, w, ends, gates]):
        with builder.dataflow():
            product = builder.emit(grouped_matmul(x, w, ends))
            out = builder.emit_output(relax.op.nn.relu(builder.emit(relax.op.multiply(product, gates))))
        builder.emit_func_output(out)
    module, transform = legalize(builder.get()), relax.transform
    for step in (transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR(), transform.DeadCodeElimination()):
        module = step(module)
    owning, product = sorted((func for _, func in module.functions_items() if isinstance(func, tirx.PrimFunc)), key=lambda func: len(func.params))
    assert len(owning.params) == 2, "the epilogue was not fused"
    return analyze(product)


def compiled(func, target):
    return tvm.compile(func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)["f"]


def owners(ends, rows):
    """What `targets.common.ops_linear.owners` says, in numpy."""
    return np.array([next((e for e, end in enumerate(ends) if end > row), len(ends)) for row in range(rows)], "int32")


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "pick"),
    [(1, 1, 1, 1, 0), (11, 4, 3, 5, 0.5), (37, 5, 401, 33, 1), (67, 3, 16, 24, 0.7), (2, 8, 29, 70, 0.6), (131, 2, 7, 48, 1)],
)
@pytest.mark.parametrize("target", runnable())
def test_awkward_sizes(rows, experts, k, n, pick, target):
    """All kinds of ends; what lies around the operands and results is poison."""
    template, func = GroupedGemm(), fused(rows, experts, k, n)
    workload = template.workload(func, frozenset([1]))
    space = list(template.space(workload, target))
    kernel = template.build(func, workload, space[int(pick * (len(space) - 1))], target)
    x, w, gates = (RANDOM.standard_normal(shape).astype("float32") for shape in ((rows, k), (experts, k, n), (rows, 1)))
    call, packed = compiled(kernel.func, target), kernel.packings[0].pack(w)
    order = [{2: "x", 3: "w", 1: "owner"}.get(len(param.shape), "") for param in func.params[:3]]
    assert order == ["x", "w", "owner"]
    for name, ends in ends_of(rows, experts).items():
        out = tvm.runtime.tensor(np.full((rows, n), np.nan, "float32"))
        call(*map(tvm.runtime.tensor, (x, packed, owners(ends, rows), gates)), out)
        error = np.abs(out.numpy() - np.maximum(reference(x, w, ends) * gates, 0))
        assert (error <= 2e-7 * reference(np.abs(x), np.abs(w), ends) * np.abs(gates)).all(), name


def test_nan_stays_with_its_row_and_weights_of_others_are_not_read():
    """Weights of experts without rows are NaN here, and rows behind all ends are zeros whatever x holds."""
    target = Target.parse("cpu")
    x, w = np.ones((6, 9), "float32"), np.ones((4, 9, 21), "float32")
    w[0] = w[2] = x[5] = np.nan
    x[1, 3] = np.nan
    func = fused(6, 4, 9, 21)
    workload = GroupedGemm().workload(func, frozenset([1]))
    kernel = GroupedGemm().build(func, workload, list(GroupedGemm().space(workload, target))[-1], target)
    out = tvm.runtime.tensor(np.empty((6, 21), "float32"))
    rows = (x, kernel.packings[0].pack(w), owners([0, 2, 2, 5], 6), np.ones((6, 1), "float32"))
    compiled(kernel.func, target)(*map(tvm.runtime.tensor, rows), out)
    assert np.isnan(out.numpy()[1]).all()
    np.testing.assert_array_equal(np.delete(out.numpy(), 1, axis=0), np.repeat([[9], [9], [9], [9], [0]], 21, axis=1))


class Groups(torch.nn.Module):
    """Rows through two products by group; of the second, the weights are computed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 7, 19))

    def forward(self, x, ends, other):
        grouped = torch.ops.transformers.grouped_mm_fallback
        return grouped(grouped(x, self.weight, ends).relu(), other.exp(), ends)


def test_rows_that_a_call_brings():
    pytest.importorskip("transformers.integrations.moe")
    module = Groups().eval()
    example = (torch.randn(11, 7), torch.tensor([0, 4, 4, 9, 11], dtype=torch.int32), torch.randn(5, 19, 3))
    exported = torch.export.export(module, example, dynamic_shapes=({0: torch.export.Dim("rows", min=2)}, None, None))
    model = tcompile.compile(exported)
    assert [kernel["template"] for kernel in model.report()["kernels"]].count("grouped_gemm") == 1
    other, weight = example[2].numpy(), module.weight.detach().numpy()
    for rows in (11, 2, 30):
        x = RANDOM.standard_normal((rows, 7)).astype("float32")
        for name, ends in ends_of(rows, 5).items():
            want = reference(np.maximum(reference(x, weight, ends), 0), np.exp(other), ends)
            np.testing.assert_allclose(model(x, ends.astype("int32"), other), want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_weights_in_16_bits():
    """`--precision bf16`, where float32 is multiplied as fast: products by rounded weights, exact but for the order of sums."""
    k, n, x, ends = 6, 21, RANDOM.standard_normal((9, 6)).astype("float32"), np.array([3, 3, 8])
    weight = RANDOM.standard_normal((3, k, n)).astype("float32")
    program = program_of(lambda emit, x, ends: [emit(grouped_matmul(x, relax.const(weight), ends))], {"x": x, "ends": ends})
    model = compile_program(program, Target.parse("cpu:haswell"), CompileOptions(precision="bf16"))
    (row,) = (row for row in model.report()["kernels"] if row["template"] == "grouped_gemm")
    assert "bf16" in row["workload"]
    rounded = weight.astype(ml_dtypes.bfloat16).astype("float32")
    np.testing.assert_allclose(model(x, ends), reference(x, rounded, ends), rtol=1e-5, atol=1e-5)


def test_operands_that_do_not_fit_are_refused():
    types = [relax.TensorType(shape, dtype) for shape, dtype in (((6, 4), "float32"), ((3, 5, 2), "float32"), ((3,), "int32"))]
    with pytest.raises(ValueError, match="do not fit"):
        relax.BlockBuilder().normalize(grouped_matmul(*(relax.Var(name, kind) for name, kind in zip("xwe", types, strict=True))))
