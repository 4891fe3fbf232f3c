"""Operators on images from ONNX, against onnxruntime: Resize and its kin."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import tcompile
import torch
from onnx import TensorProto, helper
from onnx_models import small
from tcompile.compiler.errors import UnsupportedModel

KINDS = {"f": TensorProto.FLOAT, "u": TensorProto.UINT8, "i": TensorProto.INT64}


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def against_onnxruntime(model, feeds: dict[str, np.ndarray]) -> None:
    expected = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
    found = tcompile.compile(model)(*feeds.values())
    for want, have in zip(expected, found if isinstance(found, tuple) else (found,), strict=True):
        have = np.asarray(have)
        assert have.dtype == want.dtype and have.shape == want.shape
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def resize(shape: list, sizes=None, scales=None, kind: str = "f", **attributes: object):
    constants = {"sizes": np.array(sizes, np.int64)} if sizes else {"scales": np.array(scales, np.float32)}
    node = helper.make_node("Resize", ["x", "", "", "sizes"] if sizes else ["x", "", "scales"], ["y"], **attributes)
    return small([node], {"x": (shape, KINDS[kind])}, [("y", KINDS[kind])], constants, opset=19)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("shape", "new", "attributes"),
    [
        ((2, 3, 11, 13), {"sizes": [2, 3, 3, 1]}, {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}),
        ((1, 2, 7, 5), {"sizes": [1, 2, 14, 1]}, {"mode": "nearest", "nearest_mode": "ceil", "coordinate_transformation_mode": "half_pixel_symmetric"}),
        ((1, 2, 7, 13), {"scales": [1, 1, 2, 1.3]}, {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "align_corners", "axes": [0, 1, 2, 3]}),
        ((1, 1, 7, 1), {"sizes": [1, 1, 8, 5]}, {"mode": "nearest", "nearest_mode": "round_prefer_ceil"}),
        ((2, 1, 11, 5), {"scales": [1, 1, 0.7, 3.3]}, {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"}),
        ((2, 1, 11, 5), {"scales": [0.7, 2]}, {"mode": "linear", "antialias": 1, "axes": [2, -1]}),
        ((1, 2, 4, 6, 7), {"sizes": [1, 2, 5, 3, 9]}, {"mode": "linear"}),
        ((3, 2, 9), {"scales": [1, 1, 1.7]}, {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}),
        ((7, 9), {"sizes": [8, 4]}, {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
        ((1, 1, 11, 13), {"scales": [1, 1, 0.6, 0.5]}, {"mode": "cubic", "antialias": 1, "exclude_outside": 1}),
        ((1, 2, 1, 5), {"sizes": [1, 2, 3, 16]}, {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel", "cubic_coeff_a": -0.5}),
        ((1, 2, 8, 5), {"sizes": [9, 12]}, {"mode": "linear", "axes": [3, 2], "keep_aspect_ratio_policy": "not_larger"}),
    ],
)  # fmt: skip
def test_resize(shape: tuple, new: dict, attributes: dict) -> None:
    if attributes.get("coordinate_transformation_mode") == "align_corners" and "scales" in new:
        with pytest.raises(UnsupportedModel, match="gives no whole size"):
            tcompile.compile(resize(list(shape), **new, **attributes))
        return
    dims = [*shape[:-2], "h", "w"] if sum(shape) % 2 else list(shape)
    against_onnxruntime(resize(dims, **new, **attributes), {"x": floats(*shape)})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_bytes(mode: str) -> None:
    x = np.random.default_rng(5).integers(0, 256, (1, 2, 7, 9)).astype(np.uint8)
    against_onnxruntime(resize([1, 2, 7, 9], sizes=[1, 2, 5, 13], kind="u", mode=mode, coordinate_transformation_mode="asymmetric"), {"x": x})


def test_crop_and_resize_with_regions_from_run_time() -> None:
    node = helper.make_node(
        "Resize", ["x", "roi", "", "sizes"], ["y"], coordinate_transformation_mode="tf_crop_and_resize", mode="linear", extrapolation_value=7.5
    )
    model = small([node], {"x": [1, 2, 7, "w"], "roi": [8]}, ["y"], {"sizes": np.array([1, 2, 5, 9])}, opset=13)
    feeds = {"x": floats(1, 2, 7, 8), "roi": np.array([0, 0, 0.2, -0.3, 1, 1, 0.7, 1.2], np.float32)}
    against_onnxruntime(model, feeds)


@pytest.mark.sweep
@pytest.mark.parametrize(("opset", "mode"), [(10, "nearest"), (10, "linear"), (13, "cubic")])
def test_scales_computed_at_run_time(opset: int, mode: str) -> None:
    node = helper.make_node("Resize", ["x", "scales"] if opset < 11 else ["x", "", "scales"], ["y"], mode=mode)
    model = small([node], {"x": [1, 1, 5, 7], "scales": [4]}, ["y"], opset=opset)
    compiled = tcompile.compile(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for scales in ([1, 1, 0.6, 2.5], [1, 1, 1.9, 0.4]):
        feeds = {"x": floats(1, 1, 5, 7), "scales": np.array(scales, np.float32)}
        np.testing.assert_allclose(np.asarray(compiled(*feeds.values())), session.run(None, feeds)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("image", "places", "mode", "padding", "align"),
    [
        ((5, 6), (4, 7), "linear", "zeros", 0),
        ((1, 7), (3, 3), "linear", "reflection", 0),
        ((5, 6), (4, 7), "linear", "border", 1),
        ((3, 5), (4, 7), "cubic", "border", 0),
        ((4, 5), (2, 7), "cubic", "reflection", 1),
        ((5, 1), (4, 7), "cubic", "zeros", 0),
        ((5, 7), (4, 7), "nearest", "reflection", 1),
        ((3, 5, 6), (2, 4, 7), "linear", "reflection", 1),
        ((3, 5, 1), (2, 4, 7), "nearest", "zeros", 0),
    ],
)
def test_grid_sample(image: tuple, places: tuple, mode: str, padding: str, align: int) -> None:
    """Places far outside too."""
    rank = len(image)
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], mode=mode, padding_mode=padding, align_corners=align)
    dims = [2, 3, *image] if align else ["n", 3, *(f"s{axis}" for axis in range(rank))]
    model = small([node], {"x": dims, "grid": ["n" if not align else 2, *places, rank]}, ["y"], opset=20)
    grid = floats(2, *places, rank) * 2
    grid[0, 0] = 1e4
    against_onnxruntime(model, {"x": floats(2, 3, *image), "grid": grid})


@pytest.mark.parametrize("align", [0, 1])
def test_affine_grid(align: int) -> None:
    node = helper.make_node("AffineGrid", ["theta", "size"], ["y"], align_corners=align)
    model = small([node], {"theta": [2, 3, 4], "size": ([5], TensorProto.INT64)}, ["y"], opset=20)
    against_onnxruntime(model, {"theta": floats(2, 3, 4), "size": np.array([2, 1, 3, 5, 7])})


POOLS = [
    ("MaxPool", (2, 3, 8, 11), {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1], "storage_order": 1}),
    ("MaxPool", (1, 2, 7, 9), {"kernel_shape": [3, 3], "strides": [2, 2], "dilations": [1, 2], "ceil_mode": 1}),
    ("MaxPool", (1, 2, 5, 6, 7), {"kernel_shape": [2, 3, 1], "auto_pad": "SAME_LOWER", "storage_order": 1}),
    ("LpPool", (2, 1, 7), {"kernel_shape": [3], "strides": [3], "ceil_mode": 1, "pads": [1, 0]}),
    ("LpPool", (1, 2, 11, 7), {"kernel_shape": [2, 2], "strides": [1, 2], "dilations": [2, 1], "ceil_mode": 1, "pads": [1, 0, 1, 0], "p": 3}),
    ("AveragePool", (1, 2, 11, 8), {"kernel_shape": [3, 2], "strides": [3, 1], "dilations": [2, 1], "ceil_mode": 1, "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    ("GlobalLpPool", (2, 3, 5, 7), {"p": 3}),
    ("LRN", (2, 7, 3, 5), {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 1.5}),
]  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize(("op", "shape", "attributes"), POOLS)
def test_pools(op: str, shape: tuple, attributes: dict) -> None:
    outputs = ["y", "places"] if op == "MaxPool" else ["y"]
    model = small([helper.make_node(op, ["x"], outputs, **attributes)], {"x": list(shape)}, [(name, KINDS["i"] if name == "places" else KINDS["f"]) for name in outputs], opset=21)  # fmt: skip
    against_onnxruntime(model, {"x": np.round(floats(*shape) * 2) if op == "MaxPool" else floats(*shape)})


def test_unpooling_puts_maxima_back() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[2, 3], strides=[2, 3]),
        helper.make_node("MaxUnpool", ["y", "places"], ["z"], kernel_shape=[2, 3], strides=[2, 3]),
    ]
    against_onnxruntime(small(nodes, {"x": [2, 3, 4, 6]}, ["z"]), {"x": floats(2, 3, 4, 6)})


def test_unpooling_checks_places() -> None:
    node = helper.make_node("MaxUnpool", ["y", "places"], ["z"], kernel_shape=[2], strides=[2])
    compiled = tcompile.compile(small([node], {"y": [1, 1, 3], "places": ([1, 1, 3], KINDS["i"])}, ["z"]))
    np.testing.assert_array_equal(np.asarray(compiled(floats(1, 1, 3), np.array([[[0, 3, 5]]]))) != 0, [[[True, False, False, True, False, True]]])
    with pytest.raises(Exception, match="an index lies outside"):
        compiled(floats(1, 1, 3), np.array([[[0, 3, 6]]]))


@pytest.mark.parametrize("fixed", [True, False], ids=["constant sizes", "sizes from run time"])
def test_col2im(fixed: bool) -> None:
    node = helper.make_node("Col2Im", ["x", "image", "block"], ["y"], strides=[2, 1], dilations=[1, 2], pads=[1, 0, 2, 1])
    sizes = {"image": np.array([7, 8]), "block": np.array([3, 2])}
    kinds = {} if fixed else {name: ([2], KINDS["i"]) for name in sizes}
    model = small([node], {"x": [2, 18, 28], **kinds}, ["y"], sizes if fixed else {})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": floats(2, 18, 28), **({} if fixed else sizes)}
    np.testing.assert_allclose(np.asarray(tcompile.compile(model)(*feeds.values())), session.run(None, feeds)[0], rtol=1e-5, atol=1e-5)


REGIONS = np.array([[0.3, 1.2, 7.9, 6.1], [4, 4, 4.2, 4.1], [-3, -2, 30, 20], [6, 5, 2, 1]], np.float32)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("opset", "attributes"),
    [
        (10, {"output_height": 3, "output_width": 2, "spatial_scale": 0.5}),
        (16, {"output_height": 2, "output_width": 5, "sampling_ratio": 2}),
        (16, {"output_height": 3, "output_width": 2, "mode": "max", "coordinate_transformation_mode": "output_half_pixel"}),
    ],
)
def test_roi_align(opset: int, attributes: dict) -> None:
    node = helper.make_node("RoiAlign", ["x", "regions", "images"], ["y"], **attributes)
    model = small([node], {"x": [2, 3, "h", 9], "regions": ["r", 4], "images": (["r"], KINDS["i"])}, ["y"], opset=opset)
    against_onnxruntime(model, {"x": floats(2, 3, 7, 9), "regions": REGIONS[:3], "images": np.array([1, 0, 1])})


def test_roi_align_checks_images() -> None:
    node = helper.make_node("RoiAlign", ["x", "regions", "images"], ["y"], output_height=2, output_width=2)
    compiled = tcompile.compile(small([node], {"x": [2, 1, 7, 9], "regions": ["r", 4], "images": (["r"], KINDS["i"])}, ["y"]))
    with pytest.raises(Exception, match="an index lies outside"):
        compiled(floats(2, 1, 7, 9), REGIONS[:1], np.array([2]))


def test_max_roi_pool() -> None:
    node = helper.make_node("MaxRoiPool", ["x", "regions"], ["y"], pooled_shape=[3, 2], spatial_scale=0.75)
    model = small([node], {"x": [2, 3, 7, 9], "regions": ["r", 5]}, ["y"])
    images = np.array([[1], [0], [1], [0]], np.float32)
    against_onnxruntime(model, {"x": floats(2, 3, 7, 9), "regions": np.concatenate([images, REGIONS], 1)})


@pytest.mark.parametrize("masked", [True, False])
def test_deformable_convolution(masked: bool) -> None:
    inputs = {"x": floats(2, 4, 7, 9), "offsets": floats(2, 24, 4, 7) * 2, **({"mask": floats(2, 12, 4, 7)} if masked else {})}
    names = ["x", "w", "offsets", "b", "mask"] if masked else ["x", "w", "offsets"]
    node = helper.make_node(
        "DeformConv", names, ["y"], group=2, offset_group=2, strides=[2, 1], pads=[1, 0, 2, 2], dilations=[2, 2], kernel_shape=[2, 3]
    )
    weights = {"w": floats(6, 2, 2, 3), **({"b": floats(6)} if masked else {})}
    model = small([node], {name: ["n", *array.shape[1:]] for name, array in inputs.items()}, ["y"], weights, opset=19)
    against_onnxruntime(model, inputs)


@pytest.mark.parametrize(("op", "inputs"), [("NegativeLogLikelihoodLoss", ["x", "t", "w"]), ("SoftmaxCrossEntropyLoss", ["x", "t", "w"])])
def test_losses_with_constant_weights(op: str, inputs: list[str]) -> None:
    """Operators that are inlined, some of whose inputs have no declared type."""
    node = helper.make_node(op, inputs, ["y"], reduction="mean", ignore_index=2)
    model = small([node], {"x": [4, 5, 3], "t": ([4, 3], KINDS["i"])}, ["y"], {"w": np.abs(floats(5))}, opset=13)
    against_onnxruntime(model, {"x": floats(4, 5, 3), "t": np.random.default_rng(2).integers(0, 5, (4, 3))})


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("op", "image", "kernel", "strides", "mode", "attributes"),
    [
        ("Conv", (7, 11), (3, 2), (2, 3), "SAME_UPPER", {}),
        ("Conv", (9, 8, 5), (3, 1, 4), (3, 2, 1), "SAME_UPPER", {}),
        ("MaxPool", (7, 11), (3, 2), (2, 3), "SAME_UPPER", {}),
        ("AveragePool", (7, 11), (3, 4), (2, 3), "SAME_LOWER", {}),
        ("AveragePool", (8,), (3,), (2,), "SAME_UPPER", {"count_include_pad": 1}),
        ("LpPool", (7, 11), (3, 4), (2, 3), "SAME_LOWER", {}),
    ],
)
def test_padding_that_depends_on_dynamic_sizes(op: str, image: tuple, kernel: tuple, strides: tuple, mode: str, attributes: dict) -> None:
    weights = {"w": floats(4, 3, *kernel)} if op == "Conv" else {}
    node = helper.make_node(op, ["x", *weights], ["y"], kernel_shape=kernel, strides=strides, auto_pad=mode, **attributes)
    model = small([node], {"x": ["n", 3, *(f"s{axis}" for axis in range(len(image)))]}, ["y"], weights, opset=19)
    against_onnxruntime(model, {"x": floats(2, 3, *image)})


@pytest.mark.parametrize(
    "attributes", [{"output_shape": [13, 9], "strides": [2, 1], "dilations": [4, 2]}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}]
)
def test_transposed_convolution(attributes: dict) -> None:
    """Padding may follow from dynamic sizes."""
    dims = ["n", 4, "h", "w"] if "auto_pad" in attributes else [2, 4, 5, 7]
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], group=2, **attributes)
    model = small([node], {"x": dims}, ["y"], {"w": floats(4, 3, 3, 2), "b": floats(6)})
    against_onnxruntime(model, {"x": floats(2, 4, 5, 7)})


def test_output_padding_greater_than_the_strides() -> None:
    """Which a greater dilation makes legal; onnxruntime refuses it, PyTorch does not."""
    weights, x = {"w": floats(4, 3, 3, 2), "b": floats(6)}, floats(2, 4, 5, 7)
    node = helper.make_node(
        "ConvTranspose", ["x", "w", "b"], ["y"], group=2, strides=[2, 1], dilations=[4, 2], output_padding=[3, 1], pads=[1, 0, 1, 0]
    )
    found = tcompile.compile(small([node], {"x": [2, 4, 5, 7]}, ["y"], weights))(x)
    options = {"groups": 2, "stride": (2, 1), "dilation": (4, 2), "output_padding": (3, 1), "padding": (1, 0)}
    expected = torch.nn.functional.conv_transpose2d(*(torch.from_numpy(array) for array in (x, weights["w"], weights["b"])), **options)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_sizes_that_an_operator_fixes_may_be_open() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 2]),
        helper.make_node("Resize", ["c", "", "", "sizes"], ["y"], mode="linear"),
    ]
    open_, fixed = (
        small(nodes, {"x": [1, 2, "h", "v"], "w": [3, 2, *kernel], "sizes": ([count], KINDS["i"])}, ["y"])
        for kernel, count in ((("kh", "kw"), "k"), ((3, 2), 4))
    )
    compiled = tcompile.compile(open_)
    feeds = {"x": floats(1, 2, 7, 9), "w": floats(3, 2, 3, 2), "sizes": np.array([1, 3, 4, 11])}
    expected = onnxruntime.InferenceSession(fixed.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    np.testing.assert_allclose(np.asarray(compiled(*feeds.values())), expected, rtol=1e-5, atol=1e-5)
