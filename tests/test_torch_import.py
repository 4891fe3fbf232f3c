"""The PyTorch importer against eager torch: operators, small networks, dynamic dims, names, blockers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tcompile

torch = pytest.importorskip("torch")

from kernels import UNOPTIMIZED
from tcompile.compiler.errors import UnsupportedModel, UsageError
from tcompile.compiler.importers.torch import import_torch
from tcompile.compiler.program import DimRange, Program
from tcompile.compiler.tvm import Constant, relax, tvm

F = torch.nn.functional


def executor(program: Program) -> Callable[..., list[np.ndarray]]:
    """Build with TVM's default pipeline: slow and plain, so that only the importer is tested."""
    module = relax.transform.DecomposeOpsForInference()(program.module)
    machine = relax.VirtualMachine(tvm.compile(module, target=UNOPTIMIZED), tvm.cpu())

    def run(*inputs: Any) -> list[np.ndarray]:
        result = machine["main"](*[tvm.runtime.tensor(np.asarray(value)) for value in inputs])
        return [result.numpy()] if hasattr(result, "numpy") else [value.numpy() for value in result]

    return run


def flat(values: Any) -> list[np.ndarray]:
    return [values.numpy()] if isinstance(values, torch.Tensor) else [value.numpy() for value in values if value is not None]


def agree(ours: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    assert len(ours) == len(expected)
    for left, right in zip(ours, expected, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        scale = max(1.0, float(np.abs(right[np.isfinite(right)]).max(initial=0))) if right.dtype.kind == "f" else 1.0
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * scale)


class Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def check(function: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    module = function if isinstance(function, torch.nn.Module) else Function(function)
    program = import_torch(module.eval(), example_inputs=inputs)
    with torch.no_grad():
        agree(executor(program)(*inputs), flat(module(*inputs)))
    return program


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*shape: int, high: int = 5) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


OPERATORS = {
    "slices": (lambda x: (x[1:], x[:, -3:-1], x[:, ::2], x[:, 1:100:3], x[-1], x[:, 0]), [rand(5, 7)]),
    "shapes": (lambda x: (x.reshape(-1), x.view(5, 7, 1), x.unsqueeze(1).squeeze(), x.T.reshape(5, 7), x.flatten()), [rand(5, 7)]),
    "pieces": (lambda x: (*x.chunk(3, dim=1), *x.split([2, 3], dim=0), *x.unbind(0)), [rand(5, 7)]),
    "broadcasts": (lambda x: (x.expand(3, 5, 7), x.expand(5, -1), x.repeat(2, 1), torch.cat([x, x], -1)), [rand(5, 7)]),
    "creation": (lambda x: (torch.arange(7) + x, torch.arange(1.5, 4, 0.4), torch.full((2, 3), 7), torch.zeros_like(x), x.new_ones(2)), [rand(5, 7)]),
    "arithmetic": (
        lambda x, i: (x + 2, 2 - x, x * i, i / 2, i // 2, i - 1, torch.add(x, x, alpha=3), i % 3, x.float() / i.add(1)),
        [rand(5, 7), ints(5, 7)],
    ),
    "powers": (lambda x: (x**2, x**3, x**4, x.abs() ** 0.5, (x.abs() + 1) ** -0.5, (x.abs() + 1) ** 1.7, x.abs().sqrt()), [rand(5, 7)]),
    "comparisons": (lambda x, i: (x > 0, i == 2, i < 1.5, (x > 0) & (i > 1), (x > 0) | (i > 1), ~(x > 0)), [rand(5, 7), ints(5, 7)]),
    "selection": (lambda x: (torch.where(x > 0, x, 0.5), x.masked_fill(x > 0, float("-inf")), x.clamp(-0.5, 0.5), x.maximum(x * 2)), [rand(5, 7)]),
    "clamps": (
        lambda x, i: (i.clamp(min=2), i.clamp(max=2), i.clamp(1, 3), i.clamp(0.5, 2.5), x.clamp(min=0), x.clamp(max=0.25), x.clamp(x[0], i)),
        [rand(5, 7), ints(5, 7)],
    ),
    "sums": (lambda x: (x.sum(), x.mean(-1), (x > 0).sum(0), x.amax(1), x.prod(1), x.var(1), x.mean((0, 1), keepdim=True)), [rand(5, 7)]),
    "scans": (lambda x, i: (x.cumsum(1), i.cumsum(0), (x > 0).cumsum(1)), [rand(5, 7), ints(5, 7)]),
    "functions of integers": (lambda i: (i.float().exp(), i.sqrt(), i.sin(), i.sigmoid(), i.tanh()), [ints(5, 7)]),
    "products": (lambda a, b: (a @ b, a[0] @ b[0], torch.addmm(a[0, :, :1], a[0], b[0], beta=0.5, alpha=2)), [rand(2, 5, 7), rand(2, 7, 3)]),
    "float64 products": (lambda a, b: a.double() @ b.double(), [rand(5, 7), rand(7, 3)]),
    "integer products": (lambda a, b: a @ b, [ints(5, 7), ints(7, 3)]),
    "joint indices": (
        lambda x, i, j: (x[i, j], x[:, i, j], x[:, i[:, None], j], x[:, j, i[:, None]], x[i, :, j], x[..., i, j], x[:, i, j, i]),
        [rand(5, 6, 7, 8), ints(4), ints(4, high=3)],
    ),
    "repeats": (lambda x: (x.repeat(1, 1), x.repeat(2, 3), x.repeat(2, 1, 3), x[:1].repeat(4, 1), x.repeat(0, 1), x[0, 0].repeat(3)), [rand(5, 7)]),
    "histograms": (lambda x, i: (torch.histc(x, 5, -1, 2), torch.histc(i.float(), 5, 0, 4)), [rand(5, 7), ints(9)]),
    "gathers": (lambda x, i: (x[i], x[:, i], x[i, i], x.index_select(1, i), x.gather(1, i[None].expand(5, -1))), [rand(5, 7), ints(4)]),
    "activations": (
        lambda x: (
            F.gelu(x),
            F.gelu(x, approximate="tanh"),
            F.silu(x),
            F.hardswish(x),
            F.hardsigmoid(x),
            F.relu6(x),
            F.elu(x),
            F.softplus(x),
            F.mish(x),
        ),
        [rand(5, 7)],
    ),
    "softmax": (lambda x: (x.softmax(-1), x.log_softmax(0), torch.logsumexp(x, 1)), [rand(5, 7)]),
    "norms": (lambda x: (F.layer_norm(x, (7,)), F.group_norm(x[:, :4], 2), F.rms_norm(x, (7,)), F.normalize(x, dim=1)), [rand(3, 5, 7)]),
    "pads": (lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, 2, 3, 0), value=2.0), x.roll((1, -2), (0, 1)), x.flip(1)), [rand(5, 7)]),
    "pools": (
        lambda x: (F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), F.adaptive_avg_pool2d(x, 1)),
        [rand(2, 3, 9, 11)],
    ),
    "top": (lambda x: (*x.topk(3), x.argmax(1), *x.sort(1)), [rand(5, 7)]),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bki", a, b), [rand(2, 5, 7), rand(2, 7, 3)]),
    "resize": (
        lambda x: (F.interpolate(x, scale_factor=2.0), F.interpolate(x, size=(7, 13), mode="bilinear", align_corners=False)),
        [rand(1, 2, 5, 6)],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    function, inputs = OPERATORS[name]
    check(function, *inputs)


MODULES = {
    "linear": (torch.nn.Linear(7, 3), [rand(2, 5, 7)]),
    "convolutions": (
        torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, 2, 1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 5, padding=2, groups=6)),
        [rand(2, 4, 9, 11)],
    ),
    "convolution 1d": (torch.nn.Conv1d(4, 6, 3, padding=1, dilation=1), [rand(2, 4, 13)]),
    "transposed convolution": (torch.nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), [rand(2, 4, 5, 7)]),
    "embedding": (torch.nn.Embedding(11, 5), [ints(2, 3)]),
    "attention": (torch.nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0), [rand(2, 5, 12)]),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    torch.manual_seed(0)
    module, inputs = MODULES[name]
    check(module, *inputs)


def _mask(kind: str, queries: int, keys: int) -> torch.Tensor | None:
    if kind == "bool":
        mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril()
        mask[0, :, 2] = False  # a row that sees nothing
        return mask
    return rand(2, 1, queries, keys) if kind == "float" else None


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize(("heads", "keys"), [(4, 5), (2, 5), (4, 7)])
def test_attention(kind, heads, keys):
    mask = _mask(kind, 5, keys)

    def attend(query, key, value):
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=kind == "causal", enable_gqa=heads == 2, scale=0.3 if keys == 7 else None
        )

    check(attend, rand(2, 4, 5, 8), rand(2, heads, keys, 8), rand(2, heads, keys, 8))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_whose_heads_are_rows_of_the_batch(masked):
    """nn.MultiheadAttention folds them: [batch * heads, S, D]."""

    class Net(torch.nn.Module):
        def forward(self, x, mask):
            return F.scaled_dot_product_attention(x, x, x, mask if masked else None)

    batch = torch.export.Dim("batch", min=1, max=8)
    program = import_torch(Net().eval(), example_inputs=[rand(4, 5, 8), rand(4, 5, 5)], dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    x, mask = rand(3, 5, 8), rand(3, 5, 5)
    agree(executor(program)(x, mask), flat(Net()(x, mask)))


TEXT = {"layers": 2, "hidden": 24, "heads": 4, "vocabulary": 99}
NETWORKS = {
    "bert-base": TEXT,
    "gpt2": TEXT,
    "t5-encoder": TEXT,
    "llama": TEXT,
    "vit-s16": {"depth": 1, "embed_dim": 24, "num_heads": 3},
    "swin-t": {"depths": (1, 2, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2)},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
    "mobilenetv3-l": {"num_classes": 10},
    "efficientformer-l1": {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 16, 32)},
}


def _network(name: str, **options: Any):
    if not __import__("importlib.util").util.find_spec("timm" if "attention" not in options else "transformers"):
        pytest.skip("timm and transformers are needed")
    from tcompile.models import text
    from tcompile.models.zoo import ZOO

    entry = ZOO["gpt2" if name == "llama" else name]
    return entry, (text.llama(**options).eval() if name == "llama" else entry.torch_module(**options))


CASES = [(name, "sdpa") for name in NETWORKS] + [(name, "eager") for name, options in NETWORKS.items() if options is TEXT]


#: those of the ordinary suite
FEW = [("bert-base", "sdpa"), ("resnet50", "sdpa")]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "attention"), [case if case in FEW else pytest.param(*case, marks=pytest.mark.networks) for case in CASES])
def test_networks_with_dynamic_dims(name, attention):
    """Reduced depth and width; traced at one size, run at others."""
    from tcompile.models.export import torch_dynamic_shapes

    is_text = NETWORKS[name] is TEXT
    entry, module = _network(name, **NETWORKS[name], **({"attention": attention} if is_text else {}))

    def inputs(**dims: int) -> dict[str, np.ndarray]:
        values = entry.example_inputs(**dims)
        return {key: value % 99 if key == "input_ids" else value for key, value in values.items()}

    program = import_torch(module, example_inputs=inputs(batch=2, **({"seq": 9} if is_text else {})), dynamic_shapes=torch_dynamic_shapes(entry))
    assert set(program.dims) == set(entry.dims)
    assert program.dims["batch"] == DimRange(1, 2, 64)
    assert [spec.name for spec in program.inputs] == list(inputs())
    run = executor(program)
    for dims in [{"batch": 1, "seq": 13}, {"batch": 3, "seq": 1}] if is_text else [{"batch": 1}, {"batch": 3}]:
        values = inputs(**dims)
        with torch.no_grad():
            agree(run(*values.values()), flat(module(*map(torch.from_numpy, values.values()))))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return {"logits": self.head(self.embedding(ids)), "rest": {"ids": ids + 1}}


def test_tied_weights_are_one_named_constant_and_outputs_keep_their_keys():
    program = check_dict(Tied().eval(), ids=ints(2, 3))
    constants: list[Any] = []
    relax.analysis.post_order_visit(program.main, lambda expr: constants.append(expr) if isinstance(expr, Constant) else None)
    weights = [constant for constant in constants if constant.ty.ndim == 2]
    assert {tuple(map(int, constant.ty.shape)) for constant in weights} == {(11, 6)}
    assert all(weight.same_as(weights[0]) for weight in weights)
    assert weights[0].span.source_name.name in ("embedding.weight", "head.weight")
    assert [str(spec) for spec in program.outputs] == ["logits: float32[2, 3, 11]", "rest_ids: int64[2, 3]"]
    assert program.provenance.format == "torch" and program.provenance.source == "Tied"


def check_dict(module: torch.nn.Module, **inputs: torch.Tensor) -> Program:
    program = import_torch(module, example_inputs=inputs)
    with torch.no_grad():
        result = module(**inputs)
    agree(executor(program)(*inputs.values()), [result["logits"].numpy(), result["rest"]["ids"].numpy()])
    return program


def test_bindings_are_named_after_their_nodes():
    text = import_torch(Function(lambda x: torch.relu(x) + 1).eval(), example_inputs=[rand(2, 3)]).module.script()
    assert "relu" in text and "add" in text and "lv" not in text


@pytest.mark.parametrize(
    ("shape", "spec", "dims"),
    [
        ("1..4..16x7", "float32[x_0, 7]", {"x_0": DimRange(1, 4, 16)}),
        (("batch", 7), "float32[batch, 7]", {"batch": DimRange(1, 4, None)}),
        ((3, 7), "float32[3, 7]", {}),
        ((DimRange(2, 6, 8), 7), "float32[x_0, 7]", {"x_0": DimRange(2, 6, 8)}),
    ],
)
def test_shapes(shape, spec, dims):
    class Net(torch.nn.Module):
        def forward(self, x):
            return x.relu()

    program = import_torch(Net().eval(), shapes={"x": shape})
    assert str(program.inputs[0]) == f"x: {spec}"
    assert dict(program.dims) == dims


def test_bound_of_a_dim_simplifies():
    """positions[:, :seq] with seq <= 512 has exactly seq columns."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("positions", torch.arange(512.0)[None])

        def forward(self, x):
            return x + self.positions[:, : x.shape[1]]

    dims = {"x": {1: torch.export.Dim("seq", min=1, max=512)}}
    program = import_torch(Net().eval(), example_inputs=[rand(2, 9)], dynamic_shapes=dims)
    assert "T.min" not in program.module.script()
    agree(executor(program)(rand(2, 512)), flat(Net()(rand(2, 512))))


def test_bounds_of_a_dim_decide_maxima():
    """table[-seq:] with seq <= 64 begins at 64 - seq."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(64.0)[None])

        def forward(self, x):
            return x + self.table[:, max(0, 64 - x.shape[1]) :] + self.table[:, -x.shape[1] :]

    dims = {"x": {1: torch.export.Dim("seq", min=1, max=64)}}
    program = import_torch(Net().eval(), example_inputs=[rand(2, 9)], dynamic_shapes=dims)
    assert "T.max" not in program.module.script()
    run = executor(program)
    for length in (1, 37, 64):
        agree(run(rand(2, length)), flat(Net()(rand(2, length))))


def _assigned(x, z):
    front, middle, back, steps, row = (x.clone() for _ in range(5))
    front[:, :3], middle[:, 2:5], back[:, -3:], steps[:, 1:6:2], row[1] = z, z, z, z, z[0, 0]
    return front, middle, back, steps, row, torch.slice_scatter(x, z[:, :0], 1, 9)


def test_assignments_to_slices():
    """Through the whole compiler, too."""
    inputs = rand(5, 7), rand(5, 3)
    check(_assigned, *inputs)
    model = tcompile.compile(Function(_assigned).eval(), example_inputs=inputs)
    agree([np.asarray(value) for value in model(*inputs)], flat(_assigned(*inputs)))


def test_numbers_from_tensors_are_operands():
    check(lambda x, i: (x * i.item(), x.clamp(max=i.item())), rand(5, 7), torch.tensor(2))
    with pytest.raises(UnsupportedModel, match="may be negative"):
        check(lambda x, i: x[: i.item()] * 2, rand(5, 7), torch.tensor(2))


def test_bfloat16_is_refused():
    with pytest.raises(UnsupportedModel, match="bfloat16"):
        check(lambda x: x.bfloat16() * 2, rand(5, 7))


def test_groups_of_rows():
    pytest.importorskip("transformers.integrations.moe")

    def grouped(x, weight, ends):
        return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)

    # TVM's own pipeline does not know the operator that it becomes
    inputs = rand(11, 3), rand(4, 3, 5), torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    compiled = tcompile.compile(Function(grouped).eval(), example_inputs=inputs)
    agree([compiled(*(value.numpy() for value in inputs))], flat(grouped(*inputs)))


def test_exported_program():
    exported = torch.export.export(torch.nn.Linear(7, 3).eval(), (rand(2, 7),))
    assert [str(spec) for spec in import_torch(exported).outputs] == ["output: float32[2, 3]"]


def test_all_blockers_at_once():
    with pytest.raises(UnsupportedModel) as caught:
        import_torch(Function(lambda x: torch.unique(x.relu()).sum() + torch.linalg.det(x) + torch.randn_like(x)).eval(), example_inputs=[rand(3, 3)])
    operators = {blocker.op for blocker in caught.value.blockers}
    assert {"aten::_unique2.default", "aten::randn_like.default"} <= operators and len(operators) >= 3
    assert all(blocker.node for blocker in caught.value.blockers)


def test_state_changes_are_refused():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x + self.count

    with pytest.raises(UnsupportedModel, match="changes its own state"):
        import_torch(Counter().eval(), example_inputs=[rand(2)])


def test_misuse_is_explained():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="eval"):
        import_torch(module.train(), example_inputs=[rand(1, 2)])
    with pytest.raises(UsageError, match="example_inputs or shapes"):
        import_torch(module.eval())
    with pytest.raises(UsageError, match="'y'"):
        import_torch(module, shapes={"y": (1, 2)})
    with pytest.raises(UsageError, match="min..opt..max"):
        import_torch(module, shapes={"input": "1..z x2"})
    with pytest.raises(UnsupportedModel, match="torch.export failed"):
        import_torch(Function(lambda x: x.relu() if x.sum() > 0 else x).eval(), example_inputs=[rand(2)])


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_positions_below_zero_raise_as_in_torch(dtype):
    """Other than in x[i]."""

    class Look(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 5)

        def forward(self, x, a, b, c, d):
            wide = c.to(torch.int64), d.to(torch.int64)
            return self.embedding(a), x.index_select(0, b), x.gather(0, wide[0][:, None]), x.scatter(0, wide[1][:, None], 0.5), x[a]

    module, x, good = Look().eval(), rand(11, 5), torch.tensor([0, 10, 3], dtype=dtype)
    compiled = tcompile.compile(module, example_inputs=(x, *(good.clone() for _ in range(4))))  # torch takes one tensor given twice for one input
    with torch.no_grad():
        agree([np.asarray(value) for value in compiled(x, good, good, good, good)], flat(module(x, good, good, good, good)))
    for place in range(4):
        for bad in (-1, -11, 11):
            ids = [good] * 4
            ids[place] = torch.tensor([0, bad, 3], dtype=dtype)
            with pytest.raises((IndexError, RuntimeError)):
                module(x, *ids)
            with pytest.raises(tcompile.TcompileError, match="an index lies outside"):
                compiled(x, *ids)
    negative = torch.tensor([0, -1, 3], dtype=dtype)
    plain = tcompile.compile(Function(lambda x, i: x[i]).eval(), example_inputs=(x, good))
    np.testing.assert_array_equal(np.asarray(plain(x, negative)), x[negative].numpy())
