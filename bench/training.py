"""The training step: plain accumulation, GCondFused, TorchJD, the published code.

All of them train copies of one model, with the same weights, batches and AdamW, on two losses that
need all of the model; the batches are noise and lie on the device. Each method takes turns with
plain accumulation, a step each, so that drift of the machine cancels in "relative"; plain
accumulation beside itself shows what is noise.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from bench import clock
from bench.clock import Clock, Run
from bench.models import CLASSES, MODELS, TRANSFORMER, new_model
from bench.others import torchjd_missing
from bench.published import PublishedTraining
from bench.record import Figure, InputError, quartiles
from gcond_kernels import GCondFused, Sum, ops
from gcond_kernels.methods import Method

Mode = Literal["exact", "stochastic"]
Batch = tuple[Tensor, Tensor]  # what the model takes, and what the losses compare its result with
Window = Callable[[Sequence[Batch]], object]

GCOND: dict[str, Mode] = {"GCondFused exact": "exact", "GCondFused stochastic": "stochastic"}

# Stochastic, as a multiple of plain accumulation of the same micro-batches; in smaller models the
# calls count, one for each tensor.
SLOWER_AT_MOST = 1.01
LEAST_PARAMETERS_WITH_TARGET = 80_000_000
# Times the seconds of other comparisons: steps are long, and differ little.
LONGER = 2.0
# Accumulator and history of one more task, per parameter.
BYTES_OF_A_TASK = 6.0
LEARNING_RATE = 1e-4
# Of the norm of the full gradient; on a GPU each task's backward pass is rounded to bfloat16.
ROUNDING = {"cpu": 1e-5, "cuda": 3e-2}
TASKS_OF_MEMORY = (2, 4, 8)
LAYERS_OF_MEMORY = 8


def hard_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of the classes that a teacher decides for."""
    return functional.cross_entropy(logits.float(), teacher.argmax(-1))


def soft_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of the probabilities that it gives (arXiv 1503.02531)."""
    return functional.cross_entropy(logits.float(), teacher)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of the tokens that follow."""
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def z_loss(logits: Tensor, _: Tensor) -> Tensor:
    """Return what keeps the softmax's normalizer near 1 (arXiv 2204.02311)."""
    return logits.float().logsumexp(-1).square().mean()


class Task(NamedTuple):
    """A loss of the model's logits and the targets, and its weight."""

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float


IMAGE_TASKS = {"hard": Task(hard_loss, 0.5), "soft": Task(soft_loss, 0.5)}
TEXT_TASKS = {"tokens": Task(token_loss, 1.0), "z": Task(z_loss, 1e-4)}


@dataclass(frozen=True)
class Training:
    """What is trained, and how it is accumulated."""

    name: str
    device: torch.device
    batch: int  # images of a micro-batch, or sequences
    resolution: int  # of an image
    accumulation_steps: int
    seconds: float  # of the rounds of one method, about

    @property
    def tasks(self) -> dict[str, Task]:
        """Two losses of which each needs all of the model."""
        return TEXT_TASKS if self.name in TRANSFORMER else IMAGE_TASKS

    def new_model(self) -> nn.Module:
        """Return a model of the same weights; on a GPU its forward pass is in bfloat16."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = new_model(self.name)
        model.to(device=self.device, memory_format=torch.channels_last)
        cast = torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")
        model.forward = cast(model.forward)
        return model

    @cached_property
    def batches(self) -> list[Batch]:
        """The micro-batches of every step."""
        generator = torch.Generator().manual_seed(0)
        return [self.new_batch(generator) for _ in range(self.accumulation_steps)]

    def new_batch(self, generator: torch.Generator) -> Batch:
        """Return noise: tokens, or images with a teacher's probabilities of the classes."""
        if size := TRANSFORMER.get(self.name):
            shape = self.batch, size.context + 1
            tokens = torch.randint(size.vocabulary, shape, generator=generator).to(self.device)
            return tokens[:, :-1], tokens[:, 1:]
        images = torch.randn(self.batch, 3, self.resolution, self.resolution, generator=generator)
        teacher = torch.randn(self.batch, CLASSES, generator=generator).softmax(-1)
        images = images.to(self.device, memory_format=torch.channels_last)
        return images, teacher.to(self.device)


def plain(training: Training, model: nn.Module, base: torch.optim.Optimizer) -> Window:
    """Return accumulation of the weighted sum in `.grad`, and a step."""
    tasks, steps = training.tasks.values(), training.accumulation_steps

    def window(batches: Sequence[Batch]) -> None:
        base.zero_grad()
        for inputs, targets in batches:
            logits = model(inputs)
            total = sum(task.weight * task.loss(logits, targets) for task in tasks)
            (total / steps).backward()
        base.step()

    return window


def backward_passes(training: Training, model: nn.Module, base: torch.optim.Optimizer) -> Window:
    """Return the same with a backward pass of each loss, the fewest that tell tasks apart."""
    tasks, steps = training.tasks.values(), training.accumulation_steps

    def window(batches: Sequence[Batch]) -> None:
        base.zero_grad()
        for inputs, targets in batches:
            logits = model(inputs)
            losses = [task.weight / steps * task.loss(logits, targets) for task in tasks]
            for number, loss in enumerate(losses, start=1):
                loss.backward(retain_graph=number < len(losses))
        base.step()

    return window


def gcond(
    training: Training,
    model: nn.Module,
    base: torch.optim.Optimizer,
    *,
    mode: Mode,
    method: Method | None = None,
) -> Window:
    """Return the same with GCondFused around the optimizer, which averages gradients already."""
    tasks = training.tasks
    optimizer = GCondFused(
        base,
        {name: task.weight for name, task in tasks.items()},
        accumulation_steps=training.accumulation_steps,
        mode=mode,
        method=method,
    )

    def window(batches: Sequence[Batch]) -> None:
        for inputs, targets in batches:
            logits = model(inputs)
            losses = {name: tasks[name].loss(logits, targets) for name in optimizer.active_tasks}
            optimizer.backward(losses)
        optimizer.step()

    return window


def torchjd(training: Training, model: nn.Module, base: torch.optim.Optimizer) -> Window:
    """Return the same with TorchJD's UPGrad, of the sum of the micro-batches' Jacobians."""
    autojac = importlib.import_module("torchjd.autojac")
    aggregator = importlib.import_module("torchjd.aggregation").UPGrad()
    parameters = list(model.parameters())
    tasks, steps = training.tasks.values(), training.accumulation_steps

    def window(batches: Sequence[Batch]) -> None:
        for inputs, targets in batches:
            logits = model(inputs)
            losses = [task.weight / steps * task.loss(logits, targets) for task in tasks]
            autojac.backward(losses, inputs=parameters, parallel_chunk_size=1)
        base.zero_grad()
        autojac.jac_to_grad(parameters, aggregator)
        base.step()

    return window


def published_code(
    training: Training,
    model: nn.Module,
    base: torch.optim.Optimizer,
    *,
    module: ModuleType,
    mode: Mode,
) -> Window:
    """Return the same with the code that the authors of the method published."""
    steps = training.accumulation_steps
    return PublishedTraining(module, model, training.tasks, base, steps, mode).window


class Competitor(NamedTuple):
    """One method of the comparison."""

    by: str
    new_window: Callable[[Training, nn.Module, torch.optim.Optimizer], Window]
    passes: int  # backward passes of a micro-batch
    skipped: str | None = None  # why it is not measured


def competitors(training: Training, published: ModuleType | None) -> Iterator[Competitor]:
    """Return all methods; plain accumulation first."""
    K = len(training.tasks)
    passes = {"exact": K, "stochastic": 1}
    yield Competitor("plain accumulation", plain, 1)
    for by, mode in GCOND.items():
        yield Competitor(by, partial(gcond, mode=mode), passes[mode])
    yield Competitor("TorchJD UPGrad", torchjd, K, torchjd_missing())
    if published is not None:
        for mode in GCOND.values():
            new_window = partial(published_code, module=published, mode=mode)
            yield Competitor(f"published code {mode}", new_window, passes[mode])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this section."""
    add = parser.add_argument_group("training steps").add_argument
    about = (
        f"what is trained: {', '.join(MODELS)} (default: convnext_base on a GPU; the two pico "
        "on a CPU; without a name memory alone is measured)"
    )
    add("--training-models", nargs="*", choices=MODELS, metavar="NAME", help=about)
    add("--batch", type=int, help="images or sequences of a micro-batch (default: what suits)")
    add("--resolution", type=int, help="sides of an image (default: 224; 64 on a CPU)")
    about = "micro-batches per optimizer step (default: 8)"
    add("--accumulation-steps", type=int, default=8, help=about)


def check(options: argparse.Namespace) -> None:
    """Raise InputError where an option cannot be used."""
    for name in ("batch", "resolution", "accumulation_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if options.resolution is not None and options.resolution % 32:
        raise InputError(f"--resolution {options.resolution}: must be a multiple of 32")
    if options.accumulation_steps < 2:
        raise InputError(
            "--accumulation-steps 1: stochastic mode gives each of the two tasks a micro-batch"
        )


def trainings(options: argparse.Namespace) -> list[Training]:
    """Return what is trained, by default for about a minute."""
    on_gpu = options.device.type == "cuda"
    names = options.training_models
    if names is None:
        names = ["convnext_base"] if on_gpu else ["convnext_pico", "transformer_pico"]
    images, sequences, resolution = (16, 4, 224) if on_gpu else (8, 2, 64)
    return [
        Training(
            name,
            options.device,
            options.batch or (sequences if name in TRANSFORMER else images),
            options.resolution or resolution,
            options.accumulation_steps,
            options.seconds * LONGER,
        )
        for name in names
    ]


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure each method and model, and the memory of more tasks.

    "seconds" are those of an optimizer step; samples count once, however many losses they have;
    "peak_bytes" is the most that two steps allocate beyond the weights and the batches.
    """
    for training in trainings(options):
        yield from training_figures(training, options.published_code)
    yield from memory_figures(options.device)


def training_figures(training: Training, published: ModuleType | None) -> Iterator[Figure]:
    """Measure each method."""
    parameters = [p.numel() for p in training.new_model().parameters()]
    head = {
        "section": "training",
        "operation": "optimizer step",
        "model": training.name.replace("_", " "),
        "parameters": sum(parameters),
        "tensors": len(parameters),
        "tasks": len(training.tasks),
        "accumulation_steps": training.accumulation_steps,
        "batch": training.batch,
    }
    if training.name not in TRANSFORMER:
        head["resolution"] = training.resolution
    baseline = new_window(training, plain)[1]
    for competitor in competitors(training, published):
        passes = competitor.passes * training.accumulation_steps
        figure = {**head, "by": competitor.by, "backward_passes": passes}
        if competitor.by in GCOND:
            figure["backend"] = ops.backend_for("auto", training.device).name
        yield figure | measured(training, competitor, baseline)
        gc.collect()


def new_window(training: Training, made_by: Callable[..., Window]) -> tuple[nn.Module, Window]:
    """Return a model and what trains it with AdamW."""
    model = training.new_model()
    base = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return model, made_by(training, model, base)


def measured(training: Training, competitor: Competitor, baseline: Window) -> Figure:
    """Return times and memory of one method; or why there are none."""
    if competitor.skipped is not None:
        return {"skipped": competitor.skipped}
    try:
        if competitor.by in GCOND:
            check_sum(training, GCOND[competitor.by])
        model, window = new_window(training, competitor.new_window)
        batches = training.batches
        peak = peak_bytes(lambda: (window(batches), window(batches)), training.device)
        seconds, relative = in_turns(training, partial(window, batches), partial(baseline, batches))
        check_losses(training, model)
    except Exception as error:  # one method out of memory is no reason to lose the others
        return {"error": f"{type(error).__name__}: {error}"}
    parameters = sum(p.numel() for p in model.parameters())
    samples = training.batch * training.accumulation_steps
    figure: Figure = {
        "seconds": quartiles(seconds),
        "relative": quartiles(relative),
        "samples_per_second": samples / quartiles(seconds)["median"],
        "peak_bytes": peak,
        "bytes_per_parameter": peak / parameters,
    }
    if competitor.by == "GCondFused stochastic" and parameters >= LEAST_PARAMETERS_WITH_TARGET:
        met = figure["relative"]["median"] <= SLOWER_AT_MOST
        figure |= {"target": {"relative": SLOWER_AT_MOST}, "met": met}
    return figure


def in_turns(training: Training, run: Run, baseline: Run) -> tuple[list[float], list[float]]:
    """Return the seconds of every round, and as a multiple of the baseline's."""
    both = {
        name: clock.Competitor([each], True)
        for name, each in (("run", run), ("baseline", baseline))
    }
    times = Clock(training.device, training.seconds).times(both)
    return times["run"], [a / b for a, b in zip(*times.values(), strict=True)]


def check_sum(training: Training, mode: Mode) -> None:
    """Check that GCondFused with the plain sum leaves the gradients of plain accumulation."""
    batches = training.batches
    if mode == "stochastic":  # its tasks see micro-batches of their own
        batches = batches[:1] * len(batches)
    expected = gradient_of(training, plain, batches)
    actual = gradient_of(training, partial(gcond, mode=mode, method=Sum()), batches)
    differences = torch._foreach_sub(actual, expected)
    error = float(nn.utils.get_total_norm(differences) / nn.utils.get_total_norm(expected))
    if not error <= ROUNDING[training.device.type]:
        raise AssertionError(
            f"with the plain sum the gradient differs from plain accumulation by {error:.2g} of "
            "its norm"
        )


def gradient_of(
    training: Training, made_by: Callable[..., Window], batches: Sequence[Batch]
) -> list[Tensor]:
    """Return `.grad` of every parameter after one step, which leaves the parameters alone."""
    model = training.new_model()
    made_by(training, model, torch.optim.SGD(model.parameters(), lr=0.0))(batches)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@torch.no_grad()
def check_losses(training: Training, model: nn.Module) -> None:
    """Check that the losses of the trained model are finite."""
    inputs, targets = training.batches[0]
    logits = model(inputs)
    for name, task in training.tasks.items():
        loss = float(task.loss(logits, targets))
        if not math.isfinite(loss):
            raise AssertionError(f"the loss {name!r} is {loss} after training")


def memory_figures(device: torch.device, width: int = 2048) -> Iterator[Figure]:
    """Measure the peak memory of steps, of a batch so small that activations do not count."""
    previous: Figure = {}
    for tasks in (1, *TASKS_OF_MEMORY):
        layers = [nn.Linear(width, width) for _ in range(LAYERS_OF_MEMORY)]
        model = nn.Sequential(*layers).to(device)
        parameters = sum(p.numel() for p in model.parameters())
        x = torch.ones(1, width, device=device)
        peak = peak_bytes(two_steps(model, x, tasks), device)
        figure: Figure = {
            "section": "training",
            "operation": "memory of steps",
            "model": f"{LAYERS_OF_MEMORY} linear layers",
            "parameters": parameters,
            "tensors": 2 * LAYERS_OF_MEMORY,
            "tasks": tasks,
            "by": "plain accumulation" if tasks == 1 else "GCondFused exact",
            "peak_bytes": peak,
            "bytes_per_parameter": peak / parameters,
        }
        if tasks > 1:
            figure["backend"] = ops.backend_for("auto", device).name
        if tasks > TASKS_OF_MEMORY[0]:
            growth = (peak - previous["peak_bytes"]) / (tasks - previous["tasks"]) / parameters
            # K×K numbers grow too, by some hundredths of a byte.
            figure |= {
                "bytes_per_parameter_and_task": growth,
                "target": {"bytes_per_parameter_and_task": BYTES_OF_A_TASK},
                "met": round(growth, 1) <= BYTES_OF_A_TASK,
            }
        previous = figure
        yield figure


def two_steps(model: nn.Module, x: Tensor, tasks: int) -> Run:
    """Return two steps of two micro-batches by GCondFused, of one task by plain accumulation."""
    base = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return model(x).square().mean()

    def plain_run() -> None:
        for _ in range(2):
            base.zero_grad()
            for _ in range(2):
                loss().backward()
            base.step()

    if tasks == 1:
        return plain_run
    weights = {f"task {k}": 1.0 for k in range(tasks)}
    optimizer = GCondFused(base, weights, accumulation_steps=2)

    def run() -> None:
        for _ in range(4):
            if optimizer.backward(dict.fromkeys(optimizer.tasks, loss)):
                optimizer.step()

    return run


def peak_bytes(run: Run, device: torch.device | str) -> int:
    """Return the most that `run` has allocated at any time, beyond what was there before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        run()
    events = recording.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    assert changes, "the profiler recorded no allocation"
    changes.sort(key=lambda event: event.start_ns())
    return max(0, *accumulate(event.nbytes() for event in changes))
