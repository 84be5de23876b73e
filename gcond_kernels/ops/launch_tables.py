"""Tables that kernels read: where every tensor lies, and which chunk of it each program takes.

A table of addresses is made once for a set of tensors and found again by the addresses
themselves: gradients are allocated anew for every backward pass, mostly at the same places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcond_kernels.ops.contexts import fixed_precision

# What a program has to know of a tensor, in one int64: its type, or NO_TENSOR, plus ALIGNED
# where all its vectors may be read and written 16 bytes at a time.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NO_TENSOR = 7
ALIGNED = 8

# Bytes of one vector access, and a number of elements that fills whole vectors in any type.
VECTOR_BYTES = 16
VECTOR_ELEMENTS = 8

# Sets of addresses remembered; a large model in 128 buckets, each task with its own, has that many.
REMEMBERED = 1024

# Tables that a CUDA graph has captured: it reads them at every replay, so they stay for good.
_captured: dict[int, Tensor] = {}

Addresses = tuple[int, ...]
Types = tuple[torch.dtype | None, ...]


class Chunks(NamedTuple):
    """The chunks of the tensors, one program each.

    Attributes:
        table: [C, 2] int32: the tensor, and the number of the chunk within it.
        first: [T + 1] int32: the first chunk of each tensor; the last entry is C.
        total: C.
    """

    table: Tensor
    first: Tensor
    total: int


class Plan(NamedTuple):
    """The tables of a launch over all tensors.

    Attributes:
        table: [T, 4] int64 on the device: address, code, offset, size of each tensor.
        types: bit mask of the type codes that occur.
        chunks: the chunks of the tensors.
    """

    table: Tensor
    types: int
    chunks: Chunks


def keys_of(tensors: Sequence[Tensor | None]) -> tuple[Addresses, Types]:
    """Return the address and the type of every tensor, 0 and None for None; one type if all are.

    This is most of what a launch costs the host: two calls in C a tensor and no more.
    """
    try:
        addresses = tuple(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
        types = tuple(map(attrgetter("dtype"), tensors))
        return addresses, types[:1] if len(set(types)) == 1 else types
    except TypeError:  # there is a None; asking each of them first would cost as much again
        return (
            tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors]),
            tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
        )


def no_keys(tensors: int) -> tuple[Addresses, Types]:
    """Return the keys for a launch that reads flat storage alone."""
    return (0,) * tensors, (None,)


@functools.lru_cache(maxsize=REMEMBERED)
def plan(
    keys: tuple[Addresses, Types],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    storage_aligned: bool,
    length: int,
    device: torch.device,
) -> Plan:
    """Return the plan for tensors at these addresses.

    Args:
        keys: T addresses, and T types or the one of all, as `keys_of` gives them.
        offsets: T starts of the segments in flat storage, in elements.
        sizes: T lengths of the segments.
        storage_aligned: whether every part [N'] of the flat storage starts at a vector boundary.
        length: elements of a chunk.
        device: where the tables are to lie.
    """
    codes = codes_of(keys, offsets, storage_aligned)
    table = table_without_addresses(codes, offsets, sizes, device)
    if any(keys[0]):
        columns = np.array([keys[0], codes, offsets, sizes], dtype=np.int64)
        table = to_device(columns.T, device)
    return Plan(table, type_mask(keys), chunk_table(sizes, length, device))


def plan_under_capture(
    write: Callable[[Tensor, Addresses], Tensor],
    keys: tuple[Addresses, Types],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    storage_aligned: bool,
    length: int,
    device: torch.device,
) -> Plan:
    """Return the plan for tensors that are first met while a CUDA graph is captured.

    Nothing can be copied from the host then, but launches are captured: `write(table, addresses)`
    returns a copy of the table with the addresses, which travel with its launches. The plan is not
    remembered: the table is filled when the graph is replayed, not before.

    Raises:
        CaptureMissError: the operation has not run yet on tensors of these sizes and types.
    """
    codes = codes_of(keys, offsets, storage_aligned)
    table = table_without_addresses(codes, offsets, sizes, device)
    keep_if_captured(table)
    return Plan(write(table, keys[0]), type_mask(keys), chunk_table(sizes, length, device))


def codes_of(
    keys: tuple[Addresses, Types], offsets: Sequence[int], storage_aligned: bool
) -> tuple[int, ...]:
    """Return the code of each tensor: its type, or that there is none, and ALIGNED."""
    address, offset = np.array(keys[0], dtype=np.int64), np.array(offsets, dtype=np.int64)
    codes = [NO_TENSOR if dtype is None else TYPE_CODES[dtype] for dtype in keys[1]]
    aligned = (address % VECTOR_BYTES == 0) & (offset % VECTOR_ELEMENTS == 0) & storage_aligned
    return tuple((np.array(codes, dtype=np.int64) + ALIGNED * aligned).tolist())


def type_mask(keys: tuple[Addresses, Types]) -> int:
    """Return the bit mask of the type codes that occur."""
    return sum({1 << TYPE_CODES[dtype] for dtype in keys[1] if dtype is not None})


@functools.lru_cache(maxsize=REMEMBERED)
def table_without_addresses(
    codes: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return the table of a plan, [T, 4] int64, with zeros for the addresses."""
    columns = np.array([(0,) * len(codes), codes, offsets, sizes], dtype=np.int64)
    return to_device(columns.T, device)


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
    """Return the elements of a chunk that is summed: few enough to occupy a GPU, else many.

    It depends on nothing but the number of elements: the same sums on every GPU.
    """
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
    """Return an array on the device, without synchronizing with it.

    Raises:
        CaptureMissError: a CUDA graph is being captured: it could not hold the host's copy.
    """
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


def is_aligned(*tensors: Tensor | None) -> bool:
    """Return whether each of these tensors, [N'] or [K, N'], is aligned in every row."""
    return all(
        tensor is None
        or (
            tensor.data_ptr() % VECTOR_BYTES == 0
            and (tensor.dim() == 1 or tensor.stride(0) % VECTOR_ELEMENTS == 0)
        )
        for tensor in tensors
    )
