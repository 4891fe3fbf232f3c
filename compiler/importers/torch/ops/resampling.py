"""Images of another size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ....dialect.grid_sample import PADDINGS, grid_sample
from ....tvm import relax
from ..symbols import same_shape
from .shape import argument


def _size(translator: Any, node: fx.Node, factors: Any) -> tuple[Any, ...]:
    """Height and width of the result. Where factors are given, torch takes them for the positions, even where they do not give a whole number of elements."""
    shape = node.meta["val"].shape
    for axis, factor in enumerate(factors or ()):
        exact = node.args[0].meta["val"].shape[axis + 2] * factor == shape[axis + 2]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        if not float(factor).is_integer() and exact is not True:
            raise NotImplementedError(f"the factor {factor:g} does not give a whole number of elements; use recompute_scale_factor=True or a size")
    return tuple(translator.symbols.shape(shape[2:]))


def upsample_nearest2d(translator: Any, node: fx.Node) -> relax.Expr:
    """x [N, C, H, W] -> [N, C, H', W']: element i is number floor(i * H / H') of x, as torch counts when the factor is not a whole number, too."""
    x, size = translator.value(node.args[0]), _size(translator, node, argument(node, 2, "scale_factors"))
    return translator.emit(
        relax.op.image.resize2d(
            x, size=size, layout="NCHW", method="nearest_neighbor", coordinate_transformation_mode="asymmetric", rounding_method="floor"
        )
    )


def upsample_bilinear2d(translator: Any, node: fx.Node) -> relax.Expr:
    """x [N, C, H, W] -> [N, C, H', W']: between the nearest four elements, whose corners or centres stay where they are."""
    corners = argument(node, 2, "align_corners")
    x, size = translator.value(node.args[0]), _size(translator, node, None if corners else argument(node, 3, "scale_factors"))
    mode = "align_corners" if corners else "half_pixel"
    # a single row or column is the first one; resize2d would divide by the distance of the corners
    if corners and not all(isinstance(each, int) for each in (*node.args[0].meta["val"].shape[2:], *size)):
        raise NotImplementedError("align_corners needs a fixed height and width")
    several = tuple(2 if corners and same_shape([each], [1]) else each for each in size)
    found = translator.emit(relax.op.image.resize2d(x, size=several, layout="NCHW", method="linear", coordinate_transformation_mode=mode))
    return found if same_shape(several, size) else translator.emit(relax.op.strided_slice(found, [2, 3], [0, 0], size, assume_inbound=True))


def smoothed(axis_of: Any) -> Any:
    """The converter of an operator that smooths what it shrinks (antialias=True): along each axis the product with a matrix.

    axis_of: the operator of torch, which gives the matrix, too: its result for an image that is the identity, resized along one axis.
    """

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x, given, shape = translator.value(node.args[0]), node.args[0].meta["val"].shape, node.meta["val"].shape  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        if not all(isinstance(size, int) for size in (*given[2:], *shape[2:])):
            raise NotImplementedError("smoothing while resizing needs a fixed height and width")
        corners, factors = node.args[2], (argument(node, 3, "scales_h"), argument(node, 4, "scales_w"))

        def matrix(axis: int) -> relax.Expr:
            old, new = given[axis + 2], shape[axis + 2]
            image = torch.eye(old, dtype=node.meta["val"].dtype)[None, None]
            weights = axis_of(image, [new, old], corners, factors[axis], None)[0, 0]
            return relax.const(np.ascontiguousarray(weights.numpy()))

        rows = translator.emit(relax.op.matmul(matrix(0), x))
        return translator.emit(relax.op.matmul(rows, translator.emit(relax.op.permute_dims(matrix(1)))))

    return convert


#: grid_sampler's numbers of its modes
_MODES = ("linear", "nearest", "cubic")


def grid_sampler(translator: Any, node: fx.Node) -> relax.Expr:
    """x [N, C, *S], grid [N, *O, D] of places in -1..1, the last axis of S first -> [N, C, *O]."""
    x, grid = translator.value(node.args[:2])
    mode, padding, align = node.args[2:5]
    return translator.emit(grid_sample(x, grid, _MODES[mode], PADDINGS[padding], bool(align)))  # pyright: ignore[reportCallIssue]


CONVERTERS = {
    "grid_sampler_2d.default": grid_sampler,
    "grid_sampler_3d.default": grid_sampler,
    "upsample_nearest2d.vec": upsample_nearest2d,
    "upsample_bilinear2d.vec": upsample_bilinear2d,
    "_upsample_bicubic2d_aa.default": smoothed(torch.ops.aten._upsample_bicubic2d_aa.default),
    "_upsample_bilinear2d_aa.default": smoothed(torch.ops.aten._upsample_bilinear2d_aa.default),
}
