"""combine: writes the weighted sum of the accumulators as the gradient of every parameter.

All parameters in one launch, whatever their types, with momentum and history in the same pass.
With momentum or clipping, launches on T numbers go before it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import chunk_tables, launches, stream_of
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.types import Layout, Momentum, Rescale, TaskGradients


class Resolution(NamedTuple):
    """What was resolved, for the tensors of a launch.

    Attributes:
        weights: [K] float64, or [T, K]: each tensor's own.
        finite: [] bool.
        clip_factor: [] float64, which multiplies all outputs; None is 1.
    """

    weights: Tensor
    finite: Tensor
    clip_factor: Tensor | None = None

    def of(self, launch: slice) -> "Resolution":
        """Return that of the tensors of one launch."""
        return self if self.weights.dim() == 1 else self._replace(weights=self.weights[launch])


def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> None:
    """Write gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    device, layout = gradients.accumulators.device, gradients.layout
    lists = [(launch, _cuda.TensorList(outputs[launch])) for launch in launches(len(layout.sizes))]
    resolution = Resolution(weights, finite)
    with launch_tables.guard(device):
        factors = None
        if lists and (momentum is not None or rescale is not None):
            factors, squares = torch.empty(
                (2, len(layout.sizes)), dtype=torch.float64, device=device
            )
            for launch, tensors in lists:
                _cuda.find_factors(
                    stream_of(device),
                    tensors,
                    resolution.of(launch),
                    None if momentum is None else momentum._replace(steps=momentum.steps[launch]),
                    None if rescale is None else rescale.per_tensor[launch],
                    factors[launch],
                    squares[launch],
                )
            if rescale is not None:
                clip_factor = torch.empty_like(squares[0])
                _cuda.find_clip_factor(stream_of(device), squares, rescale.max_norm, clip_factor)
                resolution = resolution._replace(clip_factor=clip_factor)
        for launch, tensors in lists:
            own = Layout(layout.offsets[launch], layout.sizes[launch])
            _cuda.combine(
                stream_of(device),
                chunk_tables(own, _cuda.COMBINE_CHUNK, device).chunks,
                gradients,
                tensors,
                resolution.of(launch),
                momentum,
                None if factors is None else factors[launch],
            )
