"""Calibration data: files and iterables cut into calls, everything that does not fit refused by name; metrics and the loss limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_models
import pytest
import tcompile
from hypothesis import given
from hypothesis import strategies as st
from tcompile.compiler import recipe
from tcompile.compiler.api import accuracy_on, compile_program, import_model
from tcompile.compiler.calibration import load
from tcompile.compiler.cli.main import main
from tcompile.compiler.errors import UsageError, VerificationError
from tcompile.compiler.metrics import METRICS, drop
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.program import DimRange, TensorSpec
from tcompile.compiler.recipe import Recipe
from tcompile.compiler.tvm import relax
from tcompile.passes.base import Pass, PassContext
from tcompile.passes.registry import PASSES
from tcompile.targets.base import Target

IMAGE = TensorSpec("x", (1, 3, 4, 4), "float32")
IDS = TensorSpec("ids", ("batch", "seq"), "int64")
DIMS = {"batch": DimRange(1), "seq": DimRange(1, 8, 16)}
GENERATOR = np.random.default_rng(0)


def images(*lead: int) -> np.ndarray:
    return GENERATOR.standard_normal((*lead, 3, 4, 4)).astype("float32")


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_file_may_hold_one_call_or_many(tmp_path):
    one, stacked, batched = images(1), images(5, 1), images(5)
    for array, want in ((one, [one]), (stacked, list(stacked)), (batched, [batched[i : i + 1] for i in range(5)])):
        calls = load(save(tmp_path / "a.npz", x=array), [IMAGE], {})
        assert len(calls) == len(want)
        assert all(np.array_equal(call["x"], expected) for call, expected in zip(calls, want, strict=True))


def test_dynamic_batch_is_cut_into_single_samples_and_a_constant_input_may_be_given_once(tmp_path):
    ids = np.arange(24).reshape(3, 8)
    mask = TensorSpec("scale", (1,), "float32")
    calls = load(save(tmp_path / "a.npz", ids=ids, scale=np.ones(1, "float32")), [IDS, mask], DIMS)
    assert [call["ids"].tolist() for call in calls] == [[row] for row in ids.tolist()]


def test_folder_and_iterables(tmp_path):
    for index in range(3):
        save(tmp_path / f"{index}.npz", x=images(1))
    assert len(load(tmp_path, [IMAGE], {})) == 3
    assert len(load([{"x": images(1)}, {"x": images(1)}], [IMAGE], {})) == 2
    assert len(load(((images(1),) for _ in range(4)), [IMAGE], {})) == 4
    assert len(load([images(1)], [IMAGE], {})) == 1


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([], "no samples"),
        ([{"y": images(1)}], "no array for input x"),
        ([{"x": images(1), "z": images(1)}], "z is no input"),
        ([{"x": np.full((1, 3, 4, 4), np.nan, "float32")}], "NaN"),
        ([{"x": images(1)[:, :2]}], r"shape \[1, 2, 4, 4\]"),
        ([{"x": np.zeros((1, 3, 4, 4), "int64")}], "int64 does not go into float32"),
        ([{"x": images(1)[0]}], "the model takes"),
        ([(images(1), images(1))], "2 arrays, the model 1 input"),
        (7, "expected a .npz file"),
    ],
)
def test_what_does_not_fit_is_refused(calls, reason):
    with pytest.raises(UsageError, match=reason):
        load(calls, [IMAGE], {})


def test_sizes_of_one_dim_must_agree_and_stay_in_range():
    with pytest.raises(UsageError, match="shape"):
        load([{"ids": np.zeros((1, 17), "int64")}], [IDS], DIMS)
    with pytest.raises(UsageError, match="shape"):
        load([{"a": np.zeros(3, "int64"), "b": np.zeros(4, "int64")}], [TensorSpec("a", ("n",), "int64"), TensorSpec("b", ("n",), "int64")], {})


def test_files_that_are_none(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    (tmp_path / "data.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "ragged.npz", x=images(3), scale=np.ones((2, 1), "float32"))
    for name, reason in (("missing.npz", "no such file"), ("broken.npz", "cannot read"), ("data.csv", "must be a .npz"), ("empty", "no .npz")):
        with pytest.raises(UsageError, match=reason):
            load(tmp_path / name, [IMAGE], {})
    with pytest.raises(UsageError, match="different numbers of samples"):
        load(tmp_path / "ragged.npz", [IMAGE, TensorSpec("scale", (1,), "float32")], {})


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_metrics_are_zero_for_the_same_and_positive_for_the_opposite(rows, columns, seed):
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype("float32")
    for name in METRICS:
        assert drop(name, [[values]], [[values]]) == pytest.approx(0.0, abs=1e-12)
    assert drop("cosine", [[-values]], [[values]]) == pytest.approx(2.0)
    assert drop("relative", [[-values]], [[values]]) == pytest.approx(2.0)


def test_metrics_refuse_what_cannot_be_compared():
    a = np.ones((2, 3), "float32")
    assert np.isnan(drop("cosine", [[a[:1]]], [[a]]))
    assert np.isnan(drop("cosine", [[a * np.nan]], [[a]]))
    assert drop("top1", [[a[:, ::-1] + np.eye(2, 3)]], [[a + np.eye(2, 3, 1)]]) == 1.0
    with pytest.raises(UsageError, match="unknown metric"):
        drop("bleu", [[a]], [[a]])


@dataclass(frozen=True)
class Shrink(Pass):
    """Multiplies every constant of the first matmul by 1 - amount: a lossy pass to test the machinery with."""

    name: ClassVar[str] = "shrink"
    lossy: ClassVar[bool] = True
    flag: ClassVar[str] = "sparsity"
    amount: float = 0.0

    def run(self, program, context: PassContext):
        if not self.amount:
            return program
        context.table("shrunk", [{"layer": "all", "amount": self.amount}])
        replaced = relax.utils.copy_with_new_vars(program.main)
        found = []
        relax.analysis.post_order_visit(
            replaced, lambda e: found.append(e) if type(e).__name__ == "GenericConst" and e.value.numpy().ndim == 2 else None
        )
        bound = {found[0]: relax.const(found[0].value.numpy() * np.float32(1 - self.amount))}

        @relax.expr_functor.mutator
        class Swap(relax.PyExprMutator):
            def visit_generic_const_(self, constant):
                return bound.get(constant, constant)

        module = program.module.clone()
        module.update_func(module.get_global_var("main"), Swap(module).visit_expr(replaced))
        return program.with_module(module)


@pytest.fixture
def shrink(monkeypatch):
    others = {name: cls for name, cls in PASSES.items() if cls.flag != "sparsity"}
    changed = {"canonicalize": others["canonicalize"], "shrink": Shrink} | others
    monkeypatch.setattr(recipe, "PASSES", changed)


@pytest.fixture
def model(tmp_path):
    return onnx_models.saved_mlp(tmp_path, layers=2, width=5)


def test_loss_is_measured_and_limited(shrink, model):
    program = import_model(model)
    calls = [{"x": GENERATOR.standard_normal((2, 4)).astype("float32")} for _ in range(3)]
    options = CompileOptions(compression={"sparsity": 0.5})
    accuracy = accuracy_on(program, calls)
    report = compile_program(program, Target.parse("cpu"), options, accuracy).report()
    step = next(entry for entry in report["passes"] if entry["name"] == "shrink")
    assert step["loss"]["relative"] > 0.01 and step["tables"]["shrunk"][0]["amount"] == 0.5
    with pytest.raises(VerificationError, match="above --max-drop"):
        compile_program(program, Target.parse("cpu"), options, accuracy_on(program, calls, metric="relative", max_drop=0.001))
    identity = compile_program(program, Target.parse("cpu"), CompileOptions(compression={"sparsity": 0.0}), accuracy).report()
    assert not any("loss" in entry or entry.get("lossy") for entry in identity["passes"])


def test_flags_win_over_the_recipe_and_keep_the_order(shrink, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[[pass]]\nname = "canonicalize"\n[[pass]]\nname = "shrink"\namount = 0.1\n')
    assert Recipe.of(CompileOptions(recipe=path)).passes[1] == Shrink(0.1)
    assert Recipe.of(CompileOptions(recipe=path, compression={"sparsity": 0.2})).passes[1] == Shrink(0.2)
    assert [step.name for step in Recipe.of(CompileOptions(compression={"sparsity": 0.2})).passes][:2] == ["canonicalize", "shrink"]
    assert "shrink" not in [step.name for step in Recipe.default().passes]
    with pytest.raises(UsageError, match="takes a Shrink"):
        Recipe.of(CompileOptions(compression={"sparsity": PASSES["canonicalize"]()}))


def test_limits_need_data_and_sense(model):
    for arguments, reason in (
        (dict(max_drop=0.1), "needs calibration"),
        (dict(max_drop=-1, calibration=[]), "at least 0"),
        (dict(metric="x"), "unknown metric"),
    ):
        with pytest.raises(UsageError, match=reason):
            tcompile.compile(model, **arguments)


def test_page_holds_steps_layers_and_nothing_from_outside(shrink, model, tmp_path):
    data, page = tmp_path / "data.npz", tmp_path / "out.html"
    np.savez(data, x=GENERATOR.standard_normal((4, 2, 4)).astype("float32"))
    tcompile.compile(model, sparsity=0.3, calibration=data, report=page)
    text = page.read_text()
    assert "shrink" in text and "shrunk" in text and "measured" in text and "times as fast" in text and "cosine" in text
    assert not any(mark in text for mark in ("http:", "https:", "src=", "@import", "<script"))
    assert main([str(model), "--report", str(tmp_path / "none" / "out.html"), "-o", str(tmp_path / "m.tcm")]) == 2
    assert main([str(model), "--report", str(tmp_path / "out.txt"), "-o", str(tmp_path / "m.tcm")]) == 2
