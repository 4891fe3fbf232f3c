"""Attention over lists of the blocks that a constant mask leaves, against numpy: patterns of heads and of all, hidden queries, cut blocks; and when the kernel is chosen."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from machines import HASWELL, runnable
from tcompile.autotune.learned import default_model
from tcompile.compiler.dialect.attention import attention, reference
from tcompile.compiler.tvm import relax, tvm
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.lower import schedule_kernels, tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from tcompile.targets.cpu.ops_attention import OWN
from test_cpu_attention import operands


class Picked:
    """A cost model that takes one of the schedules of this template."""

    name = "picked"

    def __init__(self, pick):
        self.pick = pick

    def choose(self, candidates, machine):
        own = [each for each in candidates if each.template == "attention_blocks"]
        return own[int(self.pick * (len(own) - 1))], 1.0


def module_of(arrays, mask, **attrs):
    builder = relax.BlockBuilder()
    params = [relax.Var(name, relax.TensorType(array.shape, str(array.dtype))) for name, array in zip("qkv", arrays, strict=True)]
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(attention(*params, relax.const(mask), **attrs)))
        builder.emit_func_output(out)
    return legalize(builder.get(), OWN)


def run(arrays, mask, target, pick, **attrs):
    module, (choice,) = schedule_kernels(module_of(arrays, mask, **attrs), target, Picked(pick))  # pyright: ignore[reportArgumentType]
    assert choice.template == "attention_blocks"
    executable = relax.build(module, tvm_target(target), tir_pipeline=TIR_PIPELINE)
    return relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(array) for array in arrays)).numpy()


def mask_of(kind, batch, heads, queries, keys):
    """bool or float32 masks of one pattern for all, for heads, for samples."""
    rng = np.random.default_rng(1)
    column, row = np.arange(keys), np.arange(queries)[:, None]
    ahead, near = column - row, abs(column - row) < 20
    head, sample = np.arange(heads)[:, None, None], np.arange(batch)[:, None, None, None]
    hidden = np.where(near, 0, -np.inf).astype("float32")
    masks = {
        "sinks": (ahead <= 0) & ((ahead > -9) | (column < 3)),
        "heads": ((ahead <= 0) & ((ahead > -16) | (column // 8 % 4 == head % 4)))[None],
        "documents": np.where(row * 3 // queries == column * 3 // keys, 0, -np.inf).astype("float32"),
        "bias": (hidden + rng.standard_normal((batch, heads, queries, keys))).astype("float32"),
        "lowest": np.where(near | (column < 3), 0, np.finfo("float32").min).astype("float32"),
        "samples": np.broadcast_to((column < keys // (3 + sample)) & (row > 5), (batch, 1, queries, keys)),
        "nothing": near & (row % 7 != 3) & (column < keys // 2),
    }
    return masks[kind]


CASES = [
    ((1, 4, 2, 131, 131, 16, 17), "heads", {}, 1.0),
    ((2, 2, 1, 200, 331, 33, 24), "samples", {"layout": "BSHD"}, 0.3),
    ((1, 2, 2, 67, 400, 8, 8), "nothing", {"causal": True}, 0.0),
    ((1, 1, 1, 233, 170, 20, 16), "bias", {"before": 3, "after": 60}, 0.6),
]
#: the others run beside every network
MORE = [
    (sizes, kind, options, pick)
    for sizes in ((1, 4, 2, 131, 131, 16, 17), (2, 2, 1, 200, 331, 33, 24), (1, 2, 2, 67, 400, 8, 8), (1, 3, 1, 533, 129, 64, 64))
    for kind in ("sinks", "heads", "documents", "bias", "samples", "nothing")
    for options, pick in (({}, 0.9), ({"causal": True, "layout": "BSHD"}, 0.2))
]


@pytest.mark.sweep
@pytest.mark.parametrize("target", runnable()[:2])
@pytest.mark.parametrize(("sizes", "kind", "options", "pick"), [*CASES, *(pytest.param(*case, marks=pytest.mark.networks) for case in MORE)])
def test_patterns(sizes, kind, options, pick, target):
    batch, heads, _, queries, keys = sizes[:5]
    arrays, mask = operands(*sizes, layouts=(options.get("layout", "BHSD"),) * 4), mask_of(kind, batch, heads, queries, keys)
    np.testing.assert_allclose(run(arrays, mask, target, pick, **options), reference(*arrays, mask, **options), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("target", runnable()[:1])
def test_bfloat16_and_unsafe_rows(target):
    sizes = (1, 4, 2, 131, 150, 16, 18)
    arrays, mask = [array.astype(ml_dtypes.bfloat16) for array in operands(*sizes)], mask_of("nothing", 1, 4, 131, 150)
    found = run(arrays, mask, target, 0.5, safe=False)
    q, k, v = (array.astype(np.float64) for array in arrays)
    want, bound = (reference(q, k, values, mask, safe=False) for values in (v, np.abs(v)))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    assert np.isnan(want).any() and (np.abs(found - want)[~np.isnan(want)] <= (2**-8 * bound + 1e-5)[~np.isnan(want)]).all()


def test_the_cost_model_takes_it_where_blocks_are_hidden_for_good():
    """A mask of scattered zeros hides no block; a finite number that is all a query has hides nothing."""
    sizes = (1, 2, 1, 512, 512, 32, 32)
    arrays = operands(*sizes)
    near = abs(np.arange(512) - np.arange(512)[:, None]) < 40
    alone = near.copy()
    alone[7] = False

    def chosen(mask, **options):
        _, (choice,) = schedule_kernels(module_of(arrays, mask, **options), HASWELL, default_model())
        return choice

    taken = chosen(near)
    assert taken.template == "attention_blocks" and taken.workload.endswith("mask select kept 0.34")
    assert chosen(np.where(near, 0, np.finfo("float32").min).astype("float32")).template == "attention_blocks"
    assert chosen(alone).template == "attention_blocks"
    assert {chosen(alone, fill=-1e35).template, chosen(near, fill=-5.0).template} == {"attention"}
    assert chosen(np.random.default_rng(0).random((512, 512)) > 0.5).template == "attention"
