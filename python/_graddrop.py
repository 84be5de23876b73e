"""graddrop: of every element one sign is kept, and only gradients of that sign are added up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.mask import trainable
from gcond_kernels.ops.random import start_of, uniform
from gcond_kernels.ops.types import Momentum, SignDropout, TaskGradients
from gcond_kernels.python._combine import count_steps, output_factors, write_zeros
from gcond_kernels.python.chunks import chunk_length, chunks_of, flat


def graddrop(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    finite: Tensor,
    dropout: SignDropout,
    momentum: Momentum | None,
) -> None:
    """Write gradients and momentum; see `gcond_kernels.ops.graddrop`."""
    accumulators, layout, scale, _, mask = gradients
    if not bool(finite):  # on a GPU this synchronizes; the kernels branch there instead
        write_zeros(outputs)
        return
    count_steps(outputs, momentum)
    factors = output_factors(outputs, scale, momentum, None).tolist()
    scales = scale.to(torch.float32).tolist()
    origin = start_of(dropout.seed, dropout.counter)
    length = chunk_length(len(scales) + 6, accumulators.device)
    targets = flat(outputs, layout)
    for tensor, start, stop, first in chunks_of(layout, length):
        target = targets[tensor]
        if target is None:
            continue
        places = torch.arange(
            dropout.first + start, dropout.first + stop, device=accumulators.device
        )
        random = uniform(origin, places)
        total = sum_of_one_sign(accumulators[:, start:stop], scales, random, dropout.leak)
        if momentum is not None:
            buffer = momentum.buffer[start:stop].mul_(momentum.beta)
            total = buffer.add_(total * (1.0 - momentum.beta))
        if mask is not None:
            total.masked_fill_(~trainable(mask, start, stop), 0.0)
        torch.mul(total, factors[tensor], out=target[first : first + stop - start])


def sum_of_one_sign(
    accumulators: Tensor, scales: Sequence[float], random: Tensor, leak: float
) -> Tensor:
    """Return Σ_k (leak + (1 - leak) · kept_k) · scales[k] · accumulators[k] in float32.

    In this order, and with no product fused into a sum: the kernels round alike, and so keep the
    same.
    """
    pairs = zip(accumulators, scales, strict=True)
    values = [accumulator.to(torch.float32) * s for accumulator, s in pairs if s != 0.0]
    total, size = torch.zeros_like(random), torch.zeros_like(random)
    for value in values:
        total += value
        size += value.abs()
    # The purity P = (1 + total / size) / 2 is above the random U where total > (2 U - 1) size.
    bar = (2.0 * random - 1.0) * size
    positive, negative = total > bar, total < bar
    result = torch.zeros_like(random)
    for value in values:
        kept = (positive & (value > 0.0)) | (negative & (value < 0.0))
        result += torch.where(kept, value, value * leak)
    return result
