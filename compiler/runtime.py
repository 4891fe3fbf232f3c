"""CompiledModel: an artifact that can be called."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import threads as pool
from .artifact import Artifact, read, require_host
from .binding import Binder, is_torch, without_elements
from .element_types import decode
from .errors import TcompileError, UsageError
from .program import DimRange, TensorSpec
from .tvm_runtime import Executable, array, config_threadpool, from_dlpack, load_executable

if TYPE_CHECKING:
    from .cuda_runtime import GpuModel


class CompiledModel:
    """A compiled model. Call it with numpy arrays or torch tensors (on the CPU; for a CUDA target also on the GPU), by position or by input name.

    One output comes back as an array, several as a tuple in the model's order; torch tensors when the first input is one. Outputs own their memory.
    Any number of threads may call at once: each gets a virtual machine of its own, all share the weights.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        """Code is loaded at `start` or the first call, so that a model compiled for another machine can be saved. UsageError for a bad `threads`."""
        self._artifact = artifact
        self.threads = pool.checked(threads)
        self.inputs: tuple[TensorSpec, ...] = artifact.inputs
        self.outputs: tuple[TensorSpec, ...] = artifact.outputs
        self.dims: Mapping[str, DimRange] = artifact.dims
        self._kind = str(artifact.manifest["target"]["kind"])
        self._binder = Binder(self.inputs, self.dims)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._executable: Executable | None = None
        #: library and weights on GPUs, in place of an executable
        self._gpu: GpuModel | None = None
        #: C simulation of an FPGA project, in place of an executable
        self._simulation: Callable[[np.ndarray], np.ndarray] | None = None

    def start(self) -> CompiledModel:
        """Load the artifact's code now; returns the model. Raises ToolchainError when the code needs what this CPU lacks."""
        with self._lock:
            if self._kind == "cuda":
                if self._gpu is None:
                    from .cuda_runtime import GpuModel

                    self._gpu = GpuModel(self._artifact)
            elif self._kind == "fpga":
                if self._simulation is None:
                    from ..targets.registry import BACKENDS

                    self._simulation = BACKENDS["fpga"].simulator(self._artifact.sources, self._artifact.report)
            elif self._executable is None:
                require_host(self._artifact)
                tensors = [from_dlpack(weight) if weight.size else without_elements(weight) for weight in self._artifact.weights.values()]
                self._weights = array(tensors)
                #: where memory lies that outputs must not share
                self._weight_pointers = frozenset(tensor.data_ptr() for tensor in tensors)
                self._executable = load_executable(self._artifact.library)
        return self

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the model. Raises UsageError for an input that does not fit, TcompileError when the model itself fails (an index out of range)."""
        if named or len(args) != len(self.inputs):
            args = self._binder.order(args, named)
        if self._kind == "cuda":
            self.start()
            assert self._gpu is not None
            return self._gpu(args, self.inputs)
        tensors = self._binder.bind(args)
        if self._kind == "fpga":
            return self._simulated(tensors[0], bool(args) and is_torch(args[0]))
        main = self._main()
        pool.use(self.threads, config_threadpool)
        try:
            result = main(*tensors, self._weights)
        except Exception as error:
            reason = "out of memory" if "bad_alloc" in str(error) else _last_line(error)
            raise TcompileError(f"the model failed while running: {reason}") from error
        taken = {tensor.data_ptr() for tensor in tensors}
        to_torch = bool(args) and is_torch(args[0])
        if len(self.outputs) == 1:
            return self._own(result[0] if isinstance(result, array) else result, taken, to_torch, self.outputs[0])
        return tuple(self._own(output, taken, to_torch, spec) for output, spec in zip(result, self.outputs, strict=True))

    def check(self) -> None:
        """On a GPU: wait for it, and raise TcompileError when a call since the last check met an index out of range. CPUs raise in the call itself."""
        if self._gpu is not None:
            self._gpu.check()

    def _simulated(self, tensor: Any, to_torch: bool) -> Any:
        """One call of an FPGA project: its C simulation, one call at a time."""
        simulation = self.start()._simulation
        assert simulation is not None
        with self._lock:
            result = simulation(np.from_dlpack(tensor))
        if to_torch:
            import torch

            return torch.from_numpy(result)
        return result

    def _main(self) -> Any:
        """This thread's entry point."""
        try:
            return self._local.main
        except AttributeError:
            executable = self.start()._executable
            assert executable is not None
            self._local.main = executable.main()
            return self._local.main

    def _own(self, output: Any, taken: set[int], to_torch: bool, spec: TensorSpec) -> Any:
        """`output` for the caller; a copy where the model passed an input or weight through, or returns one tensor twice."""
        pointer = output.data_ptr()
        shared = pointer in taken or pointer in self._weight_pointers
        taken.add(pointer)
        if to_torch:
            import torch

            result = torch.from_dlpack(output)
            if spec.carrier is not None:
                result = _torch_of(result, spec)
            return result.clone() if shared else result
        value = np.from_dlpack(output)
        if spec.carrier is not None:
            value = decode(value, spec.dtype)
        return value.copy() if shared else value

    def save(self, path: str | Path) -> Path:
        """Write the artifact to the directory `path` (NAME.tcm), complete or not at all. Raises UsageError where that is impossible."""
        from .artifact_writer import write

        return write(self._artifact, path)

    def report(self) -> dict[str, Any]:
        """What the compiler did: passes with matches, kernels, memory plan; seconds only on the model that `compile` returned."""
        return dict(self._artifact.report)

    def source(self) -> str:
        """The emitted code as text, one file after the other."""
        return "\n".join(f"// ==== {name} ====\n{text}" for name, text in self._artifact.sources.items())

    @property
    def artifact(self) -> Artifact:
        """Everything that `save` writes."""
        return self._artifact

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The artifact's manifest: specs, target, recipe, versions."""
        return self._artifact.manifest

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(str(spec) for spec in specs) for specs in (self.inputs, self.outputs))
        return f"CompiledModel({inputs} -> {outputs}; {self.manifest['target']['text']})"


def _torch_of(carrier: Any, spec: TensorSpec) -> Any:
    """A torch tensor of the type that `carrier` holds. UsageError where torch has no such type."""
    import torch

    dtype = getattr(torch, spec.dtype, None)
    if dtype is None or "float" not in spec.dtype or spec.dtype == "float4_e2m1fn":
        raise UsageError(f"output '{spec.name}': torch has no tensors of type {spec.dtype}; give the inputs as numpy arrays")
    return carrier.view(dtype)


#: what the VM says of a dim that is not what the program needs; the node is written there by `targets.cpu.shape_checks`
_WRONG_DIM = re.compile(r"Check failed: .* \((-?\d+) vs\. (-?\d+)\) :\s*(node '.*'): match_cast error,\s+shape\[(\d+)\]")


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    wrong = _WRONG_DIM.search(lines[-1]) if lines else None
    if wrong:
        found, wanted, node, axis = wrong.groups()
        return f"{node}: dim {axis} is {found}, {wanted} is needed"
    return lines[-1] if lines else type(error).__name__


def load(path: str | Path, *, threads: int | None = None, check: str = "full") -> CompiledModel:
    """Load the artifact at `path`; `check` as in `artifact.read`. Raises UsageError, VerificationError (damaged) or ToolchainError (another ISA)."""
    return CompiledModel(read(path, check=check), threads=threads).start()
