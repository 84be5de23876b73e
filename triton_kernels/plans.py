"""The plan of a launch: a table of the address, the dtype code and the segment of every tensor.

It is made once for a set of tensors and found again by their addresses: gradients are allocated
anew for every backward pass, mostly at the same places.
"""

import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Layout

# What a program has to know of a tensor, in one int64: its dtype, or NO_TENSOR, plus ALIGNED
# where all its vectors may be read and written 16 bytes at a time.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NO_TENSOR = 7
ALIGNED = 8

# Bytes of one vector access, and a number of elements that fills whole vectors in any dtype.
VECTOR_BYTES = 16
VECTOR_ELEMENTS = 8

# Addresses that travel with one launch, where no table can be copied to the device.
ADDRESSES = 64
# Triton compiles anew for numbers that are 1, multiples of 16, or fit in 32 bits. Doubled, made odd
# and moved this far all addresses are of one kind.
ADDRESS_SHIFT = 1 << 62
SHIFT = tl.constexpr(ADDRESS_SHIFT)

# T addresses, 0 for None, and T dtypes or the one of all.
Keys = tuple[tuple[int, ...], tuple[torch.dtype | None, ...]]


class Plan(NamedTuple):
    """The tables of a launch over all tensors."""

    table: Tensor  # [T, 4] int64: address, code, offset, size of each tensor
    types: int  # bit mask of the dtype codes that occur
    chunks: tables.Chunks


def plan_of(
    tensors: Sequence[Tensor | None] | None,
    layout: Layout,
    length: int,
    device: torch.device,
    *storage: Tensor | None,
) -> Plan:
    """Return the plan of a launch in chunks of `length` elements, also under capture.

    Args:
        tensors: T tensors, or None for a launch that works on flat storage alone.
        layout: where the segment of each lies in flat storage.
        length: elements of a chunk.
        device: where the tables are to lie.
        storage: the flat storage of the launch.
    """
    keys = ((0,) * len(layout.sizes), (None,)) if tensors is None else keys_of(tensors)
    arguments = (keys, layout, is_aligned(*storage), length, device)
    try:
        found = plan(*arguments)
    except tables.CaptureMissError:
        found = plan_under_capture(*arguments)
    else:
        if device.type == "cuda":
            load_writer(device)
    tables.keep_if_captured(found.table, found.chunks.table, found.chunks.first)
    return found


def keys_of(tensors: Sequence[Tensor | None]) -> Keys:
    """Return the addresses and dtypes: most of what a launch costs the host, two calls a tensor."""
    try:
        addresses = tuple(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
        types = tuple(map(attrgetter("dtype"), tensors))
        return addresses, types[:1] if len(set(types)) == 1 else types
    except TypeError:  # there is a None; asking each of them first would cost as much again
        return (
            tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors]),
            tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
        )


def is_aligned(*tensors: Tensor | None) -> bool:
    """Return whether each of these tensors, [N'] or [K, N'], is aligned for every task."""
    return all(
        tensor is None
        or (
            tensor.data_ptr() % VECTOR_BYTES == 0
            and (tensor.dim() == 1 or tensor.stride(0) % VECTOR_ELEMENTS == 0)
        )
        for tensor in tensors
    )


@functools.lru_cache(maxsize=tables.REMEMBERED)
def plan(
    keys: Keys, layout: Layout, storage_aligned: bool, length: int, device: torch.device
) -> Plan:
    """Return the plan for tensors at these addresses."""
    codes = codes_of(keys, layout, storage_aligned)
    table = table_without_addresses(codes, layout, device)
    if any(keys[0]):
        table = table_of(keys[0], codes, layout, device)
    return Plan(table, type_mask(keys), tables.chunk_table(layout.sizes, length, device))


def plan_under_capture(
    keys: Keys, layout: Layout, storage_aligned: bool, length: int, device: torch.device
) -> Plan:
    """Return the plan for tensors that are first met while a CUDA graph is captured.

    Nothing can be copied from the host then, so the addresses travel with launches. The plan is not
    remembered: its table is filled when the graph is replayed, not before.
    """
    table = table_without_addresses(codes_of(keys, layout, storage_aligned), layout, device)
    tables.keep_if_captured(table)
    chunks = tables.chunk_table(layout.sizes, length, device)
    return Plan(with_addresses(table, keys[0]), type_mask(keys), chunks)


def codes_of(keys: Keys, layout: Layout, storage_aligned: bool) -> tuple[int, ...]:
    """Return the code of each tensor: its dtype, or that there is none, and ALIGNED."""
    address, offset = np.array(keys[0], dtype=np.int64), np.array(layout.offsets, dtype=np.int64)
    codes = [NO_TENSOR if dtype is None else DTYPE_CODES[dtype] for dtype in keys[1]]
    aligned = (address % VECTOR_BYTES == 0) & (offset % VECTOR_ELEMENTS == 0) & storage_aligned
    return tuple((np.array(codes, dtype=np.int64) + ALIGNED * aligned).tolist())


def type_mask(keys: Keys) -> int:
    """Return the bit mask of the dtype codes that occur."""
    return sum({1 << DTYPE_CODES[dtype] for dtype in keys[1] if dtype is not None})


def table_of(
    addresses: Sequence[int], codes: Sequence[int], layout: Layout, device: torch.device
) -> Tensor:
    """Return the table of a plan."""
    return tables.to_device(np.array([addresses, codes, *layout], dtype=np.int64).T, device)


@functools.lru_cache(maxsize=tables.REMEMBERED)
def table_without_addresses(codes: tuple[int, ...], layout: Layout, device: torch.device) -> Tensor:
    """Return the table of a plan with zeros for the addresses."""
    return table_of((0,) * len(codes), codes, layout, device)


@functools.cache
def load_writer(device: torch.device) -> None:
    """Load the kernel that captures need: older drivers load none during a capture."""
    with_addresses(torch.zeros((1, 4), dtype=torch.int64, device=device), (0,))


def with_addresses(table: Tensor, addresses: Sequence[int]) -> Tensor:
    """Return a copy of a table [T, 4] with these addresses, made by launches alone."""
    tensors = len(addresses)
    padded = -(-tensors // ADDRESSES) * ADDRESSES
    copy = table.new_empty((padded, 4))
    copy[:tensors].copy_(table)
    with tables.guard(table.device):
        for first in range(0, tensors, ADDRESSES):
            moved = [2 * a + 1 + ADDRESS_SHIFT for a in addresses[first : first + ADDRESSES]]
            moved += [1 + ADDRESS_SHIFT] * (ADDRESSES - len(moved))
            write_addresses[(1,)](copy, first, tuple(moved), num_warps=1)
    return copy[:tensors]


@triton.jit(do_not_specialize=["first"])
def write_addresses(table_ptr, first, addresses):
    """Write a tuple of addresses into the first column of a table [T, 4], from `first` on."""
    for number in tl.static_range(len(addresses)):
        entry_ptr = table_ptr + 4 * (tl.cast(first, tl.int64) + number)
        tl.store(entry_ptr, (addresses[number] - SHIFT) >> 1)
