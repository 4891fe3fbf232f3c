"""PyTorch importer: torch.nn.Module or ExportedProgram -> Program. torch itself is imported only when a model arrives."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ToolchainError
from ...program import Program

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def import_torch(
    model: nn.Module | ExportedProgram,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    shapes: Mapping[str, Any] | None = None,
) -> Program:
    """Import a module (in eval mode) or an exported program.

    example_inputs: tensors or numpy arrays, by position (a sequence) or by argument name (a mapping). dynamic_shapes: as torch.export takes them;
    names of `torch.export.Dim`s become the names of the Program's dims. shapes: shape of each input by argument name; an entry is an int, the name of
    a dynamic dim, a DimRange, or text such as "1..8..32x128" (min..opt..max of the first axis). Inputs without an example are float32.

    Weights become Relax constants that share the module's memory: a tensor used under two names is one constant. Its `span` names the parameter.
    Raises UnsupportedModel with every unsupported node at once, UsageError for wrong arguments, ToolchainError without torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise ToolchainError("importing a PyTorch model needs torch, which is not installed: run `pip install tcompile[torch]`")
    import torch

    from .export import export_module
    from .translate import translate

    if isinstance(model, torch.export.ExportedProgram):
        return translate(model, type(model).__name__)
    exported, dim_names = export_module(model, example_inputs, dynamic_shapes, shapes)
    return translate(exported, type(model).__name__, dim_names)
