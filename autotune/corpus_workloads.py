"""Workloads of the cost model's corpus: the kernels of every network in `models/`, and synthetic ones of sizes that no network has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..compiler.api import import_model
from ..compiler.options import CompileOptions
from ..compiler.pipeline import graph_passes
from ..compiler.tvm import relax
from ..models.zoo import ZOO
from ..targets.base import Target
from ..targets.common import legalize
from ..targets.cpu.tasks import Task, fused_module, tasks

#: m, k, n of GEMMs with a weight
GEMMS = (
    *((1, 512, 512), (1, 1024, 4096), (1, 4096, 1024), (1, 2048, 333), (2, 768, 768), (3, 1000, 500), (4, 512, 2048), (7, 640, 640), (8, 768, 3072)),
    *(
        (13, 17, 31),
        (16, 1024, 1024),
        (17, 331, 257),
        (32, 512, 512),
        (33, 1000, 1000),
        (50, 768, 1000),
        (64, 256, 256),
        (77, 768, 768),
        (100, 100, 100),
    ),
    *((127, 511, 129), (200, 64, 1024), (256, 512, 256), (384, 384, 96), (512, 256, 512), (1000, 32, 48), (2000, 16, 16), (65, 2048, 128)),
    *((128, 4096, 64), (31, 64, 2000)),
)
#: batch, m, k, n of GEMMs of two activations
BATCHED = ((4, 33, 64, 33), (12, 64, 64, 64), (16, 100, 48, 100), (3, 250, 80, 250), (8, 1, 64, 128), (32, 16, 16, 16))
ONE, TWO = (1, 1, 1, 1), (2, 2, 2, 2)
#: x [n, h, w, ci], co, kernel, strides, padding, dilation, groups
CONVOLUTIONS: tuple[tuple[Any, ...], ...] = (
    ((1, 56, 56, 64), 128, (1, 1)),
    ((1, 33, 35, 50), 70, (1, 1)),
    ((1, 14, 14, 512), 200, (1, 1)),
    ((4, 7, 7, 320), 1280, (1, 1)),
    ((1, 100, 100, 16), 24, (1, 1)),
    ((1, 56, 56, 100), 100, (1, 1), (2, 2)),
    ((1, 28, 28, 96), 96, (3, 3), (1, 1), ONE),
    ((1, 40, 40, 64), 64, (3, 3), (1, 1), ONE),
    ((1, 17, 19, 48), 80, (3, 3), (1, 1), ONE),
    ((1, 64, 64, 32), 32, (3, 3), (1, 1), ONE),
    ((1, 7, 7, 256), 256, (3, 3), (1, 1), ONE),
    ((2, 20, 20, 128), 64, (3, 3), (1, 1), ONE),
    ((1, 80, 80, 24), 48, (3, 3), (1, 1), ONE),
    ((1, 56, 56, 48), 64, (3, 3), (2, 2), ONE),
    ((1, 112, 112, 3), 32, (5, 5), (2, 2), TWO),
    ((1, 30, 30, 64), 96, (5, 5), (1, 1), TWO),
    ((1, 28, 28, 64), 64, (3, 3), (1, 1), TWO, (2, 2)),
    ((1, 28, 28, 128), 128, (3, 3), (1, 1), ONE, (1, 1), 4),
    ((1, 1, 100, 80), 160, (1, 3), (1, 1), (0, 1, 0, 1)),
    ((1, 24, 24, 64), 64, (1, 7), (1, 1), (0, 3, 0, 3)),
    ((1, 56, 56, 64), 64, (3, 3), (1, 1), ONE, (1, 1), 64),
    ((1, 28, 28, 100), 100, (5, 5), (1, 1), TWO, (1, 1), 100),
    ((1, 15, 15, 512), 512, (3, 3), (2, 2), ONE, (1, 1), 512),
    ((2, 14, 14, 384), 384, (3, 3), (1, 1), ONE, (1, 1), 384),
    ((1, 40, 60, 30), 30, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 30),
    ((1, 112, 112, 32), 32, (3, 3), (1, 1), ONE, (1, 1), 32),
)
EPILOGUES = ("relu", "none", "sigmoid")


def workloads(target: Target, networks: Sequence[str] = tuple(ZOO)) -> Iterator[tuple[str, Task]]:
    """(where it comes from, task), every shape once; networks take turns, so that a corpus cut short has something of each."""
    seen: set[str] = set()
    queues = [(name, _network(name, target)) for name in networks]
    for source, task in [("synthetic", task) for task in synthetic(target)] + [
        (name, queue[index]) for index in range(max((len(queue) for _, queue in queues), default=0)) for name, queue in queues if index < len(queue)
    ]:
        shape = str(task.candidates[0].workload)
        if shape not in seen:
            seen.add(shape)
            yield source, task


def synthetic(target: Target) -> Iterator[Task]:
    """Awkward sizes: single rows, primes, tails, deep and shallow sums."""
    for index, (m, k, n) in enumerate(GEMMS):
        yield _task(gemm(m, k, n, EPILOGUES[index % 3]), target)
    for batch, m, k, n in BATCHED:
        yield _task(gemm(m, k, n, "none", batch), target)
    for index, case in enumerate(CONVOLUTIONS):
        yield _task(convolution(*case, epilogue=EPILOGUES[index % 3]), target)


def gemm(m: int, k: int, n: int, epilogue: str = "relu", batch: int | None = None) -> Any:
    """A module whose `main` is epilogue(x [m, k] @ w [k, n] + b); with a batch both are activations."""
    x = relax.Var("x", relax.TensorType((m, k) if batch is None else (batch, m, k), "float32"))
    w = _weight(k, n) if batch is None else relax.Var("w", relax.TensorType((batch, k, n), "float32"))
    return _module([x] if batch is None else [x, w], relax.op.matmul(x, w), n, epilogue)


def convolution(
    x: tuple[int, ...],
    co: int,
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, ...] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    epilogue: str = "relu",
) -> Any:
    """A module whose `main` is epilogue(conv2d(x [n, h, w, ci]) + b)."""
    data = relax.Var("x", relax.TensorType(x, "float32"))
    weight = _weight(*kernel, x[3] // groups, co)
    return _module([data], relax.op.nn.conv2d(data, weight, strides, padding, dilation, groups, "NHWC", "HWIO", "NHWC"), co, epilogue)


def _weight(*shape: int) -> Any:
    return relax.const((np.random.default_rng(0).random(shape, np.float32) - np.float32(0.5)) * np.float32(0.1))


def _module(params: list[Any], core: Any, width: int, epilogue: str) -> Any:
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            y = builder.emit(relax.op.add(builder.emit(core), _weight(width)))
            if epilogue != "none":
                y = builder.emit(relax.op.nn.relu(y) if epilogue == "relu" else relax.op.sigmoid(y))
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    transform = relax.transform
    module = legalize.legalize(builder.get())
    for step in (transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR(), transform.DeadCodeElimination()):
        module = step(module)
    return module


def _task(module: Any, target: Target) -> Task:
    (task,) = tasks(module, target)
    return task


def _network(name: str, target: Target) -> list[Task]:
    """The tasks of a network at its usual input sizes."""
    entry = ZOO[name]
    program = import_model(entry.onnx_path(), shapes={key: array.shape for key, array in entry.example_inputs().items()})
    return tasks(fused_module(graph_passes(program, target, CompileOptions())), target)
