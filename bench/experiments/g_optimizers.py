"""GCond against the plain sum with AdamW, with Lion and LARS, and with SGD.

    python bench/experiments/g_optimizers.py [--seeds 3] [--steps N] [--output FOLDER]

Lion/LARS is update=LionLars() with momentum 0.9 over SGD without momentum; its plain sum is the
method Sum. For each optimizer the learning rate is chosen from three, for the plain sum and for
GCond alike by the same rule: the smallest validation loss (weighted sum of the tasks) after
training with a seed that is none of the others. The others compare at the chosen rates.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from bench.experiments import common, runs
from bench.experiments.common import Record, Training, Variant
from gcond_kernels import GCond, LionLars
from gcond_kernels.methods import Sum

NAME = "g_optimizers"
GRID_SEED = 1000


class Optimizer(NamedTuple):
    """A name, a name of `common.base_optimizer`, options of GCondFused, and rates to try."""

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


def variant_of(optimizer: Optimizer, resolver: str, rate: float) -> Variant:
    """Of one learning rate; the key does not tell it."""
    plain = f"{optimizer.name} plain sum"
    name = f"{optimizer.name} {resolver}"
    method: Any = GCond() if resolver == "GCond" else None
    if method is None and optimizer.options:
        method = Sum()
    return Variant(
        name,
        name,
        method,
        "" if name == plain else plain,
        options=optimizer.options,
        base=optimizer.base,
        learning_rate=rate,
    )


RESOLVERS = ("plain sum", "GCond")
NAMES = [(o, resolver, f"{o.name} {resolver}") for o in OPTIMIZERS for resolver in RESOLVERS]
ALL = [variant_of(optimizer, resolver, 0.0) for optimizer, resolver, _ in NAMES]
VARIANTS: dict[str, list[Variant]] = {"photos": [], "digits": ALL}  # photos would take too long


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parse(__doc__, arguments)
    options.scenes = [scene for scene in options.scenes if VARIANTS[scene]]
    if not options.scenes:
        print("This experiment is of the digits alone: leave --scene out.")
        return 2
    tried: list[Record] = []
    work = (common.perform_training, common.training_cost)
    try:
        runs.perform_all(grid(options), *work, common.line, tried.append)
    except KeyboardInterrupt:
        print("Interrupted before the learning rates were chosen.")
        return runs.INTERRUPTED
    rates = chosen(tried)
    jobs = [
        Training(
            seed,
            scene,
            options.steps_of[scene],
            variant_of(optimizer, resolver, rates[scene, name]),
        )
        for seed in range(options.seeds)
        for scene in options.scenes
        for optimizer, resolver, name in NAMES
    ]

    def report_with(records: Sequence[Record]) -> list[str]:
        return report(records, tried)

    more = {"learning_rates_tried": tried}
    return common.experiment(NAME, options, jobs, work, report_with, picture, more)


def grid(options: argparse.Namespace) -> list[Training]:
    return [
        Training(GRID_SEED, scene, options.steps_of[scene], variant_of(optimizer, resolver, rate))
        for scene in options.scenes
        for optimizer, resolver, _ in NAMES
        for rate in optimizer.rates
    ]


def chosen(tried: Sequence[Record]) -> dict[tuple[str, str], float]:
    """(scene, name) → rate of the smallest validation loss."""
    best: dict[tuple[str, str], Record] = {}
    for record in tried:
        key = record["scene"], record["method"]
        if key not in best or loss_of(record) < loss_of(best[key]):
            best[key] = record
    return {key: record["learning_rate"] for key, record in best.items()}


def loss_of(record: Record) -> float:
    """The weighted sum that is trained; infinite where training diverged."""
    weights = runs.SCENES[record["scene"]].tasks
    total = sum(weight * record["losses"][task] for task, weight in weights.items())
    return total if math.isfinite(total) else math.inf


# What is written.


def report(records: Sequence[Record], tried: Sequence[Record]) -> list[str]:
    said = [
        "# GCond with three optimizers",
        "AdamW: betas (0.9, 0.95). Lion/LARS: update=LionLars() and momentum=0.9 over SGD. SGD: "
        "momentum 0.9. Differences are to the plain sum of the same optimizer. Learning rates are "
        f"those of the smallest validation loss with seed {GRID_SEED}, chosen apart for the plain "
        "sum and for GCond, of as many rates each.",
    ]
    for scene in common.scenes_in(records):
        steps = next(record["steps"] for record in records if record["scene"] == scene)
        columns = {
            "rate": lambda found: f"{found[0]['learning_rate']:g}",
            "incidence": common.mean_of("incidence"),
        }
        said += [
            *common.scene_heading(records, scene, f"{steps} steps."),
            common.score_table(records, scene, VARIANTS[scene], columns),
            common.beyond_sentence(records, scene, VARIANTS[scene]),
            "Validation losses (weighted sum) with the rates tried:",
            rate_table(tried, scene),
        ]
    return said


def rate_table(tried: Sequence[Record], scene: str) -> str:
    rows = [["", "1st rate", "2nd rate", "3rd rate"]]
    rates = chosen(tried)
    for _, _, name in NAMES:
        cells = [name]
        for record in tried:
            if (record["scene"], record["method"]) == (scene, name):
                rate = record["learning_rate"]
                mark = "**" if rate == rates[scene, name] else ""
                cells.append(f"{mark}{rate:g}: {loss_of(record):.4f}{mark}")
        rows.append(cells)
    return runs.markdown(rows)


def picture(records: Sequence[Record]) -> Figure:
    title = "GCond and the plain sum with three optimizers, each at its own learning rate"
    return common.score_picture(records, VARIANTS, title, (NAMES[0][2], "the plain sum, AdamW"))


if __name__ == "__main__":
    sys.exit(main())
