"""Runs a model with DeepSparse 1.8.0, once for every line on stdin; for the interpreter of an environment with `deepsparse==1.8.0` in it.

deepsparse_server.py MODEL.onnx FOLDER THREADS: inputs from FOLDER/feeds.npz; the line `save` also writes FOLDER/outputs.npz.
"""

import os
import sys
from pathlib import Path

os.environ["NM_DISABLE_ANALYTICS"] = "1"

import deepsparse  # pyright: ignore[reportMissingImports]
import numpy as np
import onnx


def simplified(path, folder, feeds):
    """The model with fixed inputs, no foreign opsets and an old IR version, which is what this engine reads."""
    model = onnx.load(path)
    kept = [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.ir_version = 8
    for info in model.graph.input:
        if info.name in feeds:
            for dim, size in zip(info.type.tensor_type.shape.dim, feeds[info.name].shape, strict=True):
                dim.dim_value = size
    target = Path(folder) / "model.onnx"
    onnx.save(model, target, save_as_external_data=model.ByteSize() > 1 << 30)
    return target, [info.name for info in model.graph.input]


def main():
    path, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # the engine prints to stdout
    os.dup2(2, 1)
    feeds = dict(np.load(Path(folder) / "feeds.npz"))
    model, names = simplified(path, folder, feeds)
    inputs = [np.ascontiguousarray(feeds[name]) for name in names if name in feeds]
    engine = deepsparse.Engine(
        str(model), batch_size=inputs[0].shape[0], num_cores=int(threads), input_shapes=str([list(array.shape) for array in inputs])
    )
    for line in sys.stdin:
        outputs = engine.run(inputs)
        if line.strip() == "save":
            np.savez(Path(folder) / "outputs.npz", *outputs)
        answers.write("done\n")


main()
