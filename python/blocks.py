"""Cuts the segments of a flat accumulator into blocks that stay in the processor's cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.types import WORD_BITS

# Elements of scratch memory that one block may fill, over all rows: 2^21 float32 are
# 8 MB, a share of the last-level cache; smaller blocks pay more per call than they gain.
SCRATCH_ELEMENTS = 1 << 21

# On a GPU what counts is the number of launches: 128 MB.
SCRATCH_ELEMENTS_ON_GPU = 1 << 25

# Length of one float32 partial sum, and what a block's length is a multiple of.
PARTIAL = 4096


def blocks(
    offsets: Sequence[int], sizes: Sequence[int], rows: int, device: torch.device
) -> Iterator[tuple[int, int, int]]:
    """Yields (tensor, start, stop) of every block, in memory order.

    Args:
        offsets: where each tensor's segment starts, in elements.
        sizes: how many elements each segment has; empty ones yield nothing.
        rows: how many rows of scratch memory the caller fills per block.
        device: where it works.
    """
    length = block_length(rows, device)
    for tensor, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        for start in range(offset, offset + size, length):
            yield tensor, start, min(start + length, offset + size)


def batches(
    offsets: Sequence[int], sizes: Sequence[int], length: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yields (tensor, start, stop) of what fills `length` elements, in memory order.

    Every piece takes up whole partial sums: of small tensors there are many to a batch.
    """
    batch, free = [], length
    for tensor, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        start, end = offset, offset + size
        while start < end:
            stop = min(start + free, end)
            batch.append((tensor, start, stop))
            free -= whole_partials(stop - start)
            start = stop
            if free == 0:
                yield batch
                batch, free = [], length
    if batch:
        yield batch


def block_length(rows: int, device: torch.device) -> int:
    """Elements of a block that fills `rows` rows of scratch memory: a multiple of PARTIAL."""
    scratch = SCRATCH_ELEMENTS if device.type == "cpu" else SCRATCH_ELEMENTS_ON_GPU
    return max(1, scratch // rows // PARTIAL) * PARTIAL


def whole_partials(elements: int) -> int:
    """The next multiple of PARTIAL."""
    return -(-elements // PARTIAL) * PARTIAL


def trained(mask: Tensor, start: int, stop: int) -> Tensor:
    """Which elements from `start` to `stop` of a row are trained, of a mask [N' / 32]: bool."""
    words = mask[start // WORD_BITS : -(-stop // WORD_BITS)]
    bits = words[:, None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=mask.device) & 1
    return bits.flatten()[start % WORD_BITS :][: stop - start] == 1


def in_memory_order(tensor: Tensor, start: int, length: int) -> Tensor:
    """Elements [length] from `start` on of a tensor without gaps, as its memory has them."""
    return tensor.detach().as_strided((length,), (1,), tensor.storage_offset() + start)
