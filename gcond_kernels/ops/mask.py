"""The trainable mask: a bit for each element of flat storage."""

import torch
from torch import Tensor

from gcond_kernels.ops.types import WORD_BITS


def trainable(mask: Tensor, start: int, stop: int) -> Tensor:
    """Return which elements from `start` to `stop` are trained, as bool."""
    words = mask[start // WORD_BITS : -(-stop // WORD_BITS)]
    bits = words[:, None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=mask.device) & 1
    return bits.flatten()[start % WORD_BITS :][: stop - start] == 1
