"""A window of micro-batches: what is planned when it begins, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables


@dataclass
class Window:
    """The window that is under way, or the next one.

    Trainers wrap an optimizer in an object that borrows its methods and reads its attributes, but
    keeps those that are set (Lightning's does). So nothing is set on the optimizer itself, and
    there is one window, which starts anew.
    """

    weights: tuple[float, ...] = ()  # [K] loss weights; none before its first micro-batch
    schedule: list[tuple[int, ...]] = field(default_factory=list)  # the tasks of each micro-batch
    planned: tuple[int, ...] = ()  # [K] micro-batches of each task in a full window
    position: int = 0  # micro-batches so far
    in_backward: bool = False  # whether a call of `backward` is under way
    resolved: bool = False  # whether `.grad` holds its result
    finite: Tensor | None = None  # [] bool, whether that is to be stepped with
    scaler_updated: bool = False  # whether the GradScaler has been given the overflows

    def begin(self, weights: Sequence[float], schedule: list[tuple[int, ...]]) -> None:
        """Fix loss weights and schedule, at the first micro-batch."""
        self.weights, self.schedule = tuple(weights), schedule
        self.planned = tuple(sum(k in turn for turn in schedule) for k in range(len(weights)))

    def reset(self) -> None:
        """Start a new window."""
        self.weights, self.schedule, self.planned, self.position = (), [], (), 0
        self.resolved = self.scaler_updated = False

    def comes_again(self, task: int) -> bool:
        """Return whether a later micro-batch has a loss of this task."""
        return any(task in tasks for tasks in self.schedule[self.position + 1 :])

    def loss_factor(self, task: int) -> float:
        """Return what a loss is multiplied by, as a plain loop would."""
        return self.weights[task] / max(1, self.planned[task])

    def scale(self, counts: Sequence[int], device: torch.device) -> Tensor:
        """Return what makes a task's accumulated sum its weighted mean gradient, [K] (eq. 1).

        The loss weight is in the sum, and the number of micro-batches of a full window.
        """
        shares = [
            planned / count if count and weight else 0.0
            for weight, planned, count in zip(self.weights, self.planned, counts, strict=True)
        ]
        scale = tables.settings_tensor(tuple(shares), device)
        tables.keep_if_captured(scale)
        return scale


def schedule_of(
    tasks: int, accumulation_steps: int, mode: Literal["exact", "stochastic"]
) -> list[tuple[int, ...]]:
    """Return the active tasks of every micro-batch in a window.

    In stochastic mode every task has one block; where the tasks do not divide the window evenly
    the first blocks are one longer.
    """
    if mode == "exact":
        return [tuple(range(tasks))] * accumulation_steps
    length, longer = divmod(accumulation_steps, tasks)
    return [(task,) for task in range(tasks) for _ in range(length + (task < longer))]
