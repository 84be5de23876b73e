"""Streams, and the tables that assign each block its chunk of a tensor."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.types import Layout


def stream_of(device: torch.device) -> tuple[int, int]:
    """Return the number of a GPU and the handle of its current stream; (-1, 0) for the host."""
    if device.type == "cpu":
        return -1, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


class ChunkTables(NamedTuple):
    """How segments are divided into chunks, a block each.

    Attributes:
        chunks: what a launch takes: the addresses of the tables.
        total: number of chunks.
        tables: the tensors that hold the tables.
    """

    chunks: _cuda.Chunks
    total: int
    tables: tuple[Tensor, ...]


def chunk_tables(layout: Layout, length: int, device: torch.device) -> ChunkTables:
    """Return the tables that divide segments into chunks of `length` elements."""
    made = _chunk_tables(layout, length, device)
    launch_tables.keep_if_captured(*made.tables)
    return made


@functools.lru_cache(maxsize=launch_tables.REMEMBERED)
def _chunk_tables(layout: Layout, length: int, device: torch.device) -> ChunkTables:
    segments = launch_tables.to_device(np.array(layout, dtype=np.int64).T, device)
    table, first, total = launch_tables.chunk_table(layout.sizes, length, device)
    chunks = _cuda.Chunks(segments, table, first, len(layout.sizes), total, length)
    return ChunkTables(chunks, total, (segments, table, first))


def launches(tensors: int) -> Iterator[slice]:
    """Yield which tensors go into which launch: each holds the addresses of MAX_TENSORS."""
    for start in range(0, tensors, _cuda.MAX_TENSORS):
        yield slice(start, min(start + _cuda.MAX_TENSORS, tensors))
