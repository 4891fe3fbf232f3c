"""Attention fusion: what it makes of the forms that exports have, which it leaves and why, and how many it finds in real networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tcompile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import UNOPTIMIZED
from tcompile.compiler.api import import_model
from tcompile.compiler.dialect.attention import attrs_of
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.tvm import relax, tvm
from tcompile.models.zoo import ZOO
from tcompile.passes.attention.fuse import FuseAttention
from tcompile.passes.attention.masks import window_of
from tcompile.passes.base import PassContext
from tcompile.passes.canonicalize import Canonicalize
from tcompile.passes.normalization import RecognizeNormalizations
from tcompile.passes.registry import PASSES
from tcompile.targets.base import Target
from torch_modules import Sdpa

op = relax.op
LOWEST = float(np.finfo("float32").min)


def program_of(define, *shapes, dtypes=()):
    """The program of `define(emit, *inputs)`."""
    builder = relax.BlockBuilder()
    types = [relax.TensorType(shape, dtypes[i] if i < len(dtypes) else "float32") for i, shape in enumerate(shapes)]
    params = [relax.Var(f"x{i}", kind) for i, kind in enumerate(types)]
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(define(builder.emit, *params)))
        builder.emit_func_output(out)
    specs = tuple(TensorSpec(param.name, tuple(int(dim) for dim in param.ty.shape), str(param.ty.dtype)) for param in params)
    return Program(builder.get(), specs, specs[:1], Provenance("test", "relax"))


def fused(program):
    context = PassContext(Target("cpu", "test"))
    result = FuseAttention().run(program, context)
    return (Canonicalize().run(result, PassContext(Target("cpu", "test"))) if result is not program else result), context.report


def calls(program, name):
    found = []
    relax.analysis.post_order_visit(
        program.main, lambda e: found.append(e) if isinstance(e, relax.Call) and getattr(e.op, "name", "") == name else None
    )
    return found


def execute(program, arrays):
    executable = relax.build(program.module, UNOPTIMIZED)
    return relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(array) for array in arrays)).numpy()


def transposed(emit, x):
    rank = len(x.ty.shape)
    return emit(op.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2]))


def attention_of(scores):
    """softmax(scores(emit, q k^T, ...)) v."""

    def define(emit, q, k, v, *masks):
        return op.matmul(emit(op.nn.softmax(scores(emit, emit(op.matmul(q, transposed(emit, k))), *masks))), v)

    return define


def const(value):
    return relax.const(value, "float32")


CAUSAL = np.tri(5, 7, dtype=bool)[None, None]
WINDOW = np.tri(5, 7, 1, dtype=bool) & ~np.tri(5, 7, -4, dtype=bool)
QKV = ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
FORMS = {
    "plain": (attention_of(lambda emit, s: s), (), {"scale": 1.0}),
    "scaled": (attention_of(lambda emit, s: emit(op.multiply(s, const(0.3)))), (), {"scale": 0.3}),
    "divided": (attention_of(lambda emit, s: emit(op.divide(s, const(2.0)))), (), {"scale": 0.5}),
    "added": (attention_of(lambda emit, s, m: emit(op.add(m, emit(op.multiply(s, const(0.3)))))), ((2, 1, 5, 7),), {"scale": 0.3}),
    "scaled mask": (attention_of(lambda emit, s, m: emit(op.multiply(emit(op.add(s, m)), const(0.3)))), ((1, 4, 1, 7),), {"scale": 0.3}),
    "two masks": (attention_of(lambda emit, s, m, n: emit(op.add(emit(op.add(s, m)), n))), ((1, 4, 5, 7), (2, 1, 1, 7)), {}),
    "replaced": (attention_of(lambda emit, s, m: emit(op.where(m, s, const(-1e4)))), ((1, 1, 5, 7),), {"fill": -1e4}),
    "filled": (attention_of(lambda emit, s, m: emit(op.where(m, const(LOWEST), s))), ((2, 1, 5, 7),), {"fill": LOWEST}),
    "replaced, added": (attention_of(lambda emit, s, m, n: emit(op.add(emit(op.where(m, s, const(LOWEST))), n))), ((1, 1, 5, 7), (2, 1, 1, 7)), {}),
    "causal": (attention_of(lambda emit, s: emit(op.where(relax.const(CAUSAL, "bool"), s, const(LOWEST)))), (), {"causal": True}),
    "window": (attention_of(lambda emit, s: emit(op.where(relax.const(WINDOW, "bool"), s, const(LOWEST)))), (), {"before": 3, "after": 1}),
    "sliding window, added": (
        attention_of(lambda emit, s: emit(op.add(s, const(np.where(WINDOW & CAUSAL, 0, -math.inf).astype("float32"))))),
        (),
        {"before": 3, "causal": True},
    ),
    "causal added": (attention_of(lambda emit, s: emit(op.add(s, const(np.where(CAUSAL, 0, LOWEST).astype("float32"))))), (), {"causal": True}),
}  # fmt: skip


def inputs(program):
    rng = np.random.default_rng(0)
    return [rng.random(spec.shape) > 0.3 if spec.dtype == "bool" else rng.standard_normal(spec.shape).astype("float32") for spec in program.inputs]


@pytest.mark.sweep
@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    define, masks, attrs = FORMS[form]
    boolean = form.startswith(("replaced", "filled"))
    program = program_of(define, *QKV, *masks, dtypes=["float32"] * 3 + (["bool"] if boolean else []))
    result, report = fused(program)
    assert report.matches == {"attention": 1} and report.notes == []
    assert not calls(result, "relax.nn.softmax") and not calls(result, "relax.matmul")
    (call,) = calls(result, "tcompile.attention")
    for name, value in attrs.items():
        assert getattr(attrs_of(call), name) == pytest.approx(value), name
    arrays = inputs(program)
    np.testing.assert_allclose(execute(result, arrays), execute(program, arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "fill", "window"),
    [
        (np.tri(6, 4, dtype=bool), -math.inf, (5, 0)),
        (np.tri(6, 4, dtype=bool) & ~np.tri(6, 4, -2, dtype=bool), -math.inf, (1, 0)),
        (np.tri(6, 4, dtype=bool) & ~np.tri(6, 4, -2, dtype=bool), LOWEST, None),  # the last query is the mean of all values
        (np.tri(6, 4, dtype=bool) & ~np.tri(6, 4, -2, dtype=bool), -100.0, None),
        (np.tri(6, 4, -1, dtype=bool), -math.inf, None),  # not its own key
        (np.tri(6, 4, dtype=bool) ^ (np.arange(24).reshape(6, 4) == 9), -math.inf, None),
        (np.where(np.tri(6, 4, dtype=bool), 0.5, -math.inf).astype("float32"), -math.inf, None),
        (np.where(np.tri(6, 4, dtype=bool), 0, math.nan).astype("float32"), -math.inf, None),
    ],
)
def test_which_masks_are_windows(mask, fill, window):
    assert window_of(relax.const(mask), fill) == window
    assert window_of(relax.const(np.stack([mask, mask])), fill) is None


def heads_first(emit, x, heads):
    """[B, S, H * D] -> [B, H, S, D], as every export writes it."""
    batch, length, width = (int(dim) for dim in x.ty.shape)
    return emit(op.permute_dims(emit(op.reshape(x, [batch, length, heads, width // heads])), [0, 2, 1, 3]))


def grouped(emit, x, groups):
    """Heads repeated in place, and merged with the batch, as exports of torch's enable_gqa do."""
    batch, heads, length, width = (int(dim) for dim in x.ty.shape)
    spread = emit(op.broadcast_to(emit(op.reshape(x, [batch, heads, 1, length, width])), [batch, heads, groups, length, width]))
    return emit(op.reshape(spread, [batch, heads * groups, length, width]))


def whole_layer(emit, q, k, v):
    q, k, v = heads_first(emit, q, 6), grouped(emit, heads_first(emit, k, 2), 3), grouped(emit, heads_first(emit, v, 2), 3)
    q, k = emit(op.multiply(q, const(0.5))), emit(op.multiply(transposed(emit, k), const(0.5)))
    weights = emit(op.nn.softmax(emit(op.matmul(q, k))))
    safe = emit(op.where(emit(op.isnan(weights)), const(0.0), weights))
    return op.reshape(emit(op.permute_dims(emit(op.matmul(safe, v)), [0, 2, 1, 3])), [2, 5, 24])


def test_layer_before_and_after():
    """Scales, shared heads and every transpose become part of the operator; nothing is repeated in memory."""
    program = program_of(whole_layer, (2, 5, 24), (2, 7, 8), (2, 7, 8))
    before = program.main.script(show_meta=False)
    for name in ("permute_dims", "broadcast_to", "matmul", "softmax", "multiply", "isnan"):
        assert f"R.{'nn.' if name == 'softmax' else ''}{name}(" in before
    result, _ = fused(program)
    lines = [line.split(" = ", 1)[1] for line in result.main.script(show_meta=False).splitlines() if " = R." in line or " = T." in line]
    assert [line.split("(")[0] for line in lines] == ["R.reshape", "R.reshape", "R.reshape", "T.Call", "R.reshape"]
    attrs = attrs_of(calls(result, "tcompile.attention")[0])
    assert (attrs.layout, attrs.scale, attrs.safe) == ("BSHD", 0.25, True)
    arrays = inputs(program)
    np.testing.assert_allclose(execute(result, arrays), execute(program, arrays), rtol=1e-4, atol=1e-5)


def windows(emit, q, k, v):
    """Shifted windows: a bias per head, then the scores taken apart into images and windows for a mask per window."""
    scores = emit(op.add(emit(op.matmul(q, transposed(emit, k))), const(RNG.standard_normal((1, 3, 9, 9)).astype("float32"))))
    apart = emit(op.reshape(scores, [2, 4, 3, 9, 9]))
    masked = emit(op.add(apart, const(np.where(RNG.random((1, 4, 1, 9, 9)) > 0.3, 0, -100).astype("float32"))))
    return op.matmul(emit(op.nn.softmax(emit(op.reshape(masked, [8, 3, 9, 9])))), v)


RNG = np.random.default_rng(1)


def test_windows():
    program = program_of(windows, (8, 3, 9, 8), (8, 3, 9, 8), (8, 3, 9, 8))
    result, report = fused(program)
    assert report.matches == {"attention": 1}
    arrays = inputs(program)
    np.testing.assert_allclose(execute(result, arrays), execute(program, arrays), rtol=1e-4, atol=1e-5)


def tanh_capped(emit, s):
    return emit(op.tanh(s))


def over_queries(emit, q, k, v):
    return op.matmul(emit(op.nn.softmax(emit(op.matmul(q, transposed(emit, k))), axis=2)), v)


def with_weights(emit, q, k, v):
    weights = emit(op.nn.softmax(emit(op.matmul(q, transposed(emit, k)))))
    return op.add(emit(op.matmul(weights, v)), emit(op.sum(weights, axis=-1, keepdims=True)))


def scaled_by_tensor(emit, q, k, v, m):
    return op.matmul(emit(op.nn.softmax(emit(op.multiply(emit(op.matmul(q, transposed(emit, k))), m)))), v)


@pytest.mark.parametrize(("define", "extra", "reason"), [
    (attention_of(tanh_capped), (), "'tanh' between the product and the softmax|'tanh' on the way"),
    (over_queries, (), "axis 2"),
    (with_weights, (), "used by 2 operators"),
    (scaled_by_tensor, ((2, 4, 5, 7),), "multiplied by a tensor"),
])  # fmt: skip
def test_misses_say_why(define, extra, reason):
    program = program_of(define, *QKV, *extra)
    result, report = fused(program)
    assert result is program and report.matches == {}
    (note,) = report.notes
    assert "is not fused" in note and any(part in note for part in reason.split("|"))


def test_a_classifier_is_no_attention():
    weight = const(np.ones((8, 6), "float32"))
    program = program_of(lambda emit, x: op.nn.softmax(emit(op.matmul(x, weight))), (2, 8))
    result, report = fused(program)
    assert result is program and report.notes == []


@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from(["scale", "add", "replace", "regroup"]), max_size=5), st.integers(0, 2**31))
def test_any_chain_of_changes(chain, seed):
    """Whatever is done to the scores in whatever order, the numbers stay."""
    rng = np.random.default_rng(seed)
    made = [np.where(rng.random((4, 5, 7)[rng.integers(3) :] if step == "regroup" else (1, 4, 1, 7)) > 0.4, 0.0, LOWEST) for step in chain]

    def change(emit, s):
        for step, values in zip(chain, made, strict=True):
            if step == "scale":
                s = emit(op.multiply(s, const(0.7)))
            elif step == "add":
                s = emit(op.add(s, const((values / 3e38).astype("float32"))))
            elif step == "replace":
                s = emit(op.where(relax.const(values == 0, "bool"), s, const(LOWEST)))
            else:
                s = emit(op.reshape(emit(op.add(emit(op.reshape(s, [8, 5, 7])), const(0.5))), [2, 4, 5, 7]))
        return s

    program = program_of(attention_of(change), *QKV)
    result, report = fused(program)
    arrays = inputs(program)
    assert report.matches == {"attention": 1} or "regroup" in chain or len(report.notes) == 1
    np.testing.assert_allclose(execute(result, arrays), execute(program, arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(("shapes", "mask", "options"), [
    (((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), None, {"is_causal": True}),
    (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)), (5, 7), {"enable_gqa": True}),
    (((3, 5, 8), (3, 7, 8), (3, 7, 6)), (3, 5, 7), {"scale": 0.2}),
    (((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)), (2, 1, 1, 5, 7), {}),
    (((5, 8), (7, 8), (7, 6)), None, {}),
])  # fmt: skip
def test_torch_operator(shapes, mask, options):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes] + ([rng.random(mask) > 0.7] if mask else [])
    module, tensors = Sdpa(**options).eval(), tuple(torch.from_numpy(array) for array in arrays)
    program = import_model(module, example_inputs=tensors)
    result, report = fused(program)
    assert report.matches == {"attention": 1}
    want = module(*tensors).numpy()
    assert not math.isnan(want.sum())
    np.testing.assert_allclose(execute(result, arrays), want, rtol=1e-4, atol=1e-5)


class Layer(torch.nn.Module):
    """Attention of one layer, two heads of 16, with a padding mask, as eager implementations write it."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.project(x).split(32, -1))
        return ((q @ k.transpose(-1, -2) / 4 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_no_tensor_of_tokens_by_tokens_is_planned(tmp_path):
    """1024 tokens: a tensor of scores would be 8 MB; all that is planned fits one megabyte. Without the pass there are such tensors."""
    module, inputs = Layer().eval(), (torch.randn(1, 1024, 32), torch.randn(1, 1, 1, 1024))
    names = [cls.name for cls in PASSES.values() if not cls.lossy and cls is not FuseAttention]
    (tmp_path / "unfused.toml").write_text("\n".join(f'[[pass]]\nname = "{name}"' for name in names))
    planned, results = {}, {}
    for kind, recipe in (("fused", None), ("unfused", tmp_path / "unfused.toml")):
        model = tcompile.compile(module, example_inputs=inputs, recipe=recipe)
        planned[kind] = model.report()["memory"]["workspace_bytes"]
        results[kind] = model(*inputs)
    assert planned["fused"] <= 2**20 and planned["unfused"] >= 2 * 1024 * 1024 * 4
    np.testing.assert_allclose(results["fused"], results["unfused"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results["fused"], module(*inputs).detach().numpy(), rtol=1e-4, atol=1e-5)


def found(name, through_torch):
    entry = ZOO[name]
    feeds = entry.example_inputs()
    if through_torch:
        program = import_model(entry.torch_module(), example_inputs=tuple(torch.from_numpy(value) for value in feeds.values()))
    else:
        program = import_model(str(entry.onnx_path()), shapes={name: tuple(value.shape) for name, value in feeds.items()})
    context = PassContext(Target("cpu", "test"))
    program = RecognizeNormalizations().run(Canonicalize().run(program, context), context)
    result, report = fused(program)
    assert len(calls(result, "tcompile.attention")) == report.matches.get("attention", 0)
    assert report.notes == []
    return report.matches.get("attention", 0), [attrs_of(call) for call in calls(result, "tcompile.attention")]


#: attentions in each network: all there are
COUNTS = {
    "ppocr-rec": 2, "minilm": 6, "vit-s16": 12, "deit-t": 12, "bert-base": 12, "smollm2": 30, "gpt2": 12, "t5-encoder": 6, "swin-t": 12, "efficientformer-l1": 1,
    "resnet50": 0, "mobilenetv3-l": 0, "magika": 0,
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "through_torch"), [("ppocr-rec", False), ("minilm", False), ("minilm", True), ("vit-s16", False)])
def test_counts_in_small_networks(name, through_torch):
    assert found(name, through_torch)[0] == COUNTS[name]


@pytest.mark.networks
@pytest.mark.parametrize("through_torch", [False, True], ids=["onnx", "torch"])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_in_every_network(name, through_torch):
    if through_torch and ZOO[name].build is None:
        pytest.skip("known as ONNX only")
    count, attrs = found(name, through_torch)
    assert count == COUNTS[name]
    if name in ("bert-base", "minilm", "gpt2", "t5-encoder"):
        assert all(each.layout == "BSHD" for each in attrs)


@pytest.mark.networks
@pytest.mark.parametrize(
    ("name", "windows", "masked"),
    [("mistral", {(7, 0)}, False), ("gemma3", {(7, 0)}, False), ("modernbert", {(4, 4), (None, None)}, True), ("llama_masked", {(None, 0)}, True)],
)
def test_windows_of_transformers(name, windows, masked):
    """What they compute of positions is folded; a padding mask that is joined to it stays, one row per sample."""
    from transformers_networks import TRANSFORMERS

    network = TRANSFORMERS[name]
    with torch.no_grad():
        exported = torch.export.export(network.build(), tuple(network.example().values()), strict=False)
    result, _ = fused(Canonicalize().run(import_model(exported), PassContext(Target("cpu", "test"))))
    found = calls(result, "tcompile.attention")
    assert found and {attrs_of(call).window for call in found} == windows
    for call in found:
        assert (len(call.args) == 4) == masked and (not masked or [int(dim) for dim in call.args[3].ty.shape][1:3] == [1, 1])
