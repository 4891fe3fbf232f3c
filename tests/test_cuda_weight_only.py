"""Products by weights of 1 to 8 bits on CUDA: the order of the codes simulated in numpy, the kernels run by the emulation against the operator's reference, facts of the machine code."""

from __future__ import annotations

import re
import shutil
import types

import numpy as np
import onnx
import pytest
import tcompile
from cuda_models import compiled, emulation, program_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.dialect.weight_only import decompose, reference, weight_only_matmul
from tcompile.compiler.tvm import relax
from tcompile.passes.quantization.formats import GroupedInt
from tcompile.targets.base import Target
from tcompile.targets.common.words import planes
from tcompile.targets.cuda import weight_only
from tcompile.targets.cuda.machines import MACHINES
from tcompile.targets.cuda.weight_only_hopper import HopperWeightOnly
from tcompile.targets.cuda.weight_only_schedule import FewRows, ManyRows, Shape, best, space
from test_cuda_half import SUMS, TYPES, short
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation of a GPU needs g++")
op = relax.op
RANDOM = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _seeded():
    global RANDOM
    RANDOM = np.random.default_rng(5)


def floats(*shape):
    return RANDOM.standard_normal(shape).astype("float32")


def constant(array):
    return relax.const(array, array.dtype.name)


def weights_of(k, n, made):
    """The operands of the operator behind x for a random weight."""
    encoded = made.encode(floats(k, n) + np.float32(0 if made.symmetric else 0.7))
    arrays = [made.pack(encoded.codes), np.ascontiguousarray(encoded.scale[:, 0])]
    return arrays if made.symmetric else [*arrays, encoded.zero[:, 0].astype("uint8")]


#: M, K, N, format, schedule (None: the best)
CASES = [
    (1, 128, 64, GroupedInt(4, 32), None),
    (4, 70, 33, GroupedInt(4, 32, symmetric=False), FewRows(2, 2, 2)),
    (3, 257, 50, GroupedInt(8, 64, symmetric=False), FewRows(4, 2, 1)),
    (2, 5, 1, GroupedInt(8, 32), None),  # one group longer than K
    (8, 96, 100, GroupedInt(4, 16, symmetric=False), None),
    (7, 410, 31, GroupedInt(4, 128), FewRows(2, 4, 3)),
    (5, 100, 31, GroupedInt(8, 6, symmetric=False), FewRows(1, 4, 1)),  # groups filled up
    (6, 64, 36, GroupedInt(4, 64, symmetric=False), FewRows(16, 1, 1)),
    (19, 96, 100, GroupedInt(4, 32, symmetric=False), None),
    (33, 130, 40, GroupedInt(8, 128), ManyRows(32, 2, 3, 2)),
    (9, 61, 35, GroupedInt(4, 20, symmetric=False), None),
    (17, 200, 64, GroupedInt(4, 48), ManyRows(16, 4, 4, 2)),
    (131, 72, 66, GroupedInt(8, 32, symmetric=False), ManyRows(128, 2, 3)),
    (1, 1, 5, GroupedInt(3, 2), None),
    (2, 97, 34, GroupedInt(1, 32), FewRows(2, 8, 1)),
    (33, 200, 65, GroupedInt(7, 48, symmetric=False), ManyRows(32, 4, 3, 1)),
    (7, 160, 40, GroupedInt(6, 64), FewRows(2, 2, 2)),
]


def by_mma_sync(monkeypatch):
    """On Hopper, too."""
    monkeypatch.setattr(HopperWeightOnly, "_faster", lambda self, shape: False)


def check(cases, precision, monkeypatch):
    operands = [weights_of(k, n, made) for _, k, n, made, _ in cases]
    inputs = {f"x{number}": floats(m, k) for number, (m, k, *_) in enumerate(cases)}
    bias = [floats(n) for _, _, n, *_ in cases]
    # kernels are scheduled in the order of the program, those of one shape once
    asked = {(m, k, n): schedule for m, k, n, _, schedule in cases}
    by_mma_sync(monkeypatch)
    monkeypatch.setattr(weight_only, "best", lambda shape, target: asked[shape.m, shape.k, shape.n] or best(shape, target))

    def build(emit, *xs):
        made = zip(xs, operands, bias, cases, strict=True)
        products = [
            (emit(weight_only_matmul(x, *map(constant, arrays), bits=case[3].bits, group=case[3].group)), add) for x, arrays, add, case in made
        ]
        return [emit(op.nn.relu(emit(op.add(product, constant(add))))) for product, add in products]

    outputs, lowered = run(build, inputs, precision=precision)
    for out, x, arrays, add, (*_, made, _) in zip(outputs, inputs.values(), operands, bias, cases, strict=True):
        weight = reference(np.eye(x.shape[1]), *arrays, bits=made.bits, group=made.group)
        x = short(x, precision) if precision in TYPES else x
        error = 2.0**-15 if precision == "tf32" else SUMS
        assert (
            out.dtype == np.float32 and (np.abs(out - np.maximum(x @ weight + add, 0)) <= error * (np.abs(x) @ np.abs(weight) + np.abs(add))).all()
        ), made
    rows = [row for row in lowered.report["kernels"] if row["template"] == "weight only"]
    assert len(rows) == len(cases)
    for row, case in zip(rows, cases, strict=True):
        assert case[-1] is None or row["schedule"] == str(case[-1])
    return lowered


@needs_gxx
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_of_awkward_sizes(precision, monkeypatch):
    lowered = check(CASES, precision, monkeypatch)
    rounded = [row for row in lowered.report["kernels"] if row["template"] == "map"]  # inputs; rows of an odd length are rounded by the product
    assert len(rounded) == (12 if precision == "bf16" else 0)


@pytest.mark.networks
@needs_gxx
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_every_width(precision, symmetric, monkeypatch):
    cases = [
        (m + bits, k, 39 + bits, GroupedInt(bits, group, symmetric), None) for bits in range(1, 9) for m, k, group in ((0, 97, 32), (15, 130, 10))
    ]
    check(cases, precision, monkeypatch)


@pytest.mark.networks
@needs_gxx
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_products_in_other_precisions(precision, monkeypatch):
    check(CASES, precision, monkeypatch)


@needs_gxx
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbers_that_are_none_stay_in_their_row(precision):
    inputs, arrays = {"few": floats(3, 96), "many": floats(20, 96)}, weights_of(96, 40, GroupedInt(4, 32))
    for x in inputs.values():
        x[1, 5], x[2, 7] = np.nan, np.inf
    outputs, _ = run(
        lambda emit, *xs: [emit(weight_only_matmul(x, *map(constant, arrays), bits=4, group=32)) for x in xs], inputs, precision=precision
    )
    for out in outputs:
        assert not np.isfinite(out[1:3]).any() and np.isnan(out[1]).all() and np.isfinite(np.delete(out, [1, 2], axis=0)).all()


@needs_gxx
def test_weights_that_are_computed_have_generic_kernels():
    """Of every kind of width: by the operator's definition, and by plain Relax operators."""
    formats = [GroupedInt(4, 32, symmetric=False), GroupedInt(1, 16), GroupedInt(3, 6), GroupedInt(6, 10, symmetric=False)]
    x, operands = floats(3, 43), [weights_of(43, 9, made) for made in formats]
    arrays = {f"w{i}{j}": array for i, group in enumerate(operands) for j, array in enumerate(group)}

    def build(emit, x, *flat):
        given, results = iter(flat), []
        for made, group in zip(formats, operands, strict=True):
            call = weight_only_matmul(x, *(next(given) for _ in group), bits=made.bits, group=made.group)
            results += [emit(call), emit(decompose(types.SimpleNamespace(emit=emit), call))]
        return results

    outputs, lowered = run(build, {"x": x} | arrays)
    for i, (made, group) in enumerate(zip(formats, operands, strict=True)):
        for out in outputs[2 * i : 2 * i + 2]:
            assert np.abs(out - reference(x, *group, bits=made.bits, group=made.group)).max() < 1e-5, made
    assert lowered.report["kernels"][0]["reason"] == "weights that are computed"


@needs_gxx
def test_a_quantized_model_agrees_with_the_cpu_target_and_its_weights_take_four_bits():
    first, second = floats(64, 96), floats(96, 64)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "first"], ["a"]),
        onnx.helper.make_node("Sigmoid", ["a"], ["b"]),
        onnx.helper.make_node("MatMul", ["b", "second"], ["c"]),
        onnx.helper.make_node("Softmax", ["c"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, 64]) for name in "xy")
    graph = onnx.helper.make_graph(
        nodes, "mlp", [x], [y], [onnx.numpy_helper.from_array(value, name) for name, value in (("first", first), ("second", second))]
    )
    model, x = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), floats(2, 3, 64)
    artifact = tcompile.compile(model, target="cuda", quantize="w4", emit_only=True).artifact
    (ours,) = emulation(artifact)(x)
    np.testing.assert_allclose(ours, tcompile.compile(model, quantize="w4")(x), rtol=1e-5, atol=1e-6)
    assert [row["template"] for row in artifact.report["kernels"]] == ["weight only", "weight only", "rows by warp"]
    weights = 2 * 64 * 96
    assert sum(array.nbytes for array in artifact.weights.values()) == weights // 2 + weights // 32 * 4


@needs_gxx
def test_activations_of_a_model_in_float16_are_read_as_they_lie():
    """MatMulNBits on float16 tensors, as exporters of language models write it."""
    k, n, block = 64, 24, 32
    codes = RANDOM.integers(0, 256, (n, k // block, block // 2), "uint8")
    scales = np.abs(floats(n, k // block)).astype("float16")
    node = onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=block)
    weights = [onnx.numpy_helper.from_array(codes, "w"), onnx.numpy_helper.from_array(scales, "s")]
    shapes = (("x", [5, k]), ("y", [5, n]))
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape) for name, shape in shapes)
    graph = onnx.helper.make_graph([node], "half", [x], [y], weights)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    artifact = tcompile.compile(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), target="cuda", emit_only=True).artifact
    x = floats(5, k).astype("float16")
    (out,) = emulation(artifact)(x)
    rows = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, k // block, block).astype("float64")
    weight = ((rows - 8) * scales.astype("float64")[:, :, None]).reshape(n, k).T
    exact = x.astype("float64") @ weight
    assert out.dtype == np.float16 and np.abs(out - exact).max() <= 2.0**-11 * np.abs(exact).max()
    (row,) = artifact.report["kernels"]
    assert row["workload"].startswith("fp16 x int4")


# -- the order of codes ------------------------------------------------------------------------------------------------------------------------------------


def code_of(words, bits, step, tile, register, half):
    """words: [.., bits * 32] of units -> [.., 32 lanes]: the code in that half of a register of a fragment."""

    def word(start, width, index):
        """Word `index` of every lane's `width` in the plane that begins there."""
        return words[..., start + np.arange(32) * width + index].view(np.uint32)

    if bits == 8:
        return (word(128 * step, 4, 2 * tile + register // 2) >> np.uint32(8 * (register % 2) + 16 * half) & 255) ^ 128
    found, start = 0, 0
    for width, low in planes(bits):
        pairs = 16 // width  # of a word
        pair = 8 * step + 4 * tile + register
        field = word(start, width, pair // pairs) >> np.uint32(width * (pair % pairs) + 16 * half) & ((1 << width) - 1)
        found, start = found | field << low, start + 32 * width
    return found


def matrix_of(words, shape):
    """What `mma.sync` multiplies by, by the layout of its first operand in the PTX manual: register i of lane 4 g + t has row g + 8 (i % 2) and, in its low and high half, k = 2 t + 8 (i / 2)
    and the next."""
    matrix = np.zeros((shape.all_units * 32, shape.strips * 32), np.int64)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    for step, tile, register, half in np.ndindex(2, 2, 4, 2):
        codes = code_of(words, shape.bits, step, tile, register, half)
        # slot 2 t + 8 h + e of x is its k = 16 s + 4 t + 2 h + e; row g + 8 r of the tile is the strip's column 4 g + 2 tile + r
        k, column = 16 * step + 4 * t + 2 * (register // 2) + half, 4 * g + 2 * tile + register % 2
        for strip in range(shape.strips):
            for unit in range(shape.all_units):
                matrix[32 * unit + k, 32 * strip + column] = codes[strip, unit]
    return matrix


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 100), st.integers(1, 70), st.integers(1, 40).map(lambda half: 2 * half), st.integers(0, 2**32 - 1))
def test_codes_in_the_order_of_fragments_are_the_matrix(bits, k, n, group, seed):
    made = GroupedInt(bits, group)
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (made.groups(k) * group, n)).astype("uint8")
    shape = Shape(1, k, n, bits, min(group, k + k % 2), False, 3, True, False)
    words = weight_only.shuffled(made.pack(codes), shape)
    assert words.nbytes == shape.strips * shape.all_units * 32 * 32 * bits // 8
    place = np.arange(k) // shape.group * shape.spread + np.arange(k) % shape.group
    np.testing.assert_array_equal(matrix_of(words, shape)[place, :n], codes[:k])


def test_strips_of_scales_belong_to_the_columns_of_their_lanes():
    shape = Shape(1, 96, 70, 4, 32, False, 3, True, False)
    values = floats(3, 70)
    packed = weight_only.strips(values, (shape.strips, shape.groups, 32))
    assert packed.shape == (3, 3, 32)
    np.testing.assert_array_equal(packed.transpose(1, 0, 2).reshape(3, 96)[:, :70], values)


# -- schedules and machine code ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(MACHINES))
def test_schedules_fit_the_machine(arch):
    target = Target.parse(f"cuda:{arch}")
    for m in (1, 8, 9, 4096):
        for bits, half in ((4, True), (8, False)):
            shape = Shape(m, 4096, 4096, bits, 32, True, 1 if half else 3, True, half)
            for schedule in space(shape, target):
                assert schedule.shared_bytes(shape) <= target.shared_bytes and schedule.threads <= 1024
                assert schedule.units(shape) * (schedule.parts - 1) < shape.all_units <= schedule.units(shape) * schedule.parts
            assert isinstance(best(shape, target), FewRows if m <= 8 else ManyRows)
    wide = Shape(1, 4096, 4096, 4, 128, False, 1, True, True)
    # bound by memory: no faster than its bytes, and slower only by what a kernel takes before and behind its loop
    least = wide.strips * wide.all_units * wide.unit_bytes / (target.bandwidth_gbs / target.frequency_ghz)
    assert least <= best(wide, target).predicted_cycles(wide, target) < least + 3000
    small, large = (best(Shape(m, 4096, 4096, 4, 128, False, 1, True, True), target) for m in (16, 4096))
    assert small.bm == 16 < large.bm  # few rows want blocks, many want to unpack codes once


#: m, k, n, format; decoding and many rows, 4 bits and 8, with zeros and without
CODE = [(1, 512, 256, GroupedInt(4, 32)), (40, 512, 256, GroupedInt(4, 128, symmetric=False)), (3, 256, 64, GroupedInt(8, 64, symmetric=False))]


def golden(arch, precision, cases, folder, monkeypatch):
    by_mma_sync(monkeypatch)
    inputs = {f"x{number}": floats(m, k) for number, (m, k, *_) in enumerate(cases)}
    operands = [weights_of(k, n, made) for _, k, n, made in cases]

    def build(emit, *xs):
        made = zip(xs, operands, cases, strict=True)
        return [
            emit(op.nn.silu(emit(weight_only_matmul(x, *map(constant, arrays), bits=case[3].bits, group=case[3].group)))) for x, arrays, case in made
        ]

    lowered = compiled(program_of(build, inputs), f"cuda:{arch}", precision, emit_only=False)
    code = dict(part.partition("\n")[::2] for part in dump(lowered.library, folder, "-sass").split("Function : ")[1:])
    code = {name.strip(): text for name, text in code.items()}
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump(lowered.library, folder, "-res-usage"))
    rows = {f"k_{row['kernel']}": row for row in lowered.report["kernels"]}
    for name, registers, stack, _, local in usage:
        assert int(stack) == int(local) == 0 and int(registers) * rows[name]["threads"] <= 65536
        check_code(rows[name], code[name], "FP16" if precision == "fp16" else "BF16")


def check_code(row, text, kind):
    """No conversion of codes to floats, but a mask with an or and one subtraction for two of them."""
    assert not re.search(r"\b(LDL|STL)\b", text), row
    if row["template"] != "weight only":
        return
    assert ("HMMA.16816.F32.BF16" if kind == "BF16" else "HMMA.16816.F32 ") in text and not re.search(r"\b(I2F|F2I|I2FP|PRMT\.I2F)\b", text), row
    bits, few = int(re.search(r"x int(\d)", row["workload"])[1]), "strips" in row["schedule"]
    if bits > 1:
        assert "LOP3.LUT" in text and ("HFMA2.BF16_V2" if kind == "BF16" else "HADD2") in text
    # planes by their width, scales and activations aside
    for width, load in ((4, "LDG.E.128"), (2, "LDG.E.64"), (1, "LDG.E.")):
        if few and bits & width or bits == 8 and few and width == 4:
            assert load in text, (row, load)
    if not few:
        assert "LDGSTS.E.BYPASS.128" in text
    if few and kind == "FP16" and bits < 8 and "zeros" not in row["workload"]:
        units = len(re.findall(r"HMMA\.", text)) // 4  # one for each of those on their way
        # a mask with an or makes a pair of codes of each plane; the rest finds places of activations
        assert len(re.findall(r"\bLOP3\b", text)) <= units * (16 * bits.bit_count() + 24), row


@needs_nvcc
@needs_cuobjdump
def test_codes_are_unpacked_in_registers_and_multiplied_on_tensor_cores(tmp_path, monkeypatch):
    golden("sm_80", "fp32", [*CODE[:2], (1, 512, 96, GroupedInt(3, 32))], tmp_path, monkeypatch)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(("arch", "precision"), [("sm_90a", "fp32"), ("sm_80", "tf32"), ("sm_80", "bf16"), ("sm_90a", "fp16")])
def test_codes_are_unpacked_in_registers_in_every_precision(arch, precision, tmp_path, monkeypatch):
    golden(arch, precision, CODE, tmp_path, monkeypatch)


@pytest.mark.networks
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(("arch", "precision"), [("sm_80", "fp16"), ("sm_90a", "bf16")])
def test_codes_of_every_width_are_unpacked_in_registers(arch, precision, tmp_path, monkeypatch):
    golden(arch, precision, [(m, 512, 32 * bits, GroupedInt(bits, 32)) for bits in range(1, 9) for m in (1, 40)], tmp_path, monkeypatch)
