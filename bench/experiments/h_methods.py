"""What the methods come to on the demo's two scenes, with several seeds.

Trains as the demo does, with the default options of each method. The seed decides on the initial
parameters and on the micro-batches, which are the same for all methods.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

from bench.experiments.common import SCENES, STEPS, Experiment, Job, Record
from bench.experiments.pictures import score_picture
from bench.experiments.tables import by_seed, mean_of, score_section
from bench.experiments.training import Variant, jobs_of
from examples.demo.methods import METHODS, PLAIN, methods_of
from examples.demo.summary import OPTIONS_SENTENCES, SUM_SENTENCE

# Relative times that differ by more than this over the seeds stay out of the tables.
STEADY = 0.2
VARIANTS = [
    Variant(
        method.key,
        method.name,
        method.resolver,
        "" if method is PLAIN else PLAIN.key,
        method.mode or "exact",
    )
    for method in METHODS
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option of the methods."""
    parser.add_argument(
        "--methods", nargs="+", default=["all"], metavar="NAME", help="as of the demo (default all)"
    )


def check(options: argparse.Namespace) -> None:
    """Replace the names of the methods by their keys."""
    options.methods = [method.key for method in methods_of(options.methods)]


def jobs(options: argparse.Namespace, scene: str, seed: int) -> list[Job]:
    """Return the trainings of the methods that are asked for."""
    asked = [variant for variant in VARIANTS if variant.key in options.methods]
    return jobs_of({scene: asked}, options, scene, seed)


INTRODUCTION = (
    "# What the methods come to on the demo's two scenes",
    f"{OPTIONS_SENTENCES} CAGrad, MGDA, AlignedMTL, IMTLG and "
    "NashMTL set a balance between the tasks that is not that of the loss weights: what they "
    "gain in a score other loss weights may give the plain sum, which was not tried.",
    "Differences are to the plain sum. Incidence of conflict: the share of pairs of tasks with "
    "a cosine below 0, mean over steps and seeds. In the order of the list, not of the "
    "results.",
    SUM_SENTENCE,
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    """Return the scores, with the times of a step where they are steady."""
    times, note = relative_times(records, scene)
    columns = {"incidence": mean_of("incidence")}
    if times:
        columns["step"] = lambda found: f"{times[found[0]['method']]:.2f}"
    weights = ", ".join(f"{task} {weight:g}" for task, weight in SCENES[scene].tasks.items())
    what = (
        f"{records[0]['steps']} steps of {SCENES[scene].accumulation_steps} micro-batches; "
        f"loss weights {weights}."
    )
    return [*score_section(records, scene, VARIANTS, what, columns), note]


def relative_times(records: Sequence[Record], scene: str) -> tuple[dict[str, float], str]:
    """Return method → time of a step, if that is steady over the seeds, and a note."""
    plain = by_seed(records, scene, PLAIN.key)
    ratios = {
        method: [
            found["step"] / plain[seed]["step"]
            for seed, found in by_seed(records, scene, method).items()
        ]
        for method in {found["method"] for found in records}
    }
    most = max((max(r) - min(r)) / statistics.fmean(r) for r in ratios.values())
    how = (
        "median processor time of a step relative to the plain sum with the same seed, on a "
        f"machine that other processes used too; over the seeds it differs by up to "
        f"{100 * most:.0f} %"
    )
    if most > STEADY:
        return {}, f"Times are left out of the table (they are in the JSON file): {how}."
    return {method: statistics.fmean(r) for method, r in ratios.items()}, f"Step: {how}."


PICTURE = partial(
    score_picture,
    dict.fromkeys(STEPS, VARIANTS),
    "Validation scores by method and seed",
    (PLAIN.key, "the plain sum"),
    None,
)
EXPERIMENT = Experiment(
    "h_methods",
    __doc__.splitlines()[0],
    jobs,
    INTRODUCTION,
    section,
    PICTURE,
    {name: SCENES[name].steps for name in STEPS},
    add_arguments,
    check,
)
