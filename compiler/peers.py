"""Other engines behind one call, for `verify`, `bench` and the benchmarks. Each is optional: ToolchainError names the package that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TcompileError, ToolchainError, UsageError

#: a model made ready by an engine: () -> outputs in the model's order
Peer = Callable[[], list[np.ndarray]]


#: engine -> kind of file it reads, and how to come by one
SOURCES = {
    "onnxruntime": (".onnx", "an ONNX file (.onnx)"),
    "openvino": (".onnx", "an ONNX file (.onnx)"),
    "openvino-bf16": (".onnx", "an ONNX file (.onnx)"),
    "torch": (".pt2", "the same model as a .pt2 file, made by torch.export.save(torch.export.export(module, inputs), 'NAME.pt2')"),
}


def source_for(name: str, candidates: Sequence[Path]) -> Path:
    """The first of `candidates` that the engine `name` can read. Raises UsageError for an unknown engine, or saying which file is needed."""
    if name not in PEERS:
        raise UsageError(f"unknown peer '{name}': expected one of {', '.join(PEERS)}")
    suffix, needed = SOURCES[name]
    for candidate in candidates:
        if candidate.suffix == suffix:
            return candidate
    given = " or ".join(f"'{candidate}'" for candidate in candidates)
    raise UsageError(f"{name} cannot read {given}: it needs {needed}; name that with --model")


def prepare(name: str, model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Peer:
    """`model` loaded by the engine `name`, its inputs bound.

    Raises UsageError for an unknown engine or one that cannot read this kind of file, ToolchainError where the engine is missing or fails; so does the peer.
    """
    source = source_for(name, [model])
    with _failures_of(name, source):
        peer = PEERS[name](source, feeds, threads)

    def run() -> list[np.ndarray]:
        with _failures_of(name, source):
            return peer()

    return run


@contextmanager
def _failures_of(name: str, model: Path) -> Iterator[None]:
    try:
        yield
    except TcompileError:
        raise
    except Exception as error:  # engines raise exceptions of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ToolchainError(f"{name} cannot run '{model}': {reason}") from error


def _onnxruntime(model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Peer:
    runtime = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(feeds))


def _openvino(model: Path, feeds: Mapping[str, np.ndarray], threads: int, precision: str = "f32") -> Peer:
    openvino = _require("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(str(model)), "CPU", settings).create_infer_request()
    tensors = {name: openvino.Tensor(np.ascontiguousarray(value)) for name, value in feeds.items()}

    def run() -> list[np.ndarray]:
        results = request.infer(tensors)
        return [results[index] for index in range(len(results))]

    return run


def _torch(model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Peer:
    torch = _require("torch")
    torch.set_num_threads(threads)
    exported = torch.export.load(str(model))
    module, pytree = exported.module(), torch.utils._pytree
    flat = [torch.from_numpy(feeds[name]) if name in feeds else None for name in exported.graph_signature.user_inputs]
    args, kwargs = pytree.tree_unflatten(flat, exported.call_spec.in_spec)  # as the caller of torch.export passed them

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = module(*args, **kwargs)
        return [value.numpy() for value in pytree.tree_leaves(outputs) if isinstance(value, torch.Tensor)]

    return run


def _require(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise ToolchainError(f"{package} is not installed; `pip install tcompile[bench]` brings the peers") from error


PEERS: dict[str, Callable[[Path, Mapping[str, np.ndarray], int], Peer]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino-bf16": partial(_openvino, precision="bf16"),
    "torch": _torch,
}
