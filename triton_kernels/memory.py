"""What the kernels share: access to memory in vectors of 16 bytes.

A plan's table holds the address and the dtype code of every tensor. `TYPES` has a bit for each
dtype code that occurs; a kernel compiles one access for each of these, and masks off all but the
right one. Such a mask is the same for the whole program, so that it moves no bytes and keeps the
access 16 bytes wide, which a mask that differs between the elements of a vector does not.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gcond_kernels.ops import types
from gcond_kernels.triton_kernels import plans

NO_TENSOR = tl.constexpr(plans.NO_TENSOR)
ALIGNED_BIT = tl.constexpr(plans.ALIGNED)
WORD_BITS = tl.constexpr(types.WORD_BITS)
VECTOR_ELEMENTS = tl.constexpr(plans.VECTOR_ELEMENTS)
DTYPES = tl.constexpr((tl.float32, tl.bfloat16, tl.float16, tl.float64))  # of each dtype code


class Storage(NamedTuple):
    """The flat storage that a launch works on."""

    accumulators_ptr: Any  # [K, N'] float32 or bfloat16
    history_ptr: Any  # [K, N'] float32, bfloat16 or float16; or None
    momentum_ptr: Any  # [N'] float32, or None
    mask_ptr: Any  # [⌈N' / 32⌉] int32, a bit for each trainable element; or None
    stride: Any  # N', int64


class Chunk(NamedTuple):
    """The part of a tensor that one program works on."""

    tensor: Any  # the tensor's number
    first: Any  # its first element in the chunk
    start: Any  # where that element lies in flat storage
    remaining: Any  # how many elements there are from it to the end of the tensor
    address: Any  # of the tensor
    dtype_code: Any  # of the tensor, or NO_TENSOR
    is_full: Any  # whether no element is missing and every vector is aligned


class Elements(NamedTuple):
    """The elements that a device function works on."""

    start: Any  # where they start in flat storage, int64
    offsets: Any  # from there
    mask: Any  # which of them exist
    ALIGNED: Any  # whether every vector of them is aligned, in every flat gradient


@triton.jit
def locate(chunks_ptr, BLOCK_SIZE):
    """Return this program's tensor and the first element of its chunk, both int64."""
    entry_ptr = chunks_ptr + 2 * tl.program_id(0).to(tl.int64)
    return tl.load(entry_ptr).to(tl.int64), tl.load(entry_ptr + 1).to(tl.int64) * BLOCK_SIZE


@triton.jit
def load_chunk(table_ptr, chunks_ptr, BLOCK_SIZE):
    """Return this program's `Chunk`."""
    tensor, first = locate(chunks_ptr, BLOCK_SIZE)
    entry_ptr = table_ptr + 4 * tensor
    address, code = tl.load(entry_ptr), tl.load(entry_ptr + 1)
    start, remaining = tl.load(entry_ptr + 2) + first, tl.load(entry_ptr + 3) - first
    is_full = ((code & ALIGNED_BIT) != 0) & (remaining >= BLOCK_SIZE)
    return Chunk(tensor, first, start, remaining, address, code & (ALIGNED_BIT - 1), is_full)


@triton.jit
def elements_of(chunk, BLOCK_SIZE, ALIGNED):
    """Return the `Elements` of a chunk; ALIGNED for one that is full."""
    offsets = tl.arange(0, BLOCK_SIZE)
    mask = True if ALIGNED else offsets < chunk.remaining
    return Elements(chunk.start, offsets, mask, ALIGNED)


@triton.jit
def pointers(base_ptr, base_offset, elements):
    """Return pointers to elements of the flat gradient that starts at `base_offset`.

    The alignment is stated of the value made here: of an argument it would be lost in inlining.
    """
    start_ptr = base_ptr + (base_offset + elements.start)
    if elements.ALIGNED:
        start_ptr = tl.multiple_of(start_ptr, 16)
    return start_ptr + elements.offsets


@triton.jit
def uniform_mask(condition, offsets):
    """Return a condition of the whole program as a mask of the offsets' shape.

    By `where`, because Triton's interpreter broadcasts a comparison as an integer.
    """
    return tl.where(
        condition, tl.full(offsets.shape, 1, tl.int1), tl.full(offsets.shape, 0, tl.int1)
    )


@triton.jit
def trainable_bits(mask_ptr, start, vectors, within, mask):
    """Return the trainable mask's bits of elements `start + vectors + within`.

    One word is loaded for each of `vectors` and must hold the bits of all of `within`.
    """
    bit = (start % WORD_BITS).to(tl.uint32) + vectors
    word = tl.load(mask_ptr + start // WORD_BITS + bit // WORD_BITS, mask=mask, other=0)
    return (word >> (bit % WORD_BITS + within)) & 1 != 0


@triton.jit
def trainable_elements(mask_ptr, elements):
    """Return which elements of a chunk are trainable."""
    if elements.ALIGNED:  # then the elements of a vector have their bits in one word
        COUNT: tl.constexpr = elements.offsets.shape[0]
        vectors = tl.arange(0, COUNT // VECTOR_ELEMENTS)[:, None] * VECTOR_ELEMENTS
        within = tl.arange(0, VECTOR_ELEMENTS)[None, :]
        bits = trainable_bits(mask_ptr, elements.start, vectors, within, True).reshape(COUNT)
    else:
        bits = trainable_bits(mask_ptr, elements.start, elements.offsets, 0, elements.mask)
    return bits


@triton.jit
def typed_pointer(address, dtype, ALIGNED):
    """Return an address as a pointer; ALIGNED states that it is a vector boundary."""
    typed_ptr = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        typed_ptr = tl.multiple_of(typed_ptr, 16)
    return typed_ptr


@triton.jit
def load_float32(address, dtype_code, offsets, mask, TYPES, ALIGNED):
    """Return elements of a tensor as float32; zeros outside the mask and where there is none."""
    values = tl.zeros(offsets.shape, tl.float32)
    for code in tl.static_range(4):
        if (TYPES >> code) & 1:
            selected = mask & uniform_mask(dtype_code == code, offsets)
            source_ptr = typed_pointer(address, DTYPES[code], ALIGNED)
            values += tl.load(source_ptr + offsets, mask=selected, other=0.0).to(tl.float32)
    return values


@triton.jit
def store_float32(values, address, dtype_code, offsets, mask, TYPES, ALIGNED):
    """Write float32 values to elements of a tensor, rounded to its dtype."""
    for code in tl.static_range(4):
        if (TYPES >> code) & 1:
            target_ptr = typed_pointer(address, DTYPES[code], ALIGNED)
            selected = mask & uniform_mask(dtype_code == code, offsets)
            tl.store(target_ptr + offsets, values.to(DTYPES[code]), mask=selected)
