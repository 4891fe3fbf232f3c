"""Calling a compiled model: arrays in, arrays out, from any number of threads, and every wrong input refused with its name."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tiny_models
import torch
from tcompile.compiler import threads as pool
from tcompile.compiler.artifact import build
from tcompile.compiler.errors import UsageError
from tcompile.compiler.program import DimRange, TensorSpec
from tcompile.compiler.runtime import CompiledModel
from tiny_models import linear_reference, relax

X = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)


@pytest.fixture(scope="module")
def model():
    return CompiledModel(build(tiny_models.linear()))


@pytest.fixture(scope="module")
def dynamic():
    return CompiledModel(build(tiny_models.linear("n")))


@pytest.fixture(scope="module")
def two():
    """(a [n], b [n]) -> (a + b, a, w, a + b again)."""

    def body(builder, a, b, packed):
        total = builder.emit(relax.op.add(a, b))
        return builder.emit(relax.Tuple([total, a, builder.emit(relax.TupleGetItem(packed, 0)), total]))

    vector = ("n",)
    return CompiledModel(
        build(
            tiny_models.lowered(
                body,
                [TensorSpec("a", vector, "float32"), TensorSpec("b", vector, "float32")],
                [TensorSpec(name, vector if name != "w" else (3,), "float32") for name in ("sum", "same", "w", "again")],
                {"w": np.ones(3, "float32")},
                {"n": DimRange(1, None, 100)},
            )
        )
    )


def at_offset(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy of `values` that begins `offset` bytes after a 64-byte boundary."""
    buffer = np.empty(values.nbytes + 128, np.uint8)
    view = np.ndarray(values.shape, values.dtype, buffer, -buffer.ctypes.data % 64 + offset)
    view[...] = values
    return view


@pytest.mark.parametrize("offset", [0, 1, 4, 16, 32, 60])
def test_any_alignment(model, offset):
    np.testing.assert_allclose(model(at_offset(X, offset)), linear_reference(X), rtol=1e-6)
    np.testing.assert_allclose(model(torch.from_numpy(at_offset(X, offset))).numpy(), linear_reference(X), rtol=1e-6)


def test_aligned_inputs_are_not_copied(model):
    """Pointers tell: what generated code reads is the caller's memory, unless that is not aligned."""
    for make in (lambda array: array, torch.from_numpy):
        for offset, same in ((0, True), (4, False)):
            array = at_offset(X, offset)
            (tensor,) = model._binder.bind([make(array)])
            assert (tensor.data_ptr() == array.ctypes.data) is same
            assert tensor.data_ptr() % 64 == 0


def test_arrays_without_elements():
    from tcompile.compiler.binding import without_elements

    for shape in ((0,), (2, 0), (0, 3), (4, 0, 5)):
        for value in (np.ones(shape, "int64"), torch.ones(shape, dtype=torch.int64)):
            tensor = without_elements(value)
            assert tuple(tensor.shape) == shape and str(tensor.dtype) == "int64"


def test_awkward_layouts(model):
    readonly = at_offset(X, 0)
    readonly.flags.writeable = False
    for value in (np.asfortranarray(X), np.repeat(X, 2, 1)[:, ::2], X[::-1][::-1], readonly, X.view(np.memmap)):
        np.testing.assert_allclose(model(value), linear_reference(X), rtol=1e-6)
    for value in (torch.from_numpy(X.T.copy()).T, torch.from_numpy(X).clone().requires_grad_(), torch.nn.Parameter(torch.from_numpy(X))):
        result = model(value)
        assert isinstance(result, torch.Tensor) and not result.requires_grad
        np.testing.assert_allclose(result.numpy(), linear_reference(X), rtol=1e-6)


def test_by_position_and_name(two):
    a, b = np.arange(3, dtype="float32"), np.ones(3, dtype="float32")
    for result in (two(a, b), two(a=a, b=b), two(b=b, a=a), two(a, b=b)):
        assert isinstance(result, tuple) and len(result) == 4
        np.testing.assert_array_equal(result[0], a + b)
    assert all(isinstance(value, torch.Tensor) for value in two(torch.from_numpy(a), torch.from_numpy(b)))


def test_outputs_own_their_memory(two):
    a, b = at_offset(np.arange(3, dtype="float32"), 0), np.ones(3, dtype="float32")
    total, same, weight, again = two(a, b)
    same[:], weight[:], total[:] = 7, 8, 9
    np.testing.assert_array_equal(a, [0, 1, 2])
    np.testing.assert_array_equal(again, [1, 2, 3])
    np.testing.assert_array_equal(two(a, b)[2], [1, 1, 1])
    first = two(a, b)[0]
    for _ in range(50):
        two(a + 5, b)
    np.testing.assert_array_equal(first, [1, 2, 3])


def test_outputs_outlive_the_model():
    result = CompiledModel(build(tiny_models.linear()))(X)
    np.testing.assert_allclose(result, linear_reference(X), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_symbolic_dims(dynamic, rows):
    x = np.random.default_rng(rows).standard_normal((rows, 4), dtype="float32")
    np.testing.assert_allclose(dynamic(x), linear_reference(x), rtol=1e-5, atol=1e-6)


def test_wrong_inputs_are_named(model, dynamic, two):
    v = np.ones(3, "float32")
    for call, words in [
        (lambda: model(X.astype("float64")), ["'x'", "float32", "float64"]),
        (lambda: model(torch.from_numpy(X).double()), ["'x'", "float32", "float64"]),
        (lambda: model(X[:4]), ["'x'", "[5, 4]", "[4, 4]"]),
        (lambda: model(X[0]), ["'x'", "1 dims instead of 2"]),
        (lambda: model(X, X), ["takes 1 inputs"]),
        (lambda: model(), ["missing", "x: float32[5, 4]"]),
        (lambda: model(z=X), ["unknown input 'z'", "x"]),
        (lambda: model(X, x=X), ["'x'", "twice"]),
        (lambda: model(X.tolist()), ["'x'", "list"]),
        (lambda: model(None), ["'x'", "NoneType"]),
        (lambda: model(torch.empty(5, 4, device="meta")), ["'x'", "meta"]),
        (lambda: dynamic(np.zeros((17, 4), "float32")), ["n in 1..8..16", "[17, 4]"]),
        (lambda: dynamic(np.zeros((0, 4), "float32")), ["n in 1..8..16"]),
        (lambda: two(v, np.ones(4, "float32")), ["'b'", "'n' is already 3"]),
    ]:
        with pytest.raises(UsageError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_many_threads_at_once(dynamic):
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = np.random.default_rng(seed)
            for _ in range(100):
                x = generator.standard_normal((int(generator.integers(1, 17)), 4), dtype="float32")
                np.testing.assert_allclose(dynamic(x), linear_reference(x), rtol=1e-4, atol=1e-5)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []


def test_two_loads_of_one_artifact_are_separate(tmp_path):
    built = build(tiny_models.linear())
    first, second = CompiledModel(built).start(), CompiledModel(built).start()
    second(X)
    del second
    np.testing.assert_allclose(first(X), linear_reference(X), rtol=1e-6)


@pytest.mark.parametrize("threads", [0, -1, 10_000, 1.5, "2"])
def test_impossible_thread_counts(threads):
    with pytest.raises(UsageError, match="threads must be"):
        CompiledModel(build(tiny_models.linear()), threads=threads)


def test_thread_count_is_per_caller():
    """Each calling thread's pool follows the model it calls; nobody's CPU affinity is narrowed."""
    import os

    built = build(tiny_models.linear())
    count = tiny_models.tvm.get_global_func("runtime.NumThreads")
    seen = []

    def call(threads: int) -> None:
        CompiledModel(built, threads=threads)(X)
        seen.append((count(), os.sched_getaffinity(0)))

    for threads in (1, len(pool.CPUS), 1):
        call(threads)
    worker = threading.Thread(target=call, args=(len(pool.CPUS),))
    worker.start()
    worker.join()
    assert seen == [(n, set(pool.CPUS)) for n in (1, len(pool.CPUS), 1, len(pool.CPUS))]
    assert 1 <= pool.physical_cores() <= len(pool.CPUS)


def test_runtime_does_not_load_the_compiler(tmp_path):
    import subprocess
    import sys

    path = CompiledModel(build(tiny_models.linear())).save(tmp_path / "a.tcm")
    code = f"""
import sys, numpy, tcompile
model = tcompile.load({str(path)!r})
print(model(numpy.zeros((5, 4), 'float32')).sum(), *(name in sys.modules for name in ('tvm', 'onnx', 'torch')))
import torch  # only now: tensors are taken all the same
print(type(model(torch.zeros(5, 4))).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["15.0", "False", "False", "False", "Tensor"], done.stderr
