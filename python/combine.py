"""combine: one weighted sum of the accumulators is written as the gradient of every parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.python.blocks import blocks, in_memory_order, trained

# Below this norm a trust ratio is 1: a tensor of zeros has no scale to keep to.
TRUST_RATIO_EPS = 1e-8


def combine(
    accumulators: Tensor,
    weights: Tensor,
    scale: Tensor,
    finite: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    history: Tensor | None,
    momentum: Tensor | None,
    momentum_steps: Tensor | None,
    beta: float,
    per_tensor: Tensor,
    max_norm: float | None,
    parameter_norms: Tensor | None,
    trust_ratio_coef: float,
    trust_ratio_clip: float,
    mask: Tensor | None,
) -> None:
    """Writes gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    if not bool(finite):  # on a GPU this waits for the device; the kernels branch there instead
        for output in outputs:
            if output is not None:
                output.zero_()
        return
    written = torch.tensor(
        [output is not None for output in outputs], dtype=torch.bool, device=weights.device
    )
    if momentum_steps is not None:
        momentum_steps += written
    factors = output_factors(
        per_tensor, weights, written, momentum_steps, beta, max_norm,
        parameter_norms, trust_ratio_coef, trust_ratio_clip,
    ).to(torch.float32)  # fmt: skip
    unit = (factors == 1.0).tolist()
    # For a Python number `mul` makes a tensor and converts it, for every block anew.
    decay, tensor_factors = factors.new_tensor(beta), factors.unbind()
    # [T, K]; where all tensors have the same weights these are listed once.
    row_weights = ((1.0 - beta) * weights * scale).view(-1, len(scale)).tolist()
    signs = parameter_norms is not None
    taking_part = [task for task, s in enumerate(scale.tolist()) if s != 0.0]
    rows = accumulators.unbind()

    for tensor, start, stop in blocks(
        offsets, sizes, accumulators.shape[0] + 2, accumulators.device
    ):
        # Before the output is written, which may lie in a row of the accumulators.
        if history is not None:
            if len(taking_part) == len(scale):
                history[:, start:stop] = accumulators[:, start:stop]
            else:
                for task in taking_part:
                    history[task, start:stop] = accumulators[task, start:stop]
        output = outputs[tensor]
        if output is not None:
            first = offsets[tensor]
            target = in_memory_order(output, start - first, stop - start)
            own_weights = row_weights[tensor if len(row_weights) > 1 else 0]
            if momentum is None:
                total = target if target.dtype == torch.float32 and not signs else None
                total = weighted_rows(accumulators[:, start:stop], own_weights, total)
            else:
                total = momentum[start:stop].mul_(decay)
                for row, weight in zip(rows, own_weights, strict=True):
                    if weight != 0.0:
                        total.add_(row[start:stop], alpha=weight)
            if mask is not None:
                total.masked_fill_(~trained(mask, start, stop), 0.0)
            direction = total.sign() if signs else total
            if direction is not target:
                torch.mul(direction, tensor_factors[tensor], out=target)
            elif not unit[tensor]:
                target.mul_(tensor_factors[tensor])


def weighted_rows(rows: Tensor, weights: Sequence[float], total: Tensor | None) -> Tensor:
    """Σ_k weights[k] · rows[k] in float32, into `total` where given. A zero weight is not read."""
    if total is None:
        total = torch.empty(rows.shape[1], dtype=torch.float32, device=rows.device)
    started = False
    for row, weight in zip(rows, weights, strict=True):
        if weight == 0.0:
            continue
        if started:
            total.add_(row, alpha=weight)
        else:
            torch.mul(row.to(torch.float32), weight, out=total)  # not in the row's own bfloat16
            started = True
    return total if started else total.zero_()


def output_factors(
    per_tensor: Tensor,
    weights: Tensor,
    written: Tensor,
    momentum_steps: Tensor | None,
    beta: float,
    max_norm: float | None,
    parameter_norms: Tensor | None,
    trust_ratio_coef: float,
    trust_ratio_clip: float,
) -> Tensor:
    """What multiplies the new momentum m (or its sign) of each tensor in the write: [T] float64.

    The bias correction 1 / (1 - β^t), times the clipping factor or the trust ratio. The norm
    of m̂ per tensor needs no pass over memory: with v = (1-β) w, and β for the row of the old
    momentum, ‖m‖² = vᵀ G v for that tensor's Gramian G.
    """
    tensors, rows = per_tensor.shape[:2]
    correction = per_tensor.new_ones(tensors)
    if momentum_steps is not None:
        # A tensor that never had a gradient has t = 0 and is not written: any factor will do.
        correction = 1.0 / (1.0 - beta ** momentum_steps.clamp(min=1).double())
    if max_norm is None and parameter_norms is None:
        return correction

    v = ((1.0 - beta) * weights).expand(tensors, -1)  # [T, K]
    if rows > v.shape[1]:
        v = torch.cat([v, v.new_full((tensors, 1), beta)], dim=1)
    squares = torch.einsum("ti,tij,tj->t", v, per_tensor, v).clamp(min=0.0) * correction**2
    if max_norm is not None:
        total = squares[written].sum().sqrt()
        return correction * (max_norm / total).clamp(max=1.0)
    assert parameter_norms is not None
    norms = squares.sqrt()
    ratio = (parameter_norms / norms).clamp(max=trust_ratio_clip)
    tiny = (norms < TRUST_RATIO_EPS) | (parameter_norms < TRUST_RATIO_EPS)
    return trust_ratio_coef * torch.where(tiny, 1.0, ratio)
