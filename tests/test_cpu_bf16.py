"""Products in bfloat16 on CPUs: kernels against float64 on rounded operands, the cast, the instructions, and the pass that asks for them."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tcompile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import only_kernel
from machines import HASWELL, multiplying, runnable, widest
from tcompile.compiler.errors import UsageError
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.fused import Fused
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.gemm_schedules import GemmSchedule
from tcompile.targets.cpu.generic import schedule
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.machines import MACHINES, formats
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from test_cpu_conv import Case, reference, schedules, template_for

BF16 = ml_dtypes.bfloat16
CASES = [
    Case((1, 9, 11, 8), 19, (3, 3), pad=(1, 1, 1, 1)),
    Case((2, 13, 8, 5), 32, (3, 3), stride=(2, 2), pad=(1, 1, 1, 1)),
    Case((1, 17, 23, 3), 24, (7, 7), stride=(2, 2), pad=(3, 3, 3, 3)),
    Case((1, 10, 9, 1), 6, (3, 3), pad=(1, 1, 1, 1)),
    Case((1, 9, 9, 12), 24, (3, 3), pad=(1, 1, 1, 1), groups=4),
    Case((2, 31, 1, 6), 20, (5, 1), stride=(2, 3), pad=(1, 0, 3, 0), dilation=(2, 1)),
    Case((1, "h", "w", 7), 20, (3, 3), pad=(1, 1, 1, 1), sizes={"h": 7, "w": 31}),
    Case((2, 9, 11, 7), 19, (1, 1), stride=(2, 2)),
    Case((1, 1, 1, 31), 3, (1, 1)),
]


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(BF16)


def product(m: int | str, k: int, n: int, short: bool = False, dtype: str = "bfloat16") -> Fused:
    """x [m, k] of a type @ w [k, n] + b, with relu and a cast to bfloat16 behind where `short`."""
    builder = relax.BlockBuilder()
    rows = tirx.Var(m, "int64") if isinstance(m, str) else m
    x, w = relax.Var("x", relax.TensorType((rows, k), dtype)), relax.Var("w", relax.TensorType((k, n), "bfloat16"))
    b = relax.Var("b", relax.TensorType((n,), "float32"))
    with builder.function("main"):
        with builder.dataflow():
            y = builder.emit(relax.op.add(builder.emit(relax.op.matmul(x, w, out_dtype="float32")), b))
            y = builder.emit(relax.op.astype(builder.emit(relax.op.nn.relu(y)), "bfloat16")) if short else y
            y = builder.emit_output(y)
        builder.emit_func_output(y, params=[x, w, b])
    return only_kernel(builder.get())


def compiled(kernel: Any, target: Target) -> Any:
    return tvm.compile(kernel.func.with_attr("global_symbol", "kernel"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)


def check(fused: Fused, candidate: Any, target: Target, m: int, template: Any = None) -> None:
    template = template or Gemm()
    kernel = template.build(fused, template.workload(fused, frozenset([1])), candidate, target)
    (k, n), short = (int(dim) for dim in fused.inputs[1].shape), str(fused.output.ty.dtype) == "bfloat16"
    x, w, b = values(m, k), values(k, n, seed=1), values(n, seed=2).astype(np.float32)
    if str(fused.inputs[0].ty.dtype) == "float32":
        x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64) + b
    scale = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64) + np.abs(b)
    out = tvm.runtime.tensor(np.zeros((m, n), BF16 if short else np.float32))
    compiled(kernel, target)["kernel"](*(tvm.runtime.tensor(array) for array in (x, kernel.packings[0].pack(w), b)), out)
    exact = np.maximum(exact, 0) if short else exact
    error = np.abs(out.numpy().astype(np.float64) - exact)
    assert (error <= 3e-7 * scale + (exact / 256 if short else 0)).all()


@pytest.mark.sweep
@pytest.mark.parametrize(("m", "k", "n"), [(13, 17, 31), (1, 3, 1), (129, 34, 50), (1, 1, 1), (5, 1300, 257)])
@pytest.mark.parametrize("pick", [0, 0.7])
@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_awkward_sizes(m, k, n, pick, target, dtype):
    fused = product(m, k, n, dtype=dtype)
    space = Gemm().space(Gemm().workload(fused, frozenset([1])), target)
    check(fused, space[int(pick * (len(space) - 1))], target, m)


@pytest.mark.sweep
@pytest.mark.parametrize("m", [1, 11, "rows"])
@pytest.mark.parametrize("target", runnable())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_run_time_rows_and_short_results(m, target, dtype):
    check(product(m, 19, 45, short=True, dtype=dtype), GemmSchedule(4, 2, target.lanes(), 0), target, 23 if m == "rows" else m)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.integers(0, 10**6), st.sampled_from(["bfloat16", "float32"]))
def test_any_size(m, k, n, pick, dtype):
    target = widest() or Target.parse("cpu:haswell")
    fused = product(m, k, n, dtype=dtype)
    space = Gemm().space(Gemm().workload(fused, frozenset([1])), target)
    check(fused, space[pick % len(space)], target, m)


@pytest.mark.parametrize(
    ("m", "k", "n", "schedule"), [(37, 114, 150, (4, 3, 12, 32, 4)), (64, 41, 95, (3, 2, 24)), (9, 40, 33, (2, 2, 0)), (7, 40, 33, (2, 2, 0))]
)
@pytest.mark.parametrize("target", runnable())
def test_weights_are_widened_once_where_many_tiles_read_them(m, k, n, schedule, target):
    """For float32: by blocks of K, by chunks of rows, for all rows, and within the register tile."""
    mr, nv, *rest = schedule
    check(product(m, k, n, dtype="float32"), GemmSchedule(mr, nv, target.lanes(), *rest), target, m)


@pytest.mark.sweep
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
@pytest.mark.parametrize("target", runnable())
def test_convolutions(index, target):
    check_convolution(index, target)


def check_convolution(index: int, target: Target, template: Any = None) -> None:
    case = CASES[index]
    symbols = {dim: tirx.Var(dim, "int64") for dim in case.x if isinstance(dim, str)}
    builder = relax.BlockBuilder()
    types = [symbols.get(dim, dim) for dim in case.x], (*case.k, case.x[3] // case.groups, case.co)
    params = [relax.Var(name, relax.TensorType(shape, "bfloat16")) for name, shape in zip("xw", types, strict=True)]
    with builder.function("main"):
        with builder.dataflow():
            y = builder.emit_output(relax.op.nn.conv2d(*params, case.stride, case.pad, case.dilation, case.groups, "NHWC", "HWIO", "NHWC", "float32"))
        builder.emit_func_output(y, params=params)
    fused = only_kernel(builder.get())
    template, workload = template_for(fused) if template is None else (template, template.workload(fused, frozenset([1])))
    x, w = values(*(case.sizes.get(dim, dim) for dim in case.x), seed=index), values(*types[1], seed=index + 1)
    want = reference(case, x.astype(np.float64), w.astype(np.float64), [], "none")
    scale = reference(case, np.abs(x).astype(np.float64), np.abs(w).astype(np.float64), [], "none")
    for candidate in schedules(template, workload, target, 1, index):
        kernel = template.build(fused, workload, candidate, target)
        out = tvm.runtime.tensor(np.zeros(want.shape, np.float32))
        compiled(kernel, target)["kernel"](tvm.runtime.tensor(x), tvm.runtime.tensor(kernel.packings[0].pack(w)), out)
        assert (np.abs(out.numpy() - want) <= 3e-7 * scale + 1e-12).all()


@pytest.mark.parametrize(
    ("machine", "candidate", "instruction", "dtype", "m"),
    [
        ("znver4", (8, 3, 16), r"vdpbf16ps\s.*%zmm", "bfloat16", 128),
        ("skylake-avx512", (8, 2, 16), r"vfmadd.*%zmm", "bfloat16", 128),
        ("haswell", (4, 2, 8), r"vfmadd.*%ymm", "bfloat16", 128),
        ("skylake-avx512", (8, 3, 16), r"vfmadd.*%zmm", "float32", 128),
        ("skylake-avx512", (8, 3, 16), r"vfmadd.*%zmm", "float32", 8),
        ("haswell", (5, 2, 8), r"vfmadd.*%ymm", "float32", 128),
        ("haswell", (3, 3, 8), r"vfmadd.*%ymm", "float32", 3),
    ],
)
def test_inner_loop_without_spills(machine, candidate, instruction, dtype, m):
    target, fused = Target.parse(f"cpu:{machine}"), product(m, 256, 384, short=True, dtype=dtype)
    kernel = Gemm().build(fused, Gemm().workload(fused, frozenset([1])), GemmSchedule(*candidate, 0), target)
    assembly = compiled(kernel, target).mod.inspect_source("asm")
    hot = max(re.split(r"\n\.LBB", assembly), key=lambda block: len(re.findall(instruction, block)))
    hot = re.split(r"\n\tj", hot)[0]
    assert len(re.findall(instruction, hot)) >= candidate[0] * candidate[1]
    assert "(%rsp)" not in hot
    assert "tcompile_dpbf16ps" not in assembly  # the wrappers are inlined


@pytest.mark.parametrize("target", runnable())
def test_the_cast_rounds_to_even_and_keeps_nan(target):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4107,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.astype(x, "bfloat16"))
        builder.emit_func_output(y)
    (func,) = (func for _, func in legalize(builder.get()).functions_items() if isinstance(func, tirx.PrimFunc))
    edges = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001, 1, 0x80008000, 0x7F800000, 0], np.uint32)
    array = np.concatenate([edges, np.random.default_rng(0).integers(0, 1 << 32, 4096, np.uint32)]).view(np.float32)
    out = tvm.runtime.tensor(np.zeros(array.shape, BF16))
    library = compiled(schedule(func, target), target)
    library["kernel"](tvm.runtime.tensor(array), out)
    native = "avx512bf16" in target.features
    assert ("vcvtneps2bf16" in library.mod.inspect_source("asm")) == native
    result, exact = out.numpy().astype(np.float32), array.astype(BF16).astype(np.float32)
    # the instruction takes denormal numbers for zeros
    flushed = native & (np.abs(array) < np.finfo(np.float32).tiny) & (result == 0)
    np.testing.assert_array_equal(result[~flushed], exact[~flushed])


def test_bfloat16_is_a_format_of_machines_that_multiply_it_faster():
    intel = MACHINES["sapphirerapids"]
    without_tiles = frozenset(feature for feature in intel.features if not feature.startswith("amx"))
    assert "bfloat16" in intel.formats and "bfloat16" in MACHINES["znver4"].formats
    assert "bfloat16" not in formats(without_tiles, "sapphirerapids") | formats(without_tiles, "emeraldrapids") | MACHINES["haswell"].formats
    assert formats(without_tiles, "znver5") == {"float32", "int8", "bfloat16"}


class Layers(torch.nn.Module):
    """A linear layer with gelu before another, a convolution, and a depthwise one, which stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(37, 83), torch.nn.Linear(83, 19)
        self.conv, self.depthwise = torch.nn.Conv2d(5, 17, 3, padding=1), torch.nn.Conv2d(17, 17, 3, groups=17)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.second(torch.nn.functional.gelu(self.first(x))), self.depthwise(torch.relu(self.conv(image)))


@pytest.fixture(scope="module")
def layers() -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Layers().eval(), (torch.randn(3, 7, 37), torch.randn(2, 5, 13, 11))


@pytest.mark.parametrize("target", [HASWELL, multiplying("bfloat16")])
def test_precision_rounds_operands_alone(layers, target):
    """Where float32 is multiplied as fast, weights of matrix products alone."""
    module, inputs = layers
    calibration = [dict(zip(("x", "image"), inputs, strict=True))]
    compiled = tcompile.compile(module, example_inputs=inputs, precision="bf16", calibration=calibration, target=target)
    native = "bfloat16" in target.formats
    found = compiled(*inputs)
    short = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad():
        exact = module(*inputs)
        with short:
            theirs = module(*inputs)
    for have, want, other, rounded in zip(found, exact, theirs, (True, native), strict=True):
        error, allowed = np.abs(have - want.numpy()).max(), np.abs(other.float().numpy() - want.numpy()).max()
        assert 0 < error <= allowed if rounded else error < 1e-5
    (report,) = [step for step in compiled.report()["passes"] if step["name"] == "precision"]
    assert report["matches"] == ({"matmul": 2, "conv2d": 1} if native else {"matmul": 2}) and report["lossy"] and 0 < report["loss"]["cosine"] < 1e-3
    kinds = [row["workload"] for row in compiled.report()["kernels"]]
    assert sum(" bf16 " in kind for kind in kinds) == 3 * native and sum(" f32xbf16 " in kind for kind in kinds) == 2 * (not native)
    assert sum("conv2d 2x" in kind and "bf16" not in kind for kind in kinds) == 2 - native


def test_precision_fp32_changes_nothing_and_others_are_refused(layers):
    module, inputs = layers
    plain = tcompile.compile(module, example_inputs=inputs)(*inputs)
    same = tcompile.compile(module, example_inputs=inputs, precision="fp32")(*inputs)
    assert all(np.array_equal(a, b) for a, b in zip(plain, same, strict=True))
    for wrong in ("fp16", "tf32", "int8"):
        with pytest.raises(UsageError, match=f"fp32.* bf16.* not in '{wrong}'"):
            tcompile.compile(module, example_inputs=inputs, precision=wrong)
    with pytest.raises(UsageError, match="CPU and CUDA"):
        tcompile.compile(module, example_inputs=inputs, precision="bf16", target="fpga")


def test_layers_may_be_skipped(layers, tmp_path):
    module, inputs = layers
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[pass]]\nname = "canonicalize"\n[[pass]]\nname = "precision"\nskip = ["nowhere"]\n')
    with pytest.raises(UsageError, match=r"skip names no layer nowhere; there are (\S+), "):
        tcompile.compile(module, example_inputs=inputs, recipe=recipe)


class Residual(torch.nn.Module):
    """Shortcuts: of a max-pool, of a sum, and of one that the model returns as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.third = (torch.nn.Conv2d(a, 16, k, padding=k // 2) for a, k in ((3, 3), (16, 3), (16, 1), (16, 1)))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.nn.functional.max_pool2d(torch.relu(self.stem(image)), 3, 2, 1)
        y = torch.relu(self.second(torch.relu(self.first(x))) + x)
        z = torch.relu(self.third(y) + y)
        return z, torch.relu(self.second(z) + z)


@pytest.mark.parametrize("target", [multiplying("bfloat16")])
def test_sums_read_the_16_bit_copy_of_a_shortcut(target):
    torch.manual_seed(0)
    module, image = Residual().eval(), torch.randn(1, 3, 23, 17)
    compiled = tcompile.compile(module, example_inputs=(image,), precision="bf16", target=target)
    double = module.double()

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.float().bfloat16().double()

    def conv(layer: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, rounded(layer.weight), layer.bias, padding=layer.padding)

    with torch.no_grad():
        x = torch.nn.functional.max_pool2d(rounded(torch.relu(conv(double.stem, rounded(image.double())))), 3, 2, 1)
        y = rounded(torch.relu(conv(double.second, rounded(torch.relu(conv(double.first, x)))) + x))
        z = torch.relu(conv(double.third, y) + y)  # returned, so stored in float32, which the sum behind reads
        want = z, torch.relu(conv(double.second, rounded(z)) + z)
    for have, exact in zip(compiled(image.numpy()), want, strict=True):
        # sums near the middle of two bfloat16 may round to either
        np.testing.assert_allclose(have, exact.numpy(), rtol=0, atol=2**-8 * float(exact.abs().max()))
        assert np.abs(have - exact.numpy()).mean() < 1e-4
    # the casts of the input and of what is returned stand alone; all others are part of a product or of the pool
    names = [row["kernel"] for row in compiled.report()["kernels"] if "cast" in row["kernel"] and not row["template"]]
    assert len(names) <= 2, names


@pytest.mark.parametrize("target", [multiplying("bfloat16")])
def test_nothing_is_read_shorter_than_the_model_returns_it(target):
    """A tensor of which a sum and the caller know stays in float32 for both."""
    torch.manual_seed(0)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.tanh(self.a(x))
            return y, self.b(y) + y

    module, x = Two().eval(), torch.randn(5, 32)
    compiled = tcompile.compile(module, example_inputs=(x,), precision="bf16", target=target)
    y, total = compiled(x.numpy())
    weight, bias = (value.detach().double().numpy() for value in (module.b.weight, module.b.bias))
    product = y.astype(BF16).astype(np.float64) @ weight.astype(np.float32).astype(BF16).astype(np.float64).T + bias
    np.testing.assert_allclose(total, product + y, rtol=0, atol=1e-5)
