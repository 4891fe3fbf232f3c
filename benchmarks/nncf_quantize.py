"""Makes OpenVINO's int8 model by NNCF's post-training quantization; for the interpreter of an environment with `nncf` and `openvino` in it.

nncf_quantize.py MODEL.onnx SAMPLES.npz TARGET.xml [--transformer]: samples are arrays NUMBER/INPUT, one number per sample. Default settings, and the model type that NNCF's documentation
advises for transformers.
"""

import sys

import nncf  # pyright: ignore[reportMissingImports]
import numpy as np
import openvino


def main() -> None:
    source, samples, target, *rest = sys.argv[1:]
    model = openvino.Core().read_model(source)
    feeds: dict[str, dict[str, np.ndarray]] = {}
    with np.load(samples) as saved:
        for key in saved.files:
            number, _, name = key.partition("/")
            feeds.setdefault(number, {})[name] = saved[key]
    first = next(iter(feeds.values()))
    model.reshape({name: list(array.shape) for name, array in first.items()})
    model_type = nncf.ModelType.TRANSFORMER if "--transformer" in rest else None
    quantized = nncf.quantize(model, nncf.Dataset(list(feeds.values())), model_type=model_type, subset_size=len(feeds))
    openvino.save_model(quantized, target, compress_to_fp16=False)


if __name__ == "__main__":
    main()
