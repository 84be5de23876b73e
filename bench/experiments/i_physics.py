"""What the methods come to where tasks conflict hard: two physics-informed networks.

Trains the Kovasznay flow and Burgers' equation by every method, by the plain sum with other loss
weights, and by ConFIG as the package conflictfree's documentation uses it. The plain sum has more
seeds than the rest: how far they are apart is what chance alone does.
"""

import argparse
import importlib.util
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import mannwhitneyu

from bench.experiments.common import SCENES, Experiment, Job, Record, scenes_in
from bench.experiments.pictures import name_lines
from bench.experiments.tables import markdown, percent
from bench.experiments.training import Variant, train
from examples.demo import training
from examples.demo.methods import METHODS
from examples.demo.scenes import Batch
from examples.demo.summary import OPTIONS_SENTENCES, means
from gcond_kernels import GCond, NonConflicting, Report
from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREY, SKY, VERMILION
from gcond_kernels.diagnostics.records import ALL_ZONES
from gcond_kernels.methods import Sum

PLAIN = Variant("plain", "plain sum")
PLAIN_SEEDS, SEEDS = 12, 5
EVALUATIONS = 40  # of which the last quarter makes the score
LEVEL = 0.05
FACTORS = (0.1, 10.0, 100.0)
CONFLICTFREE = "conflictfree"
# Scene → tasks whose loss weights change together. That of the residual alone is the inverse of
# all others: AdamW takes no notice of a constant factor of the sum.
WEIGHTED = {
    "kovasznay": [("boundary",)],
    "burgers": [("boundary", "initial"), ("boundary",), ("initial",)],
}
FIRST = ("sum", "gcond", "pcgrad", "nashmtl", "upgrad", "config")  # of METHODS, in this order


def variants_of(scene: str) -> list[Variant]:
    """Return the variants of a scene, those first that are wanted most."""
    of_class = {
        method.key: Variant(method.key, method.name.removesuffix(" exact"), method.resolver)
        for method in METHODS
        if method.mode == "exact" and not isinstance(method.resolver, NonConflicting)
    }
    first = [of_class.pop(key) for key in FIRST]
    moved = [
        Variant("nonconflicting gcond", "NonConflicting(GCond)", NonConflicting(GCond())),
        Variant("nonconflicting sum", "NonConflicting(Sum)", NonConflicting(Sum())),
    ]
    # Integrated momentum takes longer steps (see e): Sum shows what that does alone.
    integrated = [
        Variant(key, f"{name}, integrated momentum", method, options={"momentum": 0.9}, beta1=0.0)
        for key, name, method in (
            ("gcond paper", "GCond.paper", GCond.paper()),
            ("sum integrated", "Sum", Sum()),
        )
    ]
    packaged = Variant(CONFLICTFREE, "ConFIG of conflictfree")
    return [PLAIN, *first, *moved, *weighted(scene), *of_class.values(), *integrated, packaged]


def weighted(scene: str) -> list[Variant]:
    """Return the plain sum with other loss weights."""
    found = []
    for tasks in WEIGHTED[scene]:
        for factor in FACTORS:
            name = f"plain sum, {' and '.join(tasks)} × {factor:g}"
            found.append(Variant(name, name, weights=dict.fromkeys(tasks, factor)))
    return found


def check(_: argparse.Namespace) -> None:
    """Raise ValueError where conflictfree is missing."""
    if importlib.util.find_spec(CONFLICTFREE) is None:
        raise ValueError("one of the methods is that of conflictfree: pip install conflictfree")


def jobs(options: argparse.Namespace, scene: str, seed: int) -> list[Job]:
    """Return the trainings of a seed; beyond the first seeds those of the plain sum alone."""
    variants = variants_of(scene) if seed < SEEDS else [PLAIN]
    return [Job(seed, scene, options.steps_of[scene], measure, variant) for variant in variants]


def measure(job: Job) -> Record:
    """Train a variant, and note the error as it goes and what the steps did to each task."""
    steps: list[Seen] = []

    def see(optimizer: Any) -> None:
        if job.subject.resolver is not None:
            steps.append(seen_in(optimizer.report(), job.subject.resolver))

    packaged = conflictfree_window if job.subject.key == CONFLICTFREE else training.plain_window
    with patch.object(training, "plain_window", packaged):
        run, found = train(job, EVALUATIONS, see)
    score = next(iter(run.scene.score_labels))
    errors = [means(evaluation)["scores"][score] for evaluation in run.evaluations]
    places = [evaluation.step for evaluation in run.evaluations]
    last = [error for place, error in zip(places, errors, strict=True) if place > 0.75 * job.steps]
    return {
        **found,
        "weights": job.subject.weights,
        "errors": [round(error, 6) for error in errors],
        "error": errors[-1],
        "last_quarter": statistics.median(last),
        "rising": shares_of([step.rising for step in steps], run.scene.tasks),
        "any_rising": share_of([any(step.rising) for step in steps if step.rising]),
        "norm_ratio": median_of([step.norm_ratio for step in steps]),
        "at_bound": share_of([step.at_bound for step in steps if step.at_bound is not None]),
    }


def conflictfree_window(
    run: training.Run, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]
) -> training.Step:
    """Step as the documentation of conflictfree does: a pass forward and backward for each loss."""
    from conflictfree.grad_operator import ConFIGOperator
    from conflictfree.utils import apply_gradient_vector, get_gradient_vector

    gradients, seen = [], {}
    for task, weight in run.scene.tasks.items():
        optimizer.zero_grad()
        seen[task] = []
        for batch in batches:
            losses = training.task_losses(run, batch, [task])
            (weight * losses[task] / len(batches)).backward()
            run.backward_passes += 1
            training.note(seen, losses)
        gradients.append(get_gradient_vector(run.model))
    apply_gradient_vector(run.model, ConFIGOperator().calculate_gradient(gradients))
    optimizer.step()
    return training.Step(training.means(seen))


class Seen(NamedTuple):
    """What a step did."""

    rising: list[bool]  # of each task, whether its loss rises to first order; empty if unknown
    norm_ratio: float | None  # largest norm of a task's gradient / smallest
    at_bound: bool | None  # whether GCond's loop ended at its bound; None of other methods


def seen_in(report: Report, method: Any) -> Seen:
    """Return what a step did; all parameters are shared in these scenes."""
    inner = method.state_owner
    known = None not in report.descent.values()
    bound = inner.iterations(len(report.norms)) if isinstance(inner, GCond) else None
    return Seen(
        [task in report.rising for task in report.norms] if known else [],
        report.norm_ratio,
        None if bound is None else len(report.conflicts) == bound,
    )


def share_of(flags: Sequence[bool]) -> float | None:
    """Return the share that is true; None of none."""
    return sum(flags) / len(flags) if flags else None


def shares_of(
    rising: Sequence[Sequence[bool]], tasks: Sequence[str]
) -> dict[str, float | None] | None:
    """Return task → share of the steps in which its loss rose to first order, where it is known."""
    known = [flags for flags in rising if flags]
    if not known:
        return None
    columns = zip(*known, strict=True)
    return {task: share_of(flags) for task, flags in zip(tasks, columns, strict=True)}


def median_of(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that there are."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# Statistics.


class Result(NamedTuple):
    """A variant beside the plain sum."""

    name: str
    records: list[Record]
    errors: list[float]  # of the last quarter, by seed
    ratio: float  # of the medians
    p: float | None  # of the rank test, corrected for the number of variants; None of the plain sum

    @property
    def median(self) -> float:
        """The median over the seeds."""
        return statistics.median(self.errors)

    @property
    def verdict(self) -> str:
        """What cannot be laid to chance."""
        if self.p is None or self.p >= LEVEL:
            return ""
        return "better" if self.ratio < 1.0 else "worse"


def results(records: Sequence[Record], scene: str) -> list[Result]:
    """Return the variants that have records of a scene, the best first."""
    own = {
        variant.name: [found for found in records if found["method"] == variant.key]
        for variant in variants_of(scene)
    }
    errors = {name: errors_of(found) for name, found in own.items() if found}
    plain = errors[PLAIN.name]
    others = [name for name in errors if name != PLAIN.name]
    p = dict(zip(others, holm([rank_test(errors[name], plain) for name in others]), strict=True))
    middle = statistics.median(plain)
    found = [
        Result(name, own[name], values, statistics.median(values) / middle, p.get(name))
        for name, values in errors.items()
    ]
    return sorted(found, key=lambda result: result.median)


def errors_of(records: Sequence[Record], key: str = "last_quarter") -> list[float]:
    """Return the errors; infinite where training diverged, which JSON has as null."""
    return [math.inf if found[key] is None else found[key] for found in records]


def rank_test(values: Sequence[float], plain: Sequence[float]) -> float:
    """Return the two-sided p-value of Mann and Whitney, exact."""
    return float(mannwhitneyu(values, plain, alternative="two-sided", method="exact").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values corrected by Holm (1979): true for all of them together."""
    found, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, (len(p) - rank) * p[place])
        found[place] = min(1.0, largest)
    return found


# Tables.


INTRODUCTION = (
    "# What the methods come to where tasks conflict hard",
    f"{OPTIONS_SENTENCES} Modes are exact, parameters are float32, points are drawn anew in every "
    "step, and the seed decides on them and on the initial parameters.",
    f"The error is the relative L2 error of the field on a grid, evaluated {EVALUATIONS} times "
    "in a training. The score, settled before the runs: the median of the evaluations in the last "
    f"quarter of the steps. p: exact rank test (Mann-Whitney, two-sided) against the "
    f"{PLAIN_SEEDS} runs of the plain sum, corrected by Holm for the number of rows; “better” and "
    f"“worse” where p < {LEVEL:g}. Sum has the gradients of the plain sum but for rounding. "
    "The loss weights are a grid of which nobody knows the best before: it is chosen here by the "
    "error itself, as no one can who has no exact solution. Methods were given no such choice.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    """Return the two tables of a scene."""
    kind = SCENES[scene]
    found = results(records, scene)
    plain = next(result for result in found if result.name == PLAIN.name)
    tasks = ", ".join(kind.tasks)
    return [
        f"## {scene}: {kind.title}",
        f"{records[0]['steps']} steps; tasks {tasks}, each with the loss weight 1. "
        f"{len(plain.errors)} runs of the plain sum lie a factor of "
        f"{max(plain.errors) / min(plain.errors):.1f} apart.",
        error_table(found),
        "What happened in the steps, means over the seeds. Zones: of the smallest cosine between "
        "two tasks. Went against: the share of steps whose result has a negative product with the "
        "gradient of that task, so that its loss rises to first order; any: of one task at least. "
        "Norms: largest of a task over smallest, median over the steps. At the bound: the share of "
        "steps in which GCond's loop made all the projections that it may, so that conflicts may "
        "remain. Time: of training, in seconds, on one core.",
        steps_table(found, scene),
    ]


def error_table(found: Sequence[Result]) -> str:
    """Return the table of the errors."""
    heads = ["", "runs", "last quarter", "range", "÷ plain sum", "p", "", "at the end", "range"]
    rows = [heads]
    for result in found:
        ends = errors_of(result.records, "error")
        rows.append(
            [
                result.name,
                str(len(result.errors)),
                *median_and_range(result.errors),
                number(result.ratio),
                "" if result.p is None else f"{result.p:.3f}",
                f"**{result.verdict}**" if result.verdict else "",
                *median_and_range(ends),
            ]
        )
    return markdown(rows)


def median_and_range(values: Sequence[float]) -> list[str]:
    """Return two cells."""
    return [number(statistics.median(values)), f"{number(min(values))} to {number(max(values))}"]


def number(value: float) -> str:
    """Return two significant digits, without an exponent."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def steps_table(found: Sequence[Result], scene: str) -> str:
    """Return the table of what happened in the steps."""
    tasks = list(SCENES[scene].tasks)
    rows = [
        [
            "",
            f"{'/'.join(ALL_ZONES)}, %",
            *(f"went against {task}" for task in tasks),
            "any",
            "norms",
            "at the bound",
            "time",
        ]
    ]
    for result in found:
        records = result.records
        rows.append(
            [
                result.name,
                "/".join(mean_share(records, "zones", z).rstrip(" %") for z in ALL_ZONES).strip(
                    "/"
                ),
                *(mean_share(records, "rising", task) for task in tasks),
                mean_share(records, "any_rising"),
                mean_number(records, "norm_ratio"),
                mean_share(records, "at_bound"),
                f"{statistics.median(found['seconds'] for found in records):.0f}",
            ]
        )
    return markdown(rows)


def mean_share(records: Sequence[Record], key: str, name: str | None = None) -> str:
    """Return the mean of a share over the seeds, or of one of several, in %."""
    known = [found[key] for found in records if found[key] is not None]
    shares = known if name is None else [of_all[name] for of_all in known]
    return percent(statistics.fmean(shares)) if shares else ""


def mean_number(records: Sequence[Record], key: str) -> str:
    """Return the mean of a number over the seeds."""
    known = [found[key] for found in records if found[key] is not None]
    return number(statistics.fmean(known)) if known else ""


def picture(records: Sequence[Record]) -> Figure:
    """Draw the errors of all runs: a panel for each scene, a line for each variant."""
    scenes = scenes_in(records)
    most = max(len(variants_of(scene)) for scene in scenes)
    figure = Figure(figsize=(9.0 * len(scenes), 0.33 * most + 2.0), layout="constrained")
    panels = figure.subplots(1, len(scenes), squeeze=False)[0]
    for axes, scene in zip(panels, scenes, strict=True):
        draw_errors(axes, results([r for r in records if r["scene"] == scene], scene), scene)
    figure.suptitle(
        "Error in the last quarter of training: a dot per seed; the shade is the range of the "
        f"plain sum's {PLAIN_SEEDS} runs",
        fontsize=14,
    )
    return figure


def draw_errors(axes: Axes, found: Sequence[Result], scene: str) -> None:
    """Draw the variants of a scene, the best first."""
    colors = {"better": BLUE, "worse": VERMILION, "": BLACK}
    for place, result in enumerate(found):
        color = colors[result.verdict]
        finite = [error for error in result.errors if math.isfinite(error)]
        style = {"color": color, "markerfacecolor": "none", "marker": "o", "markersize": 5}
        axes.plot(finite, [place] * len(finite), linestyle="", **style)
        if math.isfinite(result.median):
            axes.plot(result.median, place, color=color, marker="|", markersize=14, mew=2.0)
        if result.p is None:
            axes.axvspan(min(finite), max(finite), color=SKY, alpha=0.25, linewidth=0.0)
            axes.axvline(result.median, color=GREY, linewidth=1.0)
    axes.set_xscale("log")
    name_lines(axes, [result.name for result in found])
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.set_xlabel(
        f"{next(iter(SCENES[scene].score_labels.values()))} (bar: median)\n"
        "blue, orange: better, worse than the plain sum beyond chance",
        fontsize=11,
    )
    axes.set_title(scene, fontsize=13)


EXPERIMENT = Experiment(
    "i_physics",
    __doc__.splitlines()[0],
    jobs,
    INTRODUCTION,
    section,
    picture,
    {scene: SCENES[scene].steps for scene in WEIGHTED},
    seeds=PLAIN_SEEDS,
    paired=False,
    check=check,
)
