"""Weights on disk: a safetensors file whose every tensor begins on a 64-byte boundary, mapped into memory and never copied.

Layout: 8 bytes little-endian header length | JSON header, padded with spaces to a multiple of 64 | tensors. The format allows no holes between
tensors, so gaps are filled by named `__pad_N` entries of zero bytes. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .element_types import numpy_dtype
from .errors import UsageError, VerificationError

ALIGNMENT = 64
#: bound on the header: more than enough for a hundred thousand tensors
MAX_HEADER_BYTES = 64 << 20
PADDING = "__pad_"

_NAMES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float32": "F32",
    "float64": "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def serialize(weights: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The file's content in pieces, in the order of `weights`. Raises UsageError for a dtype or name that the format cannot hold."""
    header: dict[str, Any] = {}
    pieces: list[np.ndarray | bytes] = []
    offset = 0
    for name, array in weights.items():
        if array.dtype.name not in _NAMES:
            raise UsageError(f"weight '{name}' has dtype {array.dtype}, which safetensors cannot store")
        if name.startswith("__"):
            raise UsageError(f"weight name '{name}' is reserved: names must not begin with two underscores")
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        pieces.append(array)
        offset += array.nbytes
        if gap := -offset % ALIGNMENT:
            header[f"{PADDING}{len(pieces)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
            pieces.append(bytes(gap))
            offset += gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        yield piece if isinstance(piece, bytes) else memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))


def map_file(path: Path) -> tuple[mmap.mmap | bytes, dict[str, np.ndarray]]:
    """Map `path`; returns the mapping and name -> array views of it, aligned to 64 bytes, in file order.

    The mapping is copy-on-write: pages are shared with every process that maps the file until someone writes. Raises VerificationError for a
    file that breaks the format in any way.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 8:
            raise VerificationError(f"{path}: {size} bytes are too short for a safetensors file; compile the model again")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    ask_for_huge_pages(mapping)
    length = int.from_bytes(mapping[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise VerificationError(f"{path}: header of {length} bytes does not fit a file of {size}; compile the model again")
    try:
        entries = _entries(json.loads(mapping[8 : 8 + length]), size - 8 - length)
        buffer = np.frombuffer(mapping, np.uint8)
        arrays = {name: buffer[8 + length + begin : 8 + length + end].view(dtype).reshape(shape) for name, dtype, shape, begin, end in entries}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise VerificationError(f"{path}: malformed safetensors header ({error}); compile the model again") from error
    return mapping, arrays


def _entries(header: dict[str, Any], data_bytes: int) -> Iterable[tuple[str, np.dtype, tuple[int, ...], int, int]]:
    """Checked (name, dtype, shape, begin, end) of every tensor; ValueError where the header lies."""
    position = 0
    for name, entry in header.items():
        dtype, shape, (begin, end) = numpy_dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if any(not isinstance(dim, int) or dim < 0 for dim in shape) or begin != position or end > data_bytes:
            raise ValueError(f"entry '{name}' is out of bounds")
        count = dtype.itemsize
        for dim in shape:
            count *= dim
        if end - begin != count:
            raise ValueError(f"entry '{name}' has {end - begin} bytes instead of {count}")
        position = end
        if not name.startswith(PADDING):
            yield name, dtype, shape, begin, end
    if position != data_bytes:
        raise ValueError(f"{data_bytes - position} bytes belong to no entry")


def aligned(array: np.ndarray) -> np.ndarray:
    """`array` itself when it is contiguous, writable and 64-byte aligned (what generated code may rely on); otherwise a copy that is."""
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return array
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    copy = np.ndarray(array.shape, array.dtype, buffer, -buffer.ctypes.data % ALIGNMENT)
    copy[...] = array
    return copy


def gathered(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All weights in one piece of memory, each on a 64-byte boundary, in huge pages where the system has them; `weights` is emptied meanwhile.

    A core that walks megabytes of weights in pages of 4 KiB waits for addresses: from its second-level cache they came at 90 GB/s instead of 140, from the third-level one at 21 instead of 26.
    """
    offsets, size = _offsets(weights, ALIGNMENT)
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_for_huge_pages(memory)
    buffer = np.frombuffer(memory, np.uint8)
    found = {}
    for name, offset in offsets.items():
        source = weights.pop(name)
        found[name] = np.ndarray(source.shape, source.dtype, buffer, offset)
        found[name][...] = source
    return found


def ask_for_huge_pages(mapping: mmap.mmap) -> None:
    """Advice, which a system without such pages, or a file on one that keeps none, does not take."""
    with contextlib.suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)


#: every weight of a blob on a device begins on such a boundary
DEVICE_ALIGNMENT = 256


def device_offsets(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """(where each weight lies in the one blob that a device holds, size of the blob in bytes)."""
    return _offsets(weights, DEVICE_ALIGNMENT)


def _offsets(weights: Mapping[str, np.ndarray], alignment: int) -> tuple[dict[str, int], int]:
    offsets, size = {}, 0
    for name, array in weights.items():
        offsets[name] = size
        size += -(-array.nbytes // alignment) * alignment
    return offsets, size
