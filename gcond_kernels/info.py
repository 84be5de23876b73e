"""What is installed here, and which backend serves which operation."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import gcond_kernels
from gcond_kernels import ops


def describe() -> str:
    """Versions, devices, and for each operation the backend chosen and why the others are not."""
    lines = [
        f"gcond-kernels  {gcond_kernels.__version__}",
        f"python         {platform.python_version()} on {platform.platform()}",
        f"torch          {torch.__version__}",
        f"triton         {_version('triton')}",
        f"numpy          {_version('numpy')}",
        f"cpu            {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        *(_gpu_lines() or ["gpu            none that torch can use"]),
        f"GCOND_BACKEND  {os.environ.get('GCOND_BACKEND') or 'not set'}",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        lines += ["", f"on {device.type} tensors", *_operation_lines(device)]
    return "\n".join(lines)


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
    lines = [f"  {operation:<12} {backend.serves(operation)}" for operation in ops.OPERATIONS]
    for name in ops.BACKENDS:
        if reason := ops.unavailable(name, device):
            lines.append(f"  not {name}: {reason}")
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
