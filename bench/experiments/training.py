"""Trainings of the experiments: variants of the demo's, and the task gradients of the plain sum."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.experiments.common import Job, Record, scene_of
from examples.demo import training
from examples.demo.methods import PLAIN
from examples.demo.methods import Method as DemoMethod
from examples.demo.scenes import Batch, Scene, reweighted
from examples.demo.summary import cosines, incidence, means, zone_shares
from gcond_kernels import GCond, GCondFused, ops
from gcond_kernels.methods import Method

# Gradients are recorded in a part of the steps.
RECORDED = {"photos": 1 / 3, "digits": 0.5, "kovasznay": 0.5, "burgers": 0.5}
SGD_MOMENTUM = {"sgd": 0.9, "sgd without momentum": 0.0}
CPU = torch.device("cpu")


class Variant(NamedTuple):
    """Settings of a training that may differ from the demo's."""

    key: str  # in the record
    name: str  # in tables and pictures
    resolver: Method | None = None  # of GCondFused; None is the plain sum, without it
    baseline: str = ""  # key of the variant that its scores are compared with; "" is none
    mode: Literal["exact", "stochastic"] = "exact"
    options: dict[str, Any] = {}  # noqa: RUF012  # more of GCondFused; never changed
    base: str = "adamw"  # or a key of SGD_MOMENTUM
    learning_rate: float | None = None  # None is the scene's
    beta1: float = 0.9  # of AdamW
    micro_batches: int | None = None  # per step; None is the scene's
    steps: float = 1.0  # a factor of their number
    weights: dict[str, float] = {}  # noqa: RUF012  # task → factor of its loss weight; never changed

    def job(self, seed: int, scene: str, steps: int) -> Job:
        """Return a training of so many steps of a variant with the factor 1."""
        return Job(seed, scene, max(1, round(steps * self.steps)), measure, self)


def jobs_of(
    variants: dict[str, Sequence[Variant]], options: argparse.Namespace, scene: str, seed: int
) -> list[Job]:
    """Return the trainings of a scene's variants."""
    return [variant.job(seed, scene, options.steps_of[scene]) for variant in variants[scene]]


def with_micro_batches(scene: Scene, micro_batches: int | None) -> Scene:
    """Return the scene with another number of micro-batches per step."""
    scene = copy.copy(scene)
    scene.accumulation_steps = micro_batches or scene.accumulation_steps
    return scene


def measure(job: Job) -> Record:
    """Train a variant as the demo does."""
    # Evaluations before the last step would go nowhere.
    return train(job, 1)[1]


def train(
    job: Job, evaluations: int, see: Callable[[torch.optim.Optimizer], None] = lambda _: None
) -> tuple[training.Run, Record]:
    """Train a variant as the demo does; call `see` with the optimizer after each step."""
    variant: Variant = job.subject
    scene = reweighted(scene_of(job.scene), variant.weights)
    scene = with_micro_batches(scene, variant.micro_batches)
    scene.evaluations = evaluations
    mode = None if variant.resolver is None else variant.mode
    method = DemoMethod(variant.key, variant.name, mode, 1.0, variant.resolver)
    run = training.new_run(scene, method, job.steps, job.seed, CPU)
    optimizer = new_optimizer(variant, scene, run.model)
    times, before = [], time.process_time()
    for _ in training.train(run, job.seed, optimizer=optimizer):
        times.append(time.process_time() - before)
        see(optimizer)
        before = time.process_time()
    values = cosines(run)
    return run, {
        "method": variant.key,
        "micro_batches": scene.accumulation_steps,
        "resolver": None if variant.resolver is None else repr(variant.resolver),
        "options": {key: str(value) for key, value in variant.options.items()},
        "base": variant.base,
        "learning_rate": variant.learning_rate or scene.learning_rate,
        "beta1": variant.beta1 if variant.base == "adamw" else None,
        **means(run.evaluations[-1]),
        "zones": zone_shares(run),
        "incidence": incidence(run),
        "median_cosine": statistics.median(values) if values else None,
        **conflicts_of([step.winner for step in run.history], scene),
        "backward_passes": run.backward_passes,
        "seconds": run.seconds,
        "step": statistics.median(times),
    }


def new_optimizer(variant: Variant, scene: Scene, model: nn.Module) -> torch.optim.Optimizer:
    """Return a variant's optimizer."""
    base = base_optimizer(variant, scene, model)
    if variant.resolver is None:
        return base
    return GCondFused(
        base,
        scene.tasks,
        accumulation_steps=scene.accumulation_steps,
        mode=variant.mode,
        method=variant.resolver,
        **variant.options,
    )


def base_optimizer(variant: Variant, scene: Scene, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW as in the demo but for beta1, or SGD, with momentum or without."""
    rate = variant.learning_rate or scene.learning_rate
    if variant.base == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(variant.beta1, 0.95))
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=SGD_MOMENTUM[variant.base])


def conflicts_of(winners: Sequence[str | None], scene: Scene) -> dict[str, Any]:
    """Return how often each task won a conflict, and how often in a row, of steps with one."""
    won = [winner for winner in winners if winner is not None]
    return {
        "conflicts": len(won),
        "won": {task: won.count(task) for task in scene.tasks},
        "longest_streak": max((len(list(same)) for _, same in groupby(won)), default=0),
    }


# Task gradients.


def task_gradients(model: nn.Module, scene: Scene, batch: Batch) -> Tensor:
    """Return [K, N] gradients of each task's weighted loss of a micro-batch."""
    parameters = list(model.parameters())
    losses = scene.losses(model, batch, scene.tasks)
    gradients = []
    for task, weight in scene.tasks.items():
        loss = weight * losses[task].mean()
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(gradients)


def window_gradients(
    model: nn.Module, scene: Scene, generator: torch.Generator, stochastic: bool = False
) -> Tensor:
    """Return [K, N] gradients of a window; in stochastic mode of each task's own micro-batches."""
    A, K = scene.accumulation_steps, len(scene.tasks)
    # [A, K] how much a micro-batch counts for each task; the blocks are those of GCondFused.
    shares = torch.full((A, K), 1.0 / A)
    if stochastic:
        block = torch.arange(A) * K // A
        shares = (block[:, None] == torch.arange(K)).float()
        shares /= shares.sum(0)
    total: Tensor | float = 0.0
    for share in shares:
        gradients = task_gradients(model, scene, scene.micro_batch(generator))
        total = total + share[:, None] * gradients
    return torch.as_tensor(total)


def plain_training(
    scene: Scene, steps: int, seed: int, stochastic: bool = False
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Train by the demo's plain sum; yield model and task gradients before each step."""
    model = training.new_run(scene, PLAIN, steps, seed, CPU).model
    optimizer = base_optimizer(Variant(PLAIN.key, PLAIN.name), scene, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: training.warmup_then_cosine(step, steps)
    )
    generator = torch.Generator().manual_seed(seed)
    sizes = [parameter.numel() for parameter in model.parameters()]
    for _ in range(steps):
        gradients = window_gradients(model, scene, generator, stochastic)
        yield model, gradients
        for parameter, part in zip(model.parameters(), gradients.sum(0).split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        scheduler.step()


def at_moments(job: Job, moments: Sequence[int], measured: Any) -> list[Any]:
    """Return what `measured` makes of a source of new task gradients at the weights of some steps.

    Their micro-batches are none of the training's own.
    """
    scene = scene_of(job.scene)
    generator = torch.Generator().manual_seed(1000 + job.seed)
    found = []
    for step, (model, _) in enumerate(plain_training(scene, job.steps, job.seed)):
        if step in moments:

            def gradients(model: nn.Module = model) -> Tensor:
                return task_gradients(model, scene, scene.micro_batch(generator))

            found += [measured(gradients)] * moments.count(step)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors; 0 where one of them is zero."""
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0.0 else 0.0


class Recorded(NamedTuple):
    """Inner products of the task gradients of a training by the plain sum, step by step."""

    gramians: Tensor  # [T, K, K] S of each step
    crosses: Tensor  # [T, K, K] ĝ_i of the step · ĝ_j of the step before; at first zeros
    by_tensor: list[float]  # smallest cosine of two tasks in each parameter tensor, of all steps


def recorded_steps(options: argparse.Namespace, scene: str) -> int:
    """Return the number of steps of a recording."""
    return max(2, round(RECORDED[scene] * options.steps_of[scene]))


def record_gradients(scene: Scene, steps: int, seed: int, stochastic: bool = False) -> Recorded:
    """Record the inner products of a training by the plain sum."""
    before, by_tensor, gramians, crosses = None, [], [], []
    for model, gradients in plain_training(scene, steps, seed, stochastic):
        sizes = [parameter.numel() for parameter in model.parameters()]
        wide = gradients.double()
        parts = wide.split(sizes, 1)
        by_tensor += [smallest_cosine(part @ part.T) for part in parts if part.any(1).all()]
        gramians.append(wide @ wide.T)
        crosses.append(torch.zeros_like(gramians[-1]) if before is None else wide @ before.T)
        before = wide
    return Recorded(torch.stack(gramians), torch.stack(crosses), by_tensor)


class Replay(NamedTuple):
    """What GCond makes of recorded gradients, without any influence on them."""

    cosines: list[float]  # smallest of each step, before anything was resolved
    winners: list[int]  # of each conflict in order, numbers of tasks
    changes: list[float]  # per step ‖g - Σ ĝ‖ / ‖Σ ĝ‖, of the resolved gradient g
    weights: Tensor  # [T, K]


def replay(recorded: Recorded, method: GCond) -> Replay:
    """Resolve all steps of a recording."""
    K = recorded.gramians.shape[-1]
    state = ops.ArbitrationState(**method.new_state(K, CPU))
    ones = torch.ones(K, dtype=torch.float64)
    found = Replay([], [], [], torch.empty(len(recorded.gramians), K))
    for step, (S, X) in enumerate(zip(recorded.gramians, recorded.crosses, strict=True)):
        decision = ops.arbitrate(S, X, ones, state=state, settings=method, backend="python")
        difference = decision.weights - ones
        found.cosines.append(smallest_cosine(S))
        found.winners.extend(int(e[3]) for e in decision.events if e[3] >= 0)
        found.changes.append(float((difference @ S @ difference / (ones @ S @ ones)).sqrt()))
        found.weights[step] = decision.weights
    return found


def smallest_cosine(gramian: Tensor) -> float:
    """Return the smallest cosine of two tasks."""
    norms = gramian.diagonal().sqrt()
    cosines = (gramian / torch.outer(norms, norms)).nan_to_num(1.0)
    rows, columns = torch.triu_indices(*cosines.shape, offset=1)
    return float(cosines[rows, columns].min())
