"""Exact against stochastic mode, at equal micro-batches and at equal backward passes.

    python bench/experiments/d_modes.py [--seeds 3] [--steps N] [--output FOLDER]

In exact mode a micro-batch costs a forward pass and a backward pass per task, in stochastic mode
one of each. So with two tasks as many backward passes make twice the micro-batches, in windows
twice as long or in twice the steps. Beside GCond stands the sum of the same gradients, which tells
what comes of the mode alone.
"""

import sys
from collections.abc import Sequence

from matplotlib.figure import Figure

from bench.experiments import common
from bench.experiments.common import PLAIN_SUM, Record, Variant
from gcond_kernels import GCond
from gcond_kernels.methods import Sum

NAME = "d_modes"
STEPS = {"photos": 120, "digits": 100}
EXACT = "exact"
OF_SCENE = [
    Variant(PLAIN_SUM, "plain sum", baseline=EXACT),
    Variant(EXACT, "GCond exact, A = 4", GCond()),
    Variant("stochastic", "GCond stochastic, A = 4", GCond(), EXACT, "stochastic"),
    Variant("stochastic sum", "Sum stochastic, A = 4", Sum(), EXACT, "stochastic"),
    Variant(
        "long windows", "GCond stochastic, A = 8", GCond(), EXACT, "stochastic", micro_batches=8
    ),
    Variant(
        "long windows sum", "Sum stochastic, A = 8", Sum(), EXACT, "stochastic", micro_batches=8
    ),
    Variant("more steps", "GCond stochastic, 2× steps", GCond(), EXACT, "stochastic", steps=2.0),
]
# Photos take long.
FEW = (EXACT, "stochastic", "long windows")
VARIANTS = {"photos": [v for v in OF_SCENE if v.key in FEW], "digits": OF_SCENE}


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parse(__doc__, arguments, STEPS)
    work = (common.perform_training, common.training_cost)
    jobs = common.trainings(options, VARIANTS)
    return common.experiment(NAME, options, jobs, work, report, picture)


def report(records: Sequence[Record]) -> list[str]:
    said = [
        "# Exact and stochastic mode",
        "Differences are to GCond in exact mode. Stochastic with A = 4 has as many micro-batches "
        "and half the backward passes; with A = 8, or with A = 4 and twice the steps, it has as "
        "many backward passes and twice the micro-batches (and forward passes). Passes are forward "
        "and backward, in thousands.",
    ]
    for scene in common.scenes_in(records):
        steps = min(record["steps"] for record in records if record["scene"] == scene)
        columns = {
            "steps": lambda found: str(found[0]["steps"]),
            "forward": lambda found: f"{found[0]['steps'] * found[0]['micro_batches'] / 1000:g}",
            "backward": lambda found: f"{found[0]['backward_passes'] / 1000:g}",
            "incidence": common.mean_of("incidence"),
        }
        said += [
            *common.scene_heading(records, scene, f"{steps} steps but where the table says more."),
            common.score_table(records, scene, VARIANTS[scene], columns),
            common.beyond_sentence(records, scene, VARIANTS[scene]),
        ]
    return said


def picture(records: Sequence[Record]) -> Figure:
    title = "Exact and stochastic mode"
    return common.score_picture(records, VARIANTS, title, (EXACT, "GCond exact"))


if __name__ == "__main__":
    sys.exit(main())
