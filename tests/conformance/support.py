"""Write docs/operators.md, what the ONNX importer takes: `python tests/conformance/support.py [--check]`."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx
from support_pages import short_reason, written
from tcompile.compiler.importers.onnx import registry

from conformance.run import DYNAMIC_TABLE, read_table
from conformance.suite import Case, cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"

_HEAD = """# ONNX operators

*Written by `make support-page` from the registry of converters and from the results of the ONNX backend suite (onnx {version}); not edited by hand.*

{summary}

Every test runs in a process of its own; one that does not pass is refused with the node and the reason (exit code 3). `make test-conformance` repeats the run.

- **Opsets**: from which version of the operator on, as far as onnx {version} goes. "definition": by the function body that the standard gives.
- **Tests**: passed / all tests of the suite in which the operator stands. **Any size**: passed / all of the same with every input dim above 1 left open in the model.
- **Types**: of the inputs and outputs of passed tests.

| Operator | Opsets | Tests | Any size | Types | Refused |
|---|---|---|---|---|---|
"""


def page() -> str:
    static, dynamic = read_table(), read_table(DYNAMIC_TABLE)
    of: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases():
        if "_expanded" not in case.name:
            for key in {
                (node.domain.replace("ai.onnx", "", 1) if node.domain == "ai.onnx" else node.domain, node.op_type) for node in case.model.graph.node
            }:
                of[key].append(case)
    known = {(domain, operator) for domain, operator in registry.operators() if not domain.startswith("com.")}
    rows = [_row(key, of.get(key, []), static, dynamic) for key in sorted(known | set(of))]
    others = ", ".join(f"`{operator}`" for domain, operator in sorted(registry.operators()) if domain == "com.microsoft")
    text = _HEAD.format(version=onnx.__version__, summary=_summary(static, dynamic)) + "\n".join(rows) + "\n"
    return text + (f"\nOf ONNX Runtime's domain `com.microsoft`: {others}.\n" if others else "")


def _summary(static: dict[str, tuple[str, str]], dynamic: dict[str, tuple[str, str]]) -> str:
    def count(table: dict[str, tuple[str, str]], selected: list[Case]) -> str:
        found = Counter(table.get(case.name, ("not run", ""))[0] for case in selected)
        return f"{found['pass']} of {len(selected)} pass, " + ", ".join(
            f"{number} {result}" for result, number in sorted(found.items()) if result != "pass"
        )

    fair = [case for case in cases() if case.fair]
    return (
        f"- All tests: {count(static, list(cases()))}.\n- The fair part (standard operators up to opset 26, common types, no expansions): {count(static, fair)}.\n"
        f"- All tests with open dims: {count(dynamic, list(cases()))}."
    )


def _row(key: tuple[str, str], tests: list[Case], static: dict[str, tuple[str, str]], dynamic: dict[str, tuple[str, str]]) -> str:
    domain, operator = key
    passed = [case for case in tests if static[case.name][0] == "pass"]
    oldest = registry.oldest_opset(domain, operator)
    opsets = f"{oldest}+" if oldest is not None else "definition" if passed else "none"
    types = sorted({name for case in passed for name in case.types})
    reasons = sorted({short_reason(static[case.name][1]) for case in tests if static[case.name][0] == "refused"})
    name = operator if not domain else f"{domain}.{operator}"
    counts = [
        f"{sum(1 for case in tests if table.get(case.name, ('', ''))[0] == 'pass')} / {len(tests)}" if tests else "" for table in (static, dynamic)
    ]
    return f"| {name} | {opsets} | {counts[0]} | {counts[1]} | {', '.join(types)} | {'; '.join(reasons)} |"


if __name__ == "__main__":
    sys.exit(written(PAGE, page()))
