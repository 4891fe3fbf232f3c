"""The channels-last pass: numbers unchanged, and no more transposes than the graph needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernels import UNOPTIMIZED
from tcompile.compiler.program import Program, Provenance
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.passes.base import PassContext
from tcompile.passes.layout import ChannelsLast
from tcompile.targets.base import Target

op = relax.op
RNG = np.random.default_rng(0)


def weight(*shape: int) -> Any:
    return relax.const(RNG.standard_normal(shape).astype("float32") * 0.3)


def program(x_shape: tuple[Any, ...], body: Callable[[Any, Any], Any]) -> Program:
    """A program with one input; `body(emit, x)` returns the output."""
    symbols = {dim: tirx.Var(dim, "int64") for dim in x_shape if isinstance(dim, str)}
    x = relax.Var("x", relax.TensorType([symbols.get(dim, dim) for dim in x_shape], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, x))
        builder.emit_func_output(out)
    return Program(builder.get(), (), (), Provenance("test", "test"))


def run(module: Any, x: np.ndarray) -> list[np.ndarray]:
    executable = relax.build(relax.transform.LegalizeOps()(module), UNOPTIMIZED)
    out = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x))
    return [value.numpy() for value in ([out] if hasattr(out, "numpy") else out)]


def check(x_shape: tuple[Any, ...], sizes: tuple[int, ...], transposes: int, body: Callable[[Any, Any], Any]) -> Program:
    """Same numbers, and the expected number of real transposes."""
    before = program(x_shape, body)
    context = PassContext(Target("cpu", "test"))
    after = ChannelsLast().run(before, context)
    relax.analysis.well_formed(after.module)
    assert context.report.matches.get("transposes", 0) == transposes, after.module.script()
    x = RNG.standard_normal(sizes).astype("float32")
    for want, got in zip(run(before.module, x), run(after.module, x), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    return after


def conv(emit: Any, x: Any, co: int, k: int = 3, groups: int = 1, stride: int = 1) -> Any:
    ci = int(x.ty.shape[1])
    y = emit(op.nn.conv2d(x, weight(co, ci // groups, k, k), strides=stride, padding=k // 2, groups=groups))
    return emit(op.add(y, weight(1, co, 1, 1)))


def test_chain_needs_one_transpose_in_and_one_out() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = emit(op.nn.relu(conv(emit, x, 8)))
        return op.add(emit(op.nn.max_pool2d(conv(emit, y, 8), (2, 2), (2, 2))), relax.const(1.0))

    after = check((1, 5, 12, 14), (1, 5, 12, 14), 2, body)
    assert 'kernel_layout="HWIO"' in after.module.script()


def test_squeeze_excite_and_classifier() -> None:
    """Broadcast of [N, C, 1, 1], hard-swish, depthwise, global mean, flatten to a matmul: only the input is transposed."""

    def body(emit: Any, x: Any) -> Any:
        y = conv(emit, conv(emit, x, 8), 8, groups=8)
        y = emit(op.multiply(y, emit(op.divide(emit(op.clip(emit(op.add(y, relax.const(3.0))), 0, 6)), relax.const(6.0)))))
        gate = emit(op.sigmoid(conv(emit, emit(op.nn.adaptive_avg_pool2d(y, (1, 1))), 8, k=1)))
        y = emit(op.mean(emit(op.multiply(y, gate)), [2, 3], keepdims=True))
        return emit(op.matmul(emit(op.reshape(y, (-1, 8))), weight(8, 3)))

    check((2, 3, 10, 10), (2, 3, 10, 10), 1, body)
    check(("n", 3, "h", "w"), (2, 3, 7, 9), 1, body)


def test_concat_split_resize_and_channel_vectors() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = emit(op.concat([conv(emit, x, 4), conv(emit, x, 6, k=1)], axis=1))
        left, right = (emit(relax.TupleGetItem(emit_split, i)) for emit_split in [emit(op.split(y, 2, axis=1))] for i in range(2))
        y = emit(op.multiply(emit(op.subtract(left, right)), weight(5, 1, 1)))
        y = emit(op.image.resize2d(y, (16, 12), layout="NCHW", method="nearest_neighbor", coordinate_transformation_mode="asymmetric"))
        return emit(op.nn.softmax(y, axis=1))

    check((1, 3, 8, 6), (1, 3, 8, 6), 2, body)


def test_tokens_come_free() -> None:
    """[N, C, H, W] -> [N, C, H*W] -> [N, H*W, C], as in a vision transformer's patch embedding, is only a reshape."""

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.nn.conv2d(x, weight(8, 3, 4, 4), strides=4))
        tokens = emit(op.permute_dims(emit(op.reshape(y, (2, 8, 6))), [0, 2, 1]))
        return emit(op.matmul(tokens, weight(8, 5)))

    check((2, 3, 8, 12), (2, 3, 8, 12), 1, body)


def test_sequence_head_comes_free() -> None:
    """[N, C, 1, W] squeezed and transposed to [N, W, C], as in a text recogniser, with a dynamic width."""

    def body(emit: Any, x: Any) -> Any:
        y = emit(op.squeeze(emit(op.mean(conv(emit, x, 6), [2], keepdims=True)), [2]))
        return emit(op.matmul(emit(op.permute_dims(y, [0, 2, 1])), weight(6, 4)))

    check(("n", 3, 8, "w"), (2, 3, 8, 13), 1, body)


def test_channel_shuffle_moves_channels_alone() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = emit(op.reshape(conv(emit, x, 8, groups=1), (1, 2, 4, 6, 6)))
        y = emit(op.reshape(emit(op.permute_dims(y, [0, 2, 1, 3, 4])), (1, 8, 6, 6)))
        return conv(emit, y, 4)

    check((1, 3, 6, 6), (1, 3, 6, 6), 3, body)


def test_match_cast_keeps_the_layout() -> None:
    builder = relax.BlockBuilder()
    h = tirx.Var("h", "int64")
    x = relax.Var("x", relax.TensorType((1, 3, h, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.match_cast(conv(builder.emit, x, 4), relax.TensorType((1, 4, h, 6), "float32"))
            out = builder.emit_output(op.nn.relu(conv(builder.emit, y, 5)))
        builder.emit_func_output(out)
    before, context = Program(builder.get(), (), (), Provenance("test", "test")), PassContext(Target("cpu", "test"))
    after = ChannelsLast().run(before, context)
    assert context.report.matches["transposes"] == 2
    array = RNG.standard_normal((1, 3, 7, 6)).astype("float32")
    np.testing.assert_allclose(run(after.module, array)[0], run(before.module, array)[0], rtol=1e-4, atol=1e-5)


def test_two_outputs_and_residual() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = conv(emit, x, 3)
        z = emit(op.nn.relu(emit(op.add(y, x))))
        return relax.Tuple([z, emit(op.max(y, [1]))])

    check((1, 3, 7, 5), (1, 3, 7, 5), 2, body)


@pytest.mark.parametrize("axes", [[1], [2], [1, 3], [0, 2]])
def test_reductions_without_kept_dims(axes: list[int]) -> None:
    def body(emit: Any, x: Any) -> Any:
        return emit(op.sum(conv(emit, x, 4), axes))

    program_after = ChannelsLast().run(program((2, 3, 5, 6), body), PassContext(Target("cpu", "test")))
    x = RNG.standard_normal((2, 3, 5, 6)).astype("float32")
    np.testing.assert_allclose(run(program_after.module, x)[0].shape, [s for i, s in enumerate((2, 4, 5, 6)) if i not in axes])


def test_without_convolutions_the_program_is_the_same_object() -> None:
    before = program((2, 3), lambda emit, x: emit(op.nn.relu(x)))
    assert ChannelsLast().run(before, PassContext(Target("cpu", "test"))) is before


def test_padding_keeps_the_layout() -> None:
    def body(emit: Any, x: Any) -> Any:
        y = emit(op.nn.conv2d(x, weight(5, 3, 1, 1)))
        y = emit(op.nn.pad(y, (0, 0, 0, 0, 1, 2, 3, 4), pad_value=7.0))
        return op.nn.conv2d(y, weight(4, 5, 2, 2))

    check((1, 3, 6, 7), (1, 3, 6, 7), 2, body)
