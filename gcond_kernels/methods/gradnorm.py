"""GradNorm: gradient normalization."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.method import (
    Known,
    Method,
    PositiveLosses,
    State,
    check_number,
    norms,
)
from gcond_kernels.ops.contexts import fixed_precision

# Of Adam, by which the weights learn.
BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class GradNorm(Method):
    """Weights are learned that let all tasks train at similar rates.

    Z. Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
    Networks", ICML 2018, arXiv 1711.02257. n_i = w_i ‖ĝ_i‖ with mean n̄, r_i = (L_i / L_i(0)) / mean
    of these; w goes down the slope of Σ_i |n_i − n̄ r_i^α| with n̄ r_i^α held constant, by Adam in
    units of the mean length of the gradients, and is then scaled so that Σ w = K. A step is weighed
    with the weights before it; the first is the plain sum. No weight falls below 0. A task without
    a micro-batch, or without a gradient, keeps its weight, and its gradient counts as 0 in Adam's
    averages.

    Losses must be positive: L_i is the mean loss of a window, without the loss weight, and of one
    that is negative or 0 no ratio tells how fast its task trains (but a loss of 0 without a
    gradient is that of a task that takes no part). On a CPU a ValueError names the task, before any
    state has changed; on a GPU, which is not waited for, the step is skipped and a later one
    raises it.

    Args:
        alpha: α, 0 or more: how strongly slow tasks are pulled along.
        lr: learning rate of the weights.
        parameters: names of parameters, or of modules, of which the lengths are taken (the paper
            takes the last layer that all tasks share); None is all that tasks share.
    """

    alpha: float = 1.5
    lr: float = 1e-3
    parameters: tuple[str, ...] | None = None
    _positive: PositiveLosses = field(
        default_factory=PositiveLosses, init=False, repr=False, compare=False
    )

    needs_losses: ClassVar[bool] = True
    shared_state: ClassVar[frozenset[str]] = frozenset({"initial_losses", "updates"})

    def __post_init__(self) -> None:
        check_number(self, "alpha", self.alpha, 0.0, float("inf"))
        check_number(self, "lr", self.lr, 0.0, float("inf"))
        if self.parameters is not None:
            if isinstance(self.parameters, str):
                raise ValueError(
                    f"GradNorm: parameters must be names, not one: ({self.parameters!r},)"
                )
            named = tuple(self.parameters) if isinstance(self.parameters, Iterable) else ()
            if not named or not all(isinstance(name, str) for name in named):
                raise ValueError(
                    f"GradNorm: parameters must be names, one or more, not {self.parameters!r}"
                )
            object.__setattr__(self, "parameters", named)

    @fixed_precision
    def new_state(self, tasks: int, device: torch.device) -> State:
        """Weights, Adam's averages, and the losses of each task's first window (0 before it)."""
        zeros = torch.zeros(tasks, dtype=torch.float64, device=device)
        return {
            "task_weights": zeros + 1.0,
            "average": zeros.clone(),
            "square_average": zeros.clone(),
            "initial_losses": zeros.clone(),
            "updates": torch.zeros((), dtype=torch.int64, device=device),
        }

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """The weights as they are; then they learn."""
        losses = known.losses
        if losses is None:
            raise ValueError("GradNorm: losses must be given, one for each task")
        absent = (norms(gramian) == 0.0).view(-1, len(losses)).all(0)
        at_fault = self._positive.check(self, known, ignored=absent & (losses == 0.0))
        weights = torch.where(at_fault, torch.nan, state["task_weights"])  # NaN skips the step
        seen = losses.isfinite()
        first = state["initial_losses"]
        first.copy_(torch.where((first == 0.0) & seen, losses, first))
        ratio = torch.where(
            seen & (first != 0.0), losses / torch.where(first != 0.0, first, 1.0), 1.0
        )
        takes_part = (norms(gramian) > 0.0) & seen
        slope = self.slope(weights, norms(gramian), ratio, takes_part)
        self.learn(state, slope, takes_part)
        return weights

    def slope(self, weights: Tensor, lengths: Tensor, ratio: Tensor, takes_part: Tensor) -> Tensor:
        """∂/∂w_i of Σ_i |n_i − n̄ r_i^α|, in units of the mean length: [..., K]."""
        count = takes_part.sum(-1, keepdim=True).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(takes_part, values, 0.0).sum(-1, keepdim=True) / count

        rate = (ratio / mean(ratio).clamp(min=1e-300)).clamp(min=0.0)
        weighted = weights * lengths
        target = mean(weighted) * rate**self.alpha
        unit = mean(lengths).clamp(min=1e-300)
        return torch.where(takes_part, torch.sign(weighted - target) * lengths / unit, 0.0)

    def learn(self, state: State, slope: Tensor, takes_part: Tensor) -> None:
        """One step of Adam, and Σ w = K by the weights of those that take part."""
        state["updates"] += 1
        t = state["updates"].double()
        average, square = state["average"], state["square_average"]
        average.mul_(BETA_1).add_((1.0 - BETA_1) * slope)
        square.mul_(BETA_2).add_((1.0 - BETA_2) * slope**2)
        corrected = average / (1.0 - BETA_1**t)
        root = (square / (1.0 - BETA_2**t)).sqrt()
        w = state["task_weights"]
        learned = (w - self.lr * corrected / (root + EPS)).clamp(min=0.0)
        others = torch.where(takes_part, 0.0, w).sum(-1, keepdim=True)
        total = torch.where(takes_part, learned, 0.0).sum(-1, keepdim=True)
        # Where all of them fell to 0 there is nothing to scale: they stay.
        scaled = learned * ((w.shape[-1] - others) / total.clamp(min=1e-300))
        w.copy_(torch.where(takes_part & (total > 0.0), scaled, w))
