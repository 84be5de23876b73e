"""Smoothing of the resolved gradient within GCond, in AdamW, or nowhere.

Integrated, as in the paper: momentum 0.9 in GCondFused and beta1 = 0 in AdamW. Separate: momentum
0 and beta1 = 0.9. None: both 0. AdamW divides by the root of its average of squares, which
integrated smoothing makes smaller, so its steps are longer at the same learning rate: each scheme
has several.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product

from bench.experiments.common import SCENES, Experiment, Record
from bench.experiments.pictures import score_picture
from bench.experiments.tables import score_section
from bench.experiments.training import Variant, jobs_of
from gcond_kernels import GCond
from gcond_kernels.methods import Method, Sum

SCHEMES = {"integrated": (0.9, 0.0), "separate": (0.0, 0.9), "none": (0.0, 0.0)}
FACTORS = (1.0, 0.3, 0.1)
BASELINE = "GCond separate 1"


def variant_of(scene: str, resolver: Method, scheme: str, factor: float) -> Variant:
    """Return the variant of a scheme and a factor of the learning rate."""
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


FEW = (("integrated", 0.3), ("separate", 1.0))  # photos take long
VARIANTS = {
    "photos": [variant_of("photos", GCond(), *scheme) for scheme in FEW],
    "digits": [
        *(variant_of("digits", GCond(), *scheme) for scheme in product(SCHEMES, FACTORS)),
        *(variant_of("digits", Sum(), *scheme) for scheme in FEW),
    ],
}


INTRODUCTION = (
    "# Integrated and separate smoothing",
    "Integrated: momentum=0.9 in GCondFused, beta1=0 in AdamW; separate: momentum=0, "
    "beta1=0.9; none: both 0. beta2 is 0.95. Rate: relative to the demo's learning rate. "
    "Differences are to GCond with separate smoothing and that rate. Sum does the same "
    "without resolving conflicts.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    return score_section(records, scene, VARIANTS[scene], f"{records[0]['steps']} steps.")


PICTURE = partial(
    score_picture,
    VARIANTS,
    "Integrated and separate smoothing, at several learning rates",
    (BASELINE, "GCond, separate, 1× rate"),
    None,
)
EXPERIMENT = Experiment(
    "e_smoothing",
    __doc__.splitlines()[0],
    partial(jobs_of, VARIANTS),
    INTRODUCTION,
    section,
    PICTURE,
)
