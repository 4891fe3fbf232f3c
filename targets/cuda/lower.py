"""From a legalized Relax module to a sequence of kernel launches over planned memory."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...compiler.dialect.bitcast import NAME as BITCAST
from ...compiler.dialect.opaque import NAME as HIDE_SHAPE
from ...compiler.element_types import numpy_dtype
from ...compiler.errors import Blocker, UnsupportedModel
from ...compiler.program import Program, node_of
from ...compiler.tvm import Constant, relax, tirx
from ...compiler.weights import DEVICE_ALIGNMENT
from ...compiler.workspace import Lifetime, Workspace, aligned, plan, stacked
from ...passes.fusion import NODES
from ..base import Target
from ..common.call_sites import call_sites, constant_positions
from .kernel import Kernel, Packing, Plan, Unsupported, elements
from .sizes import bind, simplified
from .symbols import Symbols, dims_of
from .templates import plan_of, rounded_copies, whole
from .zeros import Zeros, zeros_of

_OF_DATA = "a size that is computed from data, which the CUDA target does not wait for"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies. space: "input" | "output" (number `index`), "weights" | "workspace" (at byte `index`)."""

    space: str
    index: int


@dataclass
class Tensor:
    """A tensor of the graph; reshapes, and its bits as another type, are the same tensor. size_bytes: a size of sizes.py."""

    size_bytes: Any
    place: Place | None = None
    key: int = -1


@dataclass(frozen=True)
class Launch:
    """A kernel on its tensors; without a kernel, a copy of the second tensor to the first. grid, sizes, when, and the arguments of maps:
    those of the kernel, in the model's symbols."""

    kernel: str
    tensors: tuple[Tensor, ...]
    grid: tuple[Any, Any, Any] = (1, 1, 1)
    sizes: tuple[Any, ...] = ()
    when: tuple[Any, int | None, int | None] | None = None
    maps: tuple[tuple[Any, ...], ...] = ()


@dataclass
class Launches:
    """What one call of the model does.

    kernels: name -> kernel, in the order of first use; nodes: kernel -> source nodes. workspace: of the intermediate tensors, of the sizes that are to be expected where some are open.
    symbols: of open sizes; inputs, outputs: their shapes; temporaries: by their keys; below: see `workspace.stacked`, where sizes of temporaries are open.
    """

    kernels: dict[str, Kernel] = field(default_factory=dict)
    nodes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    workspace: Workspace = Workspace(0, 0, 0, {})
    symbols: Symbols = field(default_factory=Symbols)
    inputs: list[Sequence[Any]] = field(default_factory=list)
    outputs: list[Sequence[Any]] = field(default_factory=list)
    temporaries: dict[int, Tensor] = field(default_factory=dict)
    below: dict[int, list[int]] = field(default_factory=dict)

    def memory(self) -> dict[str, Any]:
        """What the report says under "memory"; `sizes` are those that it holds for."""
        sizes = {var.name: bounds.opt for var, bounds in self.symbols.bounds.items()}
        return {**self.workspace.report(), **({"sizes": sizes} if sizes else {})}

    @property
    def calls(self) -> Counter[str]:
        return Counter(launch.kernel for launch in self.launches)


def sequence(program: Program, target: Target, policy: str) -> Launches:
    """Give every call its kernels and every tensor its memory. program: legalized and fused. Raises UnsupportedModel with all that this target cannot do."""
    return _Walk(program, target, policy).run()


def refuse_sizes_of_data(program: Program) -> None:
    """Raise UnsupportedModel with every node whose result has a size that data decide. program: legalized, not fused: TVM's fusion fails on some of them."""
    bindings = [binding for block in program.module["main"].body.blocks for binding in block.bindings]
    decided = [each for each in bindings if isinstance(each, relax.MatchCast) and isinstance(each.ty, relax.ShapeType)]
    if decided:
        raise UnsupportedModel(list(dict.fromkeys(Blocker(node_of(each.var.name, program.origins), "", _OF_DATA) for each in decided)))


class _Walk:
    def __init__(self, program: Program, target: Target, policy: str):
        module = program.module
        self.module, self.target, self.policy, self.origins = module, target, policy, program.origins
        self.result = Launches(symbols=Symbols(program.dims))
        self.symbols = self.result.symbols
        self.hidden: dict[Any, Any] = {}  # variable -> dims that its type does not tell
        self.values: dict[Any, Any] = {}  # variable -> Tensor, or a list of values
        self.plans: dict[str, tuple[Plan, tuple[str, ...]]] = {}
        self.constants: dict[Any, Tensor] = {}
        self.zeros: dict[Any, Zeros | None] = {}  # constant -> those that templates may leave out
        self.chosen: dict[tuple[Any, ...], str] = {}  # function, zeros of its weights -> its plan
        self.fixed = {name: constant_positions(sites) for name, sites in call_sites(module).items()}
        self.weight_bytes = 0
        self.temporaries: list[Tensor] = []
        self.blockers: list[Blocker] = []
        self.rounded = rounded_copies(module)

    def run(self) -> Launches:
        main = self.module["main"]
        for position, param in enumerate(main.params):
            self.result.inputs.append(dims_of(param.ty) or [])
            self.symbols.of_input(position, self.result.inputs[-1])
        for position, param in enumerate(main.params):
            self.values[param] = Tensor(self._bytes(param.ty), Place("input", position))
        body = main.body
        for block in body.blocks:
            for binding in block.bindings:
                if isinstance(binding, relax.MatchCast):
                    self._cast(binding)
                if binding.var not in self.values:  # a rounded copy is there already
                    self.values[binding.var] = self._value(binding.value, binding.var)
        kind = body.body.ty
        for each in kind.fields if isinstance(kind, relax.TupleType) else [kind]:
            self._bytes(each)
            self.result.outputs.append(list(dims_of(each) or ()))
        if self.blockers:
            raise UnsupportedModel(list(dict.fromkeys(self.blockers)))
        self._outputs(self._value(body.body))
        self._place()
        return self.result

    def _cast(self, binding: Any) -> None:
        """A tensor is said to have another shape than its type tells."""
        node = node_of(binding.var.name, self.origins)
        wanted, found = dims_of(binding.ty), dims_of(binding.value.ty) or self.hidden.get(binding.value)
        if wanted is None:
            return
        if found is None:
            self._refuse(node, _OF_DATA, None)
            self.symbols.unknown(wanted)
            return
        try:
            self.symbols.cast(wanted, found, node)
        except Unsupported as reason:
            self._refuse(node, str(reason), None)

    # -- values ------------------------------------------------------------------------------------------------------------------------------------

    def _value(self, expr: Any, var: Any = None) -> Any:
        if isinstance(expr, Constant):
            return self._constant(expr)
        if isinstance(expr, relax.Tuple):
            return [self._value(item) for item in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.Call):
            return self._call(expr, var)
        if expr in self.values:
            return self.values[expr]
        return self._refuse("", f"a {type(expr).__name__} expression", expr.ty)

    def _call(self, call: Any, var: Any) -> Any:
        name = getattr(call.op, "name", str(call.op))
        if name in ("relax.reshape", BITCAST, HIDE_SHAPE):
            if name == HIDE_SHAPE:
                self.hidden[var] = dims_of(call.args[0].ty)
            return self._value(call.args[0])
        if name == "relax.call_tir":
            return self._call_tir(call, var)
        make = whole(call, self.target, self.policy, self.symbols.known)
        if make is not None:
            return self._whole(call, name.split(".")[-1], make)
        return self._refuse("", f"operator {name} has no CUDA kernel yet", call.ty)

    def _call_tir(self, call: Any, var: Any) -> Any:
        function = call.args[0].name_hint
        copy, dtype = self.rounded.get(var, (None, ""))
        outs = self._outs(call.ty_args[0])
        func, given = self.module[function], list(call.args[1].fields)
        name = function + (f"_and_{dtype}" if dtype else "")
        zeros = {position: found for position in self.fixed[function] if (found := self._zeros(given[position])) is not None}
        nodes = tuple(str(node) for node in (func.attrs or {}).get(NODES, ()))
        try:
            values = self._bound(func, call, nodes)
            known = self.symbols.known.bound(values)
            name = self._chosen(
                name, zeros, functools.partial(plan_of, func, self.target, self.policy, self.fixed[function], dtype, zeros, known), nodes
            )
            self._check(name, values)
        except Unsupported as reason:
            self.blockers.append(Blocker(", ".join(nodes[:3]), "", f"no CUDA kernel for '{name}': {reason}"))
            return outs if isinstance(call.ty_args[0], relax.TupleType) else outs[0]
        packed = {packing.param: packing for packing in self.plans[name][0].packings}
        tensors = [(arg, param) for arg, param in zip(given, func.params, strict=False) if hasattr(param, "shape")]
        operands = [self._packed(arg, packed[param]) if param in packed else self._value(arg) for arg, param in tensors]
        copies = [self._temporary(simplified(outs[0].size_bytes // 2))] if dtype else []
        self._launch(name, [*operands, *outs, *copies], values)
        if dtype:
            self.values[copy] = copies[0]
        return outs if isinstance(call.ty_args[0], relax.TupleType) else outs[0]

    def _bound(self, func: Any, call: Any, nodes: Sequence[str]) -> dict[Any, Any]:
        """The symbols of a function in terms of the model's, where it is called. Its parameters are tensors and, among them and behind them, sizes."""
        kinds = call.ty_args[0].fields if isinstance(call.ty_args[0], relax.TupleType) else [call.ty_args[0]]
        given = [*call.args[1].fields, *(relax.Var("out", kind) for kind in kinds), *(call.args[2].values if len(call.args) > 2 else [])]
        shapes: list[tuple[Any, Any]] = []
        numbers: tuple[list[Any], list[Any]] = [], []
        for param, arg in zip(func.params, given, strict=True):
            if hasattr(param, "shape") and isinstance(arg.ty, relax.TensorType):
                shapes.append((list(param.shape), dims_of(arg.ty)))
                continue
            if hasattr(param, "shape") or not str(getattr(arg.ty, "dtype", "")).startswith("int"):
                raise Unsupported("parameters that are neither tensors nor sizes")
            numbers[0].append(param)
            numbers[1].append(self.symbols.resolved(arg))
        if any(dims is None for _, dims in shapes):
            raise Unsupported("a tensor whose shape is known only at run time")
        values, checks = bind([*shapes, numbers])  # pyright: ignore[reportArgumentType]
        for own, size in checks:
            self.symbols.equal(size, own, f"node '{nodes[0] if nodes else call.args[0].name_hint}': a dim")
        return values

    def _check(self, name: str, values: Mapping[Any, Any]) -> None:
        """Raise Unsupported when the host cannot compute what the kernels of a plan take."""
        for kernel in self.plans[name][0].kernels:
            for size in (*kernel.grid, *kernel.sizes, *(kernel.when or ())[:1], *(size for each in kernel.maps for size in each.arguments)):
                self.symbols.resolved(size, values)

    def _zeros(self, arg: Any) -> Zeros | None:
        if not isinstance(arg, Constant):
            return None
        if arg not in self.zeros:
            self.zeros[arg] = zeros_of(arg.value.numpy())
        return self.zeros[arg]

    def _chosen(self, function: str, zeros: Mapping[int, Zeros], make: Callable[[], Plan], nodes: tuple[str, ...]) -> str:
        """The name of the plan of a function by weights with these zeros; weights for which the same kernels are best share it."""
        key = function, tuple(sorted(zeros.items()))
        if key not in self.chosen:
            made = make()
            others = list(dict.fromkeys(name for (other, _), name in self.chosen.items() if other == function))
            same = (name for name in others if _texts(self.plans[name][0]) == _texts(made))
            self.chosen[key] = next(same, f"{function}_other{len(others)}" if others else function)
            if self.chosen[key] not in self.plans:
                self._add(self.chosen[key], made, nodes)
        return self.chosen[key]

    def _whole(self, call: Any, hint: str, make: Callable[[], Plan]) -> Any:
        """An operator that has a kernel of its own and takes part in no fusion; equal ones share it."""
        outs = self._outs(call.ty)
        out = outs if isinstance(call.ty, relax.TupleType) else outs[0]
        try:
            made = make()
        except Unsupported as reason:
            self.blockers.append(Blocker("", "", f"no CUDA kernel for {hint}: {reason}"))
            return out
        if not made.kernels:  # of no elements
            return out
        texts = _texts(made)
        same = (old for old, (other, _) in self.plans.items() if _texts(other) == texts)
        name = next(same, f"{hint}{sum(other.startswith(hint) for other in self.plans)}")
        if name not in self.plans:
            self._add(name, made, ())
        packed = {packing.param: packing for packing in made.packings}
        operands = [
            self._packed(arg, packed[param]) if param in packed else self._value(arg) for arg, param in zip(call.args, made.params, strict=False)
        ]
        self._launch(name, [*operands, *outs])
        return out

    def _add(self, name: str, made: Plan, nodes: tuple[str, ...]) -> None:
        several = len(made.kernels) > 1
        names = tuple(f"{name}_{position}" if several else name for position in range(len(made.kernels)))
        self.plans[name] = made, names
        for own, kernel in zip(names, made.kernels, strict=True):
            self.result.kernels[own], self.result.nodes[own] = kernel, nodes

    def _launch(self, name: str, tensors: Sequence[Tensor], values: Mapping[Any, Any] | None = None) -> None:
        made, names = self.plans[name]
        buffers = {packing.param: packing.buffer for packing in made.packings}
        known = {buffers.get(param, param): tensor for param, tensor in zip(made.params, tensors, strict=True)}
        values = values or {}
        for own, kernel in zip(names, made.kernels, strict=True):
            when = None if kernel.when is None else (self.symbols.resolved(kernel.when[0], values), *kernel.when[1:])
            for buffer in kernel.tensors:
                if buffer not in known:
                    count = self.symbols.resolved(elements(buffer), values)
                    count = self.symbols.count([count if when is None else _while(when, count)])
                    known[buffer] = self._temporary(simplified(count * numpy_dtype(str(buffer.ty.dtype)).itemsize))
            grid, sizes, *maps = (
                tuple(self.symbols.resolved(size, values) for size in of)
                for of in (kernel.grid, kernel.sizes, *(each.arguments for each in kernel.maps))
            )
            given = tuple(known[buffer] for buffer in kernel.tensors)
            self.result.launches.append(Launch(own, given, grid, sizes, when, tuple(maps)))  # pyright: ignore[reportArgumentType]

    # -- tensors -----------------------------------------------------------------------------------------------------------------------------------

    def _outs(self, kind: Any) -> list[Tensor]:
        kinds = kind.fields if isinstance(kind, relax.TupleType) else [kind]
        return [self._temporary(self._bytes(each)) for each in kinds]

    def _temporary(self, size_bytes: int) -> Tensor:
        self.temporaries.append(Tensor(size_bytes, key=len(self.temporaries)))
        return self.temporaries[-1]

    def _bytes(self, kind: Any) -> Any:
        dims = dims_of(kind)
        if dims is None:
            self.blockers.append(Blocker("", "", "an intermediate has a shape that is known only at run time; the CUDA target plans memory before"))
            return 0
        try:
            return simplified(self.symbols.count(dims) * numpy_dtype(str(kind.dtype)).itemsize)
        except Unsupported as reason:
            self.blockers.append(Blocker("", "", f"an intermediate has {reason}"))
            return 0

    def _constant(self, expr: Any) -> Tensor:
        return self._stored(expr, expr.value.numpy)

    def _packed(self, expr: Any, packing: Packing) -> Tensor:
        """A constant in the layout that a kernel reads; those of equal name and shape share it."""
        return self._stored((expr, packing.buffer.name, tuple(int(dim) for dim in packing.buffer.shape)), lambda: packing.pack(expr.value.numpy()))

    def _stored(self, key: Any, make: Callable[[], np.ndarray]) -> Tensor:
        if key not in self.constants:
            value = make()
            self.result.weights[f"{len(self.constants):04d}"] = value
            self.constants[key] = Tensor(value.nbytes, Place("weights", self.weight_bytes))
            self.weight_bytes += aligned(value.nbytes, DEVICE_ALIGNMENT)
        return self.constants[key]

    def _refuse(self, node: str, reason: str, kind: Any) -> Any:
        self.blockers.append(Blocker(node, "", reason))
        if not isinstance(kind, (relax.TensorType, relax.TupleType)):
            return None
        outs = self._outs(kind)
        return outs if isinstance(kind, relax.TupleType) else outs[0]

    def _outputs(self, value: Any) -> None:
        """Intermediates that the model returns are written to its outputs at once; what is an input, a weight or returned twice is copied."""
        for position, tensor in enumerate(value if isinstance(value, list) else [value]):
            place = Place("output", position)
            if tensor.place is None:
                tensor.place = place
            elif not isinstance(tensor.size_bytes, int) or tensor.size_bytes:
                self.result.launches.append(Launch("", (Tensor(tensor.size_bytes, place), tensor)))

    def _place(self) -> None:
        uses: dict[int, list[int]] = {}
        for number, launch in enumerate(self.result.launches):
            for tensor in launch.tensors:
                if tensor.place is None:
                    uses.setdefault(tensor.key, []).append(number)
        fixed = all(isinstance(self.temporaries[key].size_bytes, int) for key in uses)
        sizes = {
            key: self.temporaries[key].size_bytes if fixed else max(1, self.symbols.known.typical(self.temporaries[key].size_bytes)) for key in uses
        }
        lifetimes = {key: Lifetime(sizes[key], min(numbers), max(numbers)) for key, numbers in uses.items()}
        self.result.workspace = plan(lifetimes, DEVICE_ALIGNMENT)
        self.result.temporaries = {key: self.temporaries[key] for key in uses}
        if not fixed:
            self.result.below = stacked(lifetimes, self.result.workspace)
        for key, offset in self.result.workspace.offsets.items():
            self.temporaries[key].place = Place("workspace", offset if fixed else key)


def _texts(made: Plan) -> list[tuple[str, ...]]:
    """What makes two plans in the model's own symbols equal."""
    return [(kernel.text, *map(str, (*kernel.grid, *kernel.sizes, *(kernel.when or ())))) for kernel in made.kernels]


def _while(when: tuple[Any, int | None, int | None], size: Any) -> Any:
    """The size while something is in a range, and 0 otherwise."""
    of, least, most = when
    bounds = [*([of >= least] if least is not None else []), *([of <= most] if most is not None else [])]
    if isinstance(of, int):
        return size if all(bounds) else 0
    inside = functools.reduce(tirx.And, bounds)
    zero = tirx.const(0, "int64")
    return tirx.Select(inside, tirx.const(size, "int64") if isinstance(size, int) else size, zero)
