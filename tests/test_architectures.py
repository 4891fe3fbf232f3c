"""Every architecture: its forms say the same, and both routes of import compile it to what eager PyTorch computes."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import tcompile
from hypothesis import given, settings
from hypothesis import strategies as st
from tcompile.compiler.compare import agree
from tcompile.models.architectures.registry import ARCHITECTURES

torch = pytest.importorskip("torch")

#: not a multiple of any chunk or window
LENGTH = 11
#: name, form (None: there is no choice): what is compiled
CASES = [(name, form) for name, entry in ARCHITECTURES.items() for form in entry.forms or (None,)]


#: fewer kernels to compile than by default
SMALLER = {"casvit": {"widths": (16,)}, "hilo": {"layers": 1}}


def options(form):
    return {} if form is None else {"form": form}


def compare(model, network, x):
    with torch.no_grad():
        agreement = agree(np.asarray(model(x)), network(x).numpy())
    assert agreement.ok, agreement


def open_dims(entry, form):
    """The dims that stay open: the batch, and the length where the form allows it."""
    return {"batch": 8} | ({"length": 64} if form in entry.any_length else {})


def runs(entry, form):
    """Sizes to run at: those compiled for, a batch of one, and lengths of one, of a chunk and a prime where the length is open."""
    return [dict(batch=batch, length=length if form in entry.any_length else LENGTH) for batch, length in ((2, LENGTH), (1, 1), (3, 8), (1, 37))]


def through_export(entry, form, **settings):
    network, dims = entry.build(**options(form), **settings), open_dims(entry, form)
    example = entry.example(batch=2, length=LENGTH)
    shape = "x".join(f"1..{dims[dim]}" if dim in dims else str(size) for dim, size in zip(entry.shape, example.shape, strict=True))
    (name,) = inspect.signature(network.forward).parameters
    model = tcompile.compile(network, example_inputs=(example,), shapes={name: shape})
    for sizes in runs(entry, form):
        compare(model, network, entry.example(seed=1, **sizes))


def through_onnx(entry, form, folder, **settings):
    pytest.importorskip("onnxscript")
    network, dims = entry.build(**options(form), **settings), open_dims(entry, form)
    symbols = {dim: torch.export.Dim(dim, min=1, max=high) for dim, high in dims.items()}
    axes = ({axis: symbols[dim] for axis, dim in enumerate(entry.shape) if dim in symbols},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (entry.example(batch=2, length=LENGTH),), dynamic_shapes=axes, opset_version=18, dynamo=True, verbose=False
        )
    program.save(folder / "network.onnx")
    model = tcompile.compile(str(folder / "network.onnx"))
    for sizes in runs(entry, form):
        compare(model, network, entry.example(seed=1, **sizes))


@pytest.mark.parametrize("name", ["hilo", pytest.param("spacetime", marks=pytest.mark.slow)])
def test_first_form_through_export(name):
    through_export(ARCHITECTURES[name], next(iter(ARCHITECTURES[name].forms), None), **SMALLER.get(name, {}))


@pytest.mark.parametrize("name", ["matmul_free", pytest.param("casvit", marks=pytest.mark.slow)])
def test_first_form_through_onnx(name, tmp_path):
    through_onnx(ARCHITECTURES[name], next(iter(ARCHITECTURES[name].forms), None), tmp_path, **SMALLER.get(name, {}))


@pytest.mark.networks
@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_form_through_export(name, form):
    through_export(ARCHITECTURES[name], form)


@pytest.mark.networks
@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_form_through_onnx(name, form, tmp_path):
    through_onnx(ARCHITECTURES[name], form, tmp_path)


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if "length" in entry.shape and name != "mor"])
def test_no_token_sees_a_later_one(name):
    """But in the mixture of recursions, where tokens compete for a place."""
    entry = ARCHITECTURES[name]
    for form in entry.forms or (None,):
        network = entry.build(**options(form))
        x = entry.example(batch=1, length=LENGTH)
        changed = torch.cat([x[:, :7], x[:, 7:] + 1], 1)
        with torch.no_grad():
            before, after = network(x), network(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7])
        assert ((before[:, 7:] - after[:, 7:]).abs().amax(-1) > 1e-3).all()


def test_flatformer_does_not_care_about_the_order_of_points():
    network, points = ARCHITECTURES["flatformer"].build(), ARCHITECTURES["flatformer"].example(batch=2)
    shuffled = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(points[:, shuffled]), network(points)[:, shuffled])


def test_mixture_gates_and_recursions():
    """The two that route, against loops over tokens that compute only what is chosen."""
    entry = ARCHITECTURES["moe_plus_plus"]
    layer, x = entry.build().layers[0], entry.example(batch=1, length=LENGTH)[0]
    with torch.no_grad():
        for token, got in zip(x, layer(x, None)[0], strict=True):
            gates = layer.router(token).softmax(-1)
            want = torch.zeros_like(token)
            for number in gates.argsort(descending=True)[:2].tolist():
                want += gates[number] * (layer.experts[number](token) if number < len(layer.experts) else 0)
            torch.testing.assert_close(got, want)
    entry = ARCHITECTURES["mor"]
    network, x = entry.build(), entry.example(batch=1, length=9)
    with torch.no_grad():
        got, places, h = network(x), torch.arange(9), x.clone()
        for router, capacity in zip(network.routers, (9, 6, 3), strict=True):
            score = torch.sigmoid(router(h[:, places])).flatten()
            chosen = score.topk(capacity).indices.sort().values
            places = places[chosen]
            gathered = h[:, places]
            added = network.block(gathered, torch.ones(1, capacity, dtype=torch.bool))
            h[:, places] = gathered + 0.1 * score[chosen][None, :, None] * added
        torch.testing.assert_close(got, network.norm(h))


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if entry.forms])
@settings(max_examples=5, deadline=None)
@given(
    length=st.sampled_from([1, 2, 7, 8, 9, 13, 16, 31]), batch=st.integers(1, 3), seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 5.0])
)
def test_forms_agree(name, length, batch, seed, scale):
    """In float64, where only a mistake can tell them apart."""
    entry = ARCHITECTURES[name]
    x = entry.example(seed=seed, batch=batch, length=length)
    with torch.no_grad():
        first, *others = (entry.build(seed=seed, form=form).double()(scale * x.double()) for form in entry.forms)
    assert torch.isfinite(first).all()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-8, atol=1e-8)
