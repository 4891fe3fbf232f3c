"""SHA-256 over files: plain for small ones, over chunks in parallel for the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CHUNK_BYTES = 4 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Digest of a JSON value in its canonical spelling (sorted keys, no spaces)."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


class ChunkedSha256:
    """SHA-256 of the concatenated SHA-256 digests of 4 MiB chunks, fed piece by piece. The chunks of a finished file can be hashed in parallel."""

    def __init__(self) -> None:
        self._chunk, self._room, self._digests = hashlib.sha256(), CHUNK_BYTES, b""

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._chunk.update(part)
            self._room -= len(part)
            if not self._room:
                self._digests += self._chunk.digest()
                self._chunk, self._room = hashlib.sha256(), CHUNK_BYTES

    def hexdigest(self) -> str:
        return sha256(self._digests + (self._chunk.digest() if self._room < CHUNK_BYTES else b""))


def chunked_sha256(data: memoryview) -> str:
    """The same digest as `ChunkedSha256` for data at hand, on all CPUs (hashlib lets other threads run)."""
    pieces: Iterable[memoryview] = (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return sha256(b"".join(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)))
