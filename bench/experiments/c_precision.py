"""bfloat16 against float32 accumulators, in long windows too.

    python bench/experiments/c_precision.py [--seeds 3] [--steps N] [--output FOLDER]

The error of the accumulated gradients of 4, 24 and 192 micro-batches against a sum in float64, at
the first and at the last step's weights of a training by the plain sum; and what it does to scores.
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.experiments import common, runs
from bench.experiments.common import SCENES, Record, Training, Variant, cosine
from gcond_kernels import GCond, ops
from gcond_kernels.diagnostics.plots import BLUE, GREY, VERMILION

NAME = "c_precision"
WINDOWS = (4, 24, 192)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STYLES = {"float32": (BLUE, "o"), "bfloat16": (VERMILION, "s")}
ERRORS = "errors"
MOMENTS = ("first step", "last step")
BASELINE = "4 float32"


def variants(windows: dict[int, float]) -> list[Variant]:
    """Both types for each number of micro-batches → factor of the number of steps."""
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
VARIANTS = {
    "photos": [],
    "digits": variants({4: 1.0, 24: 0.4, 192: 0.15}),
}


class Job(NamedTuple):
    """The errors of accumulated gradients."""

    seed: int
    scene: str
    steps: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parse(__doc__, arguments)
    jobs: list[Training | Job] = common.trainings(options, VARIANTS)
    jobs += [
        Job(seed, scene, common.recorded_steps(options, scene))
        for seed in range(options.seeds)
        for scene in options.scenes
    ]
    return common.experiment(NAME, options, jobs, (perform, cost), report, picture)


def cost(job: Training | Job) -> float:
    if isinstance(job, Training):
        return common.training_cost(job)
    scene = SCENES[job.scene]
    more = len(MOMENTS) * max(WINDOWS) / scene.accumulation_steps
    return 1.6 * scene.step_cost * (job.steps + more)


def perform(job: Training | Job) -> Record:
    return common.perform_training(job) if isinstance(job, Training) else measure_errors(job)


def measure_errors(job: Job) -> Record:
    """At both moments."""
    scene = runs.scene_of(job.scene)
    generator = torch.Generator().manual_seed(1000 + job.seed)  # not the training's own
    moments = []
    for step, (model, _) in enumerate(common.plain_training(scene, job.steps, job.seed)):
        if step in (0, job.steps - 1):
            micro_batches = (
                common.task_gradients(model, scene, scene.micro_batch(generator))
                for _ in range(max(WINDOWS))
            )
            moments.append(accumulate(micro_batches, list(scene.tasks)))
    runs.advance(cost(job))
    return {
        "scene": job.scene,
        "method": ERRORS,
        "seed": job.seed,
        "steps": job.steps,
        "moments": [moments[0], moments[-1]],
    }


def accumulate(micro_batches: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """Window → type → errors, of the first so many micro-batches."""
    exact: Tensor | None = None
    sums: dict[str, Tensor] = {}
    found = {}
    for number, gradients in enumerate(micro_batches, start=1):
        if exact is None:
            exact = torch.zeros_like(gradients, dtype=torch.float64)
            sums = {name: torch.zeros_like(gradients, dtype=d) for name, d in DTYPES.items()}
        exact += gradients
        for accumulators in sums.values():
            for row, gradient in zip(accumulators, gradients, strict=True):
                ops.accumulate(row, [gradient], [0], [len(gradient)])
        if number in WINDOWS:
            found[str(number)] = {
                name: errors(accumulators, exact, tasks) for name, accumulators in sums.items()
            }
    return found


def errors(accumulators: Tensor, exact: Tensor, tasks: Sequence[str]) -> dict[str, Any]:
    """Relative to the length of the exact sum; and of the cosine between the tasks."""
    wide = accumulators.double()
    lengths = (wide - exact).norm(dim=1) / exact.norm(dim=1)
    return {
        "relative_error": dict(zip(tasks, lengths.tolist(), strict=True)),
        "error_of_cosine": abs(cosine(*wide) - cosine(*exact)),
        "cosine": cosine(*exact),
    }


# What is written.


def report(records: Sequence[Record]) -> list[str]:
    said = [
        "# bfloat16 accumulators against float32",
        "The sum is formed in float32 and rounded to the accumulator's type after every "
        "micro-batch. Error: ‖accumulated − exact‖ / ‖exact‖, exact being the sum of the same "
        "float32 gradients in float64; of the cosine between the tasks the absolute error. Means "
        "over the seeds.",
    ]
    for scene in common.scenes_in(records):
        own = [record for record in records if record["scene"] == scene]
        said += [f"## {scene}: errors", error_table(own, scene)]
        if not VARIANTS[scene]:
            continue
        steps = "; ".join(
            f"{found[0]['steps']} steps of {found[0]['micro_batches']} micro-batches"
            for found in (of_variant(own, v) for v in VARIANTS[scene][::2])
        )
        columns = {"incidence": common.mean_of("incidence")}
        heading, how = common.scene_heading(own, scene, f"{steps}.")
        said += [
            heading + ", scores",
            how + " Differences are to float32 with as many micro-batches.",
            common.score_table(own, scene, VARIANTS[scene], columns),
            common.beyond_sentence(own, scene, VARIANTS[scene]),
        ]
    return said


def of_variant(records: Sequence[Record], variant: Variant) -> list[Record]:
    return [record for record in records if record["method"] == variant.key]


def error_table(records: Sequence[Record], scene: str) -> str:
    tasks = list(SCENES[scene].tasks)
    heads = ["weights of the", "A"]
    for name in DTYPES:
        heads += [f"{name}: {task}" for task in tasks] + [f"{name}: cosine"]
    rows = [heads]
    for (place, moment), window in itertools.product(enumerate(MOMENTS), WINDOWS):
        cells = [moment, str(window)]
        for name in DTYPES:
            cells += [f"{mean_error(records, place, window, name, task):.1e}" for task in tasks]
            found = [entry["error_of_cosine"] for entry in entries(records, place, window, name)]
            cells.append(f"{statistics.fmean(found):.1e}")
        rows.append(cells)
    return runs.markdown(rows)


def entries(records: Sequence[Record], place: int, window: int, name: str) -> list[dict[str, Any]]:
    return [r["moments"][place][str(window)][name] for r in records if r["method"] == ERRORS]


def mean_error(records: Sequence[Record], place: int, window: int, name: str, task: str) -> float:
    found = entries(records, place, window, name)
    return statistics.fmean(entry["relative_error"][task] for entry in found)


def picture(records: Sequence[Record]) -> Figure:
    title = "Accumulators in bfloat16 and float32"
    baseline = (BASELINE, "float32 with 4 micro-batches")
    return common.score_picture(records, VARIANTS, title, baseline, draw_errors)


def draw_errors(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """At the last step's weights: a dot per seed and task, and the mean."""
    for name, (color, marker) in STYLES.items():
        means = []
        for window in WINDOWS:
            found = [
                error
                for entry in entries(records, 1, window, name)
                for error in entry["relative_error"].values()
            ]
            means.append(statistics.fmean(found))
            style = {"linestyle": "", "marker": marker, "markerfacecolor": "none", "color": color}
            axes.plot([window] * len(found), found, **style)
        axes.plot(WINDOWS, means, color=color, label=f"{name}, mean")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(WINDOWS, [str(window) for window in WINDOWS])
    axes.minorticks_off()
    axes.set_xlabel("micro-batches in a window", fontsize=11)
    axes.set_title(f"{scene}: relative error of ĝ (dots: seeds and tasks)", fontsize=13)
    axes.grid(color=GREY, alpha=0.25)
    axes.legend(fontsize=10)


if __name__ == "__main__":
    sys.exit(main())
