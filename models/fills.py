"""Input values that look like what the networks are fed: images, token ids, masks, file bytes."""

from __future__ import annotations

import numpy as np

from .entry import Fill

_MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
_STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)


def photo(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """x: [N, 3, H, W] float32, smooth colour fields with noise, normalised with ImageNet's mean and deviation."""
    return (_scenes(generator, shape) - _MEAN) / _STD


def page(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """x: [N, 3, H, W] float32, lines of dark strokes on light paper, normalised as PP-OCR's detector expects."""
    return (_strokes(generator, shape, line_height=24) - _MEAN) / _STD


def text_line(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """x: [N, 3, H, W] float32 in [-1, 1], one line of dark strokes, as PP-OCR's recogniser and classifier expect."""
    return _strokes(generator, shape, line_height=shape[2]) * 2 - 1


def _scenes(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    batch, channels, height, width = shape
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    frequency, phase = generator.uniform(1, 9, (2, batch, channels, 1, 1)), generator.uniform(0, 6.28, (2, batch, channels, 1, 1))
    waves = np.sin(frequency[0] * rows * 6.28 + phase[0]) * np.sin(frequency[1] * columns * 6.28 + phase[1])
    return np.clip(0.5 + 0.35 * waves + generator.normal(0, 0.05, shape), 0, 1).astype(np.float32)


def _strokes(generator: np.random.Generator, shape: tuple[int, ...], line_height: int) -> np.ndarray:
    """[N, 3, H, W] in 0..1: every line holds glyph cells of three to five thin bars each."""
    batch, _, height, width = shape
    paper = np.full((batch, height, width), 0.92, np.float32)
    cell = max(line_height // 2, 4)
    for image in paper:
        for top in range(line_height // 6, height - line_height // 2, line_height):
            for left in range(2, width - cell, cell):
                for _ in range(generator.integers(3, 6)):
                    y, x = top + generator.integers(0, line_height // 2), left + generator.integers(0, cell - 2)
                    if generator.random() < 0.5:
                        image[y : y + line_height // 3, x : x + 2] = 0.1
                    else:
                        image[y : y + 2, x : x + cell // 2] = 0.1
    paper = np.clip(paper + generator.normal(0, 0.02, paper.shape), 0, 1)
    return np.repeat(paper[:, None], 3, axis=1).astype(np.float32)


def token_ids(vocabulary: int) -> Fill:
    """ids: [N, S] int64, within the vocabulary and skewed to the small ids as words in text are."""

    def fill(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.minimum(vocabulary * generator.random(shape) ** 3, vocabulary - 1).astype(np.int64)

    return fill


def attention_mask(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """mask: [N, S] int64, ones followed by zeros: the first text fills the row, the others end between half and the whole of it."""
    batch, length = shape
    lengths = np.concatenate([[length], generator.integers(max(length // 2, 1), length + 1, batch - 1)])
    return (np.arange(length)[None, :] < lengths[:, None]).astype(np.int64)


def file_bytes(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bytes: [N, 2048] int32 as magika reads a file: its first 1024 bytes and its last 1024, padded with 256."""
    length = shape[1]
    half = length // 2
    rows = np.full(shape, 256, np.int32)
    for row in rows:
        words = generator.choice([b"import ", b"def ", b"return ", b"self.", b"x = ", b"(1, 2)", b"\n    ", b"None"], 400)
        text = np.frombuffer(b"".join(words), np.uint8)[: int(generator.integers(64, half + 1))]
        row[: len(text)] = text
        row[length - len(text) :] = text
    return rows
