"""ExportedProgram -> Program: walk the FX graph node by node.

Shapes are never recomputed: torch.export has inferred the shape of every value, with the bounds of the dynamic dims applied (`min(seq, 512)` is `seq`
where seq <= 512), and every converter's result is held against it. Shape arithmetic in the graph therefore needs no converters at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from ...errors import Blocker, UnsupportedModel
from ...program import Program, Provenance, TensorSpec
from ...tvm import Constant, is_constant, relax, tirx, tvm
from ...tvm_torch import ExportedProgramImporter
from ..naming import NamingBuilder
from .decompose import decompose
from .derived import DerivedDims
from .ops import CONVERTERS
from .symbols import Symbols, UnsupportedSize, equal

#: nodes that only check what torch.export has already guaranteed
_CHECKS = {"_assert_tensor_metadata.default", "_assert_scalar.default", "sym_constrain_range_for_size.default", "sym_constrain_range.default"}
#: converters of TVM that compute something else than torch does (random numbers as constants, dropout and sparse tensors as identities)
_UNSOUND = {"randn.default", "randn_like.default", "exponential.default", "bernoulli.p", "to_sparse.default"}

#: libraries whose operators are known; "transformers" has the product of a mixture of experts
_NAMESPACES = ("aten", "torchvision", "transformers")
#: numbers taken out of tensors
_ITEMS = {"_local_scalar_dense.default", "item.default"}


def translate(exported: torch.export.ExportedProgram, source: str, dim_names: Mapping[str, str] | None = None) -> Program:
    """Translate an exported program; dim_names: name to use for each of torch's symbols. Raises UnsupportedModel with every blocker."""
    return _Translator(decompose(exported), source, dim_names or {}).program()


class _Translator(ExportedProgramImporter):
    """One translation. Its `convert_map` holds TVM's converters where they are right, overridden and completed by `ops`."""

    def __init__(self, exported: torch.export.ExportedProgram, source: str, dim_names: Mapping[str, str]):
        super().__init__()
        self.exported = exported
        self.source = source
        self.symbols = Symbols(exported, dim_names)
        self.derived = DerivedDims(self)
        self.block_builder = NamingBuilder()
        self.blockers: list[Blocker] = []
        self._constants: dict[tuple[Any, ...], relax.Expr] = {}
        for name in _UNSOUND:
            self.convert_map.pop(name, None)
        self.convert_map.update({name: self._bound(convert) for name, convert in CONVERTERS.items()})

    def _bound(self, convert: Callable[[Any, fx.Node], Any]) -> Callable[[fx.Node], Any]:
        return lambda node: convert(self, node)

    # ---- what converters use

    def emit(self, expr: relax.Expr) -> relax.Var:
        return self.block_builder.emit(expr)

    def value(self, argument: Any) -> Any:
        """An argument with its nodes replaced by what they were translated to."""
        return self._retrieve_args(argument)

    def out_shape(self, node: fx.Node) -> list[Any]:
        """Shape of the node's value: ints and TIR expressions."""
        return self.symbols.shape(node.meta["val"].shape)

    def out_dtype(self, node: fx.Node) -> str:
        return self._convert_data_type(node.meta["val"].dtype)

    def constant(self, tensor: torch.Tensor, name: str) -> relax.Expr:
        """The tensor as a Relax constant sharing its memory; the same constant for tensors that are the same memory."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) if tensor.numel() else (id(tensor),)
        if key not in self._constants:
            data = self._convert_pytorch_tensor_to_tvm(tensor.detach().resolve_neg().contiguous().cpu())
            span = tvm.ir.Span(tvm.ir.SourceName(name), 0, 0, 0, 0)
            self._constants[key] = Constant(data, relax.TensorType(tuple(tensor.shape), self._convert_data_type(tensor.dtype)), span)
        return self._constants[key]

    # ---- the walk

    def program(self) -> Program:
        inputs = self._bind_placeholders()
        with self.block_builder.function("main", list(inputs.values())):
            with self.block_builder.dataflow():
                self.blockers += self.derived.solve({node: value for node, value in self.env.items() if value in inputs.values()})
                for node in self.exported.graph.nodes:
                    if node.op == "call_function":
                        self._call(node)
                    elif node.op == "get_attr":
                        attribute = getattr(self.exported.graph_module, node.target)
                        self.env[node] = self.constant(attribute, node.target) if isinstance(attribute, torch.Tensor) else attribute
                names, values = self._outputs()
                results = [self.block_builder.emit_output(value, name) for name, value in zip(names, values, strict=True)]
            self.block_builder.emit_func_output(results[0] if len(results) == 1 else results)
        if self.blockers:
            raise UnsupportedModel(self.blockers)
        dims = {**self.symbols.dims(), **self.derived.ranges}
        module = self.block_builder.get()
        bounded = {"tir_var_upper_bound": {name: dim.max for name, dim in dims.items() if dim.max is not None}}
        if bounded["tir_var_upper_bound"]:
            module["main"] = module["main"].with_attrs({**bounded, "tir_var_lower_bound": {name: dim.min for name, dim in dims.items()}})
        return Program(
            module=module,
            inputs=tuple(_spec(name, variable.ty) for name, variable in inputs.items()),
            outputs=tuple(_spec(name, result.ty) for name, result in zip(names, results, strict=True)),
            provenance=Provenance(self.source, "torch", torch.__version__, "torch.export"),
            dims=dims,
            origins=self.block_builder.origins,
        )

    def _bind_placeholders(self) -> dict[str, relax.Var]:
        """Give every placeholder its variable (user inputs) or constant (weights); returns the variables by input name."""
        placeholders = {node.name: node for node in self.exported.graph.find_nodes(op="placeholder")}
        inputs: dict[str, relax.Var] = {}
        for spec in self.exported.graph_signature.input_specs:
            node = placeholders.get(spec.arg.name)
            if spec.kind is not InputKind.USER_INPUT:
                tensor = self._weight(spec)
                if isinstance(tensor, torch.Tensor) and node is not None:
                    self.env[node] = self.constant(tensor, str(spec.target))
                else:
                    self.blockers.append(Blocker(spec.arg.name, "", f"an input of kind {spec.kind.name} cannot be compiled"))
            elif isinstance(spec.arg, TensorArgument) and node is not None:
                self.env[node] = inputs[spec.arg.name] = relax.Var(spec.arg.name, self.derived.type_of(node))
            elif node is not None and not isinstance(node.meta.get("val"), torch.SymInt):
                self.env[node] = node.meta.get("val")  # None, or a number that export has made a constant
            elif node is not None:
                self.blockers.append(Blocker(node.name, "", "a number as input is not supported: pass it as a tensor, or fix its value"))
        return inputs

    def _weight(self, spec: Any) -> Any:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return self.exported.state_dict.get(spec.target, self.exported.constants.get(spec.target))
        return self.exported.constants.get(spec.target)

    @staticmethod
    def _is_size(node: fx.Node) -> bool:
        """True when the node's value is a size, a number or a condition on them: known from torch's own shape inference."""
        return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymBool, torch.SymFloat))

    def _call(self, node: fx.Node) -> None:
        """Translate one call; a blocker and a stand-in for its value when that fails, so that the walk finds the other blockers too."""
        namespace, name = getattr(node.target, "namespace", "aten"), node.target.__name__  # pyright: ignore[reportAttributeAccessIssue]
        self.block_builder.node = node.name
        try:
            if name in _ITEMS:
                self.env[node] = self._item(node)
            elif self._is_size(node):
                self.env[node] = self._size(node)
            elif name not in _CHECKS:
                value = node.meta.get("val")
                if isinstance(value, torch.Tensor) and value.dtype.is_complex:
                    raise NotImplementedError(f"{str(value.dtype).removeprefix('torch.')} is not computed")
                if name not in self.convert_map or namespace not in _NAMESPACES:
                    if isinstance(value, torch.Tensor):
                        self.out_shape(node)  # a size that depends on data is the better reason
                    raise NotImplementedError("no converter for this operator")
                empty = self._nothing(node)
                self.env[node] = self._conform(node, self.convert_map[name](node)) if empty is None else empty
        except Exception as error:  # TVM's converters raise whatever an argument that they do not know leads to
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = lines[0] if isinstance(error, (UnsupportedSize, RuntimeError, ValueError)) else f"{type(error).__name__}: {lines[0]}"
            open_numbers = [str(given.meta["val"]) for given in node.all_input_nodes if isinstance(given.meta.get("val"), torch.SymFloat)]
            reason = f"'{open_numbers[0]}' is known only at run time" if open_numbers else reason
            self.blockers.append(Blocker(node.name, f"{namespace}::{name}", reason))
            self.env[node] = self._stand_in(node)

    def _item(self, node: fx.Node) -> Any:
        """A number out of a tensor: a size, where torch knows that it is not negative (checked while the program runs), or else a tensor of no dims."""
        tensor, value = self.value(node.args[0]), node.meta.get("val")
        if not isinstance(value, torch.SymInt) or not self.symbols.may_be_size(value):
            return self.emit(relax.op.reshape(tensor, []))
        count, size = self.emit(relax.op.reshape(self.emit(relax.op.astype(tensor, "int64")), [1])), self.symbols.counted(value)
        self.block_builder.match_cast(self.emit(relax.op.tensor_to_shape(count)), relax.ShapeType([size]), node.name)
        return size

    def _nothing(self, node: fx.Node) -> Any:
        """Tensors without elements, which need no computation; None where any has elements."""
        values, made = pytree.tree_leaves(node.meta.get("val")), []
        for value in values:
            if not isinstance(value, torch.Tensor) or not any(isinstance(size, int) and size == 0 for size in value.shape):
                return None
            try:
                shape, dtype = self.symbols.shape(value.shape), self._convert_data_type(value.dtype)
            except UnsupportedSize:  # which the converter may find
                return None
            made.append(self.emit(relax.op.full(shape, relax.const(0, dtype), dtype)))
        if not made:
            return None
        return made[0] if isinstance(node.meta["val"], torch.Tensor) else made

    def _size(self, node: fx.Node) -> Any:
        """The node's number, size or condition, as torch inferred it; a condition on symbolic sizes may only be asserted.

        A fraction of sizes stays what it is until it meets a tensor.
        """
        value = node.meta["val"]
        if isinstance(value, torch.SymBool):
            if any(user.target.__name__ not in _CHECKS for user in node.users):  # pyright: ignore[reportAttributeAccessIssue]
                raise UnsupportedSize(f"'{value}' is known only at run time")
            return value
        return self.symbols.size(value) if isinstance(value, torch.SymInt) else value

    def _stand_in(self, node: fx.Node) -> Any:
        """A variable of the type that the node's value should have had."""

        def stand_in(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            try:
                return relax.Var(node.name, relax.TensorType(self.symbols.shape(value.shape), self._convert_data_type(value.dtype)))
            except (UnsupportedSize, NotImplementedError):
                return relax.Var(node.name, relax.TensorType(dtype="float32", ndim=value.ndim))

        return pytree.tree_map(stand_in, node.meta.get("val"))

    def _conform(self, node: fx.Node, value: Any) -> Any:
        """Hold the result against torch's: widen integers, state what Relax could not prove of the shape, refuse every contradiction."""
        expected = node.meta.get("val")
        if not isinstance(expected, torch.Tensor) or not isinstance(value, relax.Expr) or not isinstance(value.ty, relax.TensorType):
            return value
        dtype, ours = self.out_dtype(node), str(value.ty.dtype.dtype)
        if dtype == "bfloat16":
            raise NotImplementedError("bfloat16 is not computed: convert the model with .float()")
        if dtype != ours:
            if not (dtype.startswith("int") and ours.startswith("int")):  # another kind of number means that something else was computed
                raise NotImplementedError(f"converted to {ours}, torch has {dtype}")
            value = self.emit(relax.op.astype(value, dtype))
        shape = self.out_shape(node)
        if isinstance(value.ty.shape, relax.ShapeExpr) and len(value.ty.shape) == len(shape):
            pairs = list(zip(value.ty.shape, shape, strict=True))
            if all(equal(ours, theirs) for ours, theirs in pairs):
                return value
            if any(isinstance(ours, tirx.IntImm) and isinstance(theirs, int) for ours, theirs in pairs if not equal(ours, theirs)):
                raise ValueError(f"converted to shape {list(value.ty.shape)}, torch has {shape}: a fault of the importer")
        elif self.symbols.found:
            raise NotImplementedError("sizes that depend on the data, and that must be the same")
        elif value.ty.ndim not in (-1, len(shape)):
            raise ValueError(f"converted to {value.ty.ndim} dimensions, torch has {len(shape)}: a fault of the importer")
        return self.block_builder.match_cast(value, relax.TensorType(shape, dtype), node.name)

    def _outputs(self) -> tuple[list[str], list[relax.Expr]]:
        """Names and values of the user's outputs; a None among them is left out."""
        output = next(iter(self.exported.graph.find_nodes(op="output")))
        labels = iter(_output_names(self.exported))
        names: list[str] = []
        values: list[relax.Expr] = []
        for spec, argument in zip(self.exported.graph_signature.output_specs, output.args[0], strict=True):
            if spec.kind is not OutputKind.USER_OUTPUT:
                self.blockers.append(Blocker(spec.arg.name, "", f"the model changes its own state or inputs ({spec.kind.name} of '{spec.target}')"))
                continue
            label = next(labels)
            if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor):
                names.append(label)
                value = self.env[argument]
                # an output that is an input, a weight or another output still needs a value of its own
                values.append(
                    value if value.ty is not None and not is_constant(value) else self.emit(relax.op.reshape(value, self.out_shape(argument)))
                )
            elif argument is not None:
                self.blockers.append(Blocker(label, "", "an output that is not a tensor cannot be compiled"))
        if not values and not self.blockers:
            self.blockers.append(Blocker("", "", "the model has no tensor output"))
        return names, values


def _spec(name: str, ty: relax.TensorType) -> TensorSpec:
    shape = tuple(int(dim) if isinstance(dim, tirx.IntImm) else dim.name if tvm.ir.is_prim_var(dim) else str(dim) for dim in ty.shape)  # pyright: ignore[reportOptionalIterable]
    return TensorSpec(name, shape, str(ty.dtype.dtype))


def _output_names(exported: torch.export.ExportedProgram) -> list[str]:
    """One name per user output: its keys in dicts and dataclasses joined by "_", else "output" or "output_I"."""
    spec = exported.call_spec.out_spec
    if spec is None:
        return [f"output_{index}" for index in range(len(exported.graph_signature.user_outputs))]
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    return [_label(path) for path, _ in leaves]


def _label(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return "_".join(keys if keys and not keys[0].isdigit() else ["output", *keys])
