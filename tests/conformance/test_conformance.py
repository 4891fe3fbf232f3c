"""A sample of the ONNX backend suite against the table of results; `make test-conformance` runs all of it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from conformance.run import DYNAMIC_TABLE, TABLE, read_table
from conformance.suite import cases
from conformance.support import PAGE, page

pytestmark = pytest.mark.xdist_group("conformance")  # one process generates the suite

#: every so many-th test of the suite, in its order
STRIDE = 80


@pytest.mark.parametrize("path", [TABLE, DYNAMIC_TABLE], ids=["fixed", "open"])
def test_every_test_has_a_result_and_none_is_wrong(path):
    table = read_table(path)
    assert set(table) == {case.name for case in cases()}
    assert set(Counter(result for result, _ in table.values())) <= {"pass", "refused"}


def test_results_do_not_fall():
    # in an interpreter of its own, as threads that kernels have started do not survive the fork of every test
    command = [sys.executable, "-W", "ignore", str(TABLE.with_name("run.py")), "--processes", "1", *(case.name for case in cases()[::STRIDE])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stdout + result.stderr


def test_the_support_page_says_what_the_tables_say():
    assert PAGE.read_text() == page()
