"""The report of `python -m gcond_kernels info`: what is installed, which backend serves what."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import gcond_kernels
from gcond_kernels import ops


def describe() -> str:
    """Return versions, devices, the backend of each operation, and why others cannot serve."""
    lines = [
        f"gcond-kernels  {gcond_kernels.__version__}",
        f"python         {platform.python_version()} on {platform.platform()}",
        f"torch          {torch.__version__}",
        f"triton         {_version('triton')}",
        f"numpy          {_version('numpy')}",
        f"cpu            {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads{_vector_code()}",
        *(_gpu_lines() or ["gpu            none that torch can use"]),
        f"GCOND_BACKEND  {os.environ.get('GCOND_BACKEND') or 'not set'}",
    ]
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        lines += ["", f"on {kind} tensors", *_operation_lines(torch.device(kind))]
    return "\n".join(lines)


def _vector_code() -> str:
    """Return which of the CPU's kernels run here; nothing where they are not built."""
    if ops.unavailable("cpu", torch.device("cpu")):
        return ""
    from gcond_kernels import _cpu

    return f", kernels for {_cpu.kernels_in_use()}"


def _gpu_lines() -> list[str]:
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"gpu            {index}: {properties.name}, "
            f"{properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        )
    return lines


def _operation_lines(device: torch.device) -> list[str]:
    try:
        backend = ops.backend_for("auto", device)
    except RuntimeError as error:
        return [f"  {error}"]
    names = (*ops.OPERATIONS, "multi_tensor_dot")  # the norms and cosines of lists
    of_float64 = ops.backend_for("auto", device, torch.float64)
    lines = []
    for operation in names:
        name, other = backend.serves(operation), of_float64.serves(operation)
        also = "" if name == other else f" (float64: {other})"
        lines.append(f"  {operation:<16} {name}{also}")
    reasons = {name: ops.unavailable(name, device) for name in ops.BACKENDS}
    return lines + [f"  not {name}: {reason}" for name, reason in reasons.items() if reason]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
