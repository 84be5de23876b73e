"""Loss scaling by torch's GradScaler, through its public methods alone and without the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LossScale:
    """What GCondFused needs of a `torch.amp.GradScaler`.

    The scaler looks for overflows in the gradients of optimizers. It is shown one of a single
    number, whose gradient is infinite where a task's gradient is not finite.

    Args:
        scaler: the user's; he calls its `update` after each step.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self._one = torch.ones((), dtype=torch.float32)
        self._probe: torch.optim.Optimizer | None = None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def inverse(self, device: torch.device) -> float | Tensor:
        """1 / scale as it is now, [] float32 on the device."""
        if not self.scaler.is_enabled():
            return 1.0
        if self._one.device != device:
            self._one = torch.ones((), dtype=torch.float32, device=device)
        scale: Tensor = self.scaler.scale(self._one)
        return scale.double().reciprocal().float()  # in float32 the quotient would be rounded twice

    def tell(self, overflow: Tensor) -> None:
        """Lets the scaler know whether there was an overflow; [] bool.

        Raises:
            RuntimeError: it was told already since its last `update`.
        """
        if not self.scaler.is_enabled():
            return
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
