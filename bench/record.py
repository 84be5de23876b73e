"""The record of a benchmark: one JSON object with its command, its machine and its figures.

A figure is a flat object: what was measured, by whom and of how many tasks, and the quantities. A
quantity that was timed is an object of a median with quartiles.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gcond_kernels

Figure = dict[str, Any]

# Where Linux does not report it.
UNKNOWN_CACHE = 64 * 2**20
UNKNOWN_FREE = 4 * 2**30


class InputError(Exception):
    """Something the user gave cannot be used; the message names it."""


def write(record: dict[str, Any], path: Path) -> None:
    """Replace a record by way of a file beside it: an interrupted process leaves a valid one."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return a record; raise InputError where the file is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from error
    figures = record.get("figures") if isinstance(record, dict) else None
    if not isinstance(figures, list) or not all(isinstance(figure, dict) for figure in figures):
        raise InputError(f'{path}: has no list "figures": the bench writes one with --output')
    if not isinstance(record.setdefault("machine", {}), dict):
        raise InputError(f'{path}: "machine" must be an object, by name what it was measured on')
    return record


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def describe(device: torch.device) -> dict[str, Any]:
    """Return the machine, versions and commit for the head of a record."""
    about: dict[str, Any] = {"device": cpu_name(), "cpu": cpu_name()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return about | {
        "cache_bytes": cache_bytes(device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchjd": _version("torchjd"),
        "gcond_kernels": gcond_kernels.__version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    """Return the CPU's own name where Linux reports it."""
    return _reported("/proc/cpuinfo", "model name") or platform.machine()


def load_average() -> float:
    """Return how many processes wanted a core in the last minute."""
    return round(os.getloadavg()[0], 2)


def cores() -> int:
    """Return the number of cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last caches before the memory, of all processors together."""
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
    """Return the memory that tensors may take now; on a CPU what Linux calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    kilobytes = _reported("/proc/meminfo", "MemAvailable").removesuffix(" kB")
    return int(kilobytes) * 1024 if kilobytes else UNKNOWN_FREE


def commit() -> str | None:
    """Return the commit of the package's checkout; None outside of one."""
    folder = str(Path(gcond_kernels.__file__).parent)
    form = "--abbrev=12", "--exclude=*", "--dirty= with changes"
    return _answer("git", "-C", folder, "describe", "--always", *form)


def _reported(path: str, name: str) -> str:
    """Return what follows a name in a file of Linux; "" elsewhere."""
    text = Path(path).read_text() if Path(path).exists() else ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _answer(*command: str) -> str | None:
    """Return the first line that a command prints; None where it fails, or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
