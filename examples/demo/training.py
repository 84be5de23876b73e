"""The training loop of all methods."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gcond_kernels import GCondFused

from .methods import Method
from .scenes import Batch, Scene, reweighted

WARMUP_STEPS = 20


class Step(NamedTuple):
    """What happened in one optimizer step; None where nothing was compared, as in plain sum."""

    losses: dict[str, float]  # task → mean training loss over the micro-batches that it saw
    cosine: float | None = None  # between the tasks' gradients
    zone: str | None = None  # "none", "mild", "moderate" or "critical"
    winner: str | None = None  # of the first conflict, of methods that name one
    incidence: float | None = None  # share of the pairs of tasks with a cosine below 0
    rising: list[str] | None = None  # tasks whose loss the gradient raises to first order


class Evaluation(NamedTuple):
    """Validation after a number of steps, on the CPU; means are what is reported."""

    step: int
    losses: dict[str, Tensor]  # task → values of every sample
    scores: dict[str, Tensor]  # score → values


@dataclass
class Run:
    """One method on one scene; filled while it trains."""

    scene: Scene
    method: Method
    steps: int  # how many optimizer steps are meant to be made
    model: nn.Module
    history: list[Step] = field(default_factory=list)  # of the steps made
    # Before the first step, now and then, and after the last.
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0  # of training, without validation
    backward_passes: int = 0

    @property
    def progress(self) -> str:
        """How far it has come."""
        return f"{len(self.history)} of {self.steps} steps"

    @property
    def complete(self) -> bool:
        """Whether all steps were made."""
        return len(self.history) == self.steps


def new_run(scene: Scene, method: Method, steps: int, seed: int, device: torch.device) -> Run:
    """Return a run that has not started; a seed makes the same parameters for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = scene.new_model()
    return Run(reweighted(scene, method.factors), method, steps, model.to(device))


def train(
    run: Run, seed: int, backend: str = "auto", optimizer: torch.optim.Optimizer | None = None
) -> Iterator[Step]:
    """Train one method, yielding after each step.

    The micro-batches depend on the seed alone, so all methods see the same. Another optimizer
    of the model's parameters than that of `new_optimizer` may be given.
    """
    scene = run.scene
    device = device_of(run)
    generator = torch.Generator().manual_seed(seed)
    if optimizer is None:
        optimizer = new_optimizer(run, backend)
    scheduler = LambdaLR(optimizer, lambda step: warmup_then_cosine(step, run.steps))
    interval = math.ceil(run.steps / scene.evaluations)
    evaluate(run)
    for number in range(1, run.steps + 1):
        started = time.perf_counter()
        batches = [scene.micro_batch(generator).to(device) for _ in range(scene.accumulation_steps)]
        if isinstance(optimizer, GCondFused):
            step = gcond_window(run, optimizer, batches)
        else:
            step = plain_window(run, optimizer, batches)
        scheduler.step()
        run.seconds += time.perf_counter() - started
        run.history.append(step)
        if number % interval == 0 or number == run.steps:
            evaluate(run)
        yield step


def new_optimizer(run: Run, backend: str) -> torch.optim.Optimizer:
    """Return the same AdamW for all methods, so that they differ in the resolution alone.

    For that reason GCondFused keeps momentum=0: AdamW averages gradients already.
    """
    scene = run.scene
    base = torch.optim.AdamW(run.model.parameters(), lr=scene.learning_rate, betas=(0.9, 0.95))
    if run.method.mode is None:
        return base
    return GCondFused(
        base,
        scene.tasks,
        accumulation_steps=scene.accumulation_steps,
        mode=run.method.mode,
        method=run.method.resolver,
        momentum=0.0,
        backend=backend,
    )


def plain_window(run: Run, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> Step:
    """Accumulate the weighted sum of the losses as usual, and step."""
    seen: dict[str, list[Tensor]] = {task: [] for task in run.scene.tasks}
    optimizer.zero_grad()
    for batch in batches:
        losses = task_losses(run, batch, run.scene.tasks)
        total = sum(weight * losses[task] for task, weight in run.scene.tasks.items())
        # The mean over the micro-batches, as GCondFused takes it: the same gradient scale.
        (total / len(batches)).backward()
        run.backward_passes += 1
        note(seen, losses)
    optimizer.step()
    return Step(means(seen))


def gcond_window(run: Run, optimizer: GCondFused, batches: Sequence[Batch]) -> Step:
    """Do the same with GCondFused; in stochastic mode each task sees its block of the batches."""
    seen: dict[str, list[Tensor]] = {task: [] for task in run.scene.tasks}
    for batch in batches:
        losses = task_losses(run, batch, optimizer.active_tasks)
        run.backward_passes += len(losses)
        note(seen, losses)
        if optimizer.backward(losses):
            optimizer.step()
    report = optimizer.report()
    if report.min_cosine is None:
        return Step(means(seen))
    winner = report.conflicts[0].winner if report.conflicts else None
    # GradDrop's result is no weighted sum, of which this is known.
    known = any(cosine is not None for cosine in report.descent.values())
    rising = report.rising if known else None
    return Step(means(seen), report.min_cosine, report.zone, winner, report.incidence, rising)


def task_losses(run: Run, batch: Batch, tasks: Iterable[str]) -> dict[str, Tensor]:
    """Return the mean loss of each of the tasks."""
    losses = run.scene.losses(run.model, batch, tasks)
    return {task: values.mean() for task, values in losses.items()}


def note(seen: dict[str, list[Tensor]], losses: dict[str, Tensor]) -> None:
    """Keep the losses' values on their device: reading them here would synchronize with it."""
    for task, loss in losses.items():
        seen[task].append(loss.detach())


def means(seen: dict[str, list[Tensor]]) -> dict[str, float]:
    """Return the mean of what was kept."""
    return {task: float(torch.stack(losses).mean()) for task, losses in seen.items()}


def warmup_then_cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate: up over the first steps, then down to 0."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


@torch.no_grad()
def evaluate(run: Run) -> None:
    """Add an evaluation of the model as it is now."""
    losses, scores = (
        {name: values.detach().cpu() for name, values in found.items()}
        for found in run.scene.evaluate(run.model, device_of(run))
    )
    run.evaluations.append(Evaluation(len(run.history), losses, scores))


def device_of(run: Run) -> torch.device:
    """Return the device of the model."""
    return next(run.model.parameters()).device
