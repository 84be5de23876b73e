"""combine: one weighted sum of the accumulators is written as the gradient of every parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.mask import trainable
from gcond_kernels.ops.types import Momentum, Rescale, TaskGradients
from gcond_kernels.python.chunks import chunk_length, chunks_of, flat


def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> None:
    """Write gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    accumulators, layout, scale, _, mask = gradients
    if not bool(finite):  # on a GPU this synchronizes; the kernels branch there instead
        write_zeros(outputs)
        return
    count_steps(outputs, momentum)
    factors = output_factors(outputs, weights, momentum, rescale).to(torch.float32)
    unit = (factors == 1.0).tolist()
    beta = 0.0 if momentum is None else momentum.beta
    # For a Python number `mul` makes a tensor and converts it, for every chunk anew.
    decay, tensor_factors = factors.new_tensor(beta), factors.unbind()
    weight_lists = ((1.0 - beta) * weights * scale).expand(len(outputs), -1).tolist()
    to_keep = new_history(gradients)
    targets = flat(outputs, layout)
    length = chunk_length(len(scale) + 2, accumulators.device)
    for tensor, start, stop, first in chunks_of(layout, length):
        for history, accumulator in to_keep:  # before the output, which may lie in an accumulator
            history[..., start:stop] = accumulator[..., start:stop]
        target = targets[tensor]
        if target is None:
            continue
        target = target[first : first + stop - start]
        if momentum is None:
            total = (
                target
                if target.dtype == torch.float32
                else torch.empty_like(target, dtype=torch.float32)
            )
        else:
            total = momentum.buffer[start:stop].mul_(decay)
        add_weighted(accumulators[:, start:stop], weight_lists[tensor], total, momentum is not None)
        if mask is not None:
            total.masked_fill_(~trainable(mask, start, stop), 0.0)
        if total is not target:
            torch.mul(total, tensor_factors[tensor], out=target)
        elif not unit[tensor]:
            target.mul_(tensor_factors[tensor])


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


def new_history(gradients: TaskGradients) -> list[tuple[Tensor, Tensor]]:
    """Return the histories, [N'] or all in one, with the accumulators that they receive."""
    accumulators, _, scale, history, _ = gradients
    if history is None:
        return []
    active = [task for task, s in enumerate(scale.tolist()) if s != 0.0]
    if len(active) == len(scale):
        return [(history, accumulators)]
    return [(history[task], accumulators[task]) for task in active]


def add_weighted(
    accumulators: Tensor, weights: Sequence[float], total: Tensor, started: bool
) -> None:
    """Add Σ_k weights[k] · accumulators[k] in float32 to `total`, or set it; skip weights of 0."""
    for accumulator, weight in zip(accumulators, weights, strict=True):
        if weight == 0.0:
            continue
        if started:
            total.add_(accumulator, alpha=weight)
        else:
            torch.mul(accumulator.to(torch.float32), weight, out=total)  # not in bfloat16
            started = True
    if not started:
        total.zero_()


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
