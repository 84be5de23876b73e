"""GCond against the plain sum with AdamW, with Lion and LARS, and with SGD.

Lion/LARS is update=LionLars() with momentum 0.9 over SGD without momentum; its plain sum is the
method Sum. For each optimizer the learning rate is chosen from three, for the plain sum and for
GCond by the same rule: the smallest validation loss (weighted sum of the tasks) after training with
a seed that is none of the others. The others compare at the chosen rates.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from bench.experiments.common import SCENES, STEPS, Experiment, Job, Record, perform_all
from bench.experiments.pictures import score_picture
from bench.experiments.tables import markdown, mean_of, score_section
from bench.experiments.training import Variant, jobs_of
from gcond_kernels import GCond, LionLars
from gcond_kernels.methods import Sum

GRID_SEED = 1000
SCENE = "digits"  # photos would take too long
COLUMNS = {
    "rate": lambda found: f"{found[0]['learning_rate']:g}",
    "incidence": mean_of("incidence"),
}


class Optimizer(NamedTuple):
    """A name, a name of `training.base_optimizer`, options of GCondFused, and rates to try."""

    name: str
    base: str
    options: dict[str, Any]
    rates: Sequence[float]


LION_LARS = {"update": LionLars(), "momentum": 0.9}
OPTIMIZERS = (
    Optimizer("AdamW", "adamw", {}, (2e-3, 6e-3, 2e-2)),
    # Here the rate is a factor of the trust ratio, whose coefficient is 1e-4.
    Optimizer("Lion/LARS", "sgd without momentum", LION_LARS, (0.3, 1.0, 3.0)),
    Optimizer("SGD", "sgd", {}, (3e-2, 1e-1, 3e-1)),
)


def variants_of(optimizer: Optimizer) -> list[Variant]:
    """Return plain sum and GCond, without a learning rate."""
    plain, gcond = f"{optimizer.name} plain sum", f"{optimizer.name} GCond"
    summed = Sum() if optimizer.options else None
    more = {"options": optimizer.options, "base": optimizer.base}
    return [
        Variant(plain, plain, summed, **more),
        Variant(gcond, gcond, GCond(), plain, **more),
    ]


ALL = [variant for optimizer in OPTIMIZERS for variant in variants_of(optimizer)]
VARIANTS: dict[str, list[Variant]] = {"photos": [], SCENE: ALL}


def try_rates(options: argparse.Namespace) -> dict[str, Any]:
    """Train with each of the learning rates, and keep the best ones in the options."""
    tried: list[Record] = []
    grid = [
        variant._replace(learning_rate=rate).job(GRID_SEED, SCENE, options.steps_of[SCENE])
        for optimizer in OPTIMIZERS
        for variant in variants_of(optimizer)
        for rate in optimizer.rates
    ]
    perform_all(grid, tried.append)
    options.rates = chosen(tried)
    return {"learning_rates_tried": tried}


def jobs(options: argparse.Namespace, scene: str, seed: int) -> list[Job]:
    """Return the trainings at the best rates."""
    best = [variant._replace(learning_rate=options.rates[variant.key]) for variant in ALL]
    return jobs_of({scene: best}, options, scene, seed)


def chosen(tried: Sequence[Record]) -> dict[str, float]:
    """Return variant → rate of the smallest validation loss."""
    best: dict[str, Record] = {}
    for found in sorted(tried, key=loss_of):
        best.setdefault(found["method"], found)
    return {key: found["learning_rate"] for key, found in best.items()}


def loss_of(found: Record) -> float:
    """Return the weighted sum that is trained; infinite where training diverged."""
    losses = found["losses"]
    if None in losses.values():  # as a record has what is not finite
        return math.inf
    total = sum(weight * losses[task] for task, weight in SCENES[SCENE].tasks.items())
    return total if math.isfinite(total) else math.inf


INTRODUCTION = (
    "# GCond with three optimizers",
    "AdamW: betas (0.9, 0.95). Lion/LARS: update=LionLars() and momentum=0.9 over SGD. SGD: "
    "momentum 0.9. Differences are to the plain sum of the same optimizer. Learning rates are "
    f"those of the smallest validation loss with seed {GRID_SEED}, chosen apart for the plain "
    "sum and for GCond, of as many rates each.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    what = f"{records[0]['steps']} steps."
    return score_section(records, scene, VARIANTS[scene], what, COLUMNS)


def rates_tried(settings: dict[str, Any]) -> list[str]:
    """Return the losses with the rates that were tried."""
    tried: list[Record] = settings["learning_rates_tried"]
    rates, rows = chosen(tried), [["", "1st rate", "2nd rate", "3rd rate"]]
    for variant in ALL:
        rows.append([variant.key])
        for found in tried:
            if found["method"] == variant.key:
                rate = found["learning_rate"]
                mark = "**" if rate == rates[variant.key] else ""
                rows[-1].append(f"{mark}{rate:g}: {loss_of(found):.4f}{mark}")
    return ["Validation losses (weighted sum) with the rates tried:", markdown(rows)]


PICTURE = partial(
    score_picture,
    VARIANTS,
    "GCond and the plain sum with three optimizers, each at its own learning rate",
    (ALL[0].key, "the plain sum, AdamW"),
    None,
)
EXPERIMENT = Experiment(
    "g_optimizers",
    __doc__.splitlines()[0],
    jobs,
    INTRODUCTION,
    section,
    PICTURE,
    steps={SCENE: STEPS[SCENE]},
    prepare=try_rates,
    appendix=rates_tried,
)
