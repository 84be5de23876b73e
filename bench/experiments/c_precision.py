"""bfloat16 against float32 accumulators, in long windows too.

The error of the accumulated gradients of 4, 24 and 192 micro-batches against a sum in float64, at
the first and at the last step's weights of a training by the plain sum; and what it does to scores.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from bench.experiments.common import SCENES, Experiment, Job, Record, scene_of
from bench.experiments.pictures import number_windows, score_picture
from bench.experiments.tables import markdown, score_section
from bench.experiments.training import Variant, at_moments, cosine, jobs_of, recorded_steps
from gcond_kernels import GCond, ops
from gcond_kernels.diagnostics.plots import BLUE, VERMILION

WINDOWS = (4, 24, 192)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STYLES = {"float32": (BLUE, "o"), "bfloat16": (VERMILION, "s")}
ERRORS = "errors"
MOMENTS = ("first step", "last step")


def variants(windows: dict[int, float]) -> list[Variant]:
    """Return both types for each number of micro-batches → factor of the number of steps."""
    return [
        Variant(
            f"{window} {name}",
            f"{name}, A = {window}",
            GCond(),
            "" if name == "float32" else f"{window} float32",
            options={"accumulator_dtype": dtype},
            micro_batches=window,
            steps=steps,
        )
        for window, steps in windows.items()
        for name, dtype in DTYPES.items()
    ]


# The more micro-batches in a step, the fewer steps. Photos would take too long.
VARIANTS: dict[str, list[Variant]] = {
    "photos": [],
    "digits": variants({4: 1.0, 24: 0.4, 192: 0.15}),
}


def jobs(options: argparse.Namespace, scene: str, seed: int) -> list[Job]:
    """Return the trainings, and the errors of accumulated gradients."""
    job = Job(seed, scene, recorded_steps(options, scene), measure_errors, None)
    return [*jobs_of(VARIANTS, options, scene, seed), job]


def measure_errors(job: Job) -> Record:
    """Measure the errors at both moments."""
    tasks = list(scene_of(job.scene).tasks)
    moments = at_moments(job, (0, job.steps - 1), lambda new: accumulate(new, tasks))
    return {"method": ERRORS, "moments": moments}


def accumulate(gradients: Callable[[], Tensor], tasks: Sequence[str]) -> dict[str, Any]:
    """Return window → type → errors, of the first so many micro-batches."""
    found: dict[str, Any] = {}
    for number in range(1, max(WINDOWS) + 1):
        new = gradients()
        if number == 1:
            exact = torch.zeros_like(new, dtype=torch.float64)
            sums = {name: torch.zeros_like(new, dtype=dtype) for name, dtype in DTYPES.items()}
        exact += new
        for accumulators in sums.values():
            for accumulator, gradient in zip(accumulators, new, strict=True):
                ops.accumulate(accumulator, [gradient], ops.Layout((0,), (len(gradient),)))
        if number in WINDOWS:
            found[str(number)] = {name: errors(a, exact, tasks) for name, a in sums.items()}
    return found


def errors(accumulators: Tensor, exact: Tensor, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the errors relative to the norm of the exact sum, and that of the tasks' cosine."""
    wide = accumulators.double()
    relative = (wide - exact).norm(dim=1) / exact.norm(dim=1)
    return {
        "relative_error": dict(zip(tasks, relative.tolist(), strict=True)),
        "error_of_cosine": abs(cosine(*wide) - cosine(*exact)),
        "cosine": cosine(*exact),
    }


INTRODUCTION = (
    "# bfloat16 accumulators against float32",
    "The sum is formed in float32 and rounded to the accumulator's type after every "
    "micro-batch. Error: ‖accumulated − exact‖ / ‖exact‖, exact being the sum of the same "
    "float32 gradients in float64; of the cosine between the tasks the absolute error. Means "
    "over the seeds. Differences of scores are to float32 with as many micro-batches.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    """Return the errors, and the scores where there were trainings."""
    said = [f"## {scene}: errors", error_table(records, scene)]
    if VARIANTS[scene]:
        first = {found["method"]: found for found in records[::-1]}
        steps = "; ".join(
            f"{first[v.key]['steps']} steps of {first[v.key]['micro_batches']} micro-batches"
            for v in VARIANTS[scene][::2]
        )
        said += score_section(records, scene, VARIANTS[scene], f"{steps}.")
    return said


def error_table(records: Sequence[Record], scene: str) -> str:
    """Return the table of a scene's errors."""
    tasks = list(SCENES[scene].tasks)
    rows = [["weights of the", "A"]]
    for name in DTYPES:
        rows[0] += [f"{name}: {task}" for task in (*tasks, "cosine")]
    for (place, moment), window in itertools.product(enumerate(MOMENTS), WINDOWS):
        rows.append([moment, str(window)])
        for name in DTYPES:
            found = entries(records, place, window, name)
            for task in tasks:
                mean = statistics.fmean(entry["relative_error"][task] for entry in found)
                rows[-1].append(f"{mean:.1e}")
            rows[-1].append(f"{statistics.fmean(e['error_of_cosine'] for e in found):.1e}")
    return markdown(rows)


def entries(records: Sequence[Record], place: int, window: int, name: str) -> list[dict[str, Any]]:
    """Return the errors of all seeds."""
    return [r["moments"][place][str(window)][name] for r in records if r["method"] == ERRORS]


def draw_errors(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Draw the errors at the last step's weights: a dot per seed and task, and the mean."""
    for name, (color, marker) in STYLES.items():
        means = []
        for window in WINDOWS:
            of_seeds = entries(records, 1, window, name)
            found = [error for entry in of_seeds for error in entry["relative_error"].values()]
            means.append(statistics.fmean(found))
            style = {"linestyle": "", "marker": marker, "markerfacecolor": "none", "color": color}
            axes.plot([window] * len(found), found, **style)
        axes.plot(WINDOWS, means, color=color, label=f"{name}, mean")
    axes.set_yscale("log")
    number_windows(axes, WINDOWS)
    axes.set_title(f"{scene}: relative error of ĝ (dots: seeds and tasks)", fontsize=13)
    axes.legend(fontsize=10)


PICTURE = partial(
    score_picture,
    VARIANTS,
    "Accumulators in bfloat16 and float32",
    ("4 float32", "float32 with 4 micro-batches"),
    draw_errors,
)
EXPERIMENT = Experiment(
    "c_precision", __doc__.splitlines()[0], jobs, INTRODUCTION, section, PICTURE
)
