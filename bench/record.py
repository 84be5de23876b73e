"""What a figure was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gcond_kernels

# Where Linux does not tell.
UNKNOWN_CACHE = 64 * 2**20


class InputError(Exception):
    """Something the user gave cannot be used; the message names it."""


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit, for the head of a record of figures."""
    about: dict[str, Any] = {"device": device_name(device), "cpu": cpu_name()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return about | {
        "cache_bytes": cache_bytes(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchjd": _version("torchjd"),
        "gcond_kernels": gcond_kernels.__version__,
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The processor that computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's own name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_bytes(device: torch.device) -> int:
    """Size of the last caches before the memory, of all processors together."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20}
    # Level → the processors that share a cache of it → its size.
    levels: dict[str, dict[str, int]] = {}
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, text = (
                (path / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
        except OSError:
            continue
        if text[-1:] in units and text[:-1].isdigit():
            levels.setdefault(level, {})[shared] = int(text[:-1]) * units[text[-1]]
    return sum(levels[max(levels)].values()) if levels else UNKNOWN_CACHE


def free_bytes(device: torch.device) -> int:
    """Memory that tensors may take now; on a CPU what Linux calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return kilobytes[0] * 1024 if kilobytes else 4 * 2**30


def commit() -> str | None:
    """The commit of the checkout that the package was imported from; None outside of one."""
    folder = str(Path(gcond_kernels.__file__).parent)
    sha = _answer("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changes = _answer("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return f"{sha} with changes" if sha and changes else sha


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _answer(*command: str) -> str | None:
    """The first line that a command prints; None where it fails, or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
