"""The core ATen operators and the samples that torch tests them with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db

DTYPES = (torch.float32, torch.int64, torch.bool)
#: OpInfo names of core operators that are not called after them
_OTHER_NAMES = {
    "_adaptive_avg_pool2d": ["nn.functional.adaptive_avg_pool2d"],
    "_adaptive_avg_pool3d": ["nn.functional.adaptive_avg_pool3d"],
    "_cdist_forward": ["cdist"],
    "_fft_c2r": ["fft.irfft"],
    "_fft_r2c": ["fft.rfft"],
    "_native_batch_norm_legit_no_training": ["nn.functional.batch_norm"],
    "_pdist_forward": ["nn.functional.pdist"],
    "_to_copy": ["to", "bool", "float", "long"],
    "alias": ["alias_copy"],
    "constant_pad_nd": ["nn.functional.pad"],
    "convolution": [f"nn.functional.conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)],
    "grid_sampler_2d": ["nn.functional.grid_sample"],
    "index": ["__getitem__"],
    "max_pool2d_with_indices": ["nn.functional.max_pool2d"],
    "max_pool3d_with_indices": ["nn.functional.max_pool3d"],
    "native_group_norm": ["nn.functional.group_norm"],
    "native_layer_norm": ["nn.functional.layer_norm"],
    **{f"{kind}_pad{rank}d": ["nn.functional.pad"] for kind in ("reflection", "replication") for rank in (1, 2, 3)},
    "sym_size": [],
    "upsample_bilinear2d": ["nn.functional.interpolate"],
    "upsample_nearest2d": ["nn.functional.interpolate"],
}
#: results that are random, or that torch leaves undefined, cannot be compared
_UNDEFINED = {
    "empty",
    "empty_strided",
    "resize_",  # leaves what it adds as it is
    "bernoulli",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "randint",
    "randperm",
    "native_dropout",
    "uniform",
    "normal",
    "multinomial",
    "exponential",
}


#: operators that order elements, where equal ones may come in any order, and the position of their axis among the arguments
_DIM = {"sort": 1, "topk": 2}


@dataclass(frozen=True)
class Case:
    """One operator with one dtype of its samples; name: "OPERATOR VARIANT DTYPE"."""

    name: str
    info: Any
    dtype: torch.dtype

    def samples(self, limit: int) -> list[tuple[Call, list[torch.Tensor]]]:
        """Up to `limit` of the samples, spread over all of them: a module that calls the operator, and its tensors."""
        torch.manual_seed(0)
        every = list(self.info.sample_inputs("cpu", self.dtype, requires_grad=False))
        count = min(limit, len(every))
        chosen = [every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)]
        return [Call.of(self.info.op, (sample.input, *sample.args), sample.kwargs) for sample in chosen]


class Call(torch.nn.Module):
    """Calls an operator; tensors among its arguments are the module's inputs, everything else is fixed."""

    def __init__(self, operator: Any, leaves: list[Any], spec: Any, free: int | None):
        super().__init__()
        #: free: the axis along which the order of equal elements is open, if there is one
        self.operator, self.leaves, self.spec, self.free = operator, leaves, spec, free

    @classmethod
    def of(cls, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[torch.Tensor]]:
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        fixed = [Call if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        place = _DIM.get(getattr(operator, "__name__", ""), None)
        named = kwargs.get("dim", -1) if place is None or len(args) <= place else args[place]
        return cls(operator, fixed, spec, None if place is None or kwargs.get("stable") else named).eval(), tensors

    def forward(self, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        args, kwargs = torch.utils._pytree.tree_unflatten([next(rest) if leaf is Call else leaf for leaf in self.leaves], self.spec)
        return self.operator(*args, **kwargs)


def core_operators() -> list[str]:
    """Names of the operators that torch tags as core, without overloads."""
    # `dir(torch.ops.aten)` has only what something in the process has already asked for
    names = sorted({name.removeprefix("aten::").split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")})
    packets = ((name, getattr(torch.ops.aten, name)) for name in names)
    return [name for name, packet in packets if any(torch.Tag.core in getattr(packet, overload).tags for overload in packet.overloads())]


@cache
def cases_of(core: str) -> tuple[Case, ...]:
    """The cases of one core operator: torch's samples of it, in every dtype of DTYPES that it takes."""
    plain, found = core.removeprefix("_"), []
    wanted = set(_OTHER_NAMES.get(core, (core, plain, f"nn.functional.{plain}")))
    for info in op_db:
        if info.name in wanted and info.name not in _UNDEFINED:
            for dtype in DTYPES:
                if dtype in info.supported_dtypes("cpu"):
                    name = " ".join(filter(None, (info.name, info.variant_test_name, str(dtype).removeprefix("torch."))))
                    found.append(Case(name, info, dtype))
    return tuple(found)


@cache
def cases() -> tuple[Case, ...]:
    """The cases of all core operators, each once, by name."""
    return tuple(sorted({case.name: case for core in core_operators() for case in cases_of(core)}.values(), key=lambda case: case.name))
