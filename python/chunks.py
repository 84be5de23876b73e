"""Segments of flat storage in chunks that stay in the processor's cache."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels.ops.types import Layout

# Elements of scratch memory for a chunk of all accumulators: 8 MB of float32, part of the last
# cache; smaller chunks pay more per call than they gain. On a GPU the number of launches counts.
SCRATCH_ELEMENTS = 1 << 21
SCRATCH_ELEMENTS_ON_GPU = 1 << 25

# Elements of one float32 partial sum; a chunk's length is a multiple of it.
PARTIAL = 4096


class Chunk(NamedTuple):
    """Elements from `start` to `stop` of flat storage, those from `first` on of a tensor."""

    tensor: int
    start: int
    stop: int
    first: int


class Batch(NamedTuple):
    """Chunks of the tensors from `first` to `last`, copied to scratch memory together."""

    first: int
    last: int
    partials: tuple[int, ...]  # partial sums of each tensor
    # Of each chunk start and stop in flat storage, and in scratch memory, in full partial sums.
    places: tuple[tuple[int, int, int, int], ...]


def chunk_length(count: int, device: torch.device) -> int:
    """Return the length of chunks of which `count` fill the scratch memory."""
    scratch = SCRATCH_ELEMENTS if device.type == "cpu" else SCRATCH_ELEMENTS_ON_GPU
    return max(1, scratch // count // PARTIAL) * PARTIAL


@functools.lru_cache(maxsize=256)
def chunks_of(layout: Layout, length: int) -> tuple[Chunk, ...]:
    """Return chunks of at most `length` elements, in memory order; empty tensors have none."""
    return tuple(
        Chunk(tensor, start, min(start + length, offset + size), start - offset)
        for tensor, (offset, size) in enumerate(zip(*layout, strict=True))
        for start in range(offset, offset + size, length)
    )


@functools.lru_cache(maxsize=256)
def batches(layout: Layout, most: int) -> tuple[int, tuple[Batch, ...]]:
    """Return the length of scratch memory, `most` or less, and the batches that fill it."""
    padded = [-(-size // PARTIAL) * PARTIAL for size in layout.sizes]
    length = min(most, sum(padded))
    done: list[Batch] = []
    copies: list[tuple[int, int, int, int, int]] = []
    filled = 0
    for tensor, (offset, size) in enumerate(zip(*layout, strict=True)):
        start, end = offset, offset + size
        while start < end:
            stop = min(start + length - filled, end)
            until = filled - (start - stop) // PARTIAL * PARTIAL
            copies.append((tensor, start, stop, filled, until))
            start, filled = stop, until
            if filled == length:
                done.append(_batch_of(copies))
                copies, filled = [], 0
    if copies:
        done.append(_batch_of(copies))
    return length, tuple(done)


def _batch_of(copies: Sequence[tuple[int, int, int, int, int]]) -> Batch:
    first, last = copies[0][0], copies[-1][0]  # with the empty tensors between them
    partials = [0] * (last - first + 1)
    for tensor, _, _, filled, until in copies:
        partials[tensor - first] = (until - filled) // PARTIAL
    return Batch(first, last, tuple(partials), tuple(copy[1:] for copy in copies))


def flat(tensors: Sequence[Tensor | None], layout: Layout) -> list[Tensor | None]:
    """Return tensors without gaps as vectors of their elements, in memory order."""
    return [
        None if tensor is None else tensor.detach().as_strided((size,), (1,))
        for tensor, size in zip(tensors, layout.sizes, strict=True)
    ]
