"""Token pruning: which tokens stay, what the pass leaves, and the numbers of whole networks against the same method in plain PyTorch."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tcompile
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.api import compile_program
from tcompile.compiler.dialect.attention import attention
from tcompile.compiler.dialect.tokens import kept_count, match_reference, match_tokens, select_reference, select_tokens, take_tokens
from tcompile.compiler.errors import UnsupportedModel, UsageError
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.tvm import relax, tirx
from tcompile.models import optional
from tcompile.passes.base import PassContext
from tcompile.passes.token_pruning.prune import TokenPruning
from tcompile.targets.base import Target

op = relax.op


def program(inputs: dict[str, list], build) -> Program:
    """A program of float32 inputs; `build(emit, *inputs)` returns the output."""
    builder = relax.BlockBuilder()
    variables = [relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in inputs.items()]
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(build(builder.emit, *variables))
        builder.emit_func_output(result)
    module = builder.get()
    kind = module["main"].ret_ty
    count = len(kind.fields) if isinstance(kind, relax.TupleType) else 1
    specs = tuple(TensorSpec(name, tuple(dim if isinstance(dim, int) else dim.name for dim in shape), "float32") for name, shape in inputs.items())
    return Program(module, specs, tuple(TensorSpec(f"y{at}", (), "float32") for at in range(count)), Provenance("test", "relax"))


def pruned(model: Program, *args, **options) -> Program:
    return TokenPruning(*args, **options).run(model, PassContext(Target.parse("cpu")))


# -- the operators


@pytest.fixture(scope="module")
def selected():
    """(scores) -> indices, for any batch and number of tokens."""
    shape = [tirx.Var("b", "int64"), tirx.Var("n", "int64")]
    return compile_program(program({"scores": shape}, lambda emit, x: select_tokens(x, Fraction(7, 10))), Target.parse("cpu"))


@pytest.fixture(scope="module")
def matched():
    shape = [tirx.Var("b", "int64"), tirx.Var("n", "int64"), 3]
    return compile_program(program({"metric": shape}, lambda emit, x: match_tokens(x, Fraction(7, 10))), Target.parse("cpu"))


shapes = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(["distinct", "ties", "nan"]))
def test_selection(selected, shape, kind):
    batch, tokens, seed = shape
    generator = np.random.default_rng(seed)
    scores = generator.random((batch, tokens), dtype=np.float32)
    if kind == "ties":
        scores = np.round(scores * 3)
    if kind == "nan":
        scores[generator.random(scores.shape) < 0.3] = np.nan
    indices = selected(scores)
    assert indices.shape == (batch, kept_count(tokens, Fraction(7, 10)))
    assert (indices[:, 0] == 0).all() and (np.diff(indices, axis=1) > 0).all() and (indices < tokens).all()
    if kind != "nan":
        np.testing.assert_array_equal(indices, select_reference(scores, Fraction(7, 10)))


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans())
def test_matching(matched, shape, nan):
    batch, tokens, seed = shape
    generator = np.random.default_rng(seed)
    metric = generator.standard_normal((batch, tokens, 3)).astype(np.float32)
    if nan:
        metric[generator.random((batch, tokens)) < 0.2] = np.nan
    indices, destination = matched(metric)
    assert indices.shape == (batch, kept_count(tokens, Fraction(7, 10), True)) and destination.shape == (batch, tokens)
    assert (indices[:, 0] == 0).all() and (np.diff(indices, axis=1) > 0).all() and (indices < tokens).all()
    assert ((destination >= 0) & (destination < tokens)).all()
    if not nan:
        for row, kept in zip(destination, indices, strict=True):
            assert set(row.tolist()) == set(kept.tolist()), "every token ends up in one that stays"
        expected = match_reference(metric.astype(np.float64), Fraction(7, 10))
        np.testing.assert_array_equal(indices, expected[0])
        np.testing.assert_array_equal(destination, expected[1])


@pytest.mark.parametrize(("tokens", "keep", "count"), [(197, "0.7", 138), (10, "0.7", 7), (1, "0.1", 1), (50, "1", 50)])
def test_count_is_exact(tokens, keep, count):
    assert kept_count(tokens, Fraction(keep)) == count


def test_take_of_one_for_all():
    """A bias of batch one, taken by the indices of each row."""
    bias = np.arange(35, dtype=np.float32).reshape(1, 5, 7)
    scores = np.random.default_rng(0).random((3, 7), dtype=np.float32)

    def build(emit, bias, scores):
        return take_tokens(bias, emit(select_tokens(scores, Fraction(1, 2))), 2)

    compiled = compile_program(program({"bias": [1, 5, 7], "scores": [3, 7]}, build), Target.parse("cpu"))
    indices = select_reference(scores, Fraction(1, 2))
    np.testing.assert_array_equal(compiled(bias, scores), np.stack([bias[0][:, row] for row in indices]))


# -- the pass on small graphs


def weight(*shape: int) -> relax.Expr:
    return relax.const(np.random.default_rng(0).standard_normal(shape).astype(np.float32) / shape[0] ** 0.5, "float32")


def block(emit, x, tokens: int = 6, mask=None, **attrs):
    """x + attention(x): [2, tokens, 8] in two heads."""

    def heads():
        return emit(op.permute_dims(emit(op.reshape(emit(op.matmul(x, weight(8, 8))), [2, tokens, 2, 4])), [0, 2, 1, 3]))

    seen = emit(attention(heads(), heads(), heads(), mask, **attrs))
    joined = emit(op.reshape(emit(op.permute_dims(seen, [0, 2, 1, 3])), [2, tokens, 8]))
    return emit(op.add(x, emit(op.matmul(joined, weight(8, 8)))))


def small(head, **attrs) -> Program:
    """A block, an MLP, and `head(emit, x)`."""

    def build(emit, x):
        x = block(emit, x, **attrs)
        x = emit(op.add(x, emit(op.nn.relu(emit(op.matmul(x, weight(8, 8)))))))
        return head(emit, x)

    return program({"x": [2, 6, 8]}, build)


def first_token(emit, x):
    return op.reshape(emit(op.strided_slice(x, [1], [0], [1])), [2, 8])


def test_before_and_after():
    before = small(first_token)
    after = pruned(before, 0.5)
    old, new = (model.module.script(show_meta=False) for model in (before, after))
    assert "tcompile.select_tokens" not in old and "(2, 3, 8)" not in old
    lines = [line.strip() for line in new.splitlines() if " = " in line]
    calls = [line.split(" = ")[1] for line in lines]
    at = next(at for at, call in enumerate(calls) if "tcompile.select_tokens" in call)
    assert 'received": True' in new or "received" in new
    assert "take_tokens" in calls[at + 1] and "R.Tensor((2, 3, 8)" in lines[at + 1]
    # the MLP runs on three tokens, and its residual is the shortened stream
    assert "R.matmul" in calls[at + 2] and "R.Tensor((2, 3, 8)" in lines[at + 2]
    assert [spec.shape for spec in after.outputs] == [(2, 8)]


def test_keep_of_one_is_the_identity():
    model = small(first_token)
    assert pruned(model, 1.0) is model and pruned(model, 1) is model and pruned(model, 1.0, method="merge") is model


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), True, "half"])
def test_keep_out_of_range(keep):
    with pytest.raises(UsageError, match=r"in \(0, 1\]"):
        TokenPruning.from_flag(keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "average"}, "drop, merge"),
        ({"method": "merge", "keep": 0.4}, "at least|at most"),
        ({"blocks": (1, 1)}, "twice"),
        ({"blocks": (-1,)}, "from 0"),
        ({"blocks": "12"}, "from 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        TokenPruning(**{"keep": 0.5, **options})


def test_block_that_is_not_there():
    with pytest.raises(UsageError, match=r"no attention block 1: the model has 1, numbered 0\.\.0"):
        pruned(small(first_token), 0.5, blocks=(1,))


def test_outputs_follow_the_tokens():
    model = small(lambda emit, x: op.multiply(x, relax.const(np.float32(2), "float32")))
    assert pruned(model, 0.5).outputs[0].shape == (2, 3, 8)


def _windows(emit, x):
    """Attention within two windows of three tokens, shuffled back afterwards: the tokens of a window are no axis of the stream."""
    parts = emit(op.reshape(x, [4, 3, 2, 4]))
    seen = emit(attention(parts, parts, parts, layout="BSHD"))
    return op.add(x, emit(op.reshape(seen, [2, 6, 8])))


HEADS = {
    "token by position": (lambda emit, x: op.take(x, relax.const(3), axis=1), "only the first one stays"),
    "tokens by range": (lambda emit, x: op.strided_slice(x, [1], [2], [5]), r"tokens 2\.\.5"),
    "torn apart": (lambda emit, x: op.reshape(x, [2, 2, 3, 8]), r"tears the axis of 6 tokens apart: \[2, 6, 8\] becomes \[2, 2, 3, 8\]"),
    "mean by hand": (
        lambda emit, x: op.multiply(emit(op.sum(x, axis=1)), relax.const(np.float32(1 / 6), "float32")),
        "may be their number before tokens left",
    ),
    "order": (lambda emit, x: op.cumsum(x, axis=1), "mixes the tokens"),
    "positions": (lambda emit, x: op.argmax(x, axis=1), "mixes the tokens"),
    "unknown": (lambda emit, x: op.sort(x, axis=1), "no rule"),
    "weights per token": (lambda emit, x: op.nn.layer_norm(x, weight(6, 8), weight(6, 8), [1, 2]), "mixes the tokens"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_cannot_be_rewritten_is_refused_by_name(kind):
    head, message = HEADS[kind]
    with pytest.raises(UnsupportedModel, match=message) as refused:
        pruned(small(head), 0.5)
    assert refused.value.blockers[0].node and refused.value.exit_code == 3


def test_models_without_a_token_axis():
    with pytest.raises(UnsupportedModel, match="no attention operator"):
        pruned(program({"x": [2, 6, 8]}, lambda emit, x: op.nn.relu(x)), 0.5)
    with pytest.raises(UnsupportedModel, match="causal"):
        pruned(small(first_token, causal=True), 0.5)
    window = np.where(np.tri(6, dtype=bool) & ~np.tri(6, k=-3, dtype=bool), 0, -np.inf).astype("float32")[None, None]
    with pytest.raises(UnsupportedModel, match="causal"):
        pruned(small(first_token, mask=relax.const(window)), 0.5)
    pruned(small(first_token, mask=relax.const(np.zeros((1, 1, 6, 6), "float32"))), 0.5)


def test_decoders_whose_mask_is_computed_are_refused():
    """GPT-2's export compares positions while it runs."""

    def build(emit, x):
        position = emit(op.arange(0, 6, 1, "int64"))
        seen = emit(op.less_equal(emit(op.reshape(position, [1, 1, 1, 6])), emit(op.reshape(position, [1, 1, 6, 1]))))
        return first_token(emit, block(emit, x, mask=seen))

    with pytest.raises(UnsupportedModel, match="compares positions"):
        pruned(program({"x": [2, 6, 8]}, build), 0.5)


@pytest.mark.parametrize("method", ["drop", "merge"])
def test_masks_and_biases_are_taken_alike(method):
    """A bias per head and pair of tokens [2, 6, 6] and hidden tokens: the second block sees both for the tokens that stayed."""
    generator = np.random.default_rng(0)
    bias = generator.standard_normal((2, 6, 6)).astype(np.float32)
    x = generator.standard_normal((2, 6, 8)).astype(np.float32)

    def build(emit, x):
        table = relax.const(bias, "float32")
        x = block(emit, x, mask=table)
        x = emit(op.nn.relu(x))
        return first_token(emit, block(emit, x, mask=table))

    model = program({"x": [2, 6, 8]}, build)
    after = pruned(model, 0.7, method=method, blocks=(0,))
    result = compile_program(after, Target.parse("cpu"))(x)

    def attend(x, bias):
        q = (x @ weight(8, 8).value.numpy()).reshape(*x.shape[:2], 2, 4).transpose(0, 2, 1, 3)
        scores = q @ q.transpose(0, 1, 3, 2) / 2 + bias
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return x + (p @ q).transpose(0, 2, 1, 3).reshape(x.shape) @ weight(8, 8).value.numpy(), p, q

    y, p, q = attend(x, bias)
    if method == "drop":
        indices = select_reference(p.mean((1, 2)), Fraction("0.7"))
        short, extra = np.take_along_axis(y, indices[..., None], 1), 0
    else:
        indices, destination = match_reference(q.mean(1), Fraction("0.7"))
        members = (destination[:, None] == indices[..., None]).astype(np.float32)
        sizes = members.sum(-1, keepdims=True)
        short, extra = members @ y / sizes, np.log(sizes)[:, None, :, 0][:, :, None]
    taken = np.stack([bias[:, row][:, :, row] for row in indices]) + extra
    expected = attend(np.maximum(short, 0), taken)[0][:, 0]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


# -- whole networks against PyTorch


def _torch():
    pytest.importorskip("torch")
    return pytest.importorskip("token_pruning_reference")


@pytest.mark.sweep
@pytest.mark.parametrize(("method", "pool"), [pytest.param("drop", "token", marks=pytest.mark.networks), ("drop", "avg"), ("merge", "token")])
def test_vit_agrees_with_pytorch(method, pool):
    reference = _torch()
    import torch
    from tcompile.models.vision import timm_network

    if not optional.version("timm"):
        pytest.skip("timm is not installed")
    options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    model = timm_network("vit_small_patch16_224", global_pool=pool, **options, **({"fc_norm": False} if pool == "avg" else {})).eval()
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    compiled = tcompile.compile(model, example_inputs=(x,), token_keep=TokenPruning(0.7, method))
    with torch.no_grad():
        expected, full = reference.timm_vit(model, x, 0.7, method).numpy(), model(x).numpy()
    scale = np.abs(expected).max()
    assert np.abs(full - expected).max() > 1e-3 * scale, "pruning has to change something for the comparison to mean anything"
    np.testing.assert_allclose(compiled(x.numpy()) / scale, expected / scale, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory) -> tuple[Path, object]:
    """A BERT of two layers as ONNX with open batch and length, and its torch module."""
    from dataclasses import replace

    _torch()
    for package in ("transformers", "onnxscript"):
        pytest.importorskip(package)
    from tcompile.models.export import export
    from tcompile.models.zoo import ZOO

    entry = ZOO["bert-base"]
    assert entry.build is not None
    module = entry.build(layers=2, hidden=32, heads=2, vocabulary=60).eval()
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    export(replace(entry, build=lambda: module), path)
    return path, module


@pytest.mark.parametrize("method", [pytest.param("drop", marks=pytest.mark.slow), pytest.param("merge", marks=pytest.mark.networks)])
def test_bert_with_open_dims_agrees_with_pytorch(small_bert, method):
    reference = _torch()
    import torch

    path, module = small_bert
    compiled = tcompile.compile(path, token_keep=TokenPruning(0.7, method))
    assert compiled.outputs[0].shape[2] == 32 and "seq" in compiled.outputs[0].shape[1]
    for batch, tokens in ((3, 21), (1, 10)):
        generator = np.random.default_rng(tokens)
        ids = generator.integers(0, 60, (batch, tokens))
        mask = (np.arange(tokens) < generator.integers(tokens // 2, tokens + 1, (batch, 1))).astype(np.int64)
        with torch.no_grad():
            expected, seen = reference.bert(module.model, torch.from_numpy(ids), torch.from_numpy(mask), 0.7, method)
        result = compiled(ids, mask)[0]
        assert result.shape == tuple(expected.shape)
        seen = seen.numpy().astype(bool)
        np.testing.assert_allclose(result[seen], expected.numpy()[seen], rtol=1e-3, atol=1e-4)


@pytest.mark.networks
@pytest.mark.parametrize("method", ["drop", "merge"])
def test_trained_vit_keeps_its_accuracy(method):
    """Within one point on 1,000 held-out digits, and exactly what PyTorch says of them."""
    reference = _torch()
    import torch
    from tcompile.models.datasets import mnist
    from tcompile.models.mnist import accuracy
    from tcompile.models.zoo import ZOO

    entry, data = ZOO["mnist-vit"], mnist()[1]
    module = entry.torch_module()
    assert module is not None
    compiled = tcompile.compile(entry.onnx_path(), token_keep=TokenPruning(0.7, method))
    logits = compiled(data.x)
    with torch.no_grad():
        full, expected = module(torch.from_numpy(data.x)).numpy(), reference.mnist_vit(module, torch.from_numpy(data.x[:100]), 0.7, method).numpy()
    np.testing.assert_allclose(logits[:100], expected, rtol=1e-3, atol=1e-3)
    assert accuracy(logits, data.y) >= accuracy(full, data.y) - 0.01
