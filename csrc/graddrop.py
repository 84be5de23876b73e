"""graddrop: of every element one sign is picked, and only gradients of that sign are added up.

All parameters in one launch, whatever their types, with the momentum in the same pass. Before it a
launch on T numbers goes, where there is a momentum to correct.
"""

from collections.abc import Sequence

from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.combine import factors_of
from gcond_kernels.cuda.launch import cut, parts, place_of
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Momentum, SignDropout, TaskGradients

# What the kernel counts with.
UNSIGNED = 1 << 64


def graddrop(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    finite: Tensor,
    dropout: SignDropout,
    momentum: Momentum | None,
) -> None:
    """Writes gradients and momentum; see `gcond_kernels.ops.graddrop`."""
    accumulators, (offsets, sizes), scale, _, mask = gradients
    buffer, momentum_steps, beta = (None, None, 0.0) if momentum is None else momentum
    seed, draws, leak, first = dropout
    tasks, device = accumulators.shape[0], accumulators.device
    all_parts = [(part, _cuda.Addresses(outputs[part])) for part in parts(len(sizes))]
    no_products = scale.new_empty(len(sizes), 0, 0)
    with tables.guard(device):
        factors, _ = factors_of(
            no_products, scale, finite, all_parts, momentum_steps, beta, None, None, 0.0, 0.0
        )
        for part, addresses in all_parts:
            which = cut(offsets[part], sizes[part], _cuda.COMBINE_CHUNK, device)
            which.keep_if_captured()
            _cuda.graddrop(
                *place_of(device),
                which.pieces,
                tasks,
                accumulators,
                buffer,
                mask,
                scale,
                None if factors is None else factors[part],
                beta,
                leak,
                seed % UNSIGNED,
                draws,
                first % UNSIGNED,
                finite,
                addresses,
            )
