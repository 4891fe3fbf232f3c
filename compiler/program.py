"""Program: the one value that importers make, passes rewrite and targets lower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the runtime reads specs from here and must load without the compiler
    from .tvm import relax, tvm


#: no dim is larger: slices to "the end" are written with this or more
LARGEST_DIM = 10**9
#: bytes of the largest tensor that a program may hold
LARGEST_BYTES = 1 << 40


@dataclass(frozen=True)
class DimRange:
    """Range of a symbolic dimension; `max` is None when unbounded. `opt` is the size the schedules are chosen for."""

    min: int = 1
    opt: int | None = None
    max: int | None = None

    def __str__(self) -> str:
        return f"{self.min}..{self.opt if self.opt is not None else ''}..{self.max if self.max is not None else ''}"


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of an input or output. A dim is an int, or a str naming a symbolic dim (expressions of symbols as text in outputs).

    carrier: the type in which the program holds elements that it only stores (`element_types`), None where that is `dtype`.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    carrier: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"


@dataclass(frozen=True)
class Provenance:
    """Where a program came from: file or class name, format ("onnx" | "torch"), opset or torch version, producer."""

    source: str
    format: str
    version: str = ""
    producer: str = ""


def node_of(name: str, origins: Mapping[str, str]) -> str:
    """The source node, or nodes, behind a variable, its own name where none is known. origins: see `Program`.

    What passes put in a variable's place is called as it was, with numbers behind; importers give no names that end in one.
    """
    short = name
    while short not in origins and short[-1:].isdigit():
        short = short[:-1]
    return origins.get(short, name)


@dataclass(frozen=True)
class Program:
    """A Relax module with `main`, and what the world outside needs to know of it.

    module: `main` takes the inputs in the order of `inputs` and returns one tensor, or a tuple in the order of `outputs`. Weights are Relax constants
    while passes work (TVM's own passes see only constants); lowering lifts them out into the artifact's weight file.
    origins: name of a binding variable -> name of the source node that made it, or of several, " + " between them; passes keep the names of what they rewrite.
    """

    module: tvm.IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provenance: Provenance
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def with_module(self, module: tvm.IRModule) -> Program:
        """The same program with another module; the very same object when the module is unchanged."""
        if module is self.module or module.same_as(self.module):
            return self
        return replace(self, module=module)

    def with_main(self, main: relax.Function) -> Program:
        """The same program with another `main`; the module it had stays as it was."""
        module = self.module.clone()
        module.update_func(module.get_global_var("main"), main)
        return self.with_module(module)

    def node(self, name: str) -> str:
        """The source node, or nodes, behind a variable of this name, see `node_of`."""
        return node_of(name, self.origins)

    @property
    def main(self) -> relax.Function:
        return self.module["main"]
