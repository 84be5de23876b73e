"""Flat storage for tests, with tensors filled so that an unwritten element shows."""

import math
from dataclasses import dataclass

import torch

ALIGNMENT = 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What one rounding to a type costs, relative, and absolute below its normal range.
ROUNDING = {
    torch.float64: (0.0, 0.0),
    torch.float32: (0.0, 0.0),
    torch.bfloat16: (2.0**-8, 1e-38),
    torch.float16: (2.0**-11, 2.0**-24),
}

# What one rounding costs of sums of accumulators of a type.
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float64: 2.0**-53}


def rounding(written: torch.dtype, accumulated: torch.dtype) -> tuple[float, float]:
    """What one rounding of a sum of accumulators costs: relative, and absolute where tiny."""
    if accumulated == torch.float64 and written == torch.float32:
        return UNITS[torch.float32], 1e-38
    return ROUNDING[written]


@dataclass(frozen=True)
class Layout:
    offsets: list[int]
    sizes: list[int]
    length: int

    def mask(self) -> torch.Tensor:
        """Return which elements of flat storage belong to a segment."""
        mask = torch.zeros(self.length, dtype=torch.bool)
        for offset, size in zip(self.offsets, self.sizes, strict=True):
            mask[offset : offset + size] = True
        return mask

    def split(self, storage: torch.Tensor) -> list[torch.Tensor]:
        return [storage[o : o + s] for o, s in zip(self.offsets, self.sizes, strict=True)]


def layout_of(sizes: list[int]) -> Layout:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return Layout(offsets, list(sizes), end)


def packed_layout_of(sizes: list[int]) -> Layout:
    """Return segments without gaps: hardly any begins where a vector may."""
    offsets = [sum(sizes[:t]) for t in range(len(sizes))]
    return Layout(offsets, list(sizes), sum(sizes))


def random_mask(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which elements are trainable, [N'] bool, and the same in bits, [N' / 32] int32.

    Single elements here and there, runs of them, and all of some words or none.
    """
    generator = torch.Generator().manual_seed(seed)
    words = -(-length // 32)
    share = torch.tensor([0.0, 0.5, 0.9, 1.0])[torch.randint(4, (words, 1), generator=generator)]
    bits = torch.rand(words, 32, generator=generator) < share
    mask = (bits.long() << torch.arange(32)).sum(1)
    return bits.flatten()[:length], (mask - (mask >> 31 << 32)).to(torch.int32)


def filled(layout: Layout, count: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    """Return random flat storage [count, N'] with zeros between the segments."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, layout.length, generator=generator) * layout.mask()
    return values.double() / 3.0 if dtype == torch.float64 else values.to(dtype)


def unwritten(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values one element away from an aligned address."""
    buffer = unwritten(tensor.numel() + 1, dtype=tensor.dtype)
    buffer[1:] = tensor
    return buffer[1:]
