"""Element types that generated code only stores: how their elements lie in memory at the boundary of a model, and in the program.

A tensor of such a type is held in a carrier: an integer type with one element per item. Small integers are carried as their value, floating-point types as their bits.
The types are named as ml_dtypes names them. The runtime reads this file: it needs no compiler.
"""

from __future__ import annotations

import numpy as np

CARRIERS = {
    "bfloat16": "uint16",
    "int4": "int8",
    "uint4": "uint8",
    "int2": "int8",
    "uint2": "uint8",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
    "float4_e2m1fn": "uint8",
}
#: the type of products by `--quantize fp8`, and its largest number
FLOAT8, FLOAT8_MAX = "float8_e4m3fn", 448.0
#: the lowest and highest value of the integer types among them
BOUNDS = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}


def numpy_dtype(name: str) -> np.dtype:
    """numpy's dtype of that name; those in CARRIERS come from ml_dtypes."""
    if name in CARRIERS:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def encode(array: np.ndarray) -> np.ndarray:
    """The carrier of an array of one of the types of ml_dtypes in CARRIERS."""
    name = array.dtype.name
    if name in BOUNDS:  # what the unused bits of a byte hold is ml_dtypes' business
        return array.astype(CARRIERS[name])
    bits = np.ascontiguousarray(array).reshape(array.shape).view(CARRIERS[name])
    return bits & np.uint8(15) if name == "float4_e2m1fn" else bits


def decode(carrier: np.ndarray, name: str) -> np.ndarray:
    """The array of type `name` that `carrier` holds."""
    return carrier.astype(numpy_dtype(name)) if name in BOUNDS else carrier.view(numpy_dtype(name))
