"""Reading and writing tensors whose address and type stand in a table.

`TYPES` has a bit for every type that occurs. Each of them costs one access, of which all but
the right one are switched off for the whole program: no branch, and no bytes moved for them.
Such a switch, unlike a mask that differs from lane to lane, leaves accesses 16 bytes wide.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import WORD_BITS as REFERENCE_BITS

NO_TENSOR = tl.constexpr(tables.NO_TENSOR)
ALIGNED = tl.constexpr(tables.ALIGNED)
WORD_BITS = tl.constexpr(REFERENCE_BITS)
VECTOR_ELEMENTS = tl.constexpr(tables.VECTOR_ELEMENTS)

# Addresses that travel with one launch, where no table can be copied to the device.
ADDRESSES = 64
# Triton compiles anew for numbers that are 1, multiples of 16, or fit in 32 bits. Doubled, made odd
# and moved this far all addresses are of one kind.
ADDRESS_SHIFT = 1 << 62
SHIFT = tl.constexpr(ADDRESS_SHIFT)


def plan_of(*arguments: Any) -> tables.Plan:
    """`tables.plan`; while a CUDA graph is captured, also for tensors that are new to it."""
    try:
        plan = tables.plan(*arguments)
    except tables.CaptureMissError:
        return tables.plan_under_capture(with_addresses, *arguments)
    if plan.rows.is_cuda:
        load_writer(plan.rows.device)
    return plan


@functools.cache
def load_writer(device: torch.device) -> None:
    """Loads the kernel that captures need: older drivers load none during a capture."""
    with_addresses(torch.zeros((1, 4), dtype=torch.int64, device=device), (0,))


def with_addresses(table: Tensor, addresses: tables.Addresses) -> Tensor:
    """A copy of a plan's rows [T, 4] with these addresses, made by launches alone."""
    tensors = len(addresses)
    padded = -(-tensors // ADDRESSES) * ADDRESSES
    rows = table.new_empty((padded, 4))
    rows[:tensors].copy_(table)
    with tables.guard(table.device):
        for first in range(0, tensors, ADDRESSES):
            moved = [2 * a + 1 + ADDRESS_SHIFT for a in addresses[first : first + ADDRESSES]]
            moved += [1 + ADDRESS_SHIFT] * (ADDRESSES - len(moved))
            write_addresses[(1,)](rows, first, tuple(moved), num_warps=1)
    return rows[:tensors]


@triton.jit(do_not_specialize=["first"])
def write_addresses(rows, first, addresses):
    """Writes a tuple of addresses into the first column of rows [T, 4], from row `first` on."""
    for number in tl.static_range(len(addresses)):
        place = rows + 4 * (tl.cast(first, tl.int64) + number)
        tl.store(place, (addresses[number] - SHIFT) >> 1)


@triton.jit
def locate(chunks, LENGTH: tl.constexpr):
    """This program's tensor, and the first element of it that the program takes. Both int64."""
    entry = chunks + 2 * tl.program_id(0).to(tl.int64)
    return tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64) * LENGTH


@triton.jit
def pointer(address, dtype: tl.constexpr, WIDE: tl.constexpr):
    """An address from a table as a pointer; `WIDE` promises that it is a vector boundary."""
    typed = address.to(tl.pointer_type(dtype))
    if WIDE:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def at_element(base, element, WIDE: tl.constexpr):
    """`base` moved on by `element`, an int64; `WIDE` promises that it is a vector boundary.

    The promise holds for the value made here and for no other: said of an argument it would
    be lost when the function is inlined.
    """
    moved = base + element
    if WIDE:
        moved = tl.multiple_of(moved, 16)
    return moved


@triton.jit
def throughout(condition, at):
    """A condition of the whole program as a mask for elements `at`.

    Said this way round because Triton's interpreter spreads a comparison as an integer, which
    is no mask; compiled it is the condition itself.
    """
    return tl.where(condition, tl.full(at.shape, 1, tl.int1), tl.full(at.shape, 0, tl.int1))


@triton.jit
def trained(mask, start, group, within, inside):
    """Whether elements `start + group + within` of a row are trained, of a mask [N' / 32].

    One word is loaded for each element of `group`, and holds the bits of all of `within`.
    """
    bit = (start % WORD_BITS).to(tl.uint32) + group
    word = tl.load(mask + start // WORD_BITS + bit // WORD_BITS, mask=inside, other=0)
    return (word >> (bit % WORD_BITS + within)) & 1 != 0


@triton.jit
def trained_of_piece(mask, start, at, inside, LENGTH: tl.constexpr, WIDE: tl.constexpr):
    """Which of the elements `start + at` are trained, `at` those of a piece."""
    if WIDE:
        # From a vector boundary on, the elements of a vector have their bits in one word.
        group = tl.arange(0, LENGTH // VECTOR_ELEMENTS)[:, None] * VECTOR_ELEMENTS
        within = tl.arange(0, VECTOR_ELEMENTS)[None, :]
        kept = trained(mask, start, group, within, True).reshape(LENGTH)
    else:
        kept = trained(mask, start, at, 0, inside)
    return kept


@triton.jit
def read(address, kind, at, inside, TYPES: tl.constexpr, WIDE: tl.constexpr):
    """Elements `at` as float32; zero where not `inside` and where there is no tensor."""
    value = tl.zeros(at.shape, tl.float32)
    if TYPES & 1:
        of_type = inside & throughout(kind == 0, at)
        value += tl.load(pointer(address, tl.float32, WIDE) + at, mask=of_type, other=0.0)
    if TYPES & 2:
        of_type = inside & throughout(kind == 1, at)
        half = tl.load(pointer(address, tl.bfloat16, WIDE) + at, mask=of_type, other=0.0)
        value += half.to(tl.float32)
    if TYPES & 4:
        of_type = inside & throughout(kind == 2, at)
        half = tl.load(pointer(address, tl.float16, WIDE) + at, mask=of_type, other=0.0)
        value += half.to(tl.float32)
    if TYPES & 8:
        of_type = inside & throughout(kind == 3, at)
        double = tl.load(pointer(address, tl.float64, WIDE) + at, mask=of_type, other=0.0)
        value += double.to(tl.float32)
    return value


@triton.jit
def write(address, kind, at, value, inside, TYPES: tl.constexpr, WIDE: tl.constexpr):
    """Writes float32 values to elements `at`, rounded to the tensor's own type."""
    if TYPES & 1:
        tl.store(
            pointer(address, tl.float32, WIDE) + at, value, mask=inside & throughout(kind == 0, at)
        )
    if TYPES & 2:
        half = value.to(tl.bfloat16)
        tl.store(
            pointer(address, tl.bfloat16, WIDE) + at, half, mask=inside & throughout(kind == 1, at)
        )
    if TYPES & 4:
        half = value.to(tl.float16)
        tl.store(
            pointer(address, tl.float16, WIDE) + at, half, mask=inside & throughout(kind == 2, at)
        )
    if TYPES & 8:
        double = value.to(tl.float64)
        tl.store(
            pointer(address, tl.float64, WIDE) + at, double, mask=inside & throughout(kind == 3, at)
        )
