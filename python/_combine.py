"""combine: one weighted sum of the accumulators is written as the gradient of every parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.mask import trainable
from gcond_kernels.ops.types import Momentum, Rescale, TaskGradients, within_range
from gcond_kernels.python.chunks import chunks_of, computed_in, flattened


def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> None:
    """Write gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    accumulators, layout, scale, history, mask = gradients
    if not bool(finite):  # on a GPU this synchronizes; the kernels branch there instead
        write_zeros(outputs)
        return
    count_steps(outputs, momentum)
    factors = output_factors(outputs, weights, momentum, rescale).tolist()
    weight_lists = (weights * scale).expand(len(outputs), -1).tolist()
    active = [task for task, s in enumerate(scale.tolist()) if s != 0.0]
    for tensor, own, flat in chunks_of(layout):
        if history is not None:  # before the output, which may lie in an accumulator
            for task in active:
                history[task, flat] = within_range(accumulators[task, flat], history.dtype)
        output = outputs[tensor]
        if output is None:
            continue
        resolved = weighted_sum(accumulators[:, flat], weight_lists[tensor])
        write(flattened(output)[own], resolved, flat, momentum, mask, factors[tensor])


def weighted_sum(accumulators: Tensor, weights: Sequence[float]) -> Tensor:
    """Return Σ_k weights[k] · accumulators[k] in float32 or float64; weights of 0 read nothing."""
    total = torch.zeros_like(accumulators[0], dtype=computed_in(accumulators.dtype))
    for accumulator, weight in zip(accumulators, weights, strict=True):
        if weight != 0.0:
            total.add_(accumulator, alpha=weight)
    return total


def write(
    target: Tensor,
    resolved: Tensor,
    flat: slice,
    momentum: Momentum | None,
    mask: Tensor | None,
    factor: float,
) -> None:
    """Write a chunk of the resolved gradient g: the momentum m ← β m + (1-β) g, times `factor`."""
    if momentum is not None:
        buffer, beta = momentum.buffer[flat], momentum.beta
        # No product fused into the sum: the kernels of graddrop round alike.
        resolved = buffer.mul_(beta).add_(resolved * (1.0 - beta))
    if mask is not None:
        resolved.masked_fill_(~trainable(mask, flat.start, flat.stop), 0.0)
    target.copy_(resolved * factor)


def write_zeros(outputs: Sequence[Tensor | None]) -> None:
    """Set all outputs to zero."""
    for output in outputs:
        if output is not None:
            output.zero_()


def count_steps(outputs: Sequence[Tensor | None], momentum: Momentum | None) -> None:
    """Count a step of momentum for each tensor that is written."""
    if momentum is not None:
        written = [output is not None for output in outputs]
        momentum.steps.add_(torch.tensor(written, dtype=torch.bool, device=momentum.steps.device))


def output_factors(
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> Tensor:
    """Return what multiplies the momentum m of each tensor in the write, [T] float64.

    The bias correction 1 / (1 - β^t), times the factor that keeps the norm within its bound. The
    norm of m̂ per tensor needs no pass over memory: with v = (1-β) w, and β for the old momentum,
    ‖m‖² = vᵀ G v for that tensor's Gramian G.
    """
    correction, beta = weights.new_ones(len(outputs)), 0.0
    if momentum is not None:
        # A tensor that never had a gradient has t = 0 and is not written: any factor will do.
        beta = momentum.beta
        correction = 1.0 / (1.0 - beta ** momentum.steps.clamp(min=1).double())
    if rescale is None:
        return correction
    v = ((1.0 - beta) * weights).expand(len(outputs), -1)  # [T, K]
    if momentum is not None:
        v = torch.cat([v, v.new_full((len(v), 1), beta)], dim=1)
    squares = torch.einsum("ti,tij,tj->t", v, rescale.per_tensor, v).clamp(min=0.0) * correction**2
    written = [output is not None for output in outputs]
    norm = squares[torch.tensor(written, dtype=torch.bool, device=v.device)].sum().sqrt()
    return correction * (rescale.max_norm / norm).clamp(max=1.0)
