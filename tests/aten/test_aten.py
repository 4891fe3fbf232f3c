"""A sample of torch's operator samples against the table of results; `make test-aten` runs all of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("torch", "timm", "transformers", "expecttest"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is needed", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("aten")  # one process imports torch's samples

#: every so many-th case, in the order of their names
STRIDE = 150


# torch's samples take seconds to import, which the collection of tests should not


def test_every_case_has_a_result_and_none_is_wrong():
    from aten.run import read_table
    from aten.suite import cases

    table = read_table()
    assert set(table) == {case.name for case in cases()}
    for name, (result, count, reason) in table.items():
        passed, every = map(int, count.split("/"))
        assert result in ("pass", "refused"), (name, reason)
        assert (passed == every) == (result == "pass") and bool(reason) == (result == "refused"), name


def test_results_do_not_fall():
    from aten.suite import cases

    # in an interpreter of its own, as threads that kernels have started do not survive the fork of every case
    run = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("run.py")), "--processes", "1"]
    result = subprocess.run([*run, *(case.name for case in cases()[7::STRIDE])], capture_output=True, text=True, check=False)
    assert not result.returncode, result.stdout + result.stderr


def test_the_support_page_says_what_the_table_says():
    from aten.support import PAGE, page

    assert PAGE.read_text() == page()
