"""Windows and lists of blocks in both attention templates: their source run by the emulation against numpy in float64, which is chosen, and facts of the machine code."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_models import compiled, program_of, run
from tcompile.compiler.dialect.attention import AttentionAttrs, attention, reference
from tcompile.compiler.element_types import numpy_dtype
from tcompile.compiler.tvm import relax
from test_cpu_attention_blocks import mask_of
from test_cuda_attention_hopper import TARGET, forced, needs_gxx
from test_cuda_half import TYPES, short
from test_cuda_target import dump, needs_cuobjdump, needs_nvcc

#: batch, heads, kv heads, queries, keys, depth, width, mask, options; masks with a name are constants, "input" is none
WINDOWS = [
    (1, 2, 1, 131, 200, 32, 32, None, {"before": 20, "causal": True}),
    (1, 2, 2, 300, 71, 40, 40, None, {"before": 9, "after": 3}),  # queries that see nothing
    (1, 1, 1, 1, 1, 8, 8, None, {"before": 0, "after": 0}),
    (2, 2, 1, 133, 300, 16, 64, "input", {"before": 31, "causal": True}),
    (1, 2, 2, 140, 140, 24, 16, None, {"before": 150, "after": 5, "layout": "BSHD"}),
    (1, 2, 2, 90, 40, 24, 16, None, {"before": 10, "causal": True, "safe": False}),
    (1, 2, 2, 90, 40, 24, 16, None, {"before": 10, "causal": True, "fill": -50.0}),
    (1, 1, 1, 200, 333, 128, 128, None, {"before": 37, "after": 130, "scale": -0.1}),
]
LISTS = [
    (1, 4, 2, 131, 331, 32, 32, "sinks", {"causal": True}),
    (1, 4, 1, 333, 333, 16, 24, "heads", {"layout": "BSHD"}),
    (2, 2, 1, 200, 301, 64, 48, "samples", {}),
    (1, 2, 2, 300, 257, 40, 40, "nothing", {"safe": False}),
    (1, 1, 1, 233, 470, 128, 128, "bias", {"before": 3, "after": 60}),
    (1, 2, 1, 260, 260, 24, 16, "lowest", {"scale": -0.3}),
    (1, 2, 1, 300, 290, 24, 16, "documents", {"scale": 0.4}),
]


def floats(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def check(cases, precision=None, target="cuda:sm_80"):
    """The rows of the report."""
    rng = np.random.default_rng(5)
    inputs, constants, expected = {}, [], []
    for number, (b, h, hk, s, t, d, e, kind, options) in enumerate(cases):
        given = {f"q{number}": floats(rng, b, h, s, d), f"k{number}": floats(rng, b, hk, t, d), f"v{number}": floats(rng, b, hk, t, e)}
        mask = rng.random((b, 1, s, t)) > 0.4 if kind == "input" else None if kind is None else mask_of(kind, b, h, s, t)
        for name, layout in zip(list(given), AttentionAttrs(**options).layouts, strict=False):
            given[name] = given[name] if layout == "BHSD" else np.ascontiguousarray(given[name].transpose(0, 2, 1, 3))
        operands = [short(value, precision) if precision else value for value in given.values()]
        expected.append(reference(*operands, *([] if mask is None else [mask]), **options))
        constants.append(relax.const(mask) if kind not in (None, "input") else None)
        inputs |= given | ({f"m{number}": mask} if kind == "input" else {})

    def build(emit, *x):
        results, values = [], iter(x)
        for (*_, kind, options), constant in zip(cases, constants, strict=True):
            operands = [next(values) for _ in range(4 if kind == "input" else 3)]
            results.append(emit(attention(*operands, *([] if constant is None else [constant]), **options)))
        return results

    outputs, lowered = run(build, inputs, target=target, precision=precision)
    for out, exact in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
        assert np.nanmax(np.abs(out - exact)) <= (2 * TYPES[precision][1] if precision else 3e-6) * np.nanmax(np.abs(exact))
    return [row for row in lowered.report["kernels"] if row["template"].startswith("attention")]


@pytest.mark.sweep
@needs_gxx
@pytest.mark.parametrize("precision", [None, pytest.param("bf16", marks=pytest.mark.networks)])
def test_by_mma_sync(precision):
    rows = check([*WINDOWS, *LISTS], precision)
    assert len(rows) == len(WINDOWS) + len(LISTS) and sum(row["schedule"].endswith(", listed") for row in rows) == len(LISTS)
    assert rows[0]["workload"].endswith("window 20+0")


@needs_gxx
@pytest.mark.parametrize("cases", [[*WINDOWS[:2], *LISTS[1:4]], pytest.param([*WINDOWS[2:], *LISTS], marks=pytest.mark.networks)])
def test_by_wgmma(monkeypatch, cases):
    """Blocks take several pieces of work of different lengths."""
    forced(monkeypatch, cores=3)
    rows = check(cases, "bf16", TARGET)
    assert [row["template"] for row in rows] == ["attention hopper"] * len(cases)
    assert sum(", listed" in row["schedule"] for row in rows) == sum(case[7] not in (None, "input") for case in cases)


@needs_gxx
@pytest.mark.networks
def test_by_three_warp_groups(monkeypatch):
    forced(monkeypatch, groups=3, stages=3, cores=2)
    check([case for case in (*WINDOWS, *LISTS) if max(case[5:7]) <= 64], "fp16", TARGET)


def empty(shapes, dtype):
    return {name: np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape) for name, shape in zip("qkv", shapes, strict=True)}


def lowered(mask, dtype, target, size=4096, width=128, heads=8, **options):
    emit_only, inputs = options.pop("emit_only", True), empty([(1, heads, size, width)] * 3, dtype)
    constant = [] if mask is None else [relax.const(mask)]
    return compiled(program_of(lambda emit, *x: [emit(attention(*x, *constant, **options))], inputs), target, emit_only=emit_only)


def test_the_report_and_the_schedules_follow_what_is_seen():
    """A list where blocks are hidden; all of the mask where none is, or where what is hidden counts; equal masks share lists, other attributes do not."""
    near = (abs(np.arange(1024) - np.arange(1024)[:, None]) < 100) | (np.arange(1024) < 5)
    (row,) = lowered(near, "bfloat16", TARGET, size=1024).report["kernels"]
    assert row["template"] == "attention hopper" and row["schedule"].endswith(", listed")
    (row,) = lowered(near, "float32", "cuda:sm_80", size=1024).report["kernels"]
    assert row["schedule"].endswith(", listed")
    scattered = np.random.default_rng(0).random((1024, 1024)) > 0.5
    alone = near.copy()
    alone[7] = False
    for mask, options in ((scattered, {}), (alone, {"fill": -1e35}), (near, {"fill": -5.0})):
        (row,) = lowered(mask, "float32", "cuda:sm_80", size=1024, **options).report["kernels"]
        assert "listed" not in row["schedule"]
    few = near[:, :] & (np.arange(1024) < 64)
    made = lowered(few, "float32", "cuda:sm_80", size=1024)
    assert sum(value.nbytes for value in made.weights.values()) < near.nbytes / 8  # what nothing is seen of is not stored


@needs_nvcc
@needs_cuobjdump
@pytest.mark.networks
@pytest.mark.parametrize(
    ("mask", "dtype", "target", "size", "width", "options"),
    [
        (None, "bfloat16", TARGET, 2048, 128, {"before": 1023, "causal": True}),
        (None, "float16", TARGET, 2000, 128, {"before": 200, "after": 300}),
        (None, "bfloat16", TARGET, 2000, 128, {"before": 700, "causal": True, "fill": -1e9}),  # what is hidden counts
        (None, "bfloat16", TARGET, 2000, 120, {"before": 700, "causal": True, "scale": -0.1}),
        ("blocks", "bfloat16", TARGET, 2048, 128, {}),
        ("bias", "bfloat16", TARGET, 2000, 128, {"causal": True}),
        ("blocks", "float16", TARGET, 2048, 64, {"before": 500}),
        (None, "bfloat16", "cuda:sm_80", 2048, 128, {"before": 1023, "causal": True}),
        ("blocks", "float32", "cuda:sm_80", 2048, 64, {}),
    ],
)
def test_tensor_cores_multiply_and_nothing_spills(tmp_path, mask, dtype, target, size, width, options):
    seen = np.add.outer(np.arange(size) // 128, -(np.arange(size) // 128)) % 4 < 1
    made = {None: None, "blocks": seen, "bias": np.where(seen, np.float32(0.5), np.float32(-np.inf))}[mask]
    lib = lowered(made, dtype, target, size=size, width=width, emit_only=False, **options)
    (row,) = lib.report["kernels"]
    assert lib.report["code_generation"]["remarks"] == [] and (", listed" in row["schedule"]) == (mask is not None)
    assert ("hopper" in row["template"]) == (target == TARGET)
    code, usage = dump(lib.library, tmp_path, "-sass"), dump(lib.library, tmp_path, "-res-usage")
    assert re.search(rf"Function k_{row['kernel']}:\s*REG:\d+ STACK:0 SHARED:\d+ LOCAL:0", usage)
    assert re.search(r"HGMMA\." if target == TARGET else r"HMMA\.", code) and not re.search(r"\b(LDL|STL)\b", code)
