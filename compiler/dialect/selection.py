"""Operators that find out how many of their elements count: results have room for all of them, and the number is a result too.

`tcompile.positions`    where a mask holds
`tcompile.unique`       the distinct rows of a matrix
`tcompile.suppress`     boxes that no better box of their class overlaps (non-maximum suppression)

What lies behind the number is undefined. All of them run on one thread.
"""

from __future__ import annotations

from typing import Any

from ..tvm import operator_attrs, register_operator, relax, tirx

POSITIONS_NAME, UNIQUE_NAME, SUPPRESS_NAME = "tcompile.positions", "tcompile.unique", "tcompile.suppress"


def positions(mask: relax.Expr) -> relax.Call:
    """mask: bool [N] -> (places [N] int64 where it holds, ascending; their number [1] int64)."""
    return relax.Call(POSITIONS, [mask])


def unique(x: relax.Expr, ordered: bool) -> relax.Call:
    """x: [N, M] -> (first [N], group [N], count [N], their number [1]), all int64: for each distinct row the first row like it and how many are, and to which of
    them a row belongs. ordered: by their elements from the first column on, else as they come. NaN is like NaN, and greater than any number.
    """
    return relax.Call(UNIQUE, [x], operator_attrs(ordered=ordered))


def suppress(
    boxes: relax.Expr, scores: relax.Expr, most: relax.Expr, overlap: relax.Expr, least: relax.Expr | None = None, *, centred: bool, room: int = 0
) -> relax.Call:
    """boxes: [B, N, 4], scores: [B, C, N], of one float type; most: [1] int64; overlap, least: [1] float32 -> (chosen [B * C * R, 3] int64, their number [1] int64).

    For every image and class: boxes by falling score (the earlier one where two are equal) that do not overlap one chosen before by more than `overlap` (intersection
    over union), no more than `most`, and with a score above `least` if that is given; as rows (image, class, box). centred: a box is (x, y, width, height) of its
    centre, else two opposite corners (y, x, y, x). R = N, or min(N, room) where `most` is known not to exceed `room`.
    """
    return relax.Call(SUPPRESS, [boxes, scores, most, overlap, *([] if least is None else [least])], operator_attrs(centred=centred, room=room))


def room_of(call: Any, count: Any) -> Any:
    """R of `suppress`, for N = count."""
    room = int(call.attrs["room"])
    return count if not room else tirx.min(count, tirx.IntImm("int64", room))


def _counted(*fields: tuple[list[Any], str]) -> relax.TupleType:
    return relax.TupleType([relax.TensorType(shape, dtype) for shape, dtype in [*fields, ([1], "int64")]])


def _infer_positions(builder: Any, call: Any) -> Any:
    mask = call.args[0].ty
    if mask.ndim != 1 or str(mask.dtype) != "bool":
        raise ValueError(f"{POSITIONS_NAME}: expected a bool vector, got {mask}")
    return _counted((list(mask.shape), "int64"))


def _infer_unique(builder: Any, call: Any) -> Any:
    x = call.args[0].ty
    if x.ndim != 2:
        raise ValueError(f"{UNIQUE_NAME}: expected a matrix, got {x}")
    return _counted(*[([x.shape[0]], "int64")] * 3)


def _infer_suppress(builder: Any, call: Any) -> Any:
    boxes, scores = call.args[0].ty, call.args[1].ty
    if boxes.ndim != 3 or scores.ndim != 3 or not isinstance(boxes.shape[2], tirx.IntImm) or int(boxes.shape[2]) != 4 or boxes.dtype != scores.dtype:
        raise ValueError(f"{SUPPRESS_NAME}: expected boxes [B, N, 4] and scores [B, C, N], got {boxes} and {scores}")
    return _counted(([scores.shape[0] * scores.shape[1] * room_of(call, boxes.shape[1]), 3], "int64"))


def _undefined(builder: Any, call: Any) -> relax.Expr:
    """Data-dependent loops are not Relax operators: a target without a kernel finds the call as it is, and refuses it by its name."""
    return call


POSITIONS = register_operator(POSITIONS_NAME, ("mask",), _infer_positions, _undefined)
UNIQUE = register_operator(UNIQUE_NAME, ("x",), _infer_unique, _undefined)
SUPPRESS = register_operator(SUPPRESS_NAME, ("boxes", "scores", "most", "overlap", "least"), _infer_suppress, _undefined)
