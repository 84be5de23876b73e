"""graddrop: of every element one sign is picked, and only gradients of that sign are added up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.random import start_of, uniform
from gcond_kernels.python.blocks import blocks, in_memory_order, trained
from gcond_kernels.python.combine import output_factors


def graddrop(
    accumulators: Tensor,
    scale: Tensor,
    finite: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    momentum: Tensor | None,
    momentum_steps: Tensor | None,
    beta: float,
    mask: Tensor | None,
    leak: float,
    seed: int,
    draws: Tensor,
    first: int,
) -> None:
    """Writes gradients and momentum; see `gcond_kernels.ops.graddrop`."""
    if not bool(finite):  # on a GPU this waits for the device; the kernels branch there instead
        for output in outputs:
            if output is not None:
                output.zero_()
        return
    written = torch.tensor(
        [output is not None for output in outputs], dtype=torch.bool, device=scale.device
    )
    if momentum_steps is not None:
        momentum_steps += written
    factors = output_factors(
        scale.new_empty(len(sizes), 0, 0),
        scale,
        written,
        momentum_steps,
        beta,
        None,
        None,
        0.0,
        0.0,
    ).tolist()
    row_scale = scale.to(torch.float32).tolist()
    origin = start_of(seed, draws)
    for tensor, start, stop in blocks(
        offsets, sizes, accumulators.shape[0] + 6, accumulators.device
    ):
        output = outputs[tensor]
        if output is None:
            continue
        places = torch.arange(first + start, first + stop, device=accumulators.device)
        total = picked(accumulators[:, start:stop], row_scale, uniform(origin, places), leak)
        if momentum is not None:
            total = momentum[start:stop].mul_(beta).add_(total * (1.0 - beta))
        if mask is not None:
            total.masked_fill_(~trained(mask, start, stop), 0.0)
        target = in_memory_order(output, start - offsets[tensor], stop - start)
        torch.mul(total, factors[tensor], out=target)


def picked(rows: Tensor, scale: Sequence[float], random: Tensor, leak: float) -> Tensor:
    """Σ_k (leak + (1 - leak) · kept_k) · scale_k · row_k in float32.

    In this order, and with no product fused into a sum: the kernels round alike, and so pick alike.
    """
    values = [row.to(torch.float32) * s for row, s in zip(rows, scale, strict=True) if s != 0.0]
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
