"""Functionalise an exported program and decompose its composite operators, but for those that kernels and passes know whole."""

from __future__ import annotations

import torch

_aten = torch.ops.aten

#: composite operators that stay: each is one Relax operator (or a fixed group) that passes match, or has a better kernel than its parts
_KEPT = (
    _aten.scaled_dot_product_attention.default,
    _aten.linear.default,
    _aten.matmul.default,
    _aten.layer_norm.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.silu.default,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten.hardtanh.default,
    _aten.relu6.default,
    _aten.leaky_relu.default,
    _aten.softmax.int,
    _aten.log_softmax.int,
    _aten.reshape.default,
    _aten.upsample_nearest2d.vec,
    _aten.upsample_bilinear2d.vec,
    _aten.lstm.input,
    _aten.gru.input,
    _aten.rnn_tanh.input,
    _aten.rnn_relu.input,
)


def decompose(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program in functional form over core aten operators and the kept composite ones."""
    table = torch.export.default_decompositions()
    for operator in _KEPT:
        if operator is not _aten.lstm.input or not any(map(_projects, exported.graph.nodes)):
            table.pop(operator, None)
    return exported.run_decompositions(table)


def _projects(node: torch.fx.Node) -> bool:
    """An LSTM whose hidden state is projected (proj_size), which has a weight more per layer and direction; torch unrolls it into its steps."""
    if node.target is not _aten.lstm.input:
        return False
    _, _, params, biases, layers, _, _, bidirectional, *_ = node.args
    return len(params) != (4 if biases else 2) * layers * (2 if bidirectional else 1)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
