"""The sign update: Lion's signs with LARS' trust ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from gcond_kernels.ops.types import Momentum

# Below this norm a trust ratio is 1: a tensor of zeros has no scale to keep to.
SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class LionLars:
    """Write the sign of the gradient, times a trust ratio of each parameter tensor.

        .grad = sign(m̂) · min(‖p‖ / ‖m̂‖, clip) · coefficient

    m̂ is the resolved gradient, averaged where there is momentum. Where ‖p‖ or ‖m̂‖ is below 1e-8
    the ratio is 1. With a mask ‖p‖ is still that of the full parameter. It takes one more pass over
    `.grad` than the update without it. (Elements of m̂ that are too small for a float16 `.grad`
    count as 0.)

    Args:
        coefficient: above 0.
        clip: bound of the ratio, above 0.

    Raises:
        ValueError: a number is out of its range.
    """

    coefficient: float = 1e-4
    clip: float = 100.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not 0.0 < value < math.inf:
                raise ValueError(f"LionLars: {name} must be a number above 0, not {value!r}")

    def apply(
        self,
        outputs: Sequence[Tensor | None],
        norms: Tensor,
        parameter_norms: Tensor,
        finite: Tensor,
    ) -> None:
        """Replace m̂ by the update, in place and without synchronizing with the device.

        Args:
            outputs: m̂ of T tensors, or None where nothing is written.
            norms: [T] float64, ‖m̂‖ of each.
            parameter_norms: [T] float64, ‖p‖ of each.
            finite: [] bool; where it is False the outputs are zero, and stay so.
        """
        ratio = (parameter_norms / norms).clamp(max=self.clip)
        tiny = (norms < SMALLEST_NORM) | (parameter_norms < SMALLEST_NORM)
        factors = self.coefficient * torch.where(tiny, 1.0, ratio)
        factors = torch.where(finite, factors, 0.0)
        written = [t for t, output in enumerate(outputs) if output is not None]
        signs = [output for output in outputs if output is not None]
        if signs:
            # A factor rounded to float32 is multiplied in one pass over all tensors of that type.
            wide = any(sign.dtype == torch.float64 for sign in signs)
            each = (factors if wide else factors.to(torch.float32)).unbind()
            torch._foreach_sign_(signs)
            torch._foreach_mul_(signs, [each[t] for t in written])


def averaged_norms(per_tensor: Tensor, weights: Tensor, momentum: Momentum | None) -> Tensor:
    """Return ‖m̂‖ of every tensor from its Gramian, without a pass over memory: [T] float64.

    Args:
        per_tensor: [T, R, R] float64; with momentum its buffer before the step is the last entry.
        weights: [K] or [T, K] float64.
        momentum: after the step, with its steps counted; None without.
    """
    v = weights.expand(len(per_tensor), -1)
    correction: float | Tensor = 1.0
    if momentum is not None:
        v = ((1.0 - momentum.beta) * weights).expand(len(per_tensor), -1)
        v = torch.cat([v, v.new_full((len(v), 1), momentum.beta)], dim=1)
        correction = 1.0 / (1.0 - momentum.beta ** momentum.steps.clamp(min=1).double())
    squares = torch.einsum("ti,tij,tj->t", v, per_tensor, v).clamp(min=0.0) * correction**2
    return squares.sqrt()
