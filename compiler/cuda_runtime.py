"""Running an artifact for a CUDA device: the library by tvm-ffi, memory and streams by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .artifact import Artifact
from .binding import Binder
from .element_types import numpy_dtype
from .errors import TcompileError, ToolchainError, UsageError
from .program import TensorSpec
from .tvm_runtime import OpenSizes, load_library
from .weights import device_offsets

#: what launched kernels may assume of an address
_ALIGNMENT = 16
#: most combinations of open sizes whose plan is kept
_PLANS = 1024


class GpuModel:
    """The loaded library of an artifact and its weights on every device that it was used on."""

    def __init__(self, artifact: Artifact) -> None:
        """Raises ToolchainError without a library in the artifact, without torch, or without a CUDA device that can run it."""
        name = artifact.manifest["target"]["text"]
        if not artifact.library:
            raise ToolchainError(
                f"the artifact for {name} holds sources alone (--emit-only): compile without it, or build source/model.cu by the command in its first lines"
            )
        try:
            import torch
        except ImportError as error:
            raise ToolchainError(f"running an artifact for {name} needs torch for memory and streams: pip install tcompile[torch]") from error
        if not torch.cuda.is_available():
            raise ToolchainError(
                f"the artifact is for {name}, and torch {torch.__version__} finds no CUDA device here; run it on a machine that has one"
            )
        self._torch, self._artifact = torch, artifact
        library = load_library(artifact.library)
        self._main, self._binder = library["main"], Binder(artifact.inputs, artifact.dims)
        self._weights: dict[int, Any] = {}
        self._errors: dict[int, Any] = {}
        self._workspace_bytes = int(artifact.report["memory"]["workspace_bytes"])
        self._shapes: list[Any] = [spec.shape for spec in artifact.outputs]
        self._dtypes = [getattr(torch, spec.dtype) for spec in artifact.outputs]
        is_open = any(isinstance(dim, str) for spec in (*artifact.inputs, *artifact.outputs) for dim in spec.shape)
        self._sizes = OpenSizes(library, [len(spec.shape) for spec in artifact.outputs]) if is_open else None
        #: shapes of inputs -> what the library said of them
        self._planned: dict[tuple[tuple[int, ...], ...], tuple[int, list[tuple[int, ...]]]] = {}

    def __call__(self, values: Sequence[Any], inputs: Sequence[TensorSpec]) -> Any:
        """Run on torch's current stream and return without waiting. CUDA tensors give CUDA tensors; numpy arrays and CPU tensors are copied there and back, which waits."""
        torch = self._torch
        there = [value for value in values if isinstance(value, torch.Tensor) and value.is_cuda]
        device = there[0].device if there else torch.device("cuda", torch.cuda.current_device())
        self._prepare(device)
        bound: dict[str, int] = {}
        tensors = [self._tensor(value, spec, device, bound) for value, spec in zip(values, inputs, strict=True)]
        try:
            size, shapes = self._plan(tensors)
            outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, self._dtypes, strict=True)]
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            # the stream of these tensors' device that is torch's current one becomes tvm-ffi's: the exchange of tensors says it
            self._main(workspace, self._weights[device.index], self._errors[device.index], *tensors, *outputs)
        except RuntimeError as error:
            raise TcompileError(f"the model failed while running: {error}") from error
        if not there and values:
            self.check()
            outputs = [output.cpu() for output in outputs]
            if not isinstance(values[0], torch.Tensor):
                outputs = [self._array(output) for output in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _plan(self, tensors: Sequence[Any]) -> tuple[int, list[Any]]:
        """(bytes of workspace, shapes of the outputs) of a call; the library is asked once for every combination of shapes."""
        if self._sizes is None:
            return self._workspace_bytes, self._shapes
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self._planned:
            if len(self._planned) == _PLANS:
                self._planned.clear()
            self._planned[shapes] = self._sizes(tensors)
        return self._planned[shapes]

    def check(self) -> None:
        """Wait for the devices and raise TcompileError when an index was out of range or an integer divided by zero in any call since the last check.

        Such an index reads element 0, such a divisor counts as 1: a GPU cannot raise on its own.
        """
        for error in self._errors.values():
            site = int(error.item())
            if site:
                error.zero_()
                kernel = self._artifact.report["kernels"][site - 1]
                nodes = ", ".join(kernel["nodes"]) or kernel["kernel"]
                raise TcompileError(f"the model failed while running: an index out of range or an integer division by zero in {nodes}")

    def _prepare(self, device: Any) -> None:
        torch = self._torch
        if device.index in self._weights:
            return
        require_capability(self._artifact, torch.cuda.get_device_capability(device))
        offsets, size = device_offsets(self._artifact.weights)
        blob = np.zeros(size, np.uint8)
        for name, array in self._artifact.weights.items():
            blob[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._weights[device.index] = torch.from_numpy(blob).to(device)
        self._errors[device.index] = torch.zeros(1, dtype=torch.int32, device=device)

    def _array(self, tensor: Any) -> np.ndarray:
        if tensor.dtype == self._torch.bfloat16:
            return tensor.view(self._torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return tensor.numpy()

    def _tensor(self, value: Any, spec: TensorSpec, device: Any, bound: dict[str, int] | None = None) -> Any:
        """`value` on the device, checked against its spec (UsageError); copied only where it lies elsewhere, has gaps or is not aligned. bound: see `Binder.check_shape`."""
        torch = self._torch
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.array(value, copy=True)
            value = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype.name == "bfloat16" else torch.from_numpy(array)
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"input '{spec.name}': expected a torch tensor or numpy array of {spec}, got {type(value).__name__}")
        if str(value.dtype).removeprefix("torch.") != spec.dtype:
            raise UsageError(f"input '{spec.name}': expected dtype {spec.dtype}, got {value.dtype}; convert it first")
        if tuple(value.shape) != spec.shape:
            self._binder.check_shape(spec, tuple(value.shape), {} if bound is None else bound)
        if value.is_cuda and value.device != device:
            raise UsageError(f"input '{spec.name}': expected a tensor on {device} like the first, got one on {value.device}")
        value = value.detach().to(device).contiguous()
        return value.clone() if value.data_ptr() % _ALIGNMENT else value


def require_capability(artifact: Artifact, capability: tuple[int, int]) -> None:
    """Raise ToolchainError unless a device of this compute capability runs the artifact's code."""
    text = artifact.manifest["target"]["text"]
    number = text.rpartition("_")[2]
    major, minor = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
    same = capability == (major, minor) if number.endswith("a") else capability[0] == major and capability[1] >= minor
    if not same:
        raise ToolchainError(
            f"the artifact is for {text}, this device has compute capability {capability[0]}.{capability[1]}; compile with --target for it"
        )
