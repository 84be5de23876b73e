"""Does accumulation stabilise the task gradients, and the cosine between them?

At fixed weights, at three moments of a training by the plain sum, it accumulates independent
windows of 1, 8 and 24 micro-batches and measures how the task gradients of the windows differ. Then
it trains with 1, 8 and 24 micro-batches per step and compares each step's gradients with the last
step's.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.experiments.common import SCENES, Experiment, Job, Record, scene_of, scenes_in
from bench.experiments.pictures import number_windows
from bench.experiments.tables import markdown, percent
from bench.experiments.training import at_moments, cosine, plain_training, with_micro_batches
from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREEN, VERMILION

WINDOW = (1, 8, 24)  # micro-batches
LARGE_WINDOWS = 10  # of 24 micro-batches; the same make thrice as many of 8
SMALL_WINDOWS = 48  # of 1
AT_FIXED_WEIGHTS = "fixed weights"
MOMENTS = {"first step": 0.0, "after a fifth": 0.2, "last step": 1.0}
MOMENT_STYLES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"))
# How the tasks of a window are compared: in the same micro-batches, or in different ones.
MODES = {"exact": "cosine_of_tasks", "stochastic": "cosine_of_tasks_apart"}


def jobs(options: argparse.Namespace, scene: str, seed: int) -> list[Job]:
    """Return measurements at fixed weights (window 0), and trainings with windows of each size."""
    steps = options.steps_of[scene]
    # Large windows cost much, and step by step there is one to measure in each.
    fewer = max(2, steps // 2)
    return [
        Job(seed, scene, steps, at_fixed_weights, 0),
        *(Job(seed, scene, fewer, from_step_to_step, window) for window in WINDOW),
    ]


def at_fixed_weights(job: Job) -> Record:
    """Measure windows at the three moments of one training."""
    tasks = list(scene_of(job.scene).tasks)
    places = [round(share * (job.steps - 1)) for share in MOMENTS.values()]
    found = at_moments(job, places, lambda gradients: measure(gather(gradients), tasks))
    moments = [{"step": step, **one} for step, one in zip(sorted(places), found, strict=True)]
    return {"method": AT_FIXED_WEIGHTS, "moments": moments}


def gather(gradients: Callable[[], Tensor]) -> dict[int, Tensor]:
    """Return size → [R, K, N] independent windows, of the same micro-batches for all sizes."""
    windows: dict[int, list[Tensor]] = {size: [] for size in WINDOW}
    small, middle, large = WINDOW
    for _ in range(LARGE_WINDOWS):
        parts = []
        for _ in range(large // middle):
            micro_batches = [gradients() for _ in range(middle)]
            parts.append(torch.stack(micro_batches).mean(0))
            windows[small] += micro_batches[: SMALL_WINDOWS - len(windows[small])]
        windows[middle] += parts
        windows[large].append(torch.stack(parts).mean(0))
    return {size: torch.stack(found) for size, found in windows.items()}


def measure(windows: dict[int, Tensor], tasks: Sequence[str]) -> dict[str, Any]:
    """Return what the report needs, of one moment."""
    largest = inner_products(windows[max(windows)])
    # All sizes have the same expected gradient: all micro-batches estimate its norm best.
    signals = {task: estimates(largest[:, k, :, k]).signal for k, task in enumerate(tasks)}
    sizes = {}
    for size, found in windows.items():
        products = inner_products(found)
        each = {task: estimates(products[:, k, :, k]) for k, task in enumerate(tasks)}
        same, apart = task_cosines(products)
        sizes[str(size)] = {
            "windows": len(found),
            "variance": {task: e.variance for task, e in each.items()},
            "relative_variance": {
                task: e.variance / signals[task] if signals[task] > 0.0 else None
                for task, e in each.items()
            },
            "cosine_of_windows": {task: e.cosine for task, e in each.items()},
            "cosine_of_tasks": distribution(same),
            "cosine_of_tasks_apart": distribution(apart),
        }
    return {"expected_cosine": expected_cosine(largest), "sizes": sizes}


def inner_products(windows: Tensor) -> Tensor:
    """Return [R, K, R, K] inner products of windows [R, K, N]."""
    count, tasks, _ = windows.shape
    flat = windows.flatten(0, 1).double()
    return (flat @ flat.T).view(count, tasks, count, tasks)


class Estimates(NamedTuple):
    """What independent estimates ĝ of one gradient μ show."""

    variance: float  # E‖ĝ - μ‖², unbiased
    signal: float  # ‖μ‖², unbiased; noise may make it negative
    cosine: float  # mean cosine of two of them


def estimates(products: Tensor) -> Estimates:
    """Return what the inner products [R, R] show: those of different estimates have no noise."""
    apart = ~torch.eye(len(products), dtype=torch.bool)
    signal = float(products[apart].mean())
    norms = products.diagonal().sqrt()
    cosines = (products / torch.outer(norms, norms)).nan_to_num()
    variance = float(products.diagonal().mean()) - signal
    return Estimates(variance, signal, float(cosines[apart].mean()))


def task_cosines(products: Tensor) -> tuple[list[float], list[float]]:
    """Return the cosines of two tasks in the same window, and in different ones."""
    first, second = torch.einsum("rkrk->rk", products).sqrt().unbind(1)
    cosines = (products[:, 0, :, 1] / torch.outer(first, second)).nan_to_num()
    apart = ~torch.eye(len(cosines), dtype=torch.bool)
    return cosines.diagonal().tolist(), cosines[apart].tolist()


def expected_cosine(products: Tensor) -> float | None:
    """Return the cosine of the two tasks' expected gradients, without the noise of any window."""
    first, second = (estimates(products[:, k, :, k]).signal for k in (0, 1))
    apart = ~torch.eye(len(products), dtype=torch.bool)
    if first <= 0.0 or second <= 0.0:
        return None
    return float(products[:, 0, :, 1][apart].mean()) / math.sqrt(first * second)


def distribution(cosines: Sequence[float]) -> dict[str, float]:
    """Return mean, standard deviation and the share of conflicts."""
    return {
        "mean": statistics.fmean(cosines),
        "deviation": statistics.stdev(cosines),
        "conflicts": sum(value < 0.0 for value in cosines) / len(cosines),
    }


def from_step_to_step(job: Job) -> Record:
    """Compare each step's gradients with those of the step before, and the tasks' with another."""
    scene = with_micro_batches(scene_of(job.scene), job.subject)
    before, steps, tasks = None, {task: [] for task in scene.tasks}, []
    for _, gradients in plain_training(scene, job.steps, job.seed):
        tasks.append(cosine(*gradients))
        if before is not None:
            for task, now, then in zip(scene.tasks, gradients, before, strict=True):
                steps[task].append(cosine(now, then))
        before = gradients
    return {
        "method": f"{job.subject} micro-batches",
        "window": job.subject,
        "cosine_of_steps": {task: statistics.fmean(found) for task, found in steps.items()},
        "cosine_of_tasks": distribution(tasks),
    }


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that there are."""
    return [value for value in values if value is not None]


def cell(values: Sequence[float | None]) -> str:
    """Return mean ± standard error of the values that there are."""
    found = known(values)
    if not found:
        return ""
    text = f"{statistics.fmean(found):.2f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found) / math.sqrt(len(found)):.2f}"
    return text.replace("-", "−")


def cells(found: Sequence[dict[str, float]]) -> list[str]:
    """Return the cells of a distribution of cosines over the seeds."""
    conflicts = percent(statistics.fmean(one["conflicts"] for one in found))
    return [*(cell([one[key] for one in found]) for key in ("mean", "deviation")), conflicts]


def moments_of(records: Sequence[Record], place: int) -> list[dict[str, Any]]:
    """Return what was measured at a moment, of all seeds."""
    return [found["moments"][place] for found in records if found["method"] == AT_FIXED_WEIGHTS]


def trained(records: Sequence[Record], window: int) -> list[Record]:
    """Return the trainings with a window, of all seeds."""
    return [found for found in records if found.get("window") == window]


INTRODUCTION = (
    "# Variance and direction of accumulated task gradients",
    "At fixed weights the micro-batches are drawn independently, so the variance of their mean "
    "must be 1/A of that of a single one: that column checks the measurement. What is to be "
    "learned is how large the noise is beside the gradient, E‖ĝ−μ‖² / ‖μ‖², and so from which "
    "A on the direction is stable: the mean cosine of two independent windows. "
    f"{SMALL_WINDOWS} windows of 1, {3 * LARGE_WINDOWS} of 8 and {LARGE_WINDOWS} of 24 "
    "micro-batches. All are means over the seeds ± standard error.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    steps = next(found["steps"] for found in records if "moments" in found)
    return [
        f"## {scene}: at fixed weights",
        f"Moments of a training of {steps} steps of {SCENES[scene].accumulation_steps} "
        f"micro-batches; tasks {' and '.join(SCENES[scene].tasks)}. Variance by law: the variance "
        "of the mean of A micro-batches, times A, relative to that of one; 1 is the law.",
        direction_table(records, scene),
        "The cosine between the tasks, as windows measure it: mean and standard deviation over "
        "windows and the share that counts as a conflict, of tasks that share the "
        "micro-batches of a window (exact mode) and of tasks with different ones (stochastic "
        "mode, A for each). Without noise: the cosine of the expected gradients.",
        tasks_table(records),
        f"## {scene}: from step to step",
        f"{trained(records, 1)[0]['steps']} steps with A micro-batches each at the same "
        "learning rate; steps at which the tasks' measured cosine is below 0 count as "
        "conflict.",
        steps_table(records, scene),
    ]


def direction_table(records: Sequence[Record], scene: str) -> str:
    """Return the table of variances and directions."""
    tasks = list(SCENES[scene].tasks)
    rows = [["moment", "A"]]
    for task in tasks:
        rows[0] += [f"{task}: noise / gradient", "variance by law", "cosine of two windows"]
    for (place, moment), size in itertools.product(enumerate(MOMENTS), WINDOW):
        rows.append([moment, str(size)])
        both = [
            (found["sizes"]["1"], found["sizes"][str(size)]) for found in moments_of(records, place)
        ]
        for task in tasks:
            rows[-1] += [
                cell([s["relative_variance"][task] for _, s in both]),
                cell([s["variance"][task] * size / one["variance"][task] for one, s in both]),
                cell([s["cosine_of_windows"][task] for _, s in both]),
            ]
    return markdown(rows)


def tasks_table(records: Sequence[Record]) -> str:
    """Return the table of the cosines between the tasks."""
    rows = [["moment", "A", "without noise"]]
    for mode in MODES:
        rows[0] += [f"{mode}: cosine", "deviation", "conflicts"]
    for (place, moment), size in itertools.product(enumerate(MOMENTS), WINDOW):
        found = moments_of(records, place)
        rows.append([moment, str(size), cell([one["expected_cosine"] for one in found])])
        for key in MODES.values():
            rows[-1] += cells([one["sizes"][str(size)][key] for one in found])
    return markdown(rows)


def steps_table(records: Sequence[Record], scene: str) -> str:
    """Return the table of the cosines from step to step."""
    tasks = list(SCENES[scene].tasks)
    heads = ["A", *(f"{task}: cosine with the step before" for task in tasks)]
    rows = [[*heads, "cosine of the tasks", "deviation over steps", "conflicts"]]
    for size in WINDOW:
        found = trained(records, size)
        steps = [cell([r["cosine_of_steps"][task] for r in found]) for task in tasks]
        rows.append([str(size), *steps, *cells([r["cosine_of_tasks"] for r in found])])
    return markdown(rows)


def picture(records: Sequence[Record]) -> Figure:
    """Draw noise, direction and the cosines of the tasks against the window."""
    scenes = scenes_in(records)
    figure = Figure(figsize=(17, 5.6 * len(scenes) + 0.6), layout="constrained")
    panels = figure.subplots(len(scenes), 3, squeeze=False)
    for scene, of_scene in zip(scenes, panels, strict=True):
        for axes, draw in zip(of_scene, (draw_noise, draw_direction, draw_tasks), strict=True):
            draw(axes, [found for found in records if found["scene"] == scene], scene)
            number_windows(axes, WINDOW)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=9)
    figure.suptitle("Accumulated task gradients: mean and range over the seeds", fontsize=15)
    return figure


def draw_means(
    axes: Axes, found: dict[int, list[float | None]], style: tuple[str, str], **more: Any
) -> None:
    """Draw means with the range over the seeds."""
    there = {size: values for size in found if (values := known(found[size]))}
    means = [statistics.fmean(values) for values in there.values()]
    low, high = ([end(values) for values in there.values()] for end in (min, max))
    ranges = np.subtract(means, low), np.subtract(high, means)
    axes.errorbar(list(there), means, ranges, color=style[0], marker=style[1], capsize=3, **more)


def draw_noise(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Draw the relative variance at the three moments."""
    for place, (moment, style) in enumerate(zip(MOMENTS, MOMENT_STYLES, strict=True)):
        sizes = [found["sizes"] for found in moments_of(records, place)]
        for task, line in zip(SCENES[scene].tasks, ("-", "--"), strict=True):
            found = {n: [s[str(n)]["relative_variance"][task] for s in sizes] for n in WINDOW}
            draw_means(axes, found, style, linestyle=line, label=f"{task}, {moment}")
    axes.set_yscale("log")
    axes.axhline(1.0, color=BLACK, linewidth=1.0, linestyle=":")
    axes.set_title(f"{scene}: E‖ĝ−μ‖² / ‖μ‖² (dotted: as much noise as gradient)", fontsize=11)


def draw_direction(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Draw the cosines of independent windows at the last moment, and from step to step."""
    sizes = [found["sizes"] for found in moments_of(records, -1)]
    for task, style in zip(SCENES[scene].tasks, MOMENT_STYLES, strict=False):
        found = {n: [s[str(n)]["cosine_of_windows"][task] for s in sizes] for n in WINDOW}
        draw_means(axes, found, style, label=f"{task}: two windows, last step")
        steps = {n: [r["cosine_of_steps"][task] for r in trained(records, n)] for n in WINDOW}
        more = {"linestyle": "--", "markerfacecolor": "white"}
        draw_means(axes, steps, style, label=f"{task}: from step to step", **more)
    axes.set_ylim(top=1.05)
    axes.set_title(f"{scene}: cosine of a task's gradients", fontsize=11)


def draw_tasks(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Draw the measured cosine between the tasks: mean and standard deviation over windows."""
    for place, (moment, (color, marker)) in enumerate(zip(MOMENTS, MOMENT_STYLES, strict=True)):
        found = moments_of(records, place)
        for key, mode, fill, shift in (
            ("cosine_of_tasks", "same", color, 0.93),
            ("cosine_of_tasks_apart", "different", "white", 1.08),
        ):
            windows = [[m["sizes"][str(size)][key] for m in found] for size in WINDOW]
            axes.errorbar(
                np.multiply(WINDOW, shift * 1.06**place),
                [statistics.fmean(w["mean"] for w in of_size) for of_size in windows],
                [statistics.fmean(w["deviation"] for w in of_size) for of_size in windows],
                fmt=marker,
                color=color,
                markerfacecolor=fill,
                capsize=3,
                label=f"{moment}, {mode} micro-batches",
            )
        if true := known([one["expected_cosine"] for one in found]):
            mean = statistics.fmean(true)
            axes.axhline(mean, color=color, linewidth=1.0, linestyle="--", zorder=0)
    axes.axhline(0.0, color=BLACK, linewidth=1.0)
    axes.set_title(f"{scene}: cosine of two tasks (bars: deviation; dashed: no noise)", fontsize=11)


EXPERIMENT = Experiment(
    "a_stability",
    __doc__.splitlines()[0],
    jobs,
    INTRODUCTION,
    section,
    picture,
    {"photos": 50, "digits": 200},
)
