"""Tables on the device: settings, and which chunk of which tensor each program takes.

They are remembered, so that a launch copies nothing to the device.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcond_kernels.ops.contexts import fixed_precision

# Tables remembered by each function; a large model in 128 buckets, each task with its own, has that
# many.
REMEMBERED = 1024

# Tables that a CUDA graph has captured: it reads them at every replay, so they stay for good.
_captured: dict[int, Tensor] = {}


class Chunks(NamedTuple):
    """The chunks of the tensors, one program each."""

    table: Tensor  # [C, 2] int32: the tensor, and the number of the chunk within it
    first: Tensor  # [T + 1] int32: the first chunk of each tensor; the last entry is C
    total: int  # C


@functools.lru_cache(maxsize=REMEMBERED)
def chunk_table(sizes: tuple[int, ...], length: int, device: torch.device) -> Chunks:
    """Return the chunks of `length` elements of tensors of these sizes; empty ones have none."""
    counts = -(-np.array(sizes, dtype=np.int64) // length)  # in integers: sizes may pass 2^31
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    tensor = np.repeat(np.arange(len(sizes)), counts)
    table = np.stack([tensor, np.arange(first[-1]) - first[tensor]], 1).astype(np.int32)
    return Chunks(
        to_device(table, device), to_device(first.astype(np.int32), device), int(first[-1])
    )


def chunk_length(elements: int) -> int:
    """Return the elements of a chunk that is summed, the same on every GPU; few occupy it."""
    length = 4096
    while length < 32768 and elements >= 2 * length * 2048:
        length *= 2
    return length


@functools.lru_cache(maxsize=REMEMBERED)
def settings_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return settings on the device, as float64, which kernel arguments are not."""
    return to_device(np.array(values), device)


class CaptureMissError(RuntimeError):
    """A table is not there yet, and cannot be copied to the device while a graph is captured."""


def is_capturing(device: torch.device) -> bool:
    """Return whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@fixed_precision  # a table is kept, and not to be an inference tensor
def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Return an array on the device, without synchronizing with it; not under capture."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    if is_capturing(device):
        raise CaptureMissError(
            "a CUDA graph is being captured on tensors that this operation has not seen before: "
            "run it once on the same tensors before the capture"
        )
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_if_captured(*tables: Tensor) -> None:
    """Keep tables that a graph under capture will read at every replay."""
    if is_capturing(tables[0].device):
        _captured.update((id(table), table) for table in tables)


def guard(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: Triton launches there, wherever the tensors are."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
