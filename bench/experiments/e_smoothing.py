"""Smoothing of the resolved gradient within GCond, in AdamW, or nowhere.

    python bench/experiments/e_smoothing.py [--seeds 3] [--steps N] [--output FOLDER]

Integrated, as in the paper: momentum 0.9 in GCondFused and beta1 = 0 in AdamW. Separate: momentum
0 and beta1 = 0.9. None: both 0. AdamW divides by the root of its average of squares, which
integrated smoothing makes smaller, so its steps are longer at the same learning rate: each scheme
has several.
"""

import sys
from collections.abc import Sequence
from itertools import product

from matplotlib.figure import Figure

from bench.experiments import common
from bench.experiments.common import SCENES, Record, Variant
from gcond_kernels import GCond
from gcond_kernels.methods import Method, Sum

NAME = "e_smoothing"
SCHEMES = {"integrated": (0.9, 0.0), "separate": (0.0, 0.9), "none": (0.0, 0.0)}
FACTORS = (1.0, 0.3, 0.1)
BASELINE = "GCond separate 1"


def variant_of(scheme: str, factor: float, scene: str, resolver: Method) -> Variant:
    momentum, beta1 = SCHEMES[scheme]
    name = f"{type(resolver).__name__} {scheme}"
    key = f"{name} {factor:g}"
    return Variant(
        key,
        f"{name}, {factor:g}× rate",
        resolver,
        "" if key == BASELINE else BASELINE,
        options={"momentum": momentum},
        learning_rate=factor * SCENES[scene].learning_rate,
        beta1=beta1,
    )


# Photos take long.
FEW = (("integrated", 0.3), ("separate", 1.0))
VARIANTS = {
    "photos": [variant_of(scheme, factor, "photos", GCond()) for scheme, factor in FEW],
    "digits": [
        *(
            variant_of(scheme, factor, "digits", resolver)
            for resolver in (GCond(), Sum())
            for scheme, factor in product(SCHEMES, FACTORS)
            if isinstance(resolver, GCond) or (scheme, factor) in FEW
        ),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parse(__doc__, arguments)
    work = (common.perform_training, common.training_cost)
    jobs = common.trainings(options, VARIANTS)
    return common.experiment(NAME, options, jobs, work, report, picture)


def report(records: Sequence[Record]) -> list[str]:
    said = [
        "# Integrated and separate smoothing",
        "Integrated: momentum=0.9 in GCondFused, beta1=0 in AdamW; separate: momentum=0, "
        "beta1=0.9; none: both 0. beta2 is 0.95. Rate: relative to the demo's learning rate. "
        "Differences are to GCond with separate smoothing and that rate. Sum does the same "
        "without resolving conflicts.",
    ]
    for scene in common.scenes_in(records):
        steps = next(record["steps"] for record in records if record["scene"] == scene)
        columns = {"incidence": common.mean_of("incidence")}
        said += [
            *common.scene_heading(records, scene, f"{steps} steps."),
            common.score_table(records, scene, VARIANTS[scene], columns),
            common.beyond_sentence(records, scene, VARIANTS[scene]),
        ]
    return said


def picture(records: Sequence[Record]) -> Figure:
    title = "Integrated and separate smoothing, at several learning rates"
    baseline = (BASELINE, "GCond, separate, 1× rate")
    return common.score_picture(records, VARIANTS, title, baseline)


if __name__ == "__main__":
    sys.exit(main())
