"""Exact against stochastic mode, at equal micro-batches and at equal backward passes.

In exact mode a micro-batch costs a forward pass and a backward pass per task, in stochastic mode
one of each. So with K tasks as many backward passes make K times the micro-batches, in windows K
times as long or in K times the steps. The sum of the same gradients shows what the mode alone does.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.experiments.common import Experiment, Record
from bench.experiments.pictures import score_picture
from bench.experiments.tables import mean_of, score_section
from bench.experiments.training import Variant, jobs_of
from gcond_kernels import GCond
from gcond_kernels.methods import Sum

EXACT = "exact"
stochastic = partial(Variant, baseline=EXACT, mode="stochastic")


def variants(A: int, tasks: int = 2) -> list[Variant]:
    """Return the variants of a scene with windows of A micro-batches, or `tasks` times as many."""
    short: dict[str, Any] = {"micro_batches": A}
    long: dict[str, Any] = {"micro_batches": tasks * A}
    return [
        Variant("plain", "plain sum", baseline=EXACT, **short),
        Variant(EXACT, f"GCond exact, A = {A}", GCond(), **short),
        stochastic("stochastic", f"GCond stochastic, A = {A}", GCond(), **short),
        stochastic("stochastic sum", f"Sum stochastic, A = {A}", Sum(), **short),
        stochastic("long windows", f"GCond stochastic, A = {tasks * A}", GCond(), **long),
        stochastic("long windows sum", f"Sum stochastic, A = {tasks * A}", Sum(), **long),
        stochastic(
            "more steps", f"GCond stochastic, {tasks}× steps", GCond(), **short, steps=float(tasks)
        ),
    ]


FEW = (EXACT, "stochastic", "long windows")  # photos take long
VARIANTS = {
    "photos": [variant for variant in variants(4) if variant.key in FEW],
    "digits": variants(4),
    "kovasznay": variants(2),
    "burgers": variants(3, tasks=3),
}
COLUMNS = {
    "steps": lambda found: str(found[0]["steps"]),
    "forward": lambda found: f"{found[0]['steps'] * found[0]['micro_batches'] / 1000:g}",
    "backward": lambda found: f"{found[0]['backward_passes'] / 1000:g}",
    "incidence": mean_of("incidence"),
}


INTRODUCTION = (
    "# Exact and stochastic mode",
    "Differences are to GCond in exact mode. Stochastic with the same A has as many micro-batches "
    "and, with K tasks, 1/K of the backward passes; with K times the A, or with K times the "
    "steps, it has as many backward passes and K times the micro-batches (and forward passes). "
    "Passes are forward and backward, in thousands.",
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
    {"photos": 120, "digits": 100, "kovasznay": 300, "burgers": 400},
)
