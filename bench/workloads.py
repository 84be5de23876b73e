"""Trainings whose backward pass is short, so that what a step costs beside it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.training import Batch, Task, Training

WIDTH, HIDDEN_LAYERS = 64, 5
INPUTS = 8


@dataclass(frozen=True)
class MlpTraining(Training):
    """A small MLP with a head and a regression for each task."""

    heads: int = 2

    @property
    def tasks(self) -> dict[str, Task]:
        """One loss for each head."""
        return {f"head {k}": Task(partial(head_loss, k), 1 / self.heads) for k in range(self.heads)}

    def new_model(self) -> nn.Module:
        """Return an MLP of the same weights."""
        widths = INPUTS, *[WIDTH] * HIDDEN_LAYERS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.Tanh()]
            return nn.Sequential(*layers, nn.Linear(WIDTH, self.heads))

    def new_batch(self, generator: torch.Generator) -> Batch:
        """Return noise."""
        x = torch.randn(self.batch, INPUTS, generator=generator)
        return x, torch.randn(self.batch, self.heads, generator=generator)


def head_loss(head: int, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of one head."""
    return functional.mse_loss(outputs[:, head], targets[:, head])


@dataclass(frozen=True)
class LinearTraining(Training):
    """Two losses linear in the parameters: a backward pass writes each gradient once."""

    sizes: tuple[int, ...] = ()

    @property
    def tasks(self) -> dict[str, Task]:
        """Each the inner product of all parameters with random coefficients."""
        return {name: Task(partial(linear_loss, k), 0.5) for k, name in enumerate("ab")}

    def new_model(self) -> nn.Module:
        """Return parameters of these sizes, which are its result too."""
        return Parameters(self.sizes)

    def new_batch(self, generator: torch.Generator) -> Batch:
        """Return no inputs, and coefficients [2, N]."""
        return torch.empty(0), torch.randn(2, sum(self.sizes), generator=generator)


class Parameters(nn.Module):
    """A model that returns its parameters."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.all = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, _: Tensor) -> list[nn.Parameter]:
        """Return them."""
        return list(self.all)


def linear_loss(task: int, parameters: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Return the inner product with a task's coefficients."""
    parts = coefficients[task].split([len(parameter) for parameter in parameters])
    return torch.stack(list(map(torch.dot, parameters, parts))).sum()
