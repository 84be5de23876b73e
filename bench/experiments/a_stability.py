"""Does accumulation stabilise the task gradients, and the cosine between them?

    python bench/experiments/a_stability.py [--seeds 3] [--steps N] [--output FOLDER]

At fixed weights, at three moments of a training by the plain sum, it accumulates independent
windows of 1, 8 and 24 micro-batches and tells how the task gradients of the windows differ. Then it
trains with 1, 8 and 24 micro-batches per step and compares each step's gradients with the last
step's.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.experiments import common, runs
from bench.experiments.common import SCENES, Record, cosine, percent
from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREEN, GREY, VERMILION

NAME = "a_stability"
STEPS = {"photos": 50, "digits": 200}
WINDOW = (1, 8, 24)  # micro-batches
LARGE_WINDOWS = 10  # of 24 micro-batches; the same make thrice as many of 8
SMALL_WINDOWS = 48  # of 1
AT_FIXED_WEIGHTS = "fixed weights"
MOMENTS = {"first step": 0.0, "after a fifth": 0.2, "last step": 1.0}
TASK_STYLES = ((BLUE, "o"), (VERMILION, "s"))
MOMENT_STYLES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"))


class Job(NamedTuple):
    """Fixed weights (no window), or a training with windows of a size."""

    seed: int
    scene: str
    steps: int
    window: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parse(__doc__, arguments, STEPS)
    jobs = [
        # Large windows cost much, and step by step there is one to measure in each.
        Job(
            seed, scene, options.steps_of[scene] if window is None else half(options, scene), window
        )
        for seed in range(options.seeds)
        for scene in options.scenes
        for window in (None, *WINDOW)
    ]
    return common.experiment(NAME, options, jobs, (perform, cost), report, picture)


def half(options: argparse.Namespace, scene: str) -> int:
    return max(2, options.steps_of[scene] // 2)


def cost(job: Job) -> float:
    scene = SCENES[job.scene]
    micro_batches = job.steps * (job.window or scene.accumulation_steps)
    if job.window is None:
        micro_batches += len(MOMENTS) * LARGE_WINDOWS * max(WINDOW)
    return 1.6 * scene.step_cost / scene.accumulation_steps * micro_batches


def perform(job: Job) -> Record:
    told = {"scene": job.scene, "seed": job.seed, "steps": job.steps}
    found = at_fixed_weights(job) if job.window is None else from_step_to_step(job)
    runs.advance(cost(job))
    return {**told, **found}


def at_fixed_weights(job: Job) -> Record:
    """Windows at the three moments of one training."""
    scene = runs.scene_of(job.scene)
    generator = torch.Generator().manual_seed(1000 + job.seed)  # not the training's own
    places = [round(share * (job.steps - 1)) for share in MOMENTS.values()]
    moments: list[dict[str, Any]] = []
    for step, (model, _) in enumerate(common.plain_training(scene, job.steps, job.seed)):
        if step in places:
            windows = gather(
                lambda model=model: common.task_gradients(
                    model, scene, scene.micro_batch(generator)
                )
            )
            moment = {"step": step, **measure(windows, list(scene.tasks))}
            moments += [moment] * places.count(step)
    return {"method": AT_FIXED_WEIGHTS, "moments": moments}


def gather(gradients: Any) -> dict[int, Tensor]:
    """Size → [R, K, N] independent windows, of the same micro-batches for all sizes."""
    windows: dict[int, list[Tensor]] = {size: [] for size in WINDOW}
    small, middle, large = WINDOW
    for _ in range(LARGE_WINDOWS):
        parts = []
        for _ in range(large // middle):
            micro_batches = [gradients() for _ in range(middle)]
            parts.append(torch.stack(micro_batches).mean(0))
            room = SMALL_WINDOWS - len(windows[small])
            windows[small] += micro_batches[:room]
        windows[middle] += parts
        windows[large].append(torch.stack(parts).mean(0))
    return {size: torch.stack(found) for size, found in windows.items()}


def measure(windows: dict[int, Tensor], tasks: Sequence[str]) -> dict[str, Any]:
    """What the report needs, of one moment."""
    largest = windows[max(windows)]
    products = inner_products(largest)
    true = expected_cosine(products)
    # All sizes have the same expected gradient: its length is best told from all micro-batches.
    lengths = {task: spread(products[:, k, :, k]).signal for k, task in enumerate(tasks)}
    sizes = {}
    for size, found in windows.items():
        products = inner_products(found)
        spreads = {task: spread(products[:, k, :, k]) for k, task in enumerate(tasks)}
        same, apart = task_cosines(products)
        sizes[str(size)] = {
            "windows": len(found),
            "variance": {task: s.variance for task, s in spreads.items()},
            "relative_variance": {
                task: s.variance / lengths[task] if lengths[task] > 0.0 else None
                for task, s in spreads.items()
            },
            "cosine_of_windows": {task: s.cosine for task, s in spreads.items()},
            "cosine_of_tasks": told_cosines(same),
            "cosine_of_tasks_apart": told_cosines(apart),
        }
    return {"expected_cosine": true, "sizes": sizes}


def inner_products(windows: Tensor) -> Tensor:
    """[R, K, R, K] of windows [R, K, N]."""
    count, tasks, _ = windows.shape
    rows = windows.flatten(0, 1).double()
    return (rows @ rows.T).view(count, tasks, count, tasks)


class Spread(NamedTuple):
    """Of independent estimates of one gradient μ.

    Attributes:
        variance: E‖ĝ - μ‖², unbiased.
        signal: ‖μ‖², unbiased; noise may make it negative.
        cosine: mean cosine of two of them.
    """

    variance: float
    signal: float
    cosine: float


def spread(products: Tensor) -> Spread:
    """From the inner products [R, R] of the estimates: those of different ones know no noise."""
    count = len(products)
    apart = ~torch.eye(count, dtype=torch.bool)
    signal = float(products[apart].mean())
    norms = products.diagonal().sqrt()
    cosines = (products / torch.outer(norms, norms)).nan_to_num()
    variance = float(products.diagonal().mean()) - signal
    return Spread(variance, signal, float(cosines[apart].mean()))


def task_cosines(products: Tensor) -> tuple[list[float], list[float]]:
    """Cosines of two tasks in the same window, and in different ones, as in stochastic mode."""
    norms = torch.einsum("rkrk->rk", products).sqrt()
    first, second = norms[:, 0], norms[:, 1]
    cosines = (products[:, 0, :, 1] / torch.outer(first, second)).nan_to_num()
    apart = ~torch.eye(len(cosines), dtype=torch.bool)
    return cosines.diagonal().tolist(), cosines[apart].tolist()


def expected_cosine(products: Tensor) -> float | None:
    """Of the two tasks' expected gradients, without the noise of any window."""
    first, second = (spread(products[:, k, :, k]).signal for k in (0, 1))
    apart = ~torch.eye(len(products), dtype=torch.bool)
    if first <= 0.0 or second <= 0.0:
        return None
    return float(products[:, 0, :, 1][apart].mean()) / math.sqrt(first * second)


def told_cosines(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values),
        "conflicts": sum(value < 0.0 for value in values) / len(values),
    }


def from_step_to_step(job: Job) -> Record:
    """Cosines of each step's gradients with those of the step before, and between the tasks."""
    scene = common.with_micro_batches(runs.scene_of(job.scene), job.window)
    before, steps, tasks = None, {task: [] for task in scene.tasks}, []
    for _, gradients in common.plain_training(scene, job.steps, job.seed):
        tasks.append(cosine(*gradients))
        if before is not None:
            for task, now, then in zip(scene.tasks, gradients, before, strict=True):
                steps[task].append(cosine(now, then))
        before = gradients
    return {
        "method": f"{job.window} micro-batches",
        "window": job.window,
        "cosine_of_steps": {task: statistics.fmean(found) for task, found in steps.items()},
        "cosine_of_tasks": told_cosines(tasks),
    }


# What is written.


class Means(NamedTuple):
    """Over the seeds."""

    mean: float
    low: float
    high: float
    error: float | None


def over_seeds(values: Sequence[float | None]) -> Means | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Means(statistics.fmean(known), min(known), max(known), error)


def cell(values: Sequence[float | None], digits: int = 2) -> str:
    found = over_seeds(values)
    if found is None:
        return ""
    text = f"{found.mean:.{digits}f}"
    text = text if found.error is None else f"{text} ± {found.error:.{digits}f}"
    return text.replace("-", "−")


def fixed(records: Sequence[Record], scene: str) -> list[Record]:
    return [r for r in records if r["scene"] == scene and r["method"] == AT_FIXED_WEIGHTS]


def trained(records: Sequence[Record], scene: str, window: int) -> list[Record]:
    return [r for r in records if r["scene"] == scene and r.get("window") == window]


def report(records: Sequence[Record]) -> list[str]:
    said = [
        "# Variance and direction of accumulated task gradients",
        "At fixed weights the micro-batches are drawn independently, so the variance of their mean "
        "must be 1/A of that of a single one: that column checks the measurement. What is to be "
        "learned is how large the noise is beside the gradient, E‖ĝ−μ‖² / ‖μ‖², and so from which "
        "A on the direction is stable: the mean cosine of two independent windows. "
        f"{SMALL_WINDOWS} windows of 1, {3 * LARGE_WINDOWS} of 8 and {LARGE_WINDOWS} of 24 "
        "micro-batches. All are means over the seeds ± standard error.",
    ]
    for scene in common.scenes_in(records):
        said += of_scene(records, scene)
    return said


def of_scene(records: Sequence[Record], scene: str) -> list[str]:
    steps = fixed(records, scene)[0]["steps"]
    fewer = trained(records, scene, WINDOW[0])[0]["steps"]
    tasks = list(SCENES[scene].tasks)
    return [
        f"## {scene}: at fixed weights",
        f"Moments of a training of {steps} steps of {SCENES[scene].accumulation_steps} "
        f"micro-batches; tasks {' and '.join(tasks)}. Variance by law: the variance of the mean "
        "of A micro-batches, times A, relative to that of one; 1 is the law.",
        direction_table(records, scene),
        "The cosine between the tasks, as windows measure it: mean and standard deviation over "
        "windows and the share that counts as a conflict, of tasks that share the micro-batches of "
        "a window (exact mode) and of tasks with different ones (stochastic mode, A for each). "
        "Without noise: the cosine of the expected gradients.",
        tasks_table(records, scene),
        f"## {scene}: from step to step",
        f"{fewer} steps with A micro-batches each at the same learning rate; steps at which the "
        "tasks' measured cosine is below 0 count as conflict.",
        steps_table(records, scene),
    ]


def direction_table(records: Sequence[Record], scene: str) -> str:
    tasks = list(SCENES[scene].tasks)
    heads = ["moment", "A"]
    for task in tasks:
        heads += [f"{task}: noise / gradient", "variance by law", "cosine of two windows"]
    rows = [heads]
    for (place, moment), size in itertools.product(enumerate(MOMENTS), WINDOW):
        cells = [moment, str(size)]
        for task in tasks:
            sizes = [record["moments"][place]["sizes"] for record in fixed(records, scene)]
            law = [s[str(size)]["variance"][task] * size / s["1"]["variance"][task] for s in sizes]
            cells += [
                cell([s[str(size)]["relative_variance"][task] for s in sizes]),
                cell(law),
                cell([s[str(size)]["cosine_of_windows"][task] for s in sizes]),
            ]
        rows.append(cells)
    return runs.markdown(rows)


def tasks_table(records: Sequence[Record], scene: str) -> str:
    rows = [["moment", "A", "without noise"]]
    for mode in ("exact", "stochastic"):
        rows[0] += [f"{mode}: cosine", "deviation", "conflicts"]
    for (place, moment), size in itertools.product(enumerate(MOMENTS), WINDOW):
        found = [record["moments"][place] for record in fixed(records, scene)]
        cells = [moment, str(size), cell([m["expected_cosine"] for m in found])]
        for key in ("cosine_of_tasks", "cosine_of_tasks_apart"):
            told = [m["sizes"][str(size)][key] for m in found]
            cells += [cell([t["mean"] for t in told]), cell([t["deviation"] for t in told])]
            cells.append(percent(statistics.fmean(t["conflicts"] for t in told)))
        rows.append(cells)
    return runs.markdown(rows)


def steps_table(records: Sequence[Record], scene: str) -> str:
    tasks = list(SCENES[scene].tasks)
    heads = ["A", *(f"{task}: cosine with the step before" for task in tasks)]
    rows = [[*heads, "cosine of the tasks", "deviation over steps", "conflicts"]]
    for size in WINDOW:
        found = trained(records, scene, size)
        cells = [str(size)]
        cells += [cell([r["cosine_of_steps"][task] for r in found]) for task in tasks]
        told = [record["cosine_of_tasks"] for record in found]
        cells += [cell([t["mean"] for t in told]), cell([t["deviation"] for t in told])]
        rows.append([*cells, percent(statistics.fmean(t["conflicts"] for t in told))])
    return runs.markdown(rows)


def picture(records: Sequence[Record]) -> Figure:
    scenes = common.scenes_in(records)
    figure = Figure(figsize=(17, 5.6 * len(scenes) + 0.6), layout="constrained")
    panels = figure.subplots(len(scenes), 3, squeeze=False)
    for scene, of_scene in zip(scenes, panels, strict=True):
        draw_noise(of_scene[0], records, scene)
        draw_direction(of_scene[1], records, scene)
        draw_tasks(of_scene[2], records, scene)
        for axes in of_scene:
            axes.set_xscale("log")
            axes.set_xticks(WINDOW, [str(size) for size in WINDOW])
            axes.minorticks_off()
            axes.set_xlabel("micro-batches in a window", fontsize=11)
            axes.grid(color=GREY, alpha=0.25)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=9)
    figure.suptitle("Accumulated task gradients: mean and range over the seeds", fontsize=15)
    return figure


def series(
    axes: Axes, found: dict[float, Means | None], style: tuple[str, str], **more: Any
) -> None:
    """Means with the range over the seeds."""
    known = {size: means for size, means in found.items() if means is not None}
    means = [m.mean for m in known.values()]
    below = [m.mean - m.low for m in known.values()]
    above = [m.high - m.mean for m in known.values()]
    color, marker = style
    axes.errorbar(list(known), means, [below, above], color=color, marker=marker, capsize=3, **more)


def draw_noise(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Relative variance, at the three moments."""
    for place, (moment, style) in enumerate(zip(MOMENTS, MOMENT_STYLES, strict=True)):
        for task, line in zip(SCENES[scene].tasks, ("-", "--"), strict=True):
            sizes = [record["moments"][place]["sizes"] for record in fixed(records, scene)]
            found = {
                size: over_seeds([s[str(size)]["relative_variance"][task] for s in sizes])
                for size in WINDOW
            }
            series(axes, found, style, linestyle=line, label=f"{task}, {moment}")
    axes.set_yscale("log")
    axes.axhline(1.0, color=BLACK, linewidth=1.0, linestyle=":")
    axes.set_title(f"{scene}: E‖ĝ−μ‖² / ‖μ‖² (dotted: as much noise as gradient)", fontsize=11)


def draw_direction(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Cosines of independent windows at the last moment, and from step to step."""
    for task, style in zip(SCENES[scene].tasks, TASK_STYLES, strict=True):
        sizes = [record["moments"][-1]["sizes"] for record in fixed(records, scene)]
        found = {
            size: over_seeds([s[str(size)]["cosine_of_windows"][task] for s in sizes])
            for size in WINDOW
        }
        series(axes, found, style, label=f"{task}: two windows, last step")
        steps = {
            size: over_seeds([r["cosine_of_steps"][task] for r in trained(records, scene, size)])
            for size in WINDOW
        }
        label = f"{task}: from step to step"
        series(axes, steps, style, linestyle="--", markerfacecolor="white", label=label)
    axes.set_ylim(top=1.05)
    axes.set_title(f"{scene}: cosine of a task's gradients", fontsize=11)


def draw_tasks(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """The measured cosine between the tasks: mean and standard deviation over windows."""
    for place, (moment, style) in enumerate(zip(MOMENTS, MOMENT_STYLES, strict=True)):
        found = [record["moments"][place] for record in fixed(records, scene)]
        for key, fill, shift in (
            ("cosine_of_tasks", style[0], 0.93),
            ("cosine_of_tasks_apart", "white", 1.08),
        ):
            told = {size: [m["sizes"][str(size)][key] for m in found] for size in WINDOW}
            means = [statistics.fmean(t["mean"] for t in told[size]) for size in WINDOW]
            noise = [statistics.fmean(t["deviation"] for t in told[size]) for size in WINDOW]
            mode = "same" if fill == style[0] else "different"
            axes.errorbar(
                [size * shift * 1.06**place for size in WINDOW],
                means,
                noise,
                color=style[0],
                marker=style[1],
                markerfacecolor=fill,
                linestyle="",
                capsize=3,
                label=f"{moment}, {mode} micro-batches",
            )
        true = over_seeds([m["expected_cosine"] for m in found])
        if true is not None:
            axes.axhline(true.mean, color=style[0], linewidth=1.0, linestyle="--", zorder=0)
    axes.axhline(0.0, color=BLACK, linewidth=1.0)
    axes.set_title(f"{scene}: cosine of two tasks (bars: deviation; dashed: no noise)", fontsize=11)


if __name__ == "__main__":
    sys.exit(main())
