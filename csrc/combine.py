"""combine: one weighted sum of the accumulators is written as the gradient of every parameter.

All parameters in one launch, whatever their types, with momentum and history in the same pass.
Where the size of a tensor's gradient must be known first (momentum, clipping, trust ratios),
launches on T numbers go before it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import cut, parts, place_of
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Momentum, Rescale, TaskGradients


def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> None:
    """Writes gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    accumulators, (offsets, sizes), scale, history, mask = gradients
    buffer, momentum_steps, beta = (None, None, 0.0) if momentum is None else momentum
    max_norm, per_tensor = (None, scale.new_empty(len(sizes), 0, 0)) if rescale is None else rescale
    tasks, device = accumulators.shape[0], accumulators.device
    all_parts = [(part, _cuda.Addresses(outputs[part])) for part in parts(len(sizes))]
    with tables.guard(device):
        factors, clipping = factors_of(
            per_tensor, weights, finite, all_parts, momentum_steps, beta, max_norm,
            None, 0.0, 0.0,
        )  # fmt: skip
        for part, addresses in all_parts:
            which = cut(offsets[part], sizes[part], _cuda.COMBINE_CHUNK, device)
            which.keep_if_captured()
            _cuda.combine(
                *place_of(device),
                which.pieces,
                tasks,
                accumulators,
                history,
                buffer,
                mask,
                scale,
                None if factors is None else factors[part],
                beta,
                False,
                weights_of(weights, part),
                finite,
                clipping,
                addresses,
            )


def weights_of(weights: Tensor, part: slice) -> Tensor:
    """Those of the tensors of a launch, where each has its own."""
    return weights if weights.dim() == 1 else weights[part]


def factors_of(
    per_tensor: Tensor,
    weights: Tensor,
    finite: Tensor,
    all_parts: Sequence[tuple[slice, _cuda.Addresses]],
    momentum_steps: Tensor | None,
    beta: float,
    max_norm: float | None,
    parameter_norms: Tensor | None,
    trust_ratio_coef: float,
    trust_ratio_clip: float,
) -> tuple[Tensor | None, Tensor | None]:
    """[T] factors of the tensors and the factor [] of all; None where there is none."""
    tensors, tasks, device = len(per_tensor), weights.shape[-1], weights.device
    norms = max_norm is not None or parameter_norms is not None
    if not tensors or (momentum_steps is None and not norms):
        return None, None
    factors, squares = torch.empty((2, tensors), dtype=torch.float64, device=device)
    for part, addresses in all_parts:
        arguments = _cuda.Factors(
            tasks,
            part.stop - part.start,
            tasks + (momentum_steps is not None),
            per_tensor[part],
            None if momentum_steps is None else momentum_steps[part],
            None if parameter_norms is None else parameter_norms[part],
            factors[part],
            squares[part],
            beta,
            trust_ratio_coef,
            trust_ratio_clip,
            norms,
        )
        own = weights_of(weights, part)
        _cuda.factors(*place_of(device), arguments, own, finite, addresses)
    if max_norm is None:
        return factors, None
    clipping = torch.empty((), dtype=torch.float64, device=device)
    _cuda.clipping(*place_of(device), squares, tensors, max_norm, clipping)
    return factors, clipping
