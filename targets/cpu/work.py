"""What every kernel of a program has to do, for the shares of the roofline that are reported beside measured times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...compiler.program import Program
from ...compiler.roofline import Layer, bytes_of, default_size
from ...passes.fusion import SOURCES
from .lower import PACKED
from .peak import bytes_per_second, operations_per_second

#: kinds of products in a workload's text -> what is multiplied, see `operations_per_second`
_NUMBERS = {"u8s8": "int8", "bf16": "bfloat16", "bf16x2": "bf16x2", "bf16x3": "bf16x3"}


def add_work(rows: Sequence[dict[str, Any]], layers: Sequence[Layer], program: Program, cores: int, sizes: Mapping[str, int]) -> None:
    """Put "flops", "bytes" and "limit_us" into the rows of kernels, all calls together.

    layers: of the graph before it was lowered, one for every variable, whose arithmetic goes to the kernel that computes it (to a template's rather than to a generic one). program: calls the
    scheduled kernels. A kernel that reads parts of a tensor moves those alone. The limit is the larger of the times that arithmetic and traffic take at this machine's measured rates with `cores`; caches can beat that of the traffic.
    """
    known = {name: default_size(bounds) for name, bounds in program.dims.items()} | dict(sizes)
    moved: dict[str, int] = {}
    for binding in (binding for block in program.main.body.blocks for binding in block.bindings):
        call = binding.value
        if getattr(getattr(call, "op", None), "name", "") == "relax.call_tir":
            name = call.args[0].name_hint.removesuffix(PACKED)
            moved[name] = moved.get(name, 0) + sum(bytes_of(arg.ty, known) for arg in call.args[1].fields) + bytes_of(binding.var.ty, known)
    sources: dict[str, list[str]] = {}
    for variable, func in program.module.functions_items():
        sources[variable.name_hint.removesuffix(PACKED)] = [str(name) for name in (func.attrs or {}).get(SOURCES, ())]
    owner: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["template"] != "generic"):
        owner.update(dict.fromkeys(sources.get(row["kernel"], []), row["kernel"]))
    for row in rows:
        mine = [layer for layer in layers if owner.get(layer.name) == row["kernel"]]
        row["flops"], row["bytes"] = sum(layer.flops for layer in mine), moved.get(row["kernel"], 0)
        if mine:  # operands of which a part is read
            row["bytes"] = min(row["bytes"], sum(layer.bytes for layer in mine))
        numbers = next((numbers for kind, numbers in _NUMBERS.items() if re.search(rf" {kind}\b", row["workload"])), "float32")
        seconds = max(row["flops"] / (operations_per_second(numbers) * cores), row["bytes"] / bytes_per_second())
        row["limit_us"] = round(seconds * 1e6, 6)
