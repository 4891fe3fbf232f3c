"""The worked examples of the documentation run as they stand: fenced blocks that begin with ```python example, those of one page after each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```python example\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {page.name: "\n".join(BLOCK.findall(page.read_text())) for page in sorted(DOCS.glob("*.md"))}


#: pages whose examples take longer than ten seconds
LONG = {"fpga.md", "quantization.md", "sparsity.md", "token-pruning.md"}


@pytest.mark.parametrize("page", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name, code in PAGES.items() if code])
def test_example_runs(page, tmp_path):
    done = subprocess.run([sys.executable, "-c", PAGES[page]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert broken == []
