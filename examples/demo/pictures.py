"""The pictures of a scene's runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from torch import Tensor

from gcond_kernels import GCond
from gcond_kernels.diagnostics.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    VERMILION,
    shade_zones,
)

from .digits import Digits
from .photos import Photos
from .physics import Physics
from .summary import against, cosines, listed, percent_in_conflict, scores
from .training import Run, device_of

Draw: TypeAlias = "Callable[[Sequence[Run]], Figure]"
Column = TypeVar("Column")

ORANGE, BROWN, DARK = "#E69F00", "#7A4419", "#555555"
# Line styles and markers differ too, and the widths, so that lines on top of each other stay
# visible.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": SKY, "linestyle": "-", "linewidth": 4.0, "marker": "o"},
    "sum": {"color": BLUE, "linestyle": ":", "linewidth": 2.4, "marker": "x"},
    "gcond": {"color": VERMILION, "linestyle": "-", "linewidth": 1.6, "marker": "s"},
    "gcond-stochastic": {"color": BLACK, "linestyle": ":", "linewidth": 1.6, "marker": "^"},
    "pcgrad": {"color": GREEN, "linestyle": "-", "linewidth": 1.6, "marker": "v"},
    "cagrad": {"color": PURPLE, "linestyle": "-", "linewidth": 1.6, "marker": "D"},
    "mgda": {"color": BLUE, "linestyle": "--", "linewidth": 1.6, "marker": "P"},
    "gradnorm": {"color": ORANGE, "linestyle": "-", "linewidth": 1.6, "marker": "<"},
    "upgrad": {"color": GREEN, "linestyle": "--", "linewidth": 1.6, "marker": ">"},
    "gradvac": {"color": PURPLE, "linestyle": "--", "linewidth": 1.6, "marker": "h"},
    "alignedmtl": {"color": BROWN, "linestyle": "-", "linewidth": 1.6, "marker": "*"},
    "imtlg": {"color": ORANGE, "linestyle": "--", "linewidth": 1.6, "marker": "p"},
    "nashmtl": {"color": BROWN, "linestyle": "-.", "linewidth": 1.6, "marker": "X"},
    "dwa": {"color": SKY, "linestyle": "--", "linewidth": 1.6, "marker": "1"},
    "famo": {"color": VERMILION, "linestyle": "--", "linewidth": 1.6, "marker": "2"},
    "stch": {"color": BLACK, "linestyle": "--", "linewidth": 1.6, "marker": "3"},
    "rlw": {"color": SKY, "linestyle": "-.", "linewidth": 1.6, "marker": "4"},
    "uncertainty": {"color": VERMILION, "linestyle": "-.", "linewidth": 1.6, "marker": "+"},
    "config": {"color": BLUE, "linestyle": "-.", "linewidth": 1.6, "marker": "$C$"},
    "fairgrad": {"color": GREEN, "linestyle": "-.", "linewidth": 1.6, "marker": "$F$"},
    "normbalancing": {"color": PURPLE, "linestyle": "-.", "linewidth": 1.6, "marker": "$N$"},
    "excessmtl": {"color": BROWN, "linestyle": "--", "linewidth": 1.6, "marker": "$E$"},
    "nonconflicting": {"color": DARK, "linestyle": "--", "linewidth": 1.6, "marker": "H"},
    "boundary-x10": {"color": ORANGE, "linestyle": "-.", "linewidth": 2.4, "marker": "8"},
    "graddrop": {"color": DARK, "linestyle": "-.", "linewidth": 1.6, "marker": "d"},
}
MARKER_SIZES = {"o": 13.0, "s": 9.0, "^": 6.0}  # for lines that lie on each other
MARKER_SIZE = 7.0
TASK_STYLES = (
    {"color": BLUE, "marker": "o"},
    {"color": VERMILION, "marker": "^"},
    {"color": GREEN, "marker": "v"},
)
RIGHT, WRONG = BLACK, VERMILION
SMOOTHING = 0.9
EXAMPLES, FEWER_EXAMPLES = 6, 3
DIGIT_EXAMPLES = 10
PANEL, LINE = 2.24, 0.27  # inches: the side of an example, and the height of a line below it
FEW = 4  # so many methods have a row each where there are pictures of all of them
COLUMNS = 3 + FEW  # of reconstructions and fields, before they are wrapped
PANELS = 3  # in a row, of small multiples
MARKERS = 9  # on a line, at most


def write_pictures(runs: Sequence[Run], output: Path) -> list[Path]:
    """Write a scene's pictures; remove what it wrote before, also where nothing replaces it."""
    scene = runs[0].scene
    draws: dict[str, Draw] = {"losses": losses_picture, "cosine": cosine_picture}
    if isinstance(scene, Photos):
        draws["reconstructions"] = reconstructions_picture
    if isinstance(scene, Digits):
        draws["examples"] = examples_picture
    if isinstance(scene, Physics):
        draws |= {"error": error_picture, "field": field_picture}
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
    """Draw training and validation loss of every task over the steps."""
    scene = runs[0].scene
    many = len(runs) > FEW
    figure = Figure(figsize=(15, 7.0) if many else (13, 5.6), layout="constrained")
    set_title(figure, runs, f"{scene.title}: losses in training (lines) and validation (markers)")
    panels = figure.subplots(1, len(scene.tasks), squeeze=False)[0]
    for axes, task in zip(panels, scene.tasks, strict=True):
        for run in runs:
            plot_losses(axes, run, task)
        axes.set_title(f"task {task}", fontsize=13)
        axes.set_xlabel("optimizer step", fontsize=12)
        axes.set_ylabel(scene.loss_labels[task], fontsize=12)
        axes.grid(alpha=0.3)
        if isinstance(scene, Physics):
            axes.set_yscale("log")
    handles = method_handles(runs)
    if many:  # inside, they would cover the lines
        figure.legend(handles=handles, loc="outside right center", fontsize=12, handlelength=3.5)
    else:
        panels[-1].legend(handles=handles, fontsize=12)
    fewer = ""
    if any(run.method.mode == "stochastic" for run in runs):
        fewer = "; in stochastic mode of fewer micro-batches per task"
    figure.supxlabel(
        f"Lines: moving average (factor {SMOOTHING}){fewer}.\nValidation: {scene.validation_note}.",
        fontsize=11,
    )
    return figure


def method_handles(runs: Sequence[Run]) -> list[Line2D]:
    """Return the entries of a legend of methods."""
    return [
        Line2D([], [], label=run.method.name, markerfacecolor="white", **method_style(run))
        for run in runs
    ]


def set_title(figure: Figure, runs: Sequence[Run], title: str) -> None:
    """Write the figure's title, and which methods have not made all their steps."""
    for run in runs:
        if not run.complete:
            title += f"\n(interrupted: {run.method.name} after {run.progress})"
    figure.suptitle(title, fontsize=15)


def plot_losses(axes: Axes, run: Run, task: str) -> None:
    """Draw one method's curve of one task."""
    style = method_style(run)
    # The exponential moving average without a start at zero.
    weights = SMOOTHING ** np.arange(len(run.history))
    losses = [step.losses[task] for step in run.history]
    smoothed = np.convolve(losses, weights)[: len(losses)] / weights.cumsum()
    axes.plot(range(1, len(smoothed) + 1), smoothed, **style | {"marker": ""})
    steps = [evaluation.step for evaluation in run.evaluations]
    validated = [float(evaluation.losses[task].mean()) for evaluation in run.evaluations]
    style |= {"linestyle": "", "markerfacecolor": "none"}
    axes.plot(steps, validated, markevery=math.ceil(len(steps) / MARKERS), **style)


def method_style(run: Run) -> dict[str, Any]:
    """Return how a method's line and markers are drawn."""
    style = METHOD_STYLES[run.method.key]
    size = MARKER_SIZES.get(style["marker"], MARKER_SIZE)
    return {**style, "markersize": size, "markeredgewidth": 2.0}


def cosine_picture(runs: Sequence[Run]) -> Figure:
    """Draw the cosine of the tasks' gradients over the steps, with GCond's zones and winners."""
    compared = [run for run in runs if cosines(run)]
    tasks = list(runs[0].scene.tasks)
    title = f"{runs[0].scene.title}: do the gradients of {listed(tasks)} conflict?"
    if len(compared) <= FEW:
        figure = cosine_rows(compared)
    else:
        figure = cosine_panels(compared)
        title += "\nover the optimizer steps; shaded: GCond's mild, moderate and critical zones"
    set_title(figure, runs, title)
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    handles = [drawn[label] for label, _ in point_styles(tasks).values() if label in drawn]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=12,
        markerscale=8.0 / handles[0].get_markersize(),
    )
    return figure


def cosine_rows(runs: Sequence[Run]) -> Figure:
    """Draw a row for each run, with the distribution beside it."""
    figure = Figure(figsize=(13, 1.6 + 4.2 * len(runs)), layout="constrained")
    rows = figure.subplots(
        len(runs), 2, squeeze=False, sharey=True, width_ratios=(4, 1), sharex="col"
    )
    for (left, right), run in zip(rows, runs, strict=True):
        shade_zones(left, GCond().thresholds, labels=True)
        shade_zones(right, GCond().thresholds, labels=False)
        scatter_steps(left, run, size=6.0)
        # Room for the names of the zones.
        left.set_xlim(0, 1.24 * run.steps)
        data = run.scene.data if run.method.mode == "exact" else "different micro-batches"
        left.set_title(
            f"{run.method.name} (gradients of {data}): "
            f"conflict in {percent_in_conflict(run):.0f} % of {len(cosines(run))} steps",
            fontsize=13,
        )
        left.set_ylabel("cosine similarity", fontsize=12)
        right.hist(
            cosines(run), bins=list(np.linspace(-1, 1, 41)), orientation="horizontal", color=GREY
        )
        right.set_title("distribution", fontsize=13)
    rows[-1][0].set_xlabel("optimizer step", fontsize=12)
    rows[-1][1].set_xlabel("number of steps", fontsize=12)
    return figure


def cosine_panels(runs: Sequence[Run]) -> Figure:
    """Draw small multiples, for more runs than a page has rows."""
    count = math.ceil(len(runs) / PANELS)
    figure = Figure(figsize=(15, 2.0 + 2.7 * count), layout="constrained")
    panels = figure.subplots(count, PANELS, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, run in zip(panels, runs, strict=False):
        shade_zones(axes, GCond().thresholds, labels=False)
        scatter_steps(axes, run, size=4.0)
        axes.set_xlim(0, run.steps + 1)
        median = f"{statistics.median(cosines(run)):+.2f}".replace("-", "−")
        share = percent_in_conflict(run)
        axes.set_title(f"{run.method.name}: {share:.0f} % of steps, median {median}", fontsize=12)
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(runs) - PANELS) : len(runs)]:  # with nothing below them
        axes.tick_params(labelbottom=True)
    figure.supylabel("cosine similarity", fontsize=12)
    return figure


def scatter_steps(axes: Axes, run: Run, size: float) -> None:
    """Draw a point per step, by who won; by the sign alone where the method names no winner."""
    points: dict[str, list[tuple[int, float]]] = {"none": []}
    if run.method.names_winners:
        points |= {f"won by {task}": [] for task in run.scene.tasks}
    for number, step in enumerate(run.history, start=1):
        if step.cosine is None:
            continue
        kind = f"won by {step.winner}" if run.method.names_winners else "conflict"
        points.setdefault("none" if step.zone == "none" else kind, []).append((number, step.cosine))
    styles = point_styles(list(run.scene.tasks))
    for kind, places in points.items():
        label, style = styles[kind]
        places_of = np.array(places).reshape(-1, 2).T
        axes.plot(*places_of, linestyle="", markersize=size, label=label, **style)


def point_styles(tasks: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the kinds of points → text of the legend, and how they are drawn."""
    won = {
        f"won by {task}": (f"conflict won by {task}", style)
        for task, style in zip(tasks, TASK_STYLES, strict=False)
    }
    return {
        "none": ("no conflict", {"color": GREY, "marker": "."}),
        **won,
        # In the mild zone both may give way.
        "won by None": ("conflict without a winner", {"color": BLACK, "marker": "s"}),
        "conflict": ("conflict (the method names no winner)", {"color": DARK, "marker": "x"}),
    }


def error_picture(runs: Sequence[Run]) -> Figure:
    """Draw the error over the steps, and how often each method's result went against a task."""
    scene = runs[0].scene
    compared = [run for run in runs if against(run)]
    height = max(5.8, 0.3 * len(compared) * len(scene.tasks))
    figure = Figure(figsize=(15, height), layout="constrained")
    set_title(figure, runs, f"{scene.title}: {listed(scene.tasks)}, one seed")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for run in runs:
        steps = [evaluation.step for evaluation in run.evaluations]
        errors = [float(evaluation.scores["error"]) for evaluation in run.evaluations]
        left.plot(
            steps,
            errors,
            markevery=math.ceil(len(steps) / MARKERS),
            markerfacecolor="white",
            **method_style(run),
        )
    left.set_yscale("log")
    left.set_title("error of the field against the exact solution", fontsize=13)
    left.set_xlabel("optimizer step", fontsize=12)
    left.set_ylabel(scene.score_labels["error"], fontsize=12)
    left.grid(alpha=0.3, which="both")
    left.legend(
        handles=method_handles(runs), fontsize=12, handlelength=3.5, ncols=1 + len(runs) // 12
    )
    draw_against(right, compared)
    return figure


def draw_against(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw a bar for each method and task: the steps that went against the task."""
    tasks = list(runs[0].scene.tasks) if runs else []
    height = 0.8 / max(1, len(tasks))
    for place, task in enumerate(tasks):
        shares = [100.0 * (against(run) or {})[task] for run in runs]
        rows = [row + (place - (len(tasks) - 1) / 2.0) * height for row in range(len(runs))]
        color = TASK_STYLES[place]["color"]
        bars = axes.barh(rows, shares, 0.9 * height, color=color, label=f"against {task}")
        axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=11)
    axes.set_yticks(range(len(runs)), [run.method.name for run in runs], fontsize=12)
    axes.invert_yaxis()
    largest = max((bar.get_width() for bar in axes.patches), default=0.0)
    axes.set_xlim(0.0, 1.2 * max(1.0, largest))  # room for the numbers
    axes.set_title("steps whose result raises a task's loss (to first order)", fontsize=13)
    axes.set_xlabel("% of the steps", fontsize=12)
    axes.legend(fontsize=12)


@torch.no_grad()
def field_picture(runs: Sequence[Run]) -> Figure:
    """Draw the first field of each method beside the exact one, and below how far it is off."""
    scene = runs[0].scene
    assert isinstance(scene, Physics)
    exact = scene.field[:, 0]
    columns = [("exact", exact, torch.full_like(exact, math.nan))]
    for run in runs:
        found = run.model(scene.points.to(device_of(run))).cpu()[:, 0]
        columns.append((f"{run.method.name}\n{score_line(run, -1)}", found, found - exact))
    largest = max(float(off.abs().max()) for _, _, off in columns[1:]) or 1.0
    of_field = {"vmin": float(exact.min()), "vmax": float(exact.max()), "cmap": "viridis"}
    of_difference = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
    blocks = wrapped(columns)
    width, rows = len(blocks[0]), 2 * len(blocks)
    figure = Figure(figsize=(2.4 * width + 1.2, 2.4 * rows + 1.2), layout="constrained")
    panels = figure.subplots(rows, width, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for block, (above, below) in zip(blocks, np.split(panels, len(blocks)), strict=True):
        for place, (title, field, off) in enumerate(block):
            above[place].set_title(title, fontsize=11)
            field_image = draw_field(above[place], scene, field, of_field)
            difference_image = draw_field(below[place], scene, off, of_difference)
    name = scene.fields[0]
    figure.colorbar(field_image, ax=list(panels[0]), label=name)
    figure.colorbar(difference_image, ax=list(panels[1]), label="difference")
    set_title(figure, runs, f"{scene.title}: {name} above, its difference from the exact one below")
    across, up = (
        f"{coordinate} from {low:g} to {high:g}"
        for coordinate, low, high in zip(scene.coordinates, scene.low, scene.high, strict=True)
    )
    figure.supxlabel(f"To the right {across}, upwards {up}.".replace("-", "−"), fontsize=11)
    return figure


def draw_field(axes: Axes, scene: Physics, values: Tensor, limits: dict[str, Any]) -> AxesImage:
    """Draw values [N] on the grid as an image."""
    return axes.imshow(values.view(scene.grid).T.numpy(), origin="lower", aspect="auto", **limits)


def wrapped(columns: Sequence[Column]) -> list[Sequence[Column]]:
    """Return columns in blocks that a page is wide enough for, of nearly the same width."""
    width = math.ceil(len(columns) / math.ceil(len(columns) / COLUMNS))
    return [columns[start : start + width] for start in range(0, len(columns), width)]


@torch.no_grad()
def reconstructions_picture(runs: Sequence[Run]) -> Figure:
    """Draw validation crops: what the network is given, what it makes of it, the original."""
    scene = runs[0].scene
    assert isinstance(scene, Photos)
    fewer = len(runs) > FEW
    order = most_contrast(scene.held_out, scene.held_out_images)
    chosen = order[: FEWER_EXAMPLES if fewer else EXAMPLES]
    columns = reconstructions(runs, chosen)
    blocks = wrapped(columns)
    width, rows = len(blocks[0]), len(blocks) * len(chosen)
    height = 2.25 * rows + 0.5 * len(blocks) + 0.6
    figure = Figure(figsize=(2.4 * width, height), layout="constrained")
    which = f"the {len(chosen)} with the most contrast" if fewer else "those with the most contrast"
    set_title(
        figure,
        runs,
        f"{scene.title}: unseen crops ({which}), 75 % hidden;\n"
        "the numbers are means over all validation crops",
    )
    panels = figure.subplots(rows, width, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for block, below in zip(blocks, np.split(panels, len(blocks)), strict=True):
        for (title, images), column in zip(block, below.T, strict=False):
            column[0].set_title(title, fontsize=12)
            for axes, image in zip(column, images, strict=True):
                show(axes, image.permute(1, 2, 0))
    return figure


def reconstructions(runs: Sequence[Run], chosen: Sequence[int]) -> list[tuple[str, Tensor]]:
    """Return the columns: a title and an image of each of the chosen crops."""
    scene = runs[0].scene
    assert isinstance(scene, Photos)
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
    return [*columns, ("original", original)]


def score_line(run: Run, evaluation: int) -> str:
    """Return the validation scores under a column's title."""
    values = scores(run.scene, run.evaluations[evaluation])
    labels = run.scene.score_labels.values()
    return "  ".join(f"{label} {value}" for label, value in zip(labels, values, strict=True))


def most_contrast(crops: Tensor, images: Sequence[int]) -> list[int]:
    """Return the crop of each image with the most contrast, then each image's second, ….

    Each round from the highest contrast to the lowest: a choice no method has a part in.
    """
    order = crops.float().flatten(1).std(1).argsort(descending=True).tolist()
    of_image = [images[crop] for crop in order]
    rounds = {crop: of_image[:place].count(images[crop]) for place, crop in enumerate(order)}
    return sorted(order, key=rounds.__getitem__)


@torch.no_grad()
def examples_picture(runs: Sequence[Run]) -> Figure:
    """Draw the first validation pairs, with what every method takes them for."""
    scene = runs[0].scene
    inputs, targets = scene.validation.inputs[:DIGIT_EXAMPLES], scene.validation.targets
    guesses = [run.model(inputs.to(device_of(run))).argmax(2).cpu() for run in runs]
    names = ["truth", *(run.method.name for run in runs)]
    height = 1.2 + 2.0 * (PANEL + LINE * len(names))
    figure = Figure(figsize=(13, height), layout="constrained")
    set_title(
        figure,
        runs,
        f"{scene.title}: the first validation pairs, the truth and the predictions (left, right)",
    )
    for index, axes in enumerate(figure.subplots(2, DIGIT_EXAMPLES // 2).flat):
        show(axes, inputs[index, 0])
        axes.set_anchor("N")  # so that the lines are close below
        for row, (name, guess) in enumerate(zip(names, [targets, *guesses], strict=True)):
            left, right = guess[index].tolist()
            correct = guess[index].equal(targets[index])
            axes.annotate(
                f"{name}: {left}, {right}{'' if correct else '  ✗'}",
                (0.5, -0.04),
                (0.0, -72.0 * LINE * row),
                xycoords="axes fraction",
                textcoords="offset points",
                horizontalalignment="center",
                verticalalignment="top",
                fontsize=12,
                color=RIGHT if correct else WRONG,
                fontweight="normal" if correct else "bold",
            )
    return figure


def show(axes: Axes, image: Tensor) -> None:
    """Draw an image without ticks."""
    axes.set_axis_on()
    axes.imshow(image.numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
