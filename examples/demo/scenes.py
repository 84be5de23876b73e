"""The interface of a scene."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .methods import DEFAULT, Method


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
    """A multi-task problem: data, model, one loss per task, and scores of a trained model."""

    name: str  # start of the file names
    title: str  # what is learned, for titles of pictures and tables
    tasks: ClassVar[dict[str, float]]  # task → loss weight λ
    loss_labels: ClassVar[dict[str, str]]  # task → what its loss is called, with its unit
    # Score → what it is called; ASCII, for the terminal.
    score_labels: ClassVar[dict[str, str]]
    score_in_percent: bool  # the scores are accuracies; otherwise a lower score is better
    accumulation_steps: int  # micro-batches per optimizer step
    steps: int  # default number of optimizer steps
    learning_rate: float  # its peak
    step_cost: float  # rough milliseconds of a step of plain sum, for the remaining time shown
    evaluations: int = 8  # of the model during a training, at even distances
    methods: tuple[str, ...] = DEFAULT  # keys of those that are compared by default
    data: str = "the same data"  # that its tasks have in a step, in words
    validation: Batch  # what no training micro-batch shows
    validation_note: str  # what the scores are measured on, in words

    def fits(self, method: Method) -> bool:
        """Return whether a method can train this scene."""
        enough = method.mode != "stochastic" or self.accumulation_steps >= len(self.tasks)
        return enough and set(method.factors) <= set(self.tasks)

    @abstractmethod
    def new_model(self) -> nn.Module:
        """Return a model with fresh parameters from torch's global random numbers."""

    @abstractmethod
    def micro_batch(self, generator: torch.Generator) -> Batch:
        """Return the next training micro-batch, on the CPU."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, tasks: Iterable[str]) -> dict[str, Tensor]:
        """Return task → [B] its loss of every sample of a batch, for some of the tasks."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return task → losses and score → values on validation data, whose means are reported.

        A score that is no mean over samples has a single value.
        """


class Supervised(Scene):
    """A scene whose losses and scores follow from outputs of the model and targets."""

    @abstractmethod
    def loss(self, task: str, output: Tensor, targets: Tensor) -> Tensor:
        """Return [B] the task's loss of every sample."""

    def score(self, task: str, output: Tensor, targets: Tensor) -> Tensor:
        """Return [B] the task's score of every sample; the loss unless overridden."""
        return self.loss(task, output, targets)

    def losses(self, model: nn.Module, batch: Batch, tasks: Iterable[str]) -> dict[str, Tensor]:
        """Return task → [B] its loss of every sample, from one forward pass."""
        output = model(batch.inputs)
        return {task: self.loss(task, output, batch.targets) for task in tasks}

    def evaluate(
        self, model: nn.Module, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return losses and scores of every validation sample, both by task."""
        batch = self.validation.to(device)
        output = model(batch.inputs)
        losses = {task: self.loss(task, output, batch.targets) for task in self.tasks}
        return losses, {task: self.score(task, output, batch.targets) for task in self.tasks}


AnyScene = TypeVar("AnyScene", bound=Scene)


def reweighted(scene: AnyScene, factors: Mapping[str, float]) -> AnyScene:
    """Return a copy of a scene with the loss weights of these tasks multiplied by their factors.

    Raises:
        KeyError: the scene has no such task.
    """
    unknown = set(factors) - set(scene.tasks)
    if unknown:
        raise KeyError(f"{scene.name} has no task {', '.join(sorted(unknown))}")
    changed = copy.copy(scene)
    changed.tasks = {task: weight * factors.get(task, 1.0) for task, weight in scene.tasks.items()}
    return changed
