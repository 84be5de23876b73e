"""GradNorm: gradient normalization."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.adam import direction_of_adam
from gcond_kernels.methods.checks import check_number, check_option
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import norms
from gcond_kernels.methods.positive_losses import PositiveLosses


@dataclass(frozen=True)
class GradNorm(Method):
    """Train weights so that all tasks train at similar rates.

    Z. Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
    Networks", ICML 2018, arXiv 1711.02257. n_i = w_i ‖ĝ_i‖ with mean n̄, r_i = (L_i / L_i(0)) / mean
    of these; w descends the slope of Σ_i |n_i − n̄ r_i^α| with n̄ r_i^α held constant, by Adam
    relative to the mean norm of the gradients, and is then scaled so that Σ w = K. A step uses the
    weights before it; the first is the plain sum. No weight falls below 0. A task without a
    micro-batch, or without a gradient, keeps its weight, and its gradient counts as 0 in Adam's
    averages.

    Losses must be positive: L_i is the mean loss of a window, without the loss weight, and a loss
    of 0 or less has no ratio (but a loss of 0 without a gradient is that of a task that takes no
    part). On a CPU a ValueError names the task, before any state has changed; on a GPU, which is
    not synchronized with, the step is skipped and a later one raises it.

    Args:
        alpha: α, 0 or more: how strongly slow tasks are favoured.
        lr: learning rate of the weights.
        parameters: names of parameters, or of modules, whose norms are taken (the paper takes the
            last layer that all tasks share); None is all that tasks share.

    Raises:
        ValueError: an option is out of its range.
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
        check_number(self, "alpha")
        check_number(self, "lr")
        if self.parameters is not None:
            is_list = isinstance(self.parameters, Iterable) and not isinstance(self.parameters, str)
            names = tuple(self.parameters) if is_list else ()
            holds = bool(names) and all(isinstance(name, str) for name in names)
            check_option(self, "parameters", "names in a list", holds)
            object.__setattr__(self, "parameters", names)

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return weights, Adam's averages, losses of first windows and the number of updates."""
        zeros = torch.zeros(tasks, dtype=torch.float64, device=device)
        averages = ("average", "square_average", "initial_losses")  # a loss of 0: none yet
        return {
            "task_weights": zeros + 1.0,
            **{name: zeros.clone() for name in averages},
            "updates": torch.zeros((), dtype=torch.int64, device=device),
        }

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the weights as they are; then they are trained.

        Raises:
            ValueError: the losses are missing, or one is not positive.
        """
        losses = known.losses
        if losses is None:
            raise ValueError("GradNorm: losses must be given, one for each task")
        n = norms(gramian)
        absent = (n == 0.0).view(-1, len(losses)).all(0)
        at_fault = self._positive.check(self, known, ignored=absent & (losses == 0.0))
        weights = torch.where(at_fault, torch.nan, state["task_weights"])  # NaN skips the step
        seen = losses.isfinite()
        first = state["initial_losses"]
        first.copy_(torch.where((first == 0.0) & seen, losses, first))
        started = first != 0.0
        ratio = torch.where(seen & started, losses / torch.where(started, first, 1.0), 1.0)
        takes_part = (n > 0.0) & seen
        self.train(state, self.slope(weights, n, ratio, takes_part), takes_part)
        return weights

    def slope(self, weights: Tensor, n: Tensor, ratio: Tensor, takes_part: Tensor) -> Tensor:
        """Return ∂/∂w_i of Σ_i |n_i − n̄ r_i^α|, relative to the mean norm, [..., K]."""
        count = takes_part.sum(-1, keepdim=True).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(takes_part, values, 0.0).sum(-1, keepdim=True) / count

        rate = (ratio / mean(ratio).clamp(min=1e-300)).clamp(min=0.0)
        weighted = weights * n
        target = mean(weighted) * rate**self.alpha
        unit = mean(n).clamp(min=1e-300)
        return torch.where(takes_part, torch.sign(weighted - target) * n / unit, 0.0)

    def train(self, state: State, slope: Tensor, takes_part: Tensor) -> None:
        """Make a step of Adam, and scale the weights of tasks that take part so that Σ w = K."""
        w = state["task_weights"]
        every = torch.ones((), dtype=torch.bool, device=w.device)
        trained = (w - self.lr * direction_of_adam(state, slope, every)).clamp(min=0.0)
        others = torch.where(takes_part, 0.0, w).sum(-1, keepdim=True)
        total = torch.where(takes_part, trained, 0.0).sum(-1, keepdim=True)
        # Where all of them fell to 0 there is nothing to scale: they stay.
        scaled = trained * ((w.shape[-1] - others) / total.clamp(min=1e-300))
        w.copy_(torch.where(takes_part & (total > 0.0), scaled, w))
