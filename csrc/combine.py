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
    tasks, device = accumulators.shape[0], accumulators.device
    all_parts = [(part, _cuda.Addresses(outputs[part])) for part in parts(len(sizes))]
    with tables.guard(device):
        factors, clipping = factors_of(
            per_tensor, weights, finite, all_parts, momentum_steps, beta, max_norm,
            parameter_norms, trust_ratio_coef, trust_ratio_clip,
        )  # fmt: skip
        for part, addresses in all_parts:
            which = cut(tuple(offsets[part]), tuple(sizes[part]), _cuda.COMBINE_CHUNK, device)
            which.keep_if_captured()
            _cuda.combine(
                *place_of(device),
                which.pieces,
                tasks,
                accumulators,
                history,
                momentum,
                mask,
                scale,
                None if factors is None else factors[part],
                beta,
                parameter_norms is not None,
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
