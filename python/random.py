"""Random numbers that are a function of a seed, a count of draws and a place: SplitMix64.

No generator is advanced: every element finds its own number, in any order and on any device, to the
same bits. The numbers from place 0 on are SplitMix64's (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), started at a mixture of seed and draws.
"""

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB

# Bits of a random number, plus one half: so many that float32 holds each of them exactly.
RANDOM_BITS = 23


def signed(value: int) -> int:
    """The int64 of the same bits as an unsigned number below 2^64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shifted_right(bits: Tensor, places: int) -> Tensor:
    """An int64 as if it were unsigned, shifted."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer of int64 numbers, whose products wrap."""
    bits = (bits ^ shifted_right(bits, 30)) * signed(FIRST_FACTOR)
    bits = (bits ^ shifted_right(bits, 27)) * signed(SECOND_FACTOR)
    return bits ^ shifted_right(bits, 31)


def start_of(seed: int, draws: Tensor) -> Tensor:
    """Where the numbers of one draw start: [] int64, from a count of draws [] int64."""
    return mixed(draws * signed(GAMMA) + signed(seed % (1 << 64)))


def uniform(start: Tensor, places: Tensor) -> Tensor:
    """Random numbers in (0, 1), odd multiples of 2^-24: float32, one for each place (int64)."""
    bits = mixed(start + (places + 1) * signed(GAMMA))
    return (shifted_right(bits, 64 - RANDOM_BITS).to(torch.float32) + 0.5) * 2.0**-RANDOM_BITS
