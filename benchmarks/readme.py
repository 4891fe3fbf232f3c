"""The table of speeds in README.md (processors with AMX, batch 1) and the summary at the head of docs/performance.md, from the tables that the other benchmarks wrote into that page.

python benchmarks/readme.py
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parent.parent
#: name in the tables -> what the README calls it
NETWORKS = {
    "bert-base": "BERT-base, 128 tokens",
    "bert-base@seq=512": "BERT-base, 512 tokens",
    "minilm": "MiniLM-L6",
    "vit-s16": "ViT-S/16",
    "deit-t": "DeiT-T",
    "swin-t": "Swin-T",
    "resnet50": "ResNet-50",
    "mobilenetv3-l": "MobileNetV3-L",
    "efficientformer-l1": "EfficientFormer-L1",
    "ppocr-det": "PP-OCRv4 detector, 640 x 640",
    "ppocr-rec": "PP-OCRv4 recogniser",
    "smollm2": "SmolLM2-135M, 128 tokens",
    "decoding": "SmolLM2-135M, a token behind 511",
    "gpt2": "GPT-2, 128 tokens",
    "t5-encoder": "T5-small's encoder, 128 tokens",
}
#: column -> table in docs/performance.md and its column of ratios
RATIOS = {
    "fp32": ("networks fp32, AMX", "fastest / tcompile"),
    "bf16x2": ("networks bf16x2, AMX", "fastest / tcompile"),
    "bf16": ("networks bf16, AMX", "fastest / tcompile"),
    "int8": ("networks int8, AMX", "fastest int8 peer / int8"),
    "int8 ms": ("networks int8, AMX", "int8 ms"),
}
#: row of the summary -> tables in docs/performance.md and their column of ratios
SUMMARY = {
    "networks, float32": ("networks fp32", "fastest / tcompile"),
    "networks, bf16": ("networks bf16", "fastest / tcompile"),
    "networks, int8": ("networks int8", "fastest int8 peer / int8"),
    "attention, 128 to 4096 tokens": ("attention", "fastest / fused"),
    "attention of one query": ("attention of 1", "fastest / fused"),
    "decoding of SmolLM2": ("decoding", "fastest / tcompile"),
}
#: kinds of processors, as the names of tables have them
KINDS = ("AMX", "AVX512", "AVX512 AMD", "AVX2")


def table(page: str, name: str) -> list[dict[str, str]]:
    """The rows of the table between the markers of `name`, by column."""
    text = page.partition(f"<!-- {name}: ")[2].partition(f"<!-- end of {name} -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]] if lines else []


def figures(page: str) -> dict[tuple[str, str], dict[str, str]]:
    """(network, column) -> figure by number of threads."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for column, (name, ratio) in RATIOS.items():
        for row in table(page, name):
            if row["batch"] == "1":
                found.setdefault((row["network"], column), {})[row["threads"]] = row[ratio]
    for row in table(page, "decoding, AMX"):
        if row["fastest / tcompile"] != "-":
            found.setdefault(("decoding", "fp32" if row["weights"] == "float32" else row["weights"]), {})[row["threads"]] = row["fastest / tcompile"]
    return found


def shown(cell: dict[str, str]) -> str:
    return " / ".join(f"{float(cell[threads]):.2f}" if threads in cell else "-" for threads in ("1", "2")) if cell else "-"


def summary(page: str, name: str, column: str) -> str:
    """Least and largest ratio of a table, their geometric mean and number."""
    ratios = [float(row[column]) for row in table(page, name) if row[column] != "-"]
    return f"{min(ratios):.2f} to {max(ratios):.2f}, {geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "-"


def write(file: Path, name: str, head: list[str], rows: list[list[str]]) -> None:
    """Replace the table between the markers of `name`."""
    text = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
    marker = rf"(<!-- {name}: written by benchmarks/readme.py -->\n).*?(<!-- end of {name} -->\n)"
    page, count = re.subn(marker, lambda match: f"{match[1]}{text}\n{match[2]}", file.read_text(), flags=re.DOTALL)
    if not count:
        raise SystemExit(f"{file.name} has no markers of the table of {name}")
    file.write_text(page)


def main() -> None:
    performance = ROOT / "docs" / "performance.md"
    page = performance.read_text()
    found = figures(page)
    speed = [[label, *(shown(found.get((network, column), {})) for column in RATIOS)] for network, label in NETWORKS.items()]
    write(ROOT / "README.md", "speed", ["network", *RATIOS], speed)
    rows = [[label, *(summary(page, f"{name}, {kind}", column) for kind in KINDS)] for label, (name, column) in SUMMARY.items()]
    write(performance, "summary", ["", *KINDS], rows)


if __name__ == "__main__":
    main()
