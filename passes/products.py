"""What compressing passes see of a program: the products by constant weights, and for each of them the tensor that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import is_constant, relax, tirx

#: operators that only rename elements: codes pass through them unchanged, and they cost nothing
VIEWS = ("relax.reshape", "relax.flatten", "relax.expand_dims", "relax.squeeze")

#: what goes on element by element from a product
FOLLOWING = (
    "relax.add",
    "relax.subtract",
    "relax.multiply",
    "relax.divide",
    "relax.clip",
    "relax.maximum",
    "relax.minimum",
    "relax.astype",
    "relax.nn.relu",
)
PRODUCTS = ("relax.matmul", "relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d", "relax.nn.conv2d_transpose")


@dataclass(frozen=True, eq=False)
class Site:
    """One product by a constant weight.

    kind: "matmul" (x: [..., M, K], weight [K, N]) or "conv2d" (x: NCHW, weight OIHW, I the channels of a group). source: the variable whose codes are made once for all its readers; the operand is
    a view of it. bias: what is added per output channel right behind, `total` the variable of that sum; total is the product itself without a bias.
    """

    name: str
    kind: str
    var: Any
    call: Any
    x: Any
    source: Any
    weight: np.ndarray
    total: Any
    bias: np.ndarray | None = None

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.weight.shape[-1] if self.kind == "matmul" else self.weight.shape[0]

    @property
    def groups(self) -> int:
        return 1 if self.kind == "matmul" else int(self.call.attrs.groups)

    @property
    def depthwise(self) -> bool:
        """One input channel for every output channel."""
        return self.groups > 1 and self.weight.shape[1] == 1

    def product(self, rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """[R, N]: rows [R, groups * K] in the order of `patches` times a weight of the shape of this one's."""
        if self.kind == "matmul":
            return rows @ weight
        parts = zip(np.split(rows, self.groups, axis=1), np.split(weight, self.groups), strict=True)
        return np.concatenate([part @ filters.reshape(len(filters), -1).T for part, filters in parts], axis=1)

    def per_channel(self, values: np.ndarray) -> np.ndarray:
        """[N] values in the shape that broadcasts over the output."""
        return values if self.kind == "matmul" else values.reshape(1, -1, 1, 1)

    def multiplications(self, x_shape: Sequence[int]) -> int:
        """Multiply-adds for an operand of this shape."""
        if self.kind == "matmul":
            return int(np.prod(x_shape)) * self.weight.shape[1]
        attrs = self.call.attrs
        size = [
            (
                x_shape[2 + axis]
                + int(attrs.padding[axis])
                + int(attrs.padding[axis + 2])
                - int(attrs.dilation[axis]) * (self.weight.shape[2 + axis] - 1)
                - 1
            )
            // int(attrs.strides[axis])
            + 1
            for axis in (0, 1)
        ]
        return x_shape[0] * size[0] * size[1] * self.weight.size


@dataclass
class Graph:
    """The bindings of `main`, who reads what, and the sites. readers: variable -> the bindings that read it; "output" stands for the function's result."""

    program: Program
    bindings: dict[Any, Any] = field(default_factory=dict)
    readers: dict[Any, list[Any]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    def defining(self, expr: Any, *names: str) -> Any:
        """The call that defines a variable, if its operator is one of `names`."""
        value = self.bindings.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, relax.Call) and (not names or operator(value) in names):
            return value
        return None

    def root(self, expr: Any) -> Any:
        """The variable that `expr` is a view of."""
        while (view := self.defining(expr, *VIEWS)) is not None and isinstance(view.args[0], relax.Var):
            expr = view.args[0]
        return expr

    def single_reader(self, var: Any) -> Any:
        """The one variable that is computed from `var`; None when there are more, or the program returns it."""
        found = self.readers.get(var, [])
        return found[0] if len(found) == 1 and isinstance(found[0], relax.Var) else None

    def all_readers(self, var: Any) -> Iterator[Any]:
        """Readers of a variable and of its views, views themselves left out."""
        for reader in self.readers.get(var, ()):
            if self.defining(reader, *VIEWS) is not None:
                yield from self.all_readers(reader)
            else:
                yield reader


def operator(call: Any) -> str:
    return getattr(call.op, "name", "") if isinstance(call, relax.Call) else ""


def constant_value(expr: Any) -> np.ndarray | None:
    return expr.value.numpy() if is_constant(expr) else None


def of_products(graph: Graph, var: Any, known: dict[Any, bool]) -> bool:
    """Whether a value is made of sums of products, element by element. known: answers so far."""
    if not isinstance(var, relax.Var) or is_constant(var):
        return False
    if var not in known:
        known[var] = False
        call = graph.bindings.get(var)
        name = operator(call)
        known[var] = name in PRODUCTS or (name in FOLLOWING and any(of_products(graph, arg, known) for arg in call.args))
    return known[var]


def variables(expr: Any) -> Iterator[Any]:
    """The variables that a bound expression reads."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for arg in expr.args:
            yield from variables(arg)
    elif isinstance(expr, relax.Tuple):
        for item in expr.fields:
            yield from variables(item)
    elif isinstance(expr, relax.TupleGetItem):
        yield from variables(expr.tuple_value)
    elif isinstance(expr, relax.If):
        yield from variables(expr.cond)
        for branch in (expr.true_branch, expr.false_branch):
            relax_vars: list[Any] = []
            relax.analysis.post_order_visit(branch, lambda node: relax_vars.append(node) if isinstance(node, relax.Var) else None)  # noqa: B023
            yield from relax_vars


def graph_of(program: Program) -> Graph:
    """The bindings of a program and who reads what, without its sites, each of which has a copy of its weight."""
    graph = Graph(program)
    for block in program.main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            graph.bindings[binding.var] = value
            for var in variables(value):
                graph.readers.setdefault(var, []).append(binding.var)
    for var in variables(program.main.body.body):
        graph.readers.setdefault(var, []).append("output")
    return graph


def analyze(program: Program) -> Graph:
    """The graph of a program with its sites in the order of execution."""
    graph = graph_of(program)
    for var, value in graph.bindings.items():
        site = _site(graph, var, value, program)
        if site is not None:
            graph.sites.append(site)
    return graph


def _site(graph: Graph, var: Any, call: Any, program: Program) -> Site | None:
    kind = {"relax.matmul": "matmul", "relax.nn.conv2d": "conv2d"}.get(operator(call))
    if kind is None or not isinstance(call.args[0], relax.Var) or str(call.ty.dtype) != "float32":
        return None
    weight = constant_value(call.args[1])
    if weight is None or weight.dtype != np.float32 or not weight.size:
        return None
    if kind == "matmul" and (weight.ndim != 2 or call.args[0].ty.ndim < 2):
        return None
    if kind == "conv2d":
        attrs = call.attrs
        if (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or "NCHW") != ("NCHW", "OIHW", "NCHW"):
            return None
    total, bias = var, None
    reader = graph.single_reader(var)
    add = graph.defining(reader, "relax.add") if reader is not None else None
    if add is not None and (value := product_bias(add, var, kind, weight)) is not None:
        total, bias = reader, value
    return Site(program.node(var.name), kind, var, call, call.args[0], graph.root(call.args[0]), weight, total, bias)


def product_bias(add: Any, var: Any, kind: str, weight: np.ndarray) -> np.ndarray | None:
    """The [N] addend per output channel of `add`, None when it adds something else."""
    other = constant_value(add.args[1] if add.args[0].same_as(var) else add.args[0])
    channels = weight.shape[-1] if kind == "matmul" else weight.shape[0]
    if other is None or other.size not in (1, channels) or other.ndim > add.ty.ndim:
        return None
    place = -1 if kind == "matmul" else -3
    if other.size == channels and channels > 1 and (other.ndim < -place or other.shape[place] != channels):
        return None
    return np.broadcast_to(other.reshape(-1), (channels,)).astype(np.float32)


def patches(x: np.ndarray, site: Site, count: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of what a site multiplies: rows of x [..., M, K], or windows of the padded x [N, C, H, W] flattened as (C, kh, kw), at most `count` at random."""
    if site.kind == "matmul":
        rows = x.reshape(-1, x.shape[-1])
        return rows if len(rows) <= count else rows[generator.choice(len(rows), count, replace=False)]
    attrs = site.call.attrs
    top, left, bottom, right = (int(pad) for pad in attrs.padding)
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    kh, kw = site.weight.shape[2:]
    (sh, sw), (dh, dw) = ([int(value) for value in values] for values in (attrs.strides, attrs.dilation))
    height, width = ((padded.shape[2] - dh * (kh - 1) - 1) // sh + 1, (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1)
    total = len(x) * height * width
    picked = np.arange(total) if total <= count else generator.choice(total, count, replace=False)
    image, row, column = picked // (height * width), picked // width % height * sh, picked % width * sw
    rows = row[:, None, None] + np.arange(kh)[None, :, None] * dh
    columns = column[:, None, None] + np.arange(kw)[None, None, :] * dw
    return padded[image[:, None, None], :, rows, columns].transpose(0, 3, 1, 2).reshape(len(picked), -1)


def is_static(shape: Any) -> bool:
    return all(isinstance(dim, tirx.IntImm) for dim in shape)
