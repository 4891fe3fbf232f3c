"""Networks that are deployed most, each as one artifact with open dims, through ONNX and through torch, at several sizes.

Few layers and small widths; MiniLM and the detector of PP-OCR with their own weights. The detector comes as an ONNX file, there is no torch module of it.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import pytest
import tcompile
from tcompile.compiler.compare import agree
from tcompile.models.zoo import ZOO

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
for needed in ("timm", "onnxscript"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is needed", allow_module_level=True)

from timm_networks import TIMM
from torch_networks import Network
from transformers_networks import TRANSFORMERS


def _minilm() -> Network:
    tokens = ("batch", "seq")
    runs = [{"batch": 2, "seq": 11}, {"batch": 1, "seq": 1}, {"batch": 3, "seq": 37}]
    shapes = {"input_ids": tokens, "attention_mask": tokens}
    return Network(lambda: ZOO["minilm"].torch_module(), shapes, {"batch": (1, 8), "seq": (1, 48)}, runs)  # pyright: ignore


#: open besides the batch: the length of texts, also of what T5 writes; height and width of images, but for CLIP's, whose positions are for one size
NETWORKS = {
    "bert": TRANSFORMERS["bert"],
    "minilm": _minilm(),
    "gpt2": TRANSFORMERS["gpt2"],
    "gpt2_eager": TRANSFORMERS["gpt2_eager"],
    "llama": TRANSFORMERS["llama"],
    "qwen2": TRANSFORMERS["qwen2"],
    "t5": TRANSFORMERS["t5"],
    "clip": TRANSFORMERS["clip"],
    "vit": TRANSFORMERS["vit_any_size"],
    "swin": TRANSFORMERS["swin_any_size"],
    "resnet": TIMM["resnet"],
}
#: by the exporter that traces: the other one fails on the strides that attention has with dims open
TRACED = {"t5", "swin"}


def check(ours, want):
    agreement = agree(np.asarray(ours), np.asarray(want))
    assert agreement.ok, agreement


def through_torch(name):
    network = NETWORKS[name]
    module = network.build()
    with torch.no_grad():
        exported = torch.export.export(module, tuple(network.example().values()), dynamic_shapes=network.dynamic_shapes(), strict=False)
    model = tcompile.compile(exported)
    for run in range(len(network.runs)):
        inputs = network.example(run)
        with torch.no_grad():
            check(model(*inputs.values()), module(*inputs.values()))


def through_onnx(name, folder):
    network = NETWORKS[name]
    path = str(folder / f"{name}.onnx")
    options = {"input_names": list(network.inputs), "opset_version": 18, "verbose": False}
    if name in TRACED:
        axes = {key: {axis: dim for axis, dim in enumerate(shape) if dim in network.dims} for key, shape in network.inputs.items()}
        torch.onnx.export(network.build(), tuple(network.example().values()), path, dynamic_axes=axes, dynamo=False, **options)
    else:
        options = {**options, "dynamic_shapes": network.dynamic_shapes(), "dynamo": True}
        torch.onnx.export(network.build(), tuple(network.example().values()), **options).save(path, external_data=False)
    feeds = [{key: value.numpy() for key, value in network.example(run).items()} for run in range(len(network.runs))]
    same_at_all_sizes(path, feeds)


def same_at_all_sizes(path, feeds):
    model, session = tcompile.compile(path), onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for inputs in feeds:
        check(model(**inputs), session.run(None, inputs)[0])


@pytest.mark.networks
@pytest.mark.parametrize("route", ["onnx", "torch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_artifact_serves_the_range(name, route, tmp_path):
    through_torch(name) if route == "torch" else through_onnx(name, tmp_path)


@pytest.mark.networks
def test_one_artifact_detects_text_at_any_height_and_width():
    """Logits like onnxruntime's, probabilities like those of our logits: a sigmoid turns the last bits of logits of 50 into more than the tolerance of small probabilities."""
    entry = ZOO["ppocr-det"]
    model = onnx.load(str(entry.onnx_path()))
    sigmoid = next(node for node in model.graph.node if node.output[0] == model.graph.output[0].name)
    assert sigmoid.op_type == "Sigmoid"
    model.graph.output.append(onnx.helper.make_tensor_value_info(sigmoid.input[0], onnx.TensorProto.FLOAT, None))
    compiled, session = tcompile.compile(model), onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ({"batch": 1, "height": 64, "width": 96}, {"batch": 2, "height": 160, "width": 32}, {"batch": 1, "height": 320, "width": 352}):
        inputs = entry.example_inputs(**size)
        probabilities, logits = compiled(**inputs)
        check(logits, session.run(None, inputs)[1])
        with np.errstate(over="ignore"):
            check(probabilities, (1 / (1 + np.exp(-logits.astype("float64")))).astype("float32"))
