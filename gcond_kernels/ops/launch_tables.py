"""What kernels look up: where every tensor lies, and which piece of it each program takes.

Shared by the backends that have kernels; it knows none of them.

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

# Address sets remembered; beyond that the one not seen for longest is forgotten. A large model in
# 128 buckets, each task with its own, has that many.
REMEMBERED = 1024

# Tables that a CUDA graph has captured: it reads them at every replay, so they stay for good.
_captured: dict[int, Tensor] = {}


class Chunks(NamedTuple):
    """How the tensors are cut into pieces, one program each.

    Attributes:
        table: [C, 2] int32: the tensor, and the number of the piece within it.
        first: [T + 1] int32: the first piece of each tensor; the last entry is C.
        total: C.
    """

    table: Tensor
    first: Tensor
    total: int


class Plan(NamedTuple):
    """What a launch over all tensors needs to know.

    Attributes:
        rows: [T, 4] int64 on the device: address, kind, offset, size of each tensor.
        types: bit mask of the type codes that occur.
        chunks: the pieces.
    """

    rows: Tensor
    types: int
    chunks: Chunks


DTYPE = attrgetter("dtype")
Addresses = tuple[int, ...]
Types = tuple[torch.dtype | None, ...]


def keys_of(tensors: Sequence[Tensor | None]) -> tuple[Addresses, Types]:
    """The address and the type of every tensor; 0 and None for None; one type if all are of it.

    This is most of what a launch costs the host: two calls in C a tensor and no more.
    """
    try:
        addresses = tuple(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
        types = set(map(DTYPE, tensors))
        return addresses, tuple(types if len(types) == 1 else map(DTYPE, tensors))
    except TypeError:  # there is a None; asking each of them first would cost as much again
        return (
            tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors]),
            tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
        )


@functools.lru_cache(maxsize=REMEMBERED)
def plan(
    keys: tuple[Addresses, Types],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    rows_aligned: bool,
    length: int,
    device: torch.device,
) -> Plan:
    """The plan for tensors at these addresses; a tensor each, and its segment of flat storage.

    Args:
        keys: T addresses, and T types or the one of all, as `keys_of` gives them.
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments.
        rows_aligned: whether every row of the flat storage starts at a vector boundary.
        length: elements of a piece.
        device: where the tables are to lie.
    """
    kinds = kinds_of(keys, offsets, rows_aligned)
    table = rows_without_addresses(kinds, offsets, sizes, device)
    rows = np.stack([keys[0], kinds, offsets, sizes], 1).astype(np.int64)
    chunks = chunk_table(sizes, length, device)
    if not any(keys[0]):
        return Plan(table, types_of(keys), chunks)
    return Plan(to_device(rows, device), types_of(keys), chunks)


def plan_under_capture(
    write: Callable[[Tensor, Addresses], Tensor],
    keys: tuple[Addresses, Types],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    rows_aligned: bool,
    length: int,
    device: torch.device,
) -> Plan:
    """The same for tensors that are first met while a CUDA graph is captured.

    Nothing can be copied from the host then, but launches are captured: `write(table, addresses)`
    returns a copy of the table with the addresses, which travel with its launches. The plan is not
    remembered: the table is filled when the graph is replayed, not before.

    Raises:
        CaptureMissError: the operation has not run yet on tensors of these sizes and types.
    """
    table = rows_without_addresses(kinds_of(keys, offsets, rows_aligned), offsets, sizes, device)
    keep_if_captured(table)
    return Plan(write(table, keys[0]), types_of(keys), chunk_table(sizes, length, device))


def kinds_of(
    keys: tuple[Addresses, Types], offsets: Sequence[int], rows_aligned: bool
) -> tuple[int, ...]:
    """What a program has to know of each tensor: its type, or that there is none, and ALIGNED."""
    address, offset = np.array(keys[0], dtype=np.int64), np.array(offsets, dtype=np.int64)
    codes = [NO_TENSOR if dtype is None else TYPE_CODES[dtype] for dtype in keys[1]]
    aligned = (address % VECTOR_BYTES == 0) & (offset % VECTOR_ELEMENTS == 0) & rows_aligned
    return tuple((np.array(codes, dtype=np.int64) + ALIGNED * aligned).tolist())


def types_of(keys: tuple[Addresses, Types]) -> int:
    """Bit mask of the type codes that occur."""
    return sum({1 << TYPE_CODES[dtype] for dtype in keys[1] if dtype is not None})


@functools.lru_cache(maxsize=REMEMBERED)
def rows_without_addresses(
    kinds: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> Tensor:
    """The rows of a plan, [T, 4] int64, with zeros for the addresses."""
    rows = np.array([(0, *row) for row in zip(kinds, offsets, sizes, strict=True)], dtype=np.int64)
    return to_device(rows.reshape(-1, 4), device)


def no_keys(tensors: int) -> tuple[Addresses, Types]:
    """For launches that read flat storage alone."""
    return (0,) * tensors, (None,)


@functools.lru_cache(maxsize=REMEMBERED)
def chunk_table(sizes: tuple[int, ...], length: int, device: torch.device) -> Chunks:
    """Cuts tensors of these sizes into pieces of `length` elements; empty tensors have none."""
    counts = -(-np.array(sizes, dtype=np.int64) // length)  # in integers: sizes may pass 2^31
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    tensor = np.repeat(np.arange(len(sizes)), counts)
    piece = np.arange(first[-1]) - first[tensor]
    table = np.stack([tensor, piece], 1).astype(np.int32)
    return Chunks(
        to_device(table, device), to_device(first.astype(np.int32), device), int(first[-1])
    )


def chunk_length(elements: int) -> int:
    """Elements of a piece that is summed: few enough to give every multiprocessor work, else many.

    It depends on nothing but the number of elements: the same sums on every GPU.
    """
    length = 4096
    while length < 32768 and elements >= 2 * length * 2048:
        length *= 2
    return length


@functools.lru_cache(maxsize=REMEMBERED)
def settings_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Settings on the device, as float64, which kernel arguments are not."""
    return to_device(np.array(values), device)


class CaptureMissError(RuntimeError):
    """A table is not there yet, and cannot be copied to the device while a graph is captured."""


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@fixed_precision  # a table is kept, and not to be an inference tensor
def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array on the device, without waiting for it.

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


class HostFlag:
    """A flag of the device that the host learns of a little later, without waiting for it."""

    def __init__(self) -> None:
        self._known = False
        self._host: Tensor | None = None  # [] bool in pinned memory, once there is need for it
        self._copied: torch.cuda.Event | None = None  # while a copy is pending

    def __reduce__(self) -> tuple[type[HostFlag], tuple[()]]:
        return HostFlag, ()  # a copy has seen nothing yet: an event is of one process

    def note(self, flag: Tensor) -> bool:
        """Start a copy of a flag, [] bool; of a CPU's it is read at once.

        Returns:
            Whether it was noted: not while a CUDA graph is captured or a copy is pending, nor once
            one is known to have been True.
        """
        device = flag.device
        if device.type == "meta" or is_capturing(device):
            return False
        self._look()
        if self._known or self._copied is not None:
            return False
        if self._is_on_host(device):
            self._known = bool(flag)
        else:
            self._copied = self._start_copy(flag)
        return True

    @property
    def known(self) -> bool:
        """Whether a flag that was noted is known to be True; once it is, it stays so."""
        self._look()
        return self._known

    def _look(self) -> None:
        """Read the copy where it is there."""
        if self._copied is None:
            return
        # Asked during a capture, an event makes CUDA give the capture up.
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if not self._copied.query():  # type: ignore[no-untyped-call]
            return
        assert self._host is not None
        self._known = bool(self._host)
        self._copied = None

    def _is_on_host(self, device: torch.device) -> bool:
        return device.type != "cuda"  # of others the host asks: there are no events of one kind

    @fixed_precision  # the memory is kept
    def _start_copy(self, flag: Tensor) -> torch.cuda.Event:
        """Start a copy to the host; the event is done when that is."""
        if self._host is None:
            self._host = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(flag.device))
        return event


def keep_if_captured(*tables: Tensor) -> None:
    """Holds on to tables that a graph under capture will read at every replay."""
    if is_capturing(tables[0].device):
        _captured.update((id(table), table) for table in tables)


def guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one: Triton launches on the current device, not the tensors'."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these tensors starts at a vector boundary."""
    return all(
        tensor is None
        or (
            tensor.data_ptr() % VECTOR_BYTES == 0
            and (tensor.dim() == 1 or tensor.stride(0) % VECTOR_ELEMENTS == 0)
        )
        for tensor in tensors
    )
