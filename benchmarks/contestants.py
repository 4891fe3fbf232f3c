"""Contestants of the benchmarks beside those of `tcompile.compiler.peers`: torch.compile on a network of the zoo, and DeepSparse in an environment of its own."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tcompile.compiler.peers import PEERS, Peer, prepare
from tcompile.models.entry import Entry

_FLOAT32 = ("onnxruntime", "openvino", "torch-compile", "deepsparse")
#: by precision: whom tcompile is measured against
RIVALS = {"fp32": _FLOAT32, "bf16x3": _FLOAT32, "bf16x2": _FLOAT32, "bf16": ("openvino-bf16", "torch-bf16")}
_SERVER = Path(__file__).with_name("deepsparse_server.py")


def contestant(name: str, entry: Entry, feeds: Mapping[str, np.ndarray], threads: int, deepsparse: Path | None = None) -> Peer | None:
    """The network made ready by an engine; None where the engine cannot take part (no torch module, no DeepSparse, a model that DeepSparse ends on)."""
    if name in PEERS:
        return prepare(name, entry.onnx_path(), feeds, threads)
    if name == "deepsparse":
        return _deepsparse(deepsparse, entry.onnx_path(), feeds, threads) if deepsparse is not None else None
    return _torch(entry, feeds, threads, bf16=name == "torch-bf16")


def _torch(entry: Entry, feeds: Mapping[str, np.ndarray], threads: int, bf16: bool) -> Peer | None:
    """torch.compile with frozen weights, in bfloat16 under autocast."""
    import torch
    import torch._inductor.config as inductor

    module = entry.torch_module()
    if module is None:
        return None
    torch.set_num_threads(threads)
    inductor.freezing = True
    compiled, args = torch.compile(module), [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in entry.inputs]

    def run() -> list[np.ndarray]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = compiled(*args)
        leaves: list[Any] = torch.utils._pytree.tree_leaves(outputs)
        return [value.float().numpy() if value.is_floating_point() else value.numpy() for value in leaves if isinstance(value, torch.Tensor)]

    run()
    return run


def _deepsparse(python: Path, model: Path, feeds: Mapping[str, np.ndarray], threads: int) -> Callable[[], list[np.ndarray]] | None:
    """DeepSparse 1.8.0 in its own process: it wants older packages than the other engines. Every call costs a message there and back (about 0.05 ms)."""
    folder = Path(tempfile.mkdtemp(prefix="deepsparse"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # it holds a copy of the model
    np.savez(folder / "feeds.npz", **feeds)  # pyright: ignore[reportArgumentType]
    command = [str(python), str(_SERVER), str(model), str(folder), str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1)

    def ask(request: str) -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(request + "\n")
        if process.stdout.readline().strip() != "done":
            raise RuntimeError(f"DeepSparse ended with {process.wait()}")

    try:
        ask("save")
    except RuntimeError as problem:
        print(f"{model.name}: {problem}", file=sys.stderr)
        return None
    with np.load(folder / "outputs.npz") as saved:
        outputs = [saved[f"arr_{index}"] for index in range(len(saved.files))]

    def run() -> list[np.ndarray]:
        ask("run")
        return outputs

    return run
