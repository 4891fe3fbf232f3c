"""Networks that PyPI packages carry as ONNX: PP-OCRv4 (text recogniser, detector, direction classifier) and magika."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .entry import BATCH, Dim, Entry, Input
from .fills import file_bytes, page, text_line
from .optional import package_file

_OCR = "rapidocr-onnxruntime"


def _file(distribution: str, relative: str) -> Callable[[], Path]:
    return lambda: package_file(distribution, relative)


def _ocr(name: str, file: str, image: Input, output: str, dims: dict[str, Dim], notes: str) -> Entry:
    locate = _file(_OCR, f"rapidocr_onnxruntime/models/{file}")
    return Entry(name, "packaged", (image,), (output,), dims, "pretrained", (_OCR,), onnx_file=locate, notes=notes)


ENTRIES = (
    _ocr(
        "ppocr-rec",
        "ch_PP-OCRv4_rec_infer.onnx",
        Input("x", ("batch", 3, 48, "width"), text_line),
        "softmax_11.tmp_0",
        {"batch": BATCH, "width": Dim(default=320, min=16, max=2048, step=8)},
        "[N, 3, 48, W] -> character probabilities [N, W/8, 6625]",
    ),
    _ocr(
        "ppocr-det",
        "ch_PP-OCRv4_det_infer.onnx",
        Input("x", ("batch", 3, "height", "width"), page),
        "sigmoid_0.tmp_0",
        {"batch": BATCH, "height": Dim(default=640, min=32, max=2048, step=32), "width": Dim(default=640, min=32, max=2048, step=32)},
        "[N, 3, H, W] -> text probability of each pixel [N, 1, H, W]",
    ),
    _ocr(
        "ppocr-cls",
        "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        Input("x", ("batch", 3, 48, 192), text_line),
        "save_infer_model/scale_0.tmp_1",
        {"batch": BATCH},
        "[N, 3, 48, 192] -> probabilities of 0 and 180 degrees [N, 2]",
    ),
    Entry(
        "magika",
        "packaged",
        (Input("bytes", ("batch", 2048), file_bytes),),
        ("target_label",),
        {"batch": BATCH},
        "pretrained",
        ("magika",),
        onnx_file=_file("magika", "magika/models/standard_v3_3/model.onnx"),
        notes="file type, [N, 2048] -> [N, 214]",
    ),
)
