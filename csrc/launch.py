"""Where a launch goes, and the tables that say which block does what."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.ops import launch_tables as tables

Place = tuple[int, int]
ON_HOST: Place = (-1, 0)


def place_of(device: torch.device) -> Place:
    """The number of the GPU and the handle of its current stream."""
    if device.type == "cpu":
        return ON_HOST
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


class Cut(NamedTuple):
    """Tensors cut into pieces, a block each.

    Attributes:
        pieces: what the module takes: the addresses of the tables.
        segments: [T, 2] int64: offset and size of each tensor.
        chunks: which block takes which piece.
    """

    pieces: _cuda.Pieces
    segments: Tensor
    chunks: tables.Chunks

    def keep_if_captured(self) -> None:
        """Holds on to the tables that a graph under capture will read at every replay."""
        tables.keep_if_captured(self.segments, self.chunks.table, self.chunks.first)


@functools.lru_cache(maxsize=tables.REMEMBERED)
def cut(offsets: tuple[int, ...], sizes: tuple[int, ...], length: int, device: torch.device) -> Cut:
    """Cuts tensors at these places of flat storage into pieces of `length` elements."""
    segments = tables.to_device(np.array([offsets, sizes], dtype=np.int64).T, device)
    chunks = tables.chunk_table(sizes, length, device)
    pieces = _cuda.Pieces(segments, chunks.table, chunks.first, len(sizes), chunks.total, length)
    return Cut(pieces, segments, chunks)


def parts(tensors: int, most: int = _cuda.MOST_TENSORS) -> Iterator[slice]:
    """Which tensors go into which launch: their addresses travel with it, and it holds so many."""
    for start in range(0, tensors, most):
        yield slice(start, min(start + most, tensors))
