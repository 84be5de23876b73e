"""Exact against stochastic mode, at equal micro-batches and at equal backward passes.

In exact mode a micro-batch costs a forward pass and a backward pass per task, in stochastic mode
one of each. So with two tasks as many backward passes make twice the micro-batches, in windows
twice as long or in twice the steps. The sum of the same gradients shows what the mode alone does.
"""

from collections.abc import Sequence
from functools import partial

from bench.experiments.common import Experiment, Record
from bench.experiments.pictures import score_picture
from bench.experiments.tables import mean_of, score_section
from bench.experiments.training import Variant, jobs_of
from gcond_kernels import GCond
from gcond_kernels.methods import Sum

EXACT = "exact"
stochastic = partial(Variant, baseline=EXACT, mode="stochastic")
OF_SCENE = [
    Variant("plain", "plain sum", baseline=EXACT),
    Variant(EXACT, "GCond exact, A = 4", GCond()),
    stochastic("stochastic", "GCond stochastic, A = 4", GCond()),
    stochastic("stochastic sum", "Sum stochastic, A = 4", Sum()),
    stochastic("long windows", "GCond stochastic, A = 8", GCond(), micro_batches=8),
    stochastic("long windows sum", "Sum stochastic, A = 8", Sum(), micro_batches=8),
    stochastic("more steps", "GCond stochastic, 2× steps", GCond(), steps=2.0),
]
FEW = (EXACT, "stochastic", "long windows")  # photos take long
VARIANTS = {"photos": [v for v in OF_SCENE if v.key in FEW], "digits": OF_SCENE}
COLUMNS = {
    "steps": lambda found: str(found[0]["steps"]),
    "forward": lambda found: f"{found[0]['steps'] * found[0]['micro_batches'] / 1000:g}",
    "backward": lambda found: f"{found[0]['backward_passes'] / 1000:g}",
    "incidence": mean_of("incidence"),
}


INTRODUCTION = (
    "# Exact and stochastic mode",
    "Differences are to GCond in exact mode. Stochastic with A = 4 has as many micro-batches "
    "and half the backward passes; with A = 8, or with A = 4 and twice the steps, it has as "
    "many backward passes and twice the micro-batches (and forward passes). Passes are forward "
    "and backward, in thousands.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    what = f"{min(found['steps'] for found in records)} steps but where the table says more."
    return score_section(records, scene, VARIANTS[scene], what, COLUMNS)


PICTURE = partial(
    score_picture, VARIANTS, "Exact and stochastic mode", (EXACT, "GCond exact"), None
)
EXPERIMENT = Experiment(
    "d_modes",
    __doc__.splitlines()[0],
    partial(jobs_of, VARIANTS),
    INTRODUCTION,
    section,
    PICTURE,
    {"photos": 120, "digits": 100},
)
