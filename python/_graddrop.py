"""graddrop: of every element one sign is kept, and only gradients of that sign are added up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.random import start_of, uniform
from gcond_kernels.ops.types import Momentum, SignDropout, TaskGradients
from gcond_kernels.python._combine import count_steps, output_factors, write, write_zeros
from gcond_kernels.python.chunks import chunks_of, computed_in, flattened


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
    wide = computed_in(accumulators.dtype)
    scales = scale.to(wide).tolist()
    origin = start_of(dropout.seed, dropout.counter)
    for tensor, own, flat in chunks_of(layout):
        output = outputs[tensor]
        if output is None:
            continue
        places = torch.arange(flat.start, flat.stop, device=accumulators.device) + dropout.first
        random = uniform(origin, places).to(wide)
        resolved = sum_of_one_sign(accumulators[:, flat], scales, random, dropout.leak)
        write(flattened(output)[own], resolved, flat, momentum, mask, factors[tensor])


def sum_of_one_sign(
    accumulators: Tensor, scales: Sequence[float], random: Tensor, leak: float
) -> Tensor:
    """Return Σ_k (leak + (1 - leak) · kept_k) · scales[k] · accumulators[k], of `random`'s type.

    In this order, and with no product fused into a sum: the kernels round alike, and so keep the
    same.
    """
    pairs = zip(accumulators, scales, strict=True)
    values = [accumulator.to(random.dtype) * s for accumulator, s in pairs if s != 0.0]
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
