"""The backends: which can serve a device, and the operations of the chosen one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from gcond_kernels.ops.built import why_cpu_is_not_built
from gcond_kernels.ops.types import Arbitration, Gramians, TaskGradients

# In the order in which "auto" tries them, and in which one stands in for another.
BACKENDS = ("cuda", "triton", "cpu", "python")
MODULES = {
    "cpu": "gcond_kernels.cpu",
    "cuda": "gcond_kernels.cuda",
    "triton": "gcond_kernels.triton_kernels",
    "python": "gcond_kernels.python",
}
OPERATIONS = ("accumulate", "gramian", "arbitrate", "combine", "graddrop", "resolve")

# What reads or writes accumulators, or lists of tensors: where these are float64 the reference
# serves it, which alone computes in float64.
OF_FLOAT64 = ("accumulate", "gramian", "combine", "graddrop", "resolve", "multi_tensor_dot")

# Of so many tasks a GPU keeps every product in registers; of more, matrix products are faster.
MOST_TASKS = {"cuda": 8, "triton": 8}


class Backend:
    """A backend on a device; its operations are attributes that check nothing.

    An operation that it lacks is that of the next backend in `BACKENDS` which has it and can serve
    the device; one of `OF_FLOAT64`, where accumulators are float64, is that of the reference. A
    module is imported when its first operation is called.

    Attributes:
        name: one of `BACKENDS`.
        device: where the tensors lie.
        requested: by which name it was found, "auto" for example.
        takes_float64: whether the accumulators are float64.
    """

    accumulate: Callable[..., None]
    arbitrate: Callable[..., Arbitration]
    combine: Callable[..., None]
    graddrop: Callable[..., None]
    resolve: Callable[..., tuple[Gramians, Arbitration]]
    multi_tensor_dot: Callable[..., tuple[Tensor, Tensor]]

    def __init__(
        self, name: str, device: torch.device, requested: str, takes_float64: bool = False
    ) -> None:
        self.name, self.device, self.requested = name, device, requested
        self.takes_float64 = takes_float64

    def __getattr__(self, operation: str) -> Any:
        if operation.startswith("_"):  # asked for by copy and pickle
            raise AttributeError(operation)
        found = getattr(self.module(self.serves(operation)), operation)
        setattr(self, operation, found)
        return found

    def serves(self, operation: str) -> str:
        """Return the name of the backend that serves an operation."""
        if self.takes_float64 and operation in OF_FLOAT64:
            return "python"
        for name in BACKENDS[BACKENDS.index(self.name) :]:
            usable = name == self.name or unavailable(name, self.device) is None
            if usable and hasattr(self.module(name), operation):
                return name
        return self.name

    def gramian(
        self, gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
    ) -> Gramians:
        """Return its Gramians; of more than `MOST_TASKS` tasks those of the reference."""
        tasks = len(gradients.scale)
        many = tasks > MOST_TASKS.get(self.name, tasks)
        gramian = self.module("python").gramian if many else self._gramian
        return cast(Gramians, gramian(gradients, history_scale, momentum))

    @functools.cached_property
    def _gramian(self) -> Callable[..., Gramians]:
        found: Callable[..., Gramians] = self.module(self.serves("gramian")).gramian
        return found

    def resolves_at_once(self, gradients: TaskGradients) -> bool:
        """Return whether it has a `resolve` of its own that takes these gradients."""
        module = self.module("python" if self.takes_float64 else self.name)
        return hasattr(module, "resolve") and bool(module.resolves_at_once(gradients))

    def module(self, name: str) -> ModuleType:
        """Return the module of a backend."""
        return importlib.import_module(MODULES[name])


def backend_for(
    requested: str | Backend, device: torch.device, accumulators: torch.dtype = torch.float32
) -> Backend:
    """Return the backend that serves a device.

    Args:
        requested: "auto", one of `BACKENDS`, or what this function returned. "auto" reads the
            environment variable GCOND_BACKEND and, where that is unset or "auto" too, takes the
            first of `BACKENDS` that can serve a GPU; on a CPU "cpu" or else "python".
        device: of the tensors.
        accumulators: the type of the accumulators; float64 ones are served by the reference.

    Raises:
        RuntimeError: the requested backend cannot serve the device. Nothing is chosen instead.
    """
    takes_float64 = accumulators == torch.float64
    if isinstance(requested, Backend):
        if requested.device == device and requested.takes_float64 == takes_float64:
            return requested
        requested = requested.requested
    name, source = requested, f"backend={requested!r}"
    if name == "auto":
        name = os.environ.get("GCOND_BACKEND", "") or "auto"
        source = f"GCOND_BACKEND={name}"
    if name == "auto":
        candidates = BACKENDS if device.type == "cuda" else ("cpu", "python")
        name = next(backend for backend in candidates if unavailable(backend, device) is None)
    elif reason := unavailable(name, device):
        raise RuntimeError(f"{source} cannot be used on {device}: {reason}")
    return _backend(name, device, requested, takes_float64)


_backend = functools.lru_cache(maxsize=64)(Backend)


def unavailable(backend: str, device: torch.device) -> str | None:
    """Return why a backend cannot serve tensors on a device, or None where it can."""
    if backend == "python":
        return None
    if backend == "triton":
        return _triton_unavailable(device)
    if backend == "cuda":
        return _cuda_unavailable(device)
    if backend == "cpu":
        return _cpu_unavailable(device)
    return f"there is no such backend; choose from {', '.join(('auto', *BACKENDS))}"


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None  # 20 µs where there is none


def _triton_unavailable(device: torch.device) -> str | None:
    if not _is_installed("triton"):
        return "Triton is not installed: pip install triton (Linux only)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda":
        if interpreted:
            return "TRITON_INTERPRET=1 is set, and interpreted its kernels reach CPU tensors alone"
        return _too_old(device)
    if device.type != "cpu":
        return f"its kernels run on CUDA and ROCm devices, not on {device.type}"
    if not interpreted:
        return _NEEDS_GPU.format("TRITON_INTERPRET", "interpreted")
    import triton

    if isinstance(triton.language.zeros, triton.JITFunction):
        return "TRITON_INTERPRET=1 was set after Triton was imported, which then takes no notice"
    return None


_NEEDS_GPU = (
    "its kernels need a GPU; with {}=1 in the environment they run on the CPU, {}, which is for "
    "tests"
)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Return why Triton's kernels do not run on a GPU: before Ampere there is no bfloat16."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"


def _cuda_unavailable(device: torch.device) -> str | None:
    if not _is_installed("gcond_kernels._cuda"):
        return (
            "its CUDA C++ extension is not built: GCOND_BUILD_CUDA=1 pip install . compiles it "
            "(needs nvcc)"
        )
    if device.type == "cpu":
        if os.environ.get("GCOND_CUDA_HOST") == "1":
            return _cuda_problem(device)
        return _NEEDS_GPU.format("GCOND_CUDA_HOST", "compiled for it")
    if device in _cuda_works_on:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on NVIDIA GPUs, not on {'ROCm' if torch.version.hip else device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _cuda_problem(device)


def _cpu_unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"its code runs on CPU tensors, not on {device.type}"
    if not _is_installed("gcond_kernels._cpu"):
        return why_cpu_is_not_built()
    return _import_problem("cpu")


def _import_problem(backend: str) -> str | None:
    """Return why an extension, which is there, cannot be imported; None where it can."""
    try:
        importlib.import_module(MODULES[backend])
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"its extension is there, but cannot be imported: {error}"
    return None


# Where the compiled kernels are known to run. What failed, for want of memory say, is tried again.
_cuda_works_on: set[torch.device] = set()


def _cuda_problem(device: torch.device) -> str | None:
    """Return why the extension, which is there, fails: another system or torch, driver or GPU."""
    problem = _import_problem("cuda")
    if problem or device.type == "cpu":
        return problem
    from gcond_kernels import _cuda

    with torch.cuda.device(device):
        problem = _cuda.device_problem(device.index)
    if problem:
        return f"{problem} (built for {_cuda.ARCHITECTURES})"
    _cuda_works_on.add(device)
    return None
