"""`make demo`: the pretrained PP-OCRv4 text recogniser, compiled by the `tcompile` command, reads rendered lines of text beside onnxruntime.

Prints what both read, how closely their probabilities agree and how fast each is, from one interleaved run. The model comes from the package
rapidocr-onnxruntime; x: [1, 3, 48, W] float32 in -1..1 -> [1, T, 6625] class probabilities, decoded by CTC.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import tcompile
from PIL import Image, ImageDraw, ImageFont
from tcompile.compiler.compare import agree
from tcompile.compiler.peers import prepare
from tcompile.compiler.timing import interleaved

HEIGHT, WIDTH = 48, 480
LINES = (
    "The quick brown fox jumps over",
    "a lazy dog, 1234567890 times.",
    "Compilers turn loops into speed",
    "Invoice No. 2024-0815: $19.95",
    "tensor@example.org (555-0199)",
)


def model_path() -> Path:
    """The recogniser inside the installed package."""
    package = find_spec("rapidocr_onnxruntime")
    if package is None or package.origin is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps rapidocr-onnxruntime==1.4.4")
    return Path(package.origin).parent / "models" / "ch_PP-OCRv4_rec_infer.onnx"


def alphabet(model: Path) -> list[str]:
    """Characters by class: 0 is CTC's blank, then the list in the model's metadata, then the space."""
    metadata = {entry.key: entry.value for entry in onnx.load(str(model), load_external_data=False).metadata_props}
    return ["", *metadata["character"].splitlines(), " "]


def render(text: str) -> np.ndarray:
    """A line of black text on white as [1, 3, HEIGHT, WIDTH] float32 in -1..1."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    size = 30
    while (font := ImageFont.load_default(size)).getlength(text) > WIDTH - 16:
        size -= 1
    ImageDraw.Draw(image).text((8, HEIGHT // 2), text, fill="black", font=font, anchor="lm")
    return (np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 127.5 - 1.0).copy()


def decode(probabilities: np.ndarray, characters: list[str]) -> str:
    """Greedy CTC: the best class of every step, repeats merged, blanks dropped."""
    best = probabilities[0].argmax(axis=1)
    kept = best[np.concatenate(([True], best[1:] != best[:-1]))]
    return "".join(characters[index] for index in kept)


def main() -> None:
    model = model_path()
    characters = alphabet(model)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "ocr.tcm"
        subprocess.run(["tcompile", str(model), "--shape", f"x=1x3x{HEIGHT}x{WIDTH}", "-o", str(artifact)], check=True)
        start = time.perf_counter()
        compiled = tcompile.load(artifact)
        print(f"loaded in {(time.perf_counter() - start) * 1e3:.0f} ms, {compiled.threads} threads\n")
    worst, exact = 0.0, 0
    for line in LINES:
        image = render(line)
        ours, theirs = compiled(image), prepare("onnxruntime", model, {"x": image}, compiled.threads)()[0]
        check = agree(ours, theirs)
        worst, exact = max(worst, check.max_error), exact + (decode(ours, characters).strip() == line)
        print(
            f"  text        {line}\n  tcompile    {decode(ours, characters)}\n  onnxruntime {decode(theirs, characters)}   {'agree' if check.ok else check.reason}\n"
        )
    print(f"{exact} of {len(LINES)} lines read exactly; largest difference to onnxruntime {worst:.1e} of the output's range\n")
    image = render(LINES[0])
    contestants: dict[str, Callable[[], object]] = {"tcompile": lambda: compiled(image)}
    contestants["onnxruntime"] = prepare("onnxruntime", model, {"x": image}, compiled.threads)
    timings = interleaved(contestants)
    for name, timing in timings.items():
        print(f"  {name:<12} {timing.median * 1e3:7.2f} ms   {timing.median / timings['onnxruntime'].median:.2f} x onnxruntime")


if __name__ == "__main__":
    main()
