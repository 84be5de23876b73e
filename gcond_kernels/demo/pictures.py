"""The pictures of a scene's runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from gcond_kernels import GCond
from gcond_kernels.demo.digits import Digits
from gcond_kernels.demo.photos import Photos
from gcond_kernels.demo.summary import cosines, scores, zone_shares
from gcond_kernels.demo.training import Run, device_of
from gcond_kernels.plot import BLACK, BLUE, GREY, SKY, VERMILION, shade_zones

Draw: TypeAlias = "Callable[[Sequence[Run]], Figure]"

# Line styles and markers differ too, and the widths, so that lines on top of each other stay
# visible.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "plain sum": {"color": SKY, "linestyle": "-", "linewidth": 4.0, "marker": "o"},
    "GCond exact": {"color": VERMILION, "linestyle": "-", "linewidth": 1.6, "marker": "s"},
    "GCond stochastic": {"color": BLACK, "linestyle": ":", "linewidth": 1.6, "marker": "^"},
}
MARKER_SIZES = {"o": 13.0, "s": 9.0, "^": 6.0}
TASK_STYLES = ({"color": BLUE, "marker": "o"}, {"color": VERMILION, "marker": "^"})
RIGHT, WRONG = BLACK, VERMILION
SMOOTHING = 0.9
EXAMPLES = 6
DIGIT_EXAMPLES = 10


def write_pictures(runs: Sequence[Run], output: Path) -> list[Path]:
    """Writes one scene's pictures; what it wrote before goes, also where nothing replaces it."""
    scene = runs[0].scene
    draws: dict[str, Draw] = {"losses": losses_picture, "cosine": cosine_picture}
    if isinstance(scene, Photos):
        draws["reconstructions"] = reconstructions_picture
    if isinstance(scene, Digits):
        draws["examples"] = examples_picture
    written = []
    for kind, draw in draws.items():
        path = output / f"{scene.name}_{kind}.png"
        path.unlink(missing_ok=True)
        if kind == "cosine" and not any(map(cosines, runs)):
            continue  # plain sum has no cosine
        draw(runs).savefig(path, dpi=110)
        written.append(path)
    return written


def losses_picture(runs: Sequence[Run]) -> Figure:
    """Training and validation loss of every task over the steps."""
    scene = runs[0].scene
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    set_title(figure, runs, f"{scene.title}: losses in training (lines) and validation (markers)")
    panels = figure.subplots(1, len(scene.tasks), squeeze=False)[0]
    for axes, task in zip(panels, scene.tasks, strict=True):
        for run in runs:
            plot_losses(axes, run, task)
        axes.set_title(f"task {task}", fontsize=13)
        axes.set_xlabel("optimizer step", fontsize=12)
        axes.set_ylabel(scene.loss_labels[task], fontsize=12)
        axes.grid(alpha=0.3)
    panels[-1].legend(handles=[method_handle(run) for run in runs], fontsize=12)
    figure.supxlabel(
        f"Lines: moving average (factor {SMOOTHING}); in stochastic mode of fewer micro-batches "
        f"per task.\nValidation: {scene.validation_note}.",
        fontsize=11,
    )
    return figure


def set_title(figure: Figure, runs: Sequence[Run], title: str) -> None:
    """The figure's title, and which methods have not made all their steps."""
    for run in runs:
        if not run.complete:
            title += f"\n(interrupted: {run.method.name} after {run.progress})"
    figure.suptitle(title, fontsize=15)


def plot_losses(axes: Axes, run: Run, task: str) -> None:
    """One method's curve of one task."""
    style = dict(METHOD_STYLES[run.method.name])
    marker = style.pop("marker")
    steps = np.arange(1, len(run.history) + 1)
    axes.plot(steps, smooth([step.losses[task] for step in run.history]), **style)
    axes.plot(
        [evaluation.step for evaluation in run.evaluations],
        [float(evaluation.losses[task].mean()) for evaluation in run.evaluations],
        linestyle="",
        marker=marker,
        markersize=MARKER_SIZES[marker],
        markerfacecolor="none",
        markeredgecolor=style["color"],
        markeredgewidth=2.0,
    )


def method_handle(run: Run) -> Line2D:
    """Legend entry of a method."""
    style = METHOD_STYLES[run.method.name]
    return Line2D(
        [],
        [],
        label=run.method.name,
        markersize=MARKER_SIZES[style["marker"]],
        markerfacecolor="white",
        markeredgewidth=2.0,
        **style,
    )


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without a start at zero."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1.0 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1.0 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def cosine_picture(runs: Sequence[Run]) -> Figure:
    """Cosine of the tasks' gradients over the steps, with GCond's zones and the winners."""
    compared = [run for run in runs if cosines(run)]
    scene = runs[0].scene
    tasks = list(scene.tasks)
    figure = Figure(figsize=(13, 1.6 + 4.2 * len(compared)), layout="constrained")
    set_title(figure, runs, f"{scene.title}: do the gradients of {' and '.join(tasks)} conflict?")
    rows = figure.subplots(
        len(compared), 2, squeeze=False, sharey=True, width_ratios=(4, 1), sharex="col"
    )
    for (left, right), run in zip(rows, compared, strict=True):
        shade_zones(left, GCond().thresholds, labels=True)
        shade_zones(right, GCond().thresholds, labels=False)
        scatter_steps(left, run)
        left.set_title(row_title(run), fontsize=13)
        left.set_ylabel("cosine similarity", fontsize=12)
        right.hist(
            cosines(run), bins=list(np.linspace(-1, 1, 41)), orientation="horizontal", color=GREY
        )
        right.set_title("distribution", fontsize=13)
    rows[-1][0].set_xlabel("optimizer step", fontsize=12)
    rows[-1][1].set_xlabel("number of steps", fontsize=12)
    figure.legend(handles=winner_handles(tasks), loc="outside lower center", ncols=3, fontsize=12)
    return figure


def row_title(run: Run) -> str:
    """Title of a row of the cosine picture."""
    shares = zone_shares(run)
    assert shares is not None
    data = "of the same data" if run.method.mode == "exact" else "of different micro-batches"
    return (
        f"{run.method.name} (gradients {data}): "
        f"conflict in {100.0 * (1.0 - shares['none']):.0f} % of {len(cosines(run))} steps"
    )


def scatter_steps(axes: Axes, run: Run) -> None:
    """One point per step, by who won."""
    tasks = list(run.scene.tasks)
    for number, step in enumerate(run.history, start=1):
        if step.cosine is None:
            continue
        style: dict[str, Any] = {"color": GREY, "marker": "."}
        if step.winner is not None:
            style = TASK_STYLES[tasks.index(step.winner)]
        axes.plot(number, step.cosine, linestyle="", markersize=6, **style)
    # Room for the names of the zones.
    axes.set_xlim(0, 1.18 * run.steps)


def winner_handles(tasks: Sequence[str]) -> list[Line2D]:
    """Legend of the points."""

    def handle(label: str, color: str, marker: str) -> Line2D:
        return Line2D([], [], linestyle="", label=label, color=color, marker=marker, markersize=8)

    won = [
        handle(f"conflict won by {task}", **style)
        for task, style in zip(tasks, TASK_STYLES, strict=False)
    ]
    return [handle("no conflict", GREY, "."), *won]


@torch.no_grad()
def reconstructions_picture(runs: Sequence[Run]) -> Figure:
    """Validation crops: what the network is given, what it makes of it, and the original."""
    scene = runs[0].scene
    assert isinstance(scene, Photos)
    chosen = most_contrast(scene.held_out, scene.held_out_images)[:EXAMPLES]
    inputs, targets = scene.validation.inputs[chosen], scene.validation.targets[chosen]
    hidden = inputs[:, 3:]
    original = scene.denormalise(targets)
    columns = [
        ("masked input", original * (1.0 - hidden) + 0.5 * hidden),
        (f"untrained: filled in\n{score_line(runs[0], 0)}", scene.denormalise(inputs[:, :3])),
    ]
    for run in runs:
        output = run.model(inputs.to(device_of(run))).cpu()
        columns.append((f"{run.method.name}\n{score_line(run, -1)}", scene.denormalise(output)))
    columns.append(("original", original))
    figure = Figure(figsize=(2.4 * len(columns), 2.25 * len(chosen) + 1.1), layout="constrained")
    set_title(
        figure,
        runs,
        f"{scene.title}: unseen crops (those with the most contrast), 75 % hidden;\n"
        "the numbers are means over all validation crops",
    )
    panels = figure.subplots(len(chosen), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns):
        panels[0][column].set_title(title, fontsize=12)
        for row, image in enumerate(images):
            show(panels[row][column], image.permute(1, 2, 0))
    return figure


def score_line(run: Run, evaluation: int) -> str:
    """Validation scores under a column's title."""
    values = scores(run.scene, run.evaluations[evaluation])
    labels = run.scene.score_labels.values()
    return "  ".join(f"{label} {value}" for label, value in zip(labels, values, strict=True))


def most_contrast(crops: Tensor, images: Sequence[int]) -> list[int]:
    """The crop of each image in which the pixels differ most, then each image's second, ….

    Each round from the highest contrast to the lowest: a choice no method has a part in.
    """
    order = crops.float().flatten(1).std(1).argsort(descending=True).tolist()
    seen: Counter[int] = Counter()
    rounds = []
    for place, crop in enumerate(order):
        rounds.append((seen[images[crop]], place, crop))
        seen[images[crop]] += 1
    return [crop for _, _, crop in sorted(rounds)]


@torch.no_grad()
def examples_picture(runs: Sequence[Run]) -> Figure:
    """The first validation pairs, with what every method takes them for."""
    scene = runs[0].scene
    inputs, targets = scene.validation.inputs[:DIGIT_EXAMPLES], scene.validation.targets
    guesses = [run.model(inputs.to(device_of(run))).argmax(2).cpu() for run in runs]
    figure = Figure(figsize=(13, 8.2))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.91, bottom=0.16, hspace=0.75, wspace=0.15)
    set_title(
        figure,
        runs,
        f"{scene.title}: the first validation pairs, the truth and the predictions (left, right)",
    )
    panels = figure.subplots(2, DIGIT_EXAMPLES // 2).flat
    for index, axes in enumerate(panels):
        show(axes, inputs[index, 0])
        truth = targets[index].tolist()
        lines = [("truth", truth, True)]
        for run, guess in zip(runs, guesses, strict=True):
            guessed = guess[index].tolist()
            lines.append((run.method.name, guessed, guessed == truth))
        for row, (name, (left, right), correct) in enumerate(lines):
            axes.text(
                0.5,
                -0.04 - 0.12 * row,
                f"{name}: {left}, {right}{'' if correct else '  ✗'}",
                transform=axes.transAxes,
                horizontalalignment="center",
                verticalalignment="top",
                fontsize=12,
                color=RIGHT if correct else WRONG,
                fontweight="normal" if correct else "bold",
            )
    return figure


def show(axes: Axes, image: Tensor) -> None:
    """An image without ticks."""
    pixels: NDArray[Any] = image.numpy()
    axes.imshow(pixels, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
