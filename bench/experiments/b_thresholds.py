"""What do the thresholds of the zones change?

Trains with several thresholds, comparing the tasks over the whole model and within each parameter
tensor, and counts the cosines that fall in each zone. Then it replays the task gradients of a
training by the plain sum, of windows of 1 and 4 micro-batches, through a grid of thresholds.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from bench.experiments.common import PHYSICS_STEPS, Experiment, Job, Record, scene_of
from bench.experiments.pictures import name_lines, score_picture
from bench.experiments.tables import markdown, score_section
from bench.experiments.training import (
    Variant,
    jobs_of,
    record_gradients,
    recorded_steps,
    replay,
    with_micro_batches,
)
from gcond_kernels import GCond
from gcond_kernels.diagnostics.plots import BLUE, GREY, SKY, VERMILION
from gcond_kernels.diagnostics.records import ALL_ZONES, zone_of

Thresholds = tuple[float, float, float]

GRID = (
    (-0.8, -0.5, 0.0),
    (-0.95, -0.8, 0.0),
    (-0.95, -0.5, 0.0),
    (-0.65, -0.5, 0.0),
    (-0.5, -0.5, 0.0),
    (-0.3, -0.3, 0.0),
    (-0.3, -0.1, 0.0),
    (-0.8, -0.5, -0.1),
    (-0.8, -0.5, 0.2),
    (0.0, 0.0, 0.0),
)
# θ_crit decides on cosines below θ_main alone, and in digits there is none below -0.5 over the
# model.
SAME = ((-0.95, -0.5, 0.0), (-0.65, -0.5, 0.0), (-0.5, -0.5, 0.0))
BY_TENSOR = ((-0.8, -0.5, 0.0), (-0.3, -0.3, 0.0), (0.0, 0.0, 0.0))
DEFAULT = f"model {GRID[0]}"
WINDOWS = {"1 exact": 1, "4 exact": 4}  # name in the record → micro-batches
ZONE_COLORS = dict(zip(ALL_ZONES, ("#EEEEEE", SKY, BLUE, VERMILION), strict=True))


def name_of(thresholds: Sequence[float]) -> str:
    """Return the thresholds to be read."""
    return "(" + ", ".join(f"{t:g}" for t in thresholds).replace("-", "−") + ")"


def variant_of(thresholds: Thresholds, granularity: str) -> Variant:
    """Return a variant, compared with the default thresholds of the same granularity."""
    key, baseline = (f"{granularity} {t}" for t in (thresholds, GRID[0]))
    return Variant(
        key,
        name_of(thresholds) + (", by tensor" if granularity == "tensor" else ""),
        GCond(thresholds=thresholds),
        "" if key == baseline else baseline,
        options={"granularity": granularity},
    )


def variants(left_out: Sequence[Thresholds] = ()) -> list[Variant]:
    """Return the variants that are trained: thresholds over the model, and within tensors."""
    return [
        Variant("plain", "plain sum", baseline=DEFAULT),
        *(variant_of(thresholds, "model") for thresholds in GRID if thresholds not in left_out),
        *(variant_of(thresholds, "tensor") for thresholds in BY_TENSOR),
    ]


# Photos take long and hardly conflict: their gradients are replayed.
VARIANTS: dict[str, list[Variant]] = {
    "photos": [],
    "digits": variants(SAME),
    "kovasznay": variants(),
    "burgers": variants(),
}


def jobs(options: argparse.Namespace, scene: str, seed: int) -> list[Job]:
    """Return the trainings, and recordings with what the grid makes of them."""
    steps = recorded_steps(options, scene)
    recordings = [Job(seed, scene, steps, replays, window) for window in WINDOWS]
    return jobs_of(VARIANTS, options, scene, seed) + recordings


def replays(job: Job) -> Record:
    """Replay a recording with the grid of thresholds."""
    scene = with_micro_batches(scene_of(job.scene), WINDOWS[job.subject])
    recorded = record_gradients(scene, job.steps, job.seed)
    found, default = {}, None
    for thresholds in GRID:
        result = replay(recorded, GCond(thresholds=thresholds))
        default = result.weights if default is None else default
        found[name_of(thresholds)] = {
            "zones": shares(result.cosines, thresholds),
            "zones_by_tensor": shares(recorded.by_tensor, thresholds),
            "mean_change": statistics.fmean(result.changes),
            "largest_change": max(result.changes),
            "mean_change_to_default": change(recorded.gramians, result.weights - default),
        }
    return {
        "method": f"replay, {job.subject}",
        "window": job.subject,
        "smallest_cosine": min(result.cosines),
        "smallest_cosine_by_tensor": min(recorded.by_tensor),
        "grid": found,
    }


def shares(cosines: Sequence[float], thresholds: Thresholds) -> dict[str, float]:
    """Return the share of the cosines in each zone."""
    zones = [zone_of(cosine, thresholds) for cosine in cosines]
    return {zone: zones.count(zone) / len(zones) for zone in ALL_ZONES}


def change(gramians: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the mean over the steps of ‖Σ weights ĝ‖ / ‖Σ ĝ‖."""
    weights = weights.to(gramians)
    squares = torch.einsum("ti,tij,tj->t", weights, gramians, weights)
    return float((squares / gramians.sum((1, 2))).clamp(min=0.0).sqrt().mean())


INTRODUCTION = (
    "# The thresholds of the zones",
    "Thresholds are (θ_crit, θ_main, θ_weak). Differences are to the default thresholds "
    f"{name_of(GRID[0])} with the same granularity. With (0, 0, 0) every conflict is critical.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    """Return the scores where there were trainings, and the replays."""
    said = []
    if VARIANTS[scene]:
        what = f"{records[0]['steps']} steps; zones of the steps' smallest cosine over the model."
        columns = {f"{zone} %": zone_column(zone) for zone in ALL_ZONES}
        said += score_section(records, scene, VARIANTS[scene], what, columns)
    said += [
        f"## {scene}: the same gradients through all thresholds",
        f"Task gradients of {replays_of(records, '4 exact')[0]['steps']} steps of a training by "
        "the plain sum, with windows of 1 and 4 micro-batches; the share of steps in a zone, over "
        "the model, and in brackets the share of the comparisons within a parameter tensor. "
        "Change: mean over the steps of the norm of what GCond takes from the sum of the "
        "gradients, relative to that sum; to default: how far it is from the result with the "
        "default thresholds.",
    ]
    for window, micro_batches in WINDOWS.items():
        found = replays_of(records, window)
        smallest = min(one["smallest_cosine"] for one in found)
        by_tensor = min(one["smallest_cosine_by_tensor"] for one in found)
        cosines = f"smallest cosine {smallest:.2f}, within a tensor {by_tensor:.2f}"
        said += [
            f"Windows of {micro_batches}: {cosines.replace('-', '−')}.",
            grid_table(found),
        ]
    return said


def zone_column(zone: str) -> Callable[[Sequence[Record]], str]:
    """Return a column with the share of the steps in a zone."""

    def column(records: Sequence[Record]) -> str:
        known = [found["zones"][zone] for found in records if found["zones"]]
        return f"{100.0 * statistics.fmean(known):.1f}" if known else ""

    return column


def replays_of(records: Sequence[Record], window: str) -> list[Record]:
    """Return the replays of a window."""
    return [found for found in records if found.get("window") == window]


def grid_table(records: Sequence[Record]) -> str:
    """Return what the grid makes of the recordings of a window."""
    rows = [["thresholds", *ALL_ZONES, "change", "to default"]]
    for thresholds in map(name_of, GRID):
        found = [one["grid"][thresholds] for one in records]
        rows.append([thresholds])
        for zone in ALL_ZONES:
            over, within = (zone_mean(found, key, zone) for key in ("zones", "zones_by_tensor"))
            rows[-1].append(f"{over:.1f} % ({within:.1f} %)")
        for key in ("mean_change", "mean_change_to_default"):
            rows[-1].append(f"{100.0 * statistics.fmean(one[key] for one in found):.2f} %")
    return markdown(rows)


def zone_mean(found: Sequence[dict[str, Any]], key: str, zone: str) -> float:
    """Return the mean share of a zone in %."""
    return 100.0 * statistics.fmean(one[key][zone] for one in found)


def draw_zones(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Draw shares of zones of the gradients of 4 micro-batches: whole model, within tensors."""
    found = replays_of(records, "4 exact")
    names = [name_of(thresholds) for thresholds in GRID]
    for place, name in enumerate(names):
        for key, shift in (("zones", -0.2), ("zones_by_tensor", 0.2)):
            left = 0.0
            for zone in ALL_ZONES[::-1]:
                share = zone_mean([one["grid"][name] for one in found], key, zone)
                style = {"color": ZONE_COLORS[zone], "edgecolor": GREY, "linewidth": 0.4}
                axes.barh(place + shift, share, left=left, height=0.36, **style)
                left += share
    name_lines(axes, names)
    axes.set_xlim(0.0, 100.0)
    axes.set_xlabel("% (above: steps, whole model; below: within tensors)", fontsize=11)
    axes.set_title(f"{scene}: zones of the plain sum's gradients", fontsize=13)
    patches = [Patch(facecolor=c, edgecolor=GREY, label=zone) for zone, c in ZONE_COLORS.items()]
    axes.legend(
        handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=10
    )


PICTURE = partial(
    score_picture,
    VARIANTS,
    "Thresholds (θ_crit, θ_main, θ_weak)",
    (DEFAULT, "the default thresholds, whole model"),
    draw_zones,
)
EXPERIMENT = Experiment(
    "b_thresholds",
    __doc__.splitlines()[0],
    jobs,
    INTRODUCTION,
    section,
    PICTURE,
    {"photos": 120, "digits": 100, **PHYSICS_STEPS},
)
