"""What `benchmarks/gpu.py` times: products, attention, networks and decoding, each as a model to compile, its inputs on the device, and the peers' calls on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tcompile
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tcompile.compiler.element_types import numpy_dtype
from tcompile.models import text
from tcompile.models.zoo import ZOO
from tcompile.passes.sparsity.patterns import parse

Call = Callable[[], Any]
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    model() is what `tcompile.compile` takes, with `options`; inputs(device) its tensors; reference(inputs) the first output as it should be; peers(inputs) what the others call on
    the same tensors, by name. flops: of a call; moved: the fewest bytes that a call moves (0: not known); bar: the ratio that is asked for, of the time of the fastest peer, or of `against`, to ours;
    tolerance: the largest difference to the reference, over its norm.
    """

    name: str
    model: Callable[[], Any]
    inputs: Callable[[torch.device], Tensors]
    peers: Callable[[Tensors], Mapping[str, Call]]
    reference: Callable[[Tensors], torch.Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    flops: float = 0.0
    moved: float = 0.0
    bar: float | None = None
    against: str | None = None
    tolerance: float = 1e-2


def cases(small: bool) -> Iterator[Case]:
    """All of them; `small`: of sizes that a CPU does in seconds, to try the harness."""
    if small:
        yield gemm(33, 48, 40)
        yield int8_gemm(32, 64, 48)
        yield fp8_gemm(32, 64, 48)
        yield sparse_gemm(33, 96, 80, "block16x32:0.5", "cpu")
        yield attention(2, 32, 37, causal=True)
        yield depthwise(1, 9, 12, 3)
        yield top_k(3, 70, 5)
        yield network("mobilenetv3-l", 1, "fp32")
        return
    yield gemm(4096, 4096, 4096, bar=0.9)
    yield gemm(8192, 8192, 8192, bar=0.95)
    for m, k, n in ((128, 768, 3072), (128, 3072, 768), (4093, 768, 2304), (197, 384, 1536), (1, 4096, 14336), (16, 4096, 14336)):
        yield gemm(m, k, n)
    yield int8_gemm(4096, 4096, 4096)
    for m, k, n in ((4096, 4096, 4096), (8192, 8192, 8192), (16, 4096, 14336)):
        yield fp8_gemm(m, k, n)
    for size, pattern, bar in ((4096, "block64x128:0.5", 1.5), (8192, "block64x128:0.5", 1.5), (4096, "block64x64:0.5", None)):
        yield sparse_gemm(size, size, size, pattern, "cuda", bar)
    for batch, size, channels, taps in ((1, 56, 144, 3), (32, 56, 144, 3), (32, 28, 120, 5)):
        yield depthwise(batch, size, channels, taps)
    for rows, length, count in ((32, 128256, 50), (8192, 64, 8), (64, 4096, 4096)):
        yield top_k(rows, length, count)
    for tokens in (4096, 8192, 16384):
        yield attention(16, 128, tokens, causal=True, bar=1.0)
        yield attention(16, 128, tokens, causal=False, bar=1.0)
    yield attention(16, 128, 4093, causal=False)
    yield attention(32, 64, 8192, causal=True)
    for name in ("bert-base", "vit-s16", "resnet50"):
        for batch in (1, 32):
            yield network(name, batch, "bf16", bar=1.1)
    yield network("mobilenetv3-l", 1, "bf16")
    yield decode("bf16", 1023, bar=1.1)


def _graph(
    nodes: list[Any], inputs: Mapping[str, tuple[int, tuple[int, ...]]], output: tuple[int, tuple[int, ...]], constants: list[Any]
) -> ModelProto:
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    graph = helper.make_graph(nodes, "case", values, [helper.make_tensor_value_info("y", *output)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _bfloat16(name: str, tensor: torch.Tensor) -> TensorProto:
    return numpy_helper.from_array(tensor.to(torch.bfloat16).view(torch.int16).numpy().view(numpy_dtype("bfloat16")), name)


def first(outputs: Any) -> torch.Tensor:
    """The first tensor of whatever a network returns."""
    return next(value for value in torch.utils._pytree.tree_leaves(outputs) if isinstance(value, torch.Tensor))


def _tuned(function: Callable[..., Any], *args: Any) -> Call:
    """The function as torch.compile's search makes it, without CUDA graphs of its own: the timing captures one around every contestant."""
    compiled = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda: compiled(*args)


def gemm(m: int, k: int, n: int, bar: float | None = None) -> Case:
    """x [m, k] times constant weights [k, n], all bfloat16; the peer may have the weights in either order."""
    weight = _normal(1, k, n) * k**-0.5

    def peers(inputs: Tensors) -> dict[str, Call]:
        (x,) = inputs
        right = weight.to(x.device, torch.bfloat16)
        other = right.t().contiguous()
        linear = torch.nn.functional.linear
        return {"torch": lambda: x @ right, "torch, weights transposed": lambda: linear(x, other), "torch.compile": _tuned(linear, x, other)}

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    kind = TensorProto.BFLOAT16
    return Case(
        f"gemm bf16 {m}x{k}x{n}",
        lambda: _graph([node], {"x": (kind, (m, k))}, (kind, (m, n)), [_bfloat16("w", weight)]),
        lambda device: [_normal(2, m, k).to(device, torch.bfloat16)],
        peers,
        lambda inputs: inputs[0].double() @ weight.to(inputs[0].device, torch.bfloat16).double(),
        flops=2.0 * m * k * n,
        moved=2.0 * (m * k + k * n + m * n),
        bar=bar,
    )


def int8_gemm(m: int, k: int, n: int) -> Case:
    """u8 activations times s8 weights with a scale per channel, dequantized; beside int32 sums of torch and its bfloat16 product (which the bar refers to)."""
    rng = np.random.default_rng(1)
    codes, scales = rng.integers(-127, 128, (k, n), np.int8), rng.uniform(0.5, 1.5, n).astype(np.float32) / (127 * k**0.5)
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "sw"], ["b"], axis=1),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    arrays = {"sx": np.float32(0.02), "zx": np.uint8(128), "w": codes, "sw": scales}

    def reference(inputs: Tensors) -> torch.Tensor:
        (x,) = inputs
        weight = torch.from_numpy(codes).to(x.device).double() * torch.from_numpy(scales).to(x.device).double()
        return (x.double() - 128) * float(arrays["sx"]) @ weight

    def peers(inputs: Tensors) -> dict[str, Call]:
        (x,) = inputs
        signed = (x.to(torch.int16) - 128).to(torch.int8)
        right, scale = torch.from_numpy(codes).to(x.device), torch.from_numpy(scales).to(x.device) * arrays["sx"]
        short, half = signed.bfloat16(), right.bfloat16()
        by_column = right.t().contiguous().t()
        return {"torch bf16": lambda: short @ half * scale, "torch._int_mm": lambda: torch._int_mm(signed, by_column) * scale}

    return Case(
        f"gemm int8 {m}x{k}x{n}",
        lambda: _graph(
            nodes,
            {"x": (TensorProto.UINT8, (m, k))},
            (TensorProto.FLOAT, (m, n)),
            [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
        ),
        lambda device: [torch.randint(0, 256, (m, k), generator=torch.Generator().manual_seed(2)).to(device, torch.uint8)],
        peers,
        reference,
        flops=2.0 * m * k * n,
        moved=1.0 * (m * k + k * n) + 4.0 * m * n,
        bar=1.5,
        against="torch bf16",
    )


def fp8_gemm(m: int, k: int, n: int) -> Case:
    """x [m, k] float32 times constant weights by `--quantize fp8`, a scale per row found in the call; beside torch's bfloat16 product (which the bar refers to), and its float8 product of
    rows that are scaled and rounded in the call, or were before it."""
    weight = _normal(1, k, n) * k**-0.5

    def scaled(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(dim, keepdim=True).float() / 448
        return (x / scale).to(torch.float8_e4m3fn), scale

    def peers(inputs: Tensors) -> dict[str, Call]:
        (x,) = inputs
        half, right = x.bfloat16(), weight.to(x.device, torch.bfloat16)
        codes, scales = scaled(weight.to(x.device), 0)
        by_column, before = codes.t().contiguous().t(), scaled(x, 1)

        def product(left: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return torch._scaled_mm(left, by_column, scale, scales, out_dtype=torch.bfloat16)

        found: dict[str, Call] = {"torch bf16": lambda: half @ right}
        if hasattr(torch, "_scaled_mm"):
            found |= {"torch._scaled_mm": lambda: product(*scaled(x, 1)), "torch._scaled_mm, x rounded before": lambda: product(*before)}
        return found

    return Case(
        f"gemm fp8 {m}x{k}x{n}",
        lambda: _graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            {"x": (TensorProto.FLOAT, (m, k))},
            (TensorProto.FLOAT, (m, n)),
            [numpy_helper.from_array(weight.numpy(), "w")],
        ),
        lambda device: [_normal(2, m, k).to(device)],
        peers,
        lambda inputs: inputs[0].double() @ weight.to(inputs[0].device).double(),
        options={"quantize": "fp8"},
        flops=2.0 * m * k * n,
        moved=4.0 * (m * k + m * n) + 1.0 * k * n,
        bar=1.5,
        against="torch bf16",
        tolerance=0.06,
    )


def sparse_gemm(m: int, k: int, n: int, pattern: str, target: str, bar: float | None = None) -> Case:
    """x [m, k] times constant weights [k, n] with blocks of zeros, all bfloat16; beside torch's dense product of the same weights, and ours of weights that are no less than 1e-30."""
    wanted = parse(pattern)
    weight = (_normal(1, k, n) * k**-0.5).bfloat16().float()
    weight = weight * torch.from_numpy(wanted.mask(weight.abs().numpy(), wanted.level))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    kind = TensorProto.BFLOAT16

    def model(values: torch.Tensor) -> ModelProto:
        return _graph([node], {"x": (kind, (m, k))}, (kind, (m, n)), [_bfloat16("w", values)])

    def peers(inputs: Tensors) -> dict[str, Call]:
        (x,) = inputs
        right = weight.to(x.device, torch.bfloat16)
        dense = tcompile.compile(model(torch.where(weight == 0, torch.tensor(1e-30), weight)), target=target)
        return {"torch": lambda: x @ right, "tcompile dense": lambda: dense(x)}

    return Case(
        f"gemm bf16 {m}x{k}x{n}, {pattern}",
        lambda: model(weight),
        lambda device: [_normal(2, m, k).to(device, torch.bfloat16)],
        peers,
        lambda inputs: inputs[0].double() @ weight.to(inputs[0].device).double(),
        flops=2.0 * m * k * n * (1 - wanted.level),
        moved=2.0 * (m * k + k * n * (1 - wanted.level) + m * n),
        bar=bar,
        against="tcompile dense",
    )


def attention(heads: int, width: int, tokens: int, *, causal: bool, bar: float | None = None) -> Case:
    """q, k, v [1, heads, tokens, width] in bfloat16, beside every fused kernel that torch has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape, kind = (1, heads, tokens, width), TensorProto.BFLOAT16
    product = torch.nn.functional.scaled_dot_product_attention

    def peers(inputs: Tensors) -> dict[str, Call]:
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}

        def call(backend: SDPBackend) -> Any:
            with sdpa_kernel(backend):
                return product(*inputs, is_causal=causal)

        return {f"torch {name}": lambda backend=backend: call(backend) for name, backend in backends.items()}

    def reference(inputs: Tensors) -> torch.Tensor:
        """A head at a time: the scores of all of them may not fit."""
        rows = []
        for q, k, v in zip(*(x[0].double() for x in inputs), strict=True):
            scores = q @ k.t() * width**-0.5
            if causal:
                scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            rows.append(scores.softmax(-1) @ v)
        return torch.stack(rows)[None]

    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(causal))
    return Case(
        f"attention bf16 {heads}x{tokens}x{width}{' causal' if causal else ''}",
        lambda: _graph([node], dict.fromkeys("qkv", (kind, shape)), (kind, shape), []),
        lambda device: [_normal(seed, *shape).to(device, torch.bfloat16) for seed in (1, 2, 3)],
        peers,
        reference,
        options={"precision": "bf16"},  # the probabilities too
        flops=4.0 * heads * tokens * tokens * width * (0.5 if causal else 1.0),
        moved=2.0 * 4 * heads * tokens * width,
        bar=bar,
    )


def depthwise(batch: int, size: int, channels: int, taps: int) -> Case:
    """x [batch, size, size, channels] by one filter of taps x taps per channel, fp32; the peers get the same memory as a channels-last image."""
    weight, shape = _normal(1, channels, 1, taps, taps), (batch, size, size, channels)

    def conv(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, padding=taps // 2, groups=channels).permute(0, 2, 3, 1)

    def peers(inputs: Tensors) -> dict[str, Call]:
        (x,) = inputs
        own = weight.to(x.device)
        return {"torch": lambda: conv(x, own), "torch.compile": _tuned(conv, x, own)}

    nodes = [
        helper.make_node("Transpose", ["x"], ["image"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["image", "w"], ["sums"], group=channels, pads=[taps // 2] * 4),
        helper.make_node("Transpose", ["sums"], ["y"], perm=[0, 2, 3, 1]),
    ]
    kind = TensorProto.FLOAT
    return Case(
        f"depthwise fp32 {batch}x{size}x{size}x{channels}, {taps}x{taps}",
        lambda: _graph(nodes, {"x": (kind, shape)}, (kind, shape), [numpy_helper.from_array(weight.numpy(), "w")]),
        lambda device: [_normal(2, *shape).to(device)],
        peers,
        lambda inputs: conv(inputs[0].double(), weight.to(inputs[0].device).double()),
        flops=2.0 * batch * size * size * channels * taps * taps,
        moved=8.0 * batch * size * size * channels,
        tolerance=1e-4,
    )


def top_k(rows: int, length: int, count: int) -> Case:
    """The `count` greatest numbers of every row of x [rows, length] in fp32 and their places, sorted; all of them are a sort."""

    def peers(inputs: Tensors) -> dict[str, Call]:
        (x,) = inputs
        own = {"torch": lambda: torch.topk(x, count)}
        return own | ({"torch sort": lambda: torch.sort(x, stable=True, descending=True)} if count == length else {})

    node = helper.make_node("TopK", ["x", "k"], ["y", "places"])
    return Case(
        f"top-{count} fp32 {rows}x{length}",
        lambda: _graph(
            [node], {"x": (TensorProto.FLOAT, (rows, length))}, (TensorProto.FLOAT, (rows, count)), [numpy_helper.from_array(np.array([count]), "k")]
        ),
        lambda device: [_normal(2, rows, length).to(device)],
        peers,
        lambda inputs: torch.topk(inputs[0], count).values,
        moved=4.0 * rows * (length + count),
        tolerance=0.0,
    )


def network(name: str, batch: int, precision: str, bar: float | None = None) -> Case:
    """A network of the zoo; inputs in float32, weights and products in `precision`, the peers' in the same type throughout."""
    entry = ZOO[name]
    feeds = entry.example_inputs(batch=batch)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    def peers(inputs: Tensors) -> dict[str, Call]:
        module = entry.torch_module()
        assert module is not None
        images = inputs[0].ndim == 4
        module = module.to(inputs[0].device, dtype, memory_format=torch.channels_last if images else torch.preserve_format)
        # as the peers' own guides advise: images channels last, everything in the type of the weights
        own = [x.to(dtype, memory_format=torch.channels_last if images else torch.preserve_format) if x.is_floating_point() else x for x in inputs]
        return {"torch": lambda: module(*own), "torch.compile": _tuned(module, *own)}

    return Case(
        f"{name}, batch {batch}, {precision}",
        lambda: str(entry.onnx_path()),
        lambda device: [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])).to(device) for spec in entry.inputs],
        peers,
        lambda inputs: first(entry.torch_module().to(inputs[0].device)(*inputs)),  # pyright: ignore[reportOptionalMemberAccess]
        options={"precision": precision, "shapes": {name: tuple(value.shape) for name, value in feeds.items()}},
        bar=bar,
        tolerance=5e-2 if precision == "bf16" else 1e-3,
    )


def decode(precision: str, past: int, bar: float | None = None) -> Case:
    """One token of SmolLM2-135M behind a cache of `past`, which comes in and goes out as tensors."""

    def step() -> tuple[torch.nn.Module, Tensors]:
        decoder = text.smollm2()
        sizes = decoder.model.config
        shape = sizes.num_hidden_layers, 1, sizes.num_key_value_heads, past, sizes.hidden_size // sizes.num_attention_heads
        return text.decode_step(decoder), [torch.full((1, 1), 7), _normal(1, *shape), _normal(2, *shape)]

    def peers(inputs: Tensors) -> dict[str, Call]:
        module, _ = step()
        module = module.to(inputs[0].device, torch.bfloat16)
        own = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
        return {"torch": lambda: module(*own), "torch.compile": _tuned(module, *own)}

    return Case(
        f"smollm2 decode, {past} past tokens, {precision}",
        lambda: step()[0],
        lambda device: [x.to(device) for x in step()[1]],
        peers,
        lambda inputs: first(step()[0].to(inputs[0].device)(*inputs)),
        options={"precision": precision, "example_inputs": tuple(step()[1])},
        bar=bar,
        tolerance=5e-2,
    )
