"""The interface of a scene."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class InputError(Exception):
    """Something the user gave cannot be used; the message names it."""


class Batch(NamedTuple):
    """A micro-batch."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the same on another device."""
        return Batch(self.inputs.to(device), self.targets.to(device))


class Scene(ABC):
    """A multi-task problem: data, model and one loss per task."""

    name: str  # start of the file names
    title: str  # what is learned, for titles of pictures and tables
    tasks: ClassVar[dict[str, float]]  # task → loss weight λ
    loss_labels: ClassVar[dict[str, str]]  # task → what its loss is called, with its unit
    # Task → what its validation score is called; ASCII, for the terminal.
    score_labels: ClassVar[dict[str, str]]
    score_in_percent: bool  # the score is an accuracy; otherwise it is the loss
    accumulation_steps: int  # micro-batches per optimizer step
    steps: int  # default number of optimizer steps
    learning_rate: float  # its peak
    step_cost: float  # rough milliseconds of a step of plain sum, for the remaining time shown
    validation: Batch  # what no training micro-batch shows
    validation_note: str  # what that is, in words

    @abstractmethod
    def new_model(self) -> nn.Module:
        """Return a model with fresh parameters from torch's global random numbers."""

    @abstractmethod
    def micro_batch(self, generator: torch.Generator) -> Batch:
        """Return the next training micro-batch, on the CPU."""

    @abstractmethod
    def losses(self, task: str, output: Tensor, targets: Tensor) -> Tensor:
        """Return [B] the task's loss of every sample."""

    def scores(self, task: str, output: Tensor, targets: Tensor) -> Tensor:
        """Return [B] what validation reports of every sample; the loss unless overridden."""
        return self.losses(task, output, targets)
