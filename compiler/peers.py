"""Other engines behind one call, for `verify`, `bench` and the benchmarks. Each is optional: ToolchainError names the package that is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ToolchainError, UsageError

#: a model made ready by an engine: () -> outputs in the model's order
Peer = Callable[[], list[np.ndarray]]


def prepare(name: str, model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Peer:
    """`model` loaded by the engine `name`, its inputs bound. Raises UsageError for an unknown engine or one that cannot read this kind of file."""
    if name not in PEERS:
        raise UsageError(f"unknown peer '{name}': expected one of {', '.join(PEERS)}")
    return PEERS[name](model, feeds, threads)


def _onnxruntime(model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Peer:
    runtime = _require("onnxruntime")
    _require_suffix("onnxruntime", model, ".onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(feeds))


def _openvino(model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Peer:
    openvino = _require("openvino")
    _require_suffix("openvino", model, ".onnx")
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(str(model)), "CPU", settings).create_infer_request()
    tensors = {name: openvino.Tensor(np.ascontiguousarray(value)) for name, value in feeds.items()}

    def run() -> list[np.ndarray]:
        results = request.infer(tensors)
        return [results[index] for index in range(len(results))]

    return run


def _torch(model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Peer:
    torch = _require("torch")
    _require_suffix("torch", model, ".pt2")
    torch.set_num_threads(threads)
    module = torch.export.load(str(model)).module()
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = module(**tensors)
        return [value.numpy() for value in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]

    return run


def _require(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise ToolchainError(f"{package} is not installed; `pip install tcompile[bench]` brings the peers") from error


def _require_suffix(name: str, model: Path, suffix: str) -> None:
    if model.suffix != suffix:
        raise UsageError(f"{name} reads {suffix} files, not '{model}'; name the original with --model")


PEERS: dict[str, Callable[[Path, Mapping[str, np.ndarray], int], Peer]] = {"onnxruntime": _onnxruntime, "openvino": _openvino, "torch": _torch}
