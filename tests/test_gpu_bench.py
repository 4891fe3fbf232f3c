"""The harness of `make gpu-bench`, tried on the CPU: what it compares, what it refuses to time, what it writes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_cases


@pytest.fixture(autouse=True)
def _without_a_search(monkeypatch):
    """torch.compile takes a minute here."""
    monkeypatch.setattr(gpu_cases, "_tuned", lambda function, *args: lambda: function(*args))


def test_a_rehearsal_writes_a_table_of_all_kinds(tmp_path, monkeypatch, capsys):
    page, result = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text("before\n<!-- gpu: written by benchmarks/gpu.py -->\n<!-- end of gpu -->\nafter\n")
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "gemm", "attention", "depthwise", "top", "--rehearse", "--rounds", "2", "--output", str(result), "--docs", str(page)]
    )
    gpu.main()
    rows = json.loads(result.read_text())["cases"]
    assert [row["case"].split()[0] for row in rows] == ["gemm", "gemm", "gemm", "gemm", "attention", "depthwise", "top-5"]
    for row in rows:
        assert {name for name in row["refused"] if "_scaled_mm" not in name} <= {"torch cudnn", "torch efficient"} and len(
            row["ms"]
        ) >= 2  # not on CPUs
        assert max(row["errors"].values()) < (0.06 if "fp8" in row["case"] else 0.01) and row["kernels"]
    text = page.read_text()
    assert (
        text.startswith("before")
        and text.endswith("after\n")
        and all(row["case"] in text and f"| {gpu.cells(row, json.loads(result.read_text())['rates'])[1]} |" in text for row in rows)
    )
    assert "| case |" in capsys.readouterr().out


def test_what_is_wrong_or_cannot_run_is_named_and_not_timed():
    case = gpu_cases.gemm(5, 8, 7)

    def broken(_):
        def fails():
            raise RuntimeError("no such kernel\nand more")

        return {"wrong": lambda: torch.ones(5, 7), "absent": fails}

    row = gpu.measure(replace(case, peers=broken), gpu.Rehearsal(), rounds=2)
    assert set(row["ms"]) == {"tcompile"} and row["refused"]["absent"] == "no such kernel" and row["refused"]["wrong"].startswith("error ")
    row = gpu.measure(replace(case, reference=lambda inputs: torch.ones(5, 7)), gpu.Rehearsal(), rounds=2)
    assert not row["ms"] and "above" in gpu.cells(row, {})[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert "finds no CUDA device" in capsys.readouterr().out
