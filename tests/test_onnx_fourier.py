"""Fourier transforms, determinants, diagonals and cumulative products, against numpy and onnx's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import tcompile
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tcompile.compiler.errors import TcompileError, UnsupportedModel
from tcompile.compiler.program import DimRange

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model(
    op: str,
    inputs: dict[str, tuple[int, Any]],
    constants: dict[str, Any] | None = None,
    *,
    opset: int = 21,
    domain: str = "",
    outputs: list[int] | None = None,
    names: list[str] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    results = [f"y{index}" for index in range(len(outputs or [FLOAT]))]
    node = helper.make_node(op, names or [*inputs, *(constants or {})], results, name="the_node", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(results, outputs or [FLOAT], strict=True)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def as_complex(x: np.ndarray) -> np.ndarray:
    return x[..., 0] + (1j * x[..., 1] if x.shape[-1] == 2 else 0)


def as_pairs(x: np.ndarray) -> np.ndarray:
    return np.stack([x.real, x.imag], -1)


@pytest.mark.sweep
@pytest.mark.parametrize("length", [1, 2, 7, 60, 257, 400])
@pytest.mark.parametrize("inverse", [0, 1])
def test_transforms_of_many_lengths(length: int, inverse: int):
    x = data(2, length, 2)
    compiled = tcompile.compile(model("DFT", {"x": (FLOAT, ["n", length, 2])}, inverse=inverse))
    wanted = (np.fft.ifft if inverse else np.fft.fft)(as_complex(x.astype(np.float64)), axis=1)
    np.testing.assert_allclose(compiled(x), as_pairs(wanted), rtol=1e-5, atol=3e-5 / (1 if not inverse else 10))


@pytest.mark.parametrize(("have", "length"), [(10, 10), (10, 13), (16, 5)])
def test_one_sided_transforms_cut_and_pad(have: int, length: int):
    x = data(3, have, 2, 1)
    compiled = tcompile.compile(model("DFT", {"x": (FLOAT, x.shape)}, {"length": np.int64(length), "axis": np.int64(-3)}, onesided=1))
    np.testing.assert_allclose(compiled(x), as_pairs(np.fft.rfft(x[..., 0], length, axis=1)), rtol=1e-5, atol=1e-5)
    back = tcompile.compile(model("DFT", {"x": (FLOAT, [3, have, 2])}, {"length": np.int64(length)}, onesided=1, inverse=1))
    y = data(3, have, 2)
    np.testing.assert_allclose(back(y)[..., 0], np.fft.irfft(as_complex(y), length, axis=1), rtol=1e-5, atol=1e-6)


def test_long_transforms_of_prime_length_are_refused():
    with pytest.raises(UnsupportedModel, match="prime"):
        tcompile.compile(model("DFT", {"x": (FLOAT, [1, 4099, 1])}))


@pytest.mark.parametrize("onesided", [0, 1])
def test_short_time_transform_of_signals_of_any_length(onesided: int):
    window = np.hanning(24).astype(np.float32)
    compiled = tcompile.compile(model("STFT", {"x": (FLOAT, [2, "n", 1])}, {"step": np.int64(7), "window": window}, onesided=onesided))
    for length in (24, 31, 101):
        x = data(2, length, 1)
        frames = np.stack([x[:, first : first + 24, 0] * window for first in range(0, length - 23, 7)], 1)
        wanted = np.fft.fft(frames, axis=-1)[..., : 13 if onesided else 24]
        np.testing.assert_allclose(compiled(x), as_pairs(wanted), rtol=1e-5, atol=1e-5)


def test_mel_weights():
    values = {"bins": np.int64(8), "length": np.int64(64), "rate": np.int64(16000), "low": np.float32(0), "high": np.float32(7600)}
    graph = model("MelWeightMatrix", {"x": (FLOAT, [1])}, values, names=[*values])
    graph.graph.node.append(helper.make_node("Add", ["y0", "x"], ["y"]))
    graph.graph.output[0].name = "y"
    (wanted,) = ReferenceEvaluator(graph).run(None, {"x": np.zeros(1, np.float32)})
    np.testing.assert_allclose(tcompile.compile(graph)(np.zeros(1, np.float32)), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_determinants(size: int):
    compiled = tcompile.compile(model("Det", {"x": (FLOAT, [3, "n", size, size])}))
    x = data(3, 4, size, size)
    x[0, 0, :, 0] = 0  # singular
    if size > 1:
        x[1, 1, 0, 0] = 0  # needs a pivot
    np.testing.assert_allclose(compiled(x), np.linalg.det(x.astype(np.float64)), rtol=1e-4, atol=1e-6)


def test_a_determinant_of_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(UnsupportedModel, match="square"):
        tcompile.compile(model("Det", {"x": (FLOAT, [2, 3])}))


@pytest.mark.parametrize("equation", ["...ii->...i", "ii->", "iij,jk->ik", "...ij,jk->...ik", "...ij,...jk", "ii,jj->ij"])
def test_einsum_with_ellipses_and_diagonals(equation: str):
    shapes = {"ii": [3, 3], "...ii": [2, 3, 3], "iij": [3, 3, 4], "jk": [4, 5], "...ij": [2, 3, 4], "...jk": [2, 4, 5], "jj": [4, 4]}
    operands = [data(*shapes[term]) for term in equation.split("->")[0].split(",")]
    graph = model("Einsum", {f"x{index}": (FLOAT, operand.shape) for index, operand in enumerate(operands)}, equation=equation)
    np.testing.assert_allclose(tcompile.compile(graph)(*operands), np.einsum(equation, *operands), rtol=1e-5, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "equation", ["ij,jk,kl->il", "i,i,i->i", "i,j,k->kij", "ij,j,i->", "ab,bc,cd,da->bd", "bij,bjk,bk->bi", "ij->j", "ij->", "ij->ji"]
)
def test_einsum_of_any_number_of_operands(equation: str):
    """All sizes open, and checked: a letter has one."""
    sizes = dict(zip("abcdijkl", (2, 3, 4, 5, 3, 4, 5, 2), strict=True))
    terms = equation.split("->")[0].split(",")
    operands = [data(*(sizes[letter] for letter in term)) for term in terms]
    names = [[f"{letter}{index}" for letter in term] for index, term in enumerate(terms)]
    compiled = tcompile.compile(model("Einsum", {f"x{index}": (FLOAT, dims) for index, dims in enumerate(names)}, equation=equation))
    np.testing.assert_allclose(compiled(*operands), np.einsum(equation, *operands), rtol=1e-4, atol=1e-4)
    if len(terms) == 3 and "i,j,k" not in equation:
        operands[-1] = data(*(size + 1 for size in operands[-1].shape))
        with pytest.raises(tcompile.TcompileError, match="is needed"):
            compiled(*operands)


@pytest.mark.parametrize("equation", ["iz->ji", "ij->ii", "ij,jk->im", "ij,jk,kl->im", "i1->i", "ij->i1"])
def test_einsum_of_letters_that_no_operand_has_is_refused(equation: str):
    """TVM's type inference ends the process for some of them (found by the fuzzer)."""
    inputs = {f"x{index}": (FLOAT, [3] * len(term)) for index, term in enumerate(equation.split("->")[0].split(","))}
    with pytest.raises(UnsupportedModel, match="equation"):
        tcompile.compile(model("Einsum", inputs, equation=equation))


def test_diagonal_of_a_dynamic_matrix():
    compiled = tcompile.compile(model("Einsum", {"x": (FLOAT, ["n", "n"])}, equation="ii->i"))
    np.testing.assert_array_equal(compiled(data(7, 7)), np.diagonal(data(7, 7)))


@pytest.mark.parametrize(("exclusive", "reverse"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_cumulative_products(exclusive: int, reverse: int):
    graph = model("CumProd", {"x": (FLOAT, [3, "n"])}, {"axis": np.int64(1)}, opset=26, exclusive=exclusive, reverse=reverse)
    x = data(3, 5)
    (wanted,) = ReferenceEvaluator(graph).run(None, {"x": x})
    np.testing.assert_allclose(tcompile.compile(graph)(x), wanted, rtol=1e-5)


def test_eye_like_takes_the_sizes_of_its_input():
    compiled = tcompile.compile(model("EyeLike", {"x": (FLOAT, ["n", 4])}, k=-1), shapes={"x": (DimRange(0), 4)})
    for rows in (0, 1, 6):
        np.testing.assert_array_equal(compiled(np.ones((rows, 4), np.float32)), np.eye(rows, 4, -1, dtype=np.float32))


def test_tensor_scatter():
    inputs = {"past": (FLOAT, [2, 1, 4, 5]), "update": (FLOAT, [2, 1, 3, 5]), "at": (INT64, [2])}
    past, update = data(2, 1, 4, 5), -data(2, 1, 3, 5)
    linear, circular = (tcompile.compile(model("TensorScatter", inputs, opset=24, mode=mode)) for mode in ("linear", "circular"))
    for compiled, places in ((linear, (0, 1)), (circular, (3, 2))):
        wanted = past.copy()
        for sample, place in enumerate(places):
            wanted[sample, 0, (place + np.arange(3)) % 4] = update[sample, 0]
        np.testing.assert_array_equal(compiled(past, update, np.array(places)), wanted)
    with pytest.raises(TcompileError, match="the_node"):
        linear(past, update, np.array([0, 2]))


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_softmax_of_half_precision_rounds_every_step(kind: str):
    x = (4 * data(3, 37)).astype(np.float16)
    compiled = tcompile.compile(model(kind, {"x": (TensorProto.FLOAT16, [3, 37])}, outputs=[TensorProto.FLOAT16], axis=-1))

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(np.float16).astype(np.float32)

    centred = rounded(x.astype(np.float32) - x.max(1, keepdims=True).astype(np.float32))
    grown = rounded(np.exp(centred))
    total = rounded(grown.sum(1, keepdims=True))
    wanted = centred - rounded(np.log(total)) if kind == "LogSoftmax" else grown / total
    np.testing.assert_array_max_ulp(compiled(x), wanted.astype(np.float16), 1)


def test_optimizers():
    domain = "ai.onnx.preview.training"
    values = {"r": np.float32(0.1), "t": np.int64(2), "x": data(5), "g": -data(5), "v": data(5) * 2, "h": np.abs(data(5))}
    for op, names, options in (
        ("Adagrad", "rtxgh", {"norm_coefficient": 0.01, "decay_factor": 0.1}),
        ("Adam", "rtxgvh", {"norm_coefficient": 0.01, "norm_coefficient_post": 0.02}),
        ("Momentum", "rtxgv", {"norm_coefficient": 0.01, "alpha": 0.9, "beta": 0.8, "mode": "nesterov"}),
    ):
        inputs = {name: (INT64 if name == "t" else FLOAT, values[name].shape) for name in names}
        graph = model(op, inputs, domain=domain, outputs=[FLOAT] * (len(names) - 3), **options)
        compiled, reference = tcompile.compile(graph), ReferenceEvaluator(graph)
        for steps in (0, 2):
            feeds = {name: values[name] for name in names} | {"t": np.int64(steps)}
            for have, want in zip(compiled(*feeds.values()), reference.run(None, feeds), strict=True):
                np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_numeric_operators_of_traditional_machine_learning():
    x = data(3, 4)
    for op, wanted, options in (
        ("Scaler", (x - np.array([1, 2, 3, 4], np.float32)) * np.float32(0.5), {"offset": [1.0, 2.0, 3.0, 4.0], "scale": [0.5]}),
        ("Normalizer", x / np.abs(x).sum(1, keepdims=True), {"norm": "L1"}),
        ("Normalizer", x / np.linalg.norm(x, axis=1, keepdims=True), {"norm": "L2"}),
        ("Binarizer", (x > 0.25).astype(np.float32), {"threshold": 0.25}),
        ("LinearRegressor", x @ np.arange(8, dtype=np.float32).reshape(2, 4).T + np.array([1, -1], np.float32),
         {"targets": 2, "coefficients": [float(value) for value in range(8)], "intercepts": [1.0, -1.0]}),
    ):  # fmt: skip
        compiled = tcompile.compile(model(op, {"x": (FLOAT, [3, 4])}, domain="ai.onnx.ml", **options))
        np.testing.assert_allclose(compiled(x), wanted, rtol=1e-5, atol=1e-6)


def test_random_numbers_are_refused():
    with pytest.raises(UnsupportedModel, match="random numbers"):
        tcompile.compile(model("RandomUniformLike", {"x": (FLOAT, [3])}))


@pytest.mark.sweep
@pytest.mark.parametrize(("rank", "axis"), [(2, 0), (3, 0), (4, 0), (4, 2), (4, 3), (5, 1)])
@pytest.mark.parametrize("exclusive", [0, 1])
def test_running_sums_of_tensors_with_open_sizes(rank: int, axis: int, exclusive: int):
    """TVM's own kernel takes seconds to compile for three open sizes, and for four no one has waited long enough (found by the fuzzer)."""
    dims = [f"d{index}" for index in range(rank)]
    sums = tcompile.compile(model("CumSum", {"x": (FLOAT, dims)}, {"axis": np.int64(axis)}, exclusive=exclusive))
    products = tcompile.compile(model("CumProd", {"x": (FLOAT, dims)}, {"axis": np.int64(axis)}, opset=26, exclusive=exclusive))
    for first in (1, 3):
        x = data(first, *range(2, rank + 1))
        want = np.cumsum(x, axis), np.cumprod(x, axis)
        if exclusive:
            want = want[0] - x, np.roll(want[1], 1, axis)
            want[1][tuple(slice(0, 1) if place == axis else slice(None) for place in range(rank))] = 1
        np.testing.assert_allclose(sums(x), want[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(products(x), want[1], rtol=1e-5, atol=1e-5)


def test_one_hot_wants_two_values():
    inputs = {"indices": (TensorProto.INT64, ["n"]), "values": (FLOAT, [0])}
    with pytest.raises(UnsupportedModel, match="two"):
        tcompile.compile(model("OneHot", inputs, {"depth": np.int64(3)}, names=["indices", "depth", "values"]))
    inputs["values"] = (FLOAT, ["m"])
    compiled = tcompile.compile(model("OneHot", inputs, {"depth": np.int64(3)}, names=["indices", "depth", "values"]))
    np.testing.assert_array_equal(compiled(np.array([2, 0]), np.float32([5, 7])), np.float32([[5, 5, 7], [7, 5, 5]]))
    with pytest.raises(tcompile.TcompileError, match="2 is needed"):
        compiled(np.array([2, 0]), np.float32([5, 7, 9]))
