"""What do the thresholds of the zones change?

    python bench/experiments/b_thresholds.py [--seeds 3] [--steps N] [--output FOLDER]

Trains with several thresholds, comparing the tasks over the whole model and within each parameter
tensor, and counts the cosines that fall in each zone. Then it replays the task gradients of a
training by the plain sum, of windows of 1 and 4 micro-batches, through a grid of thresholds.
"""

import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.experiments import common, runs
from bench.experiments.common import PLAIN_SUM, Record, Training, Variant
from gcond_kernels import GCond
from gcond_kernels.diagnostics.plots import BLUE, GREY, SKY, VERMILION
from gcond_kernels.diagnostics.records import ALL_ZONES, zone_of

NAME = "b_thresholds"
STEPS = {"photos": 120, "digits": 100}
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
# θ_crit decides on cosines below θ_main alone, and over the model there is none below -0.5.
ALIKE = ((-0.95, -0.5, 0.0), (-0.65, -0.5, 0.0), (-0.5, -0.5, 0.0))
BY_TENSOR = ((-0.8, -0.5, 0.0), (-0.3, -0.3, 0.0), (0.0, 0.0, 0.0))
DEFAULT = "model " + str(GRID[0])
WINDOWS = {"1 exact": 1, "4 exact": 4}
REPLAY = "replay"
ZONE_COLORS = dict(zip(ALL_ZONES, ("#EEEEEE", SKY, BLUE, VERMILION), strict=True))


def variant_of(thresholds: tuple[float, float, float], granularity: str) -> Variant:
    """Default thresholds of the same granularity are what others are compared with."""
    key, baseline = (f"{granularity} {t}" for t in (thresholds, GRID[0]))
    name = name_of(thresholds) + (", by tensor" if granularity == "tensor" else "")
    return Variant(
        key,
        name,
        GCond(thresholds=thresholds),
        "" if key == baseline else baseline,
        options={"granularity": granularity},
    )


def name_of(thresholds: Sequence[float]) -> str:
    return "(" + ", ".join(f"{t:g}" for t in thresholds).replace("-", "−") + ")"


# Photos take long and hardly conflict: their gradients are replayed.
VARIANTS = {
    "photos": [],
    "digits": [
        Variant(PLAIN_SUM, "plain sum", baseline=DEFAULT),
        *(variant_of(thresholds, "model") for thresholds in GRID if thresholds not in ALIKE),
        *(variant_of(thresholds, "tensor") for thresholds in BY_TENSOR),
    ],
}


class Job(NamedTuple):
    """A recording and what the grid makes of it."""

    seed: int
    scene: str
    steps: int
    window: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parse(__doc__, arguments, STEPS)
    jobs: list[Training | Job] = common.trainings(options, VARIANTS)
    jobs += [
        Job(seed, scene, common.recorded_steps(options, scene), window)
        for seed in range(options.seeds)
        for scene in options.scenes
        for window in WINDOWS
    ]
    return common.experiment(NAME, options, jobs, (perform, cost), report, picture)


def cost(job: Training | Job) -> float:
    if isinstance(job, Training):
        return common.training_cost(job)
    return 0.5 * WINDOWS[job.window] * job.steps * runs.SCENES[job.scene].step_cost


def perform(job: Training | Job) -> Record:
    return common.perform_training(job) if isinstance(job, Training) else perform_replay(job)


def perform_replay(job: Job) -> Record:
    scene = common.with_micro_batches(runs.scene_of(job.scene), WINDOWS[job.window])
    recorded = common.record_gradients(scene, job.steps, job.seed)
    found, default = {}, None
    for thresholds in GRID:
        replay = common.replay(recorded, GCond(thresholds=thresholds))
        default = replay.weights if default is None else default
        found[name_of(thresholds)] = {
            "zones": shares(replay.cosines, thresholds),
            "zones_by_tensor": shares(recorded.by_tensor, thresholds),
            "mean_change": statistics.fmean(replay.changes),
            "largest_change": max(replay.changes),
            "mean_change_to_default": change(recorded.gramians, replay.weights - default),
        }
    runs.advance(cost(job))
    smallest = min(replay.cosines)
    return {
        "scene": job.scene,
        "method": f"{REPLAY}, {job.window}",
        "window": job.window,
        "seed": job.seed,
        "steps": job.steps,
        "smallest_cosine": smallest,
        "smallest_cosine_by_tensor": min(recorded.by_tensor),
        "grid": found,
    }


def shares(cosines: Sequence[float], thresholds: tuple[float, float, float]) -> dict[str, float]:
    zones = [zone_of(cosine, thresholds) for cosine in cosines]
    return {zone: zones.count(zone) / len(zones) for zone in ALL_ZONES}


def change(gramians: torch.Tensor, weights: torch.Tensor) -> float:
    """Mean over the steps of ‖Σ weights ĝ‖ / ‖Σ ĝ‖."""
    weights = weights.to(gramians)
    squares = torch.einsum("ti,tij,tj->t", weights, gramians, weights)
    return float((squares / gramians.sum((1, 2))).clamp(min=0.0).sqrt().mean())


# What is written.


def report(records: Sequence[Record]) -> list[str]:
    said = [
        "# The thresholds of the zones",
        "Thresholds are (θ_crit, θ_main, θ_weak). Differences are to the default thresholds "
        f"{name_of(GRID[0])} with the same granularity. With (0, 0, 0) every conflict is critical.",
    ]
    for scene in common.scenes_in(records):
        own = [record for record in records if record["scene"] == scene]
        said += (trained(own, scene) if VARIANTS[scene] else []) + replayed(own, scene)
    return said


def trained(records: Sequence[Record], scene: str) -> list[str]:
    steps = records[0]["steps"]
    columns = {f"{zone} %": zone_column(zone) for zone in ALL_ZONES}
    return [
        *common.scene_heading(
            records, scene, f"{steps} steps; zones of the steps' smallest cosine over the model."
        ),
        common.score_table(records, scene, VARIANTS[scene], columns),
        common.beyond_sentence(records, scene, VARIANTS[scene]),
    ]


def zone_column(zone: str) -> Any:
    def column(records: Sequence[Record]) -> str:
        known = [record["zones"][zone] for record in records if record["zones"]]
        return f"{100.0 * statistics.fmean(known):.1f}" if known else ""

    return column


def replays(records: Sequence[Record], window: str) -> list[Record]:
    return [record for record in records if record.get("window") == window]


def replayed(records: Sequence[Record], scene: str) -> list[str]:
    said = [
        f"## {scene}: the same gradients through all thresholds",
        f"Task gradients of {replays(records, '4 exact')[0]['steps']} steps of a training by the "
        "plain sum, with windows of 1 and 4 micro-batches; the "
        "share of steps in a zone, over the model, and in brackets the share of the comparisons "
        "within a parameter tensor. Change: mean over the steps of the length of what GCond takes "
        "from the sum of the gradients, relative to that sum; to default: how far it is from the "
        "result with the default thresholds.",
    ]
    for window in WINDOWS:
        found = replays(records, window)
        smallest = min(record["smallest_cosine"] for record in found)
        by_tensor = min(record["smallest_cosine_by_tensor"] for record in found)
        told = f"smallest cosine {smallest:.2f}, within a tensor {by_tensor:.2f}".replace("-", "−")
        said.append(f"Windows of {WINDOWS[window]}: {told}.")
        rows = [["thresholds", *ALL_ZONES, "change", "to default"]]
        for thresholds in map(name_of, GRID):
            of_grid = [record["grid"][thresholds] for record in found]
            cells = [thresholds]
            for zone in ALL_ZONES:
                over, within = (
                    100.0 * statistics.fmean(g[key][zone] for g in of_grid)
                    for key in ("zones", "zones_by_tensor")
                )
                cells.append(f"{over:.1f} % ({within:.1f} %)")
            cells.append(percent_of(of_grid, "mean_change"))
            cells.append(percent_of(of_grid, "mean_change_to_default"))
            rows.append(cells)
        said.append(runs.markdown(rows))
    return said


def percent_of(found: Sequence[dict[str, Any]], key: str) -> str:
    return f"{100.0 * statistics.fmean(entry[key] for entry in found):.2f} %"


def picture(records: Sequence[Record]) -> Figure:
    title = "Thresholds (θ_crit, θ_main, θ_weak)"
    baseline = (DEFAULT, "the default thresholds, whole model")
    return common.score_picture(records, VARIANTS, title, baseline, draw_zones)


def draw_zones(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Shares of zones of the replayed gradients of 4 micro-batches: whole model, within tensors."""
    found = replays(records, "4 exact")
    names = [name_of(thresholds) for thresholds in GRID]
    for place, name in enumerate(names):
        for key, shift in (("zones", -0.2), ("zones_by_tensor", 0.2)):
            left = 0.0
            for zone in ALL_ZONES[::-1]:
                share = 100.0 * statistics.fmean(r["grid"][name][key][zone] for r in found)
                style = {"color": ZONE_COLORS[zone], "edgecolor": GREY, "linewidth": 0.4}
                axes.barh(place + shift, share, left=left, height=0.36, **style)
                left += share
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 100.0)
    axes.set_xlabel("% (above: steps, whole model; below: within tensors)", fontsize=11)
    axes.set_title(f"{scene}: zones of the plain sum's gradients", fontsize=13)
    patches = [
        Patch(facecolor=color, edgecolor=GREY, label=zone) for zone, color in ZONE_COLORS.items()
    ]
    axes.legend(
        handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=10
    )


if __name__ == "__main__":
    sys.exit(main())
