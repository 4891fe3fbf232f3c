"""Integer kernels at the edge of memory: nothing behind the activations is read; and element-wise code between floats and codes is vector code."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
import test_cpu_int8_conv
import test_cpu_int8_gemm
from machines import runnable
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.common.legalize import legalize
from tcompile.targets.cpu.gemm import Gemm
from tcompile.targets.cpu.generic import schedule
from tcompile.targets.cpu.lower import tvm_target
from tcompile.targets.cpu.math_lowering import TIR_PIPELINE
from test_cpu_conv import Case, schedules, template_for

op = relax.op


def before_a_hole(array: np.ndarray) -> np.ndarray:
    """A copy of `array` whose last byte is the last that may be read: the page behind it is closed."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    view = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    view[...] = array
    assert view.ctypes.data % 64 == 0, "TVM expects aligned tensors"
    return view


CASES = [
    Case((1, 8, 8, 3), 8, (3, 3), pad=(1, 1, 1, 1)),
    Case((1, 16, 8, 5), 8, (3, 3), stride=(2, 2)),
    Case((1, 8, 8, 3), 8, (1, 1)),
    Case((1, 8, 8, 20), 20, (3, 3), pad=(1, 1, 1, 1), groups=20),
]


@pytest.mark.parametrize("case", [None, *CASES], ids=str)
@pytest.mark.parametrize("target", runnable())
def test_nothing_behind_the_input_is_read(case, target):
    rng = np.random.default_rng(0)
    if case is None:
        x, w, out = rng.integers(0, 256, (64, 7)), rng.integers(-128, 128, (7, 20)), np.zeros((64, 20), np.int32)
        fused, template = test_cpu_int8_gemm.fused((), 64, 7, 20), Gemm()
        workload = template.workload(fused, frozenset([1]))
    else:
        x, w = rng.integers(0, 256, case.x), rng.integers(-128, 128, (*case.k, case.x[3] // case.groups, case.co))
        fused = test_cpu_int8_conv.fused_conv(case, requantize=False)
        template, workload = template_for(fused)
        out = np.zeros([int(dim) for dim in fused.output.shape], np.int32)
    kernel = template.build(fused, workload, schedules(template, workload, target, 1, 0)[0], target)
    packed = kernel.packings[0].pack(w.astype(np.int8))
    result = tvm.runtime.tensor(out)
    function = tvm.compile(kernel.func.with_attr("global_symbol", "f"), target=tvm_target(target), tir_pipeline=TIR_PIPELINE)["f"]
    function(tvm.runtime.from_dlpack(before_a_hole(x.astype(np.uint8))), tvm.runtime.tensor(packed), result)
    assert result.numpy().any()


def element_wise(kind: str, emit: Any, x: Any) -> Any:
    if kind == "quantize":
        return op.astype(emit(op.clip(emit(op.add(emit(op.round(emit(op.multiply(x, relax.const(20.0))))), relax.const(3.0))), 0, 255)), "uint8")
    if kind == "dequantize":
        return op.multiply(emit(op.subtract(emit(op.astype(x, "float32")), relax.const(3.0))), relax.const(0.1))
    return op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC", out_layout="NHWC")


@pytest.mark.parametrize(
    ("machine_name", "kind", "wanted", "unwanted"),
    [
        ("cascadelake", "quantize", ("vrndscaleps", "vcvttps2dq", "vpmovdb"), "vcvttss2si"),
        ("haswell", "quantize", ("vroundps", "vcvttps2dq", "vpackuswb"), "vcvttss2si"),
        ("cascadelake", "dequantize", ("vpmovzxbd", "vcvtdq2ps"), "vcvtsi2ss"),
        ("haswell", "dequantize", ("vpmovzxbd", "vcvtdq2ps"), "vcvtsi2ss"),
        ("cascadelake", "pool", ("vpmaxub",), "vpextrb"),
        ("haswell", "pool", ("vpmaxub",), "vpextrb"),
    ],
)
def test_between_floats_and_codes_all_is_vector_code(machine_name, kind, wanted, unwanted):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 14, 14, 64), "float32" if kind == "quantize" else "uint8"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(element_wise(kind, builder.emit, x))
        builder.emit_func_output(out)
    module, transform = legalize(builder.get()), relax.transform
    for step in (transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR(), transform.DeadCodeElimination()):
        module = step(module)
    (func,) = [func for _, func in module.functions_items() if isinstance(func, tirx.PrimFunc)]
    target = Target.parse(f"cpu:{machine_name}")
    scheduled = schedule(func, target).func.with_attr("global_symbol", "f")
    assembly = tvm.compile(scheduled, target=tvm_target(target), tir_pipeline=TIR_PIPELINE).mod.inspect_source("asm")
    body = assembly[assembly.index("compute_") :] if "compute_" in assembly else assembly
    assert all(instruction in assembly for instruction in wanted)
    assert unwanted not in body
