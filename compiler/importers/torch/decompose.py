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
)


def decompose(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program in functional form over core aten operators and the kept composite ones."""
    table = torch.export.default_decompositions()
    for operator in _KEPT:
        table.pop(operator, None)
    return exported.run_decompositions(table)
