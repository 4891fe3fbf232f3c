"""From a legalized Relax module of static shapes to a sequence of kernel launches over planned memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...compiler.dialect import attention as dialect
from ...compiler.dialect import recurrent as recurrent_dialect
from ...compiler.dialect.bitcast import NAME as BITCAST
from ...compiler.element_types import numpy_dtype
from ...compiler.errors import Blocker, UnsupportedModel
from ...compiler.tvm import Constant, TensorLoad, relax, tirx
from ...compiler.weights import DEVICE_ALIGNMENT
from ...compiler.workspace import Lifetime, Workspace, aligned, plan
from ...passes.fusion import NODES
from ...passes.products import operator
from ..base import Target
from ..common.call_sites import call_sites, constant_positions
from ..common.fused import Unfusable, analyze
from ..common.stages import Unreadable, read_stages, reads_in_place
from . import attention, attention_hopper, depthwise, gemm_hopper, generic, recurrent, scan, scatter, sort, sparse
from .gemm import gemm
from .kernel import SHORT, Kernel, Packing, Plan, Unsupported, elements
from .weight_only import weight_only

#: templates of products in the order in which they are asked; those of core operators that others do not take
DENSE: tuple[Callable[..., Plan], ...] = (gemm_hopper.gemm, gemm, depthwise.conv)
ATTENTION: tuple[Callable[..., Plan], ...] = (attention_hopper.kernel, attention.kernel)
TEMPLATES: dict[str, tuple[Callable[..., Plan], ...]] = {"weight_only_matmul": (weight_only,)}
#: Relax operators that are kernels of their own: call -> its plan
WHOLE: dict[str, Callable[[Any], Plan]] = {name: part.kernel for part in (scan, scatter, sort) for name in part.OPERATORS}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies. space: "input" | "output" (number `index`), "weights" | "workspace" (at byte `index`)."""

    space: str
    index: int


@dataclass
class Tensor:
    """A tensor of the graph; reshapes, and its bits as another type, are the same tensor."""

    size_bytes: int
    place: Place | None = None
    key: int = -1


@dataclass(frozen=True)
class Launch:
    """A kernel on its tensors; without a kernel, a copy of the second tensor to the first."""

    kernel: str
    tensors: tuple[Tensor, ...]


@dataclass
class Launches:
    """What one call of the model does.

    kernels: name -> kernel, in the order of first use; nodes: kernel -> source nodes. workspace: of the intermediate tensors.
    """

    kernels: dict[str, Kernel] = field(default_factory=dict)
    nodes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    workspace: Workspace = Workspace(0, 0, 0, {})

    @property
    def calls(self) -> Counter[str]:
        return Counter(launch.kernel for launch in self.launches)


def sequence(module: Any, target: Target, policy: str) -> Launches:
    """Give every call its kernels and every tensor its memory. Raises UnsupportedModel with all that this target cannot do."""
    return _Walk(module, target, policy).run()


class _Walk:
    def __init__(self, module: Any, target: Target, policy: str):
        self.module, self.target, self.policy = module, target, policy
        self.result = Launches()
        self.values: dict[Any, Any] = {}  # variable -> Tensor, or a list of values
        self.plans: dict[str, tuple[Plan, tuple[str, ...]]] = {}
        self.constants: dict[Any, Tensor] = {}
        self.two_of_four: dict[Any, bool] = {}  # constant -> whether it is a weight of this pattern
        self.fixed = {name: constant_positions(sites) for name, sites in call_sites(module).items()}
        self.weight_bytes = 0
        self.temporaries: list[Tensor] = []
        self.blockers: list[Blocker] = []
        self.rounded = _rounded_copies(module)

    def run(self) -> Launches:
        main = self.module["main"]
        for position, param in enumerate(main.params):
            self.values[param] = Tensor(self._bytes(param.ty), Place("input", position))
        body = main.body
        for block in body.blocks:
            for binding in block.bindings:
                if binding.var not in self.values:  # a rounded copy is there already
                    self.values[binding.var] = self._value(binding.value, binding.var)
        if self.blockers:
            raise UnsupportedModel(list(dict.fromkeys(self.blockers)))
        self._outputs(self._value(body.body))
        self._place()
        return self.result

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
        if name in ("relax.reshape", BITCAST):
            return self._value(call.args[0])
        if name == "relax.call_tir":
            return self._call_tir(call, var)
        if name == dialect.NAME:
            return self._whole(call, "attention", lambda: _first_of(ATTENTION, call, self.target, self.policy))
        if name == recurrent_dialect.NAME:
            return self._whole(call, "recurrent", lambda: recurrent.kernel(call, self.target))
        if name in WHOLE:
            return self._whole(call, name.split(".")[-1], lambda: WHOLE[name](call))
        return self._refuse("", f"operator {name} has no CUDA kernel yet", call.ty)

    def _call_tir(self, call: Any, var: Any) -> Any:
        function = call.args[0].name_hint
        copy, dtype = self.rounded.get(var, (None, ""))
        outs = self._outs(call.ty_args[0])
        func, given = self.module[function], list(call.args[1].fields)
        pruned = frozenset(position for position in self.fixed[function] if self._two_of_four(given[position]))
        name = function + ("_two_of_four" if pruned else "") + (f"_and_{dtype}" if dtype else "")
        nodes = tuple(str(node) for node in (func.attrs or {}).get(NODES, ()))
        try:
            if len(call.args) > 2:
                raise Unsupported("sizes known only at run time")
            if name not in self.plans:
                self._add(name, plan_of(func, self.target, self.policy, self.fixed[function], dtype, pruned), nodes)
        except Unsupported as reason:
            self.blockers.append(Blocker(", ".join(nodes[:3]), "", f"no CUDA kernel for '{name}': {reason}"))
            return outs if isinstance(call.ty_args[0], relax.TupleType) else outs[0]
        packed = {packing.param: packing for packing in self.plans[name][0].packings}
        operands = [self._packed(arg, packed[param]) if param in packed else self._value(arg) for arg, param in zip(given, func.params, strict=False)]
        copies = [self._temporary(outs[0].size_bytes // 2)] if dtype else []
        self._launch(name, [*operands, *outs, *copies])
        if dtype:
            self.values[copy] = copies[0]
        return outs if isinstance(call.ty_args[0], relax.TupleType) else outs[0]

    def _two_of_four(self, arg: Any) -> bool:
        if not isinstance(arg, Constant):
            return False
        if arg not in self.two_of_four:
            self.two_of_four[arg] = sparse.two_of_four(arg.value.numpy())
        return self.two_of_four[arg]

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
        texts = [(kernel.text, kernel.grid) for kernel in made.kernels]
        same = (old for old, (other, _) in self.plans.items() if [(kernel.text, kernel.grid) for kernel in other.kernels] == texts)
        name = next(same, f"{hint}{sum(other.startswith(hint) for other in self.plans)}")
        if name not in self.plans:
            self._add(name, made, ())
        self._launch(name, [*(self._value(arg) for arg in call.args), *outs])
        return out

    def _add(self, name: str, made: Plan, nodes: tuple[str, ...]) -> None:
        several = len(made.kernels) > 1
        names = tuple(f"{name}_{position}" if several else name for position in range(len(made.kernels)))
        self.plans[name] = made, names
        for own, kernel in zip(names, made.kernels, strict=True):
            self.result.kernels[own], self.result.nodes[own] = kernel, nodes

    def _launch(self, name: str, tensors: Sequence[Tensor]) -> None:
        made, names = self.plans[name]
        buffers = {packing.param: packing.buffer for packing in made.packings}
        known = {buffers.get(param, param): tensor for param, tensor in zip(made.params, tensors, strict=True)}
        for own, kernel in zip(names, made.kernels, strict=True):
            for buffer in kernel.tensors:
                if buffer not in known:
                    known[buffer] = self._temporary(elements(buffer) * numpy_dtype(str(buffer.ty.dtype)).itemsize)
            self.result.launches.append(Launch(own, tuple(known[buffer] for buffer in kernel.tensors)))

    # -- tensors -----------------------------------------------------------------------------------------------------------------------------------

    def _outs(self, kind: Any) -> list[Tensor]:
        kinds = kind.fields if isinstance(kind, relax.TupleType) else [kind]
        return [self._temporary(self._bytes(each)) for each in kinds]

    def _temporary(self, size_bytes: int) -> Tensor:
        self.temporaries.append(Tensor(size_bytes, key=len(self.temporaries)))
        return self.temporaries[-1]

    def _bytes(self, kind: Any) -> int:
        count = numpy_dtype(str(kind.dtype)).itemsize
        for dim in kind.shape if kind.shape is not None else ("unknown",):
            if not isinstance(dim, (int, tirx.IntImm)):
                self.blockers.append(
                    Blocker("", "", f"an intermediate has size {dim}, which is known only at run time; the CUDA target takes fixed sizes")
                )
                return 0
            count *= int(dim)
        return count

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
            elif tensor.size_bytes:
                self.result.launches.append(Launch("", (Tensor(tensor.size_bytes, place), tensor)))

    def _place(self) -> None:
        uses: dict[int, list[int]] = {}
        for number, launch in enumerate(self.result.launches):
            for tensor in launch.tensors:
                if tensor.place is None:
                    uses.setdefault(tensor.key, []).append(number)
        lifetimes = {key: Lifetime(self.temporaries[key].size_bytes, min(numbers), max(numbers)) for key, numbers in uses.items()}
        self.result.workspace = plan(lifetimes, DEVICE_ALIGNMENT)
        for key, offset in self.result.workspace.offsets.items():
            self.temporaries[key].place = Place("workspace", offset)


def plan_of(
    func: Any, target: Target, policy: str, constants: frozenset[int] = frozenset(), rounded: str = "", pruned: frozenset[int] = frozenset()
) -> Plan:
    """The kernels of one fused function: a template where one takes it, the generic scheduler otherwise. Raises Unsupported when neither does.

    constants: positions of parameters that are known at compile time; pruned: of those that are weights of the 2:4 pattern. rounded: a type of two bytes in which the
    float32 result is written, too, as a last parameter.
    """
    try:
        fused = analyze(func)
    except Unfusable as problem:
        return generic.schedule(func, str(problem), rounded)
    reason, templates = "", TEMPLATES.get(fused.core["op"], DENSE)
    if len(fused.inputs) > 1 and fused.param_index(fused.inputs[1]) in pruned:
        templates = (sparse.gemm, *templates)
    for template in templates:
        try:
            return template(fused, target, policy, constants, rounded=rounded)
        except Unfusable as problem:
            reason = str(problem)
    return generic.schedule(func, reason, rounded)


def _first_of(templates: Sequence[Callable[..., Plan]], *args: Any) -> Plan:
    """The plan of the first template that has one; raises the last one's Unsupported."""
    for template in templates[:-1]:
        with contextlib.suppress(Unsupported):
            return template(*args)
    return templates[-1](*args)


def _rounded_copies(module: Any) -> dict[Any, tuple[Any, str]]:
    """Variable of a kernel's only result -> (variable that is the same rounded to two bytes, its type): one kernel writes both."""
    made, found = {}, {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if operator(call) != "relax.call_tir" or isinstance(call.ty_args[0], relax.TupleType):
                continue
            made[binding.var] = call
            source = call.args[1].fields[0] if len(call.args[1].fields) == 1 else None
            dtype = str(call.ty_args[0].dtype)
            if source in made and source not in found and dtype in SHORT and str(source.ty.dtype) == "float32" and _is_cast(module[call.args[0]]):
                found[source] = binding.var, dtype
    return found


def _is_cast(func: Any) -> bool:
    """The function is nothing but a cast."""
    try:
        (stage,) = read_stages(func)
    except (Unreadable, ValueError):
        return False
    value = stage.value
    return not stage.reduced and isinstance(value, tirx.Cast) and isinstance(value.value, TensorLoad) and reads_in_place(value.value, stage)
