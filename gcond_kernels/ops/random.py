"""Random numbers that are a function of a seed, a counter and a place alone: SplitMix64.

Every element finds its own number, in any order, in every backend and on any device, to the same
bits. The numbers from place 0 on are SplitMix64's (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), started at a mixture of seed and counter.
"""

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB

# Bits of a random number, plus one half: so many that float32 holds each of them exactly.
RANDOM_BITS = 23


def signed(value: int) -> int:
    """Return the int64 of the same bits as an unsigned number below 2^64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shifted_right(bits: Tensor, places: int) -> Tensor:
    """Return an int64 shifted as if it were unsigned."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def mixed(bits: Tensor) -> Tensor:
    """Return SplitMix64's finalizer of int64 numbers, whose products wrap."""
    bits = (bits ^ shifted_right(bits, 30)) * signed(FIRST_FACTOR)
    bits = (bits ^ shifted_right(bits, 27)) * signed(SECOND_FACTOR)
    return bits ^ shifted_right(bits, 31)


def start_of(seed: int, counter: Tensor) -> Tensor:
    """Return where the numbers of one step start, [] int64; the counter of steps is [] int64."""
    return mixed(counter * signed(GAMMA) + signed(seed % (1 << 64)))


def uniform(start: Tensor, places: Tensor) -> Tensor:
    """Return random numbers in (0, 1) for int64 places: float32, odd multiples of 2^-24."""
    bits = mixed(start + (places + 1) * signed(GAMMA))
    return (shifted_right(bits, 64 - RANDOM_BITS).to(torch.float32) + 0.5) * 2.0**-RANDOM_BITS
