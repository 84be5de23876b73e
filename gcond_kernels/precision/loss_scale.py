"""Loss scaling by torch's GradScaler, without reading its scale on the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import fixed_precision


class LossScale:
    """Scale losses by an enabled `torch.amp.GradScaler`, and report overflows to it.

    The scaler looks for them in the gradients of an optimizer: it is given one of a single number,
    whose gradient is infinite where a task's is not finite. The user calls its `update`.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self._one = torch.ones((), dtype=torch.float32, device="cpu")
        self._probe: torch.optim.Optimizer | None = None

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    @fixed_precision
    def inverse(self, device: torch.device) -> Tensor:
        """Return 1 / scale as it is now, [] float32 on the device."""
        if self._one.device != device:
            self._one = torch.ones((), dtype=torch.float32, device=device)
        # In float64, as torch does: a float32 quotient may be inexact on a GPU.
        return self.scaled(self._one).double().reciprocal().float()

    @fixed_precision
    def report(self, overflow: Tensor) -> None:
        """Report to the scaler whether there was an overflow; [] bool.

        Raises:
            RuntimeError: its `update` was not called since the last report.
        """
        self.inverse(overflow.device)  # a scaler that has not scaled anything yet has no scale
        if self._probe is None:
            number = torch.zeros(1, dtype=torch.float32, device=overflow.device)
            self._probe = torch.optim.SGD([torch.nn.Parameter(number)], lr=0.0)
        (parameter,) = self._probe.param_groups[0]["params"]
        parameter.grad = torch.where(overflow, math.inf, 0.0).float().view(1)
        try:
            self.scaler.unscale_(self._probe)
        except RuntimeError as error:
            raise RuntimeError(
                "the GradScaler was not updated since the last step: call scaler.update() after "
                "each step, then step() again"
            ) from error
