"""Does the dominance window keep one task from winning all conflicts?

    python bench/experiments/f_dominance.py [--seeds 3] [--steps N] [--output FOLDER]

Trains with windows of 0, 1, 3 and 5 and both histories. In the mild zone both tasks give way alike,
whoever wins: so the thresholds are (0, 0, 0) here, where every conflict is critical and the winner
gives way in nothing; the default thresholds stand beside. Then it replays the task gradients of a
training by the plain sum.
"""

import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.experiments import common, runs
from bench.experiments.common import SCENES, Record, Training, Variant
from gcond_kernels import GCond
from gcond_kernels.diagnostics.plots import BLUE, GREY, SKY

NAME = "f_dominance"
WINDOWS = (0, 1, 3, 5)
HISTORIES = ("raw", "resolved")
CRITICAL = (0.0, 0.0, 0.0)
BASELINE = "critical raw 3"
RECORDINGS = {"exact": False, "stochastic": True}
SETTINGS = {
    f"{history}, W = {window}": GCond(dominance_window=window, history=history, thresholds=CRITICAL)
    for history in HISTORIES
    for window in WINDOWS
}


def variants(windows: dict[str, Sequence[int]], defaults: Sequence[int]) -> list[Variant]:
    found = []
    for history in HISTORIES:
        for window in windows[history]:
            key = f"critical {history} {window}"
            name = f"{history}, W = {window}"
            baseline = "" if key == BASELINE else BASELINE
            found.append(Variant(key, name, SETTINGS[name], baseline))
    for window in defaults:
        key = f"default raw {window}"
        baseline = "" if window == 3 else "default raw 3"
        name = f"default thresholds, raw, W = {window}"
        found.append(Variant(key, name, GCond(dominance_window=window), baseline))
    return found


# Photos take long and hardly conflict: their gradients are replayed.
VARIANTS = {"photos": [], "digits": variants({"raw": WINDOWS, "resolved": (0, 3)}, (3, 0))}


class Job(NamedTuple):
    """A recording and what all windows make of it."""

    seed: int
    scene: str
    steps: int
    mode: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parse(__doc__, arguments)
    jobs: list[Training | Job] = common.trainings(options, VARIANTS)
    jobs += [
        Job(seed, scene, common.recorded_steps(options, scene), mode)
        for seed in range(options.seeds)
        for scene in options.scenes
        for mode in RECORDINGS
    ]
    return common.experiment(NAME, options, jobs, (perform, cost), report, picture)


def cost(job: Training | Job) -> float:
    if isinstance(job, Training):
        return common.training_cost(job)
    return 2.0 * job.steps * SCENES[job.scene].step_cost


def perform(job: Training | Job) -> Record:
    return common.perform_training(job) if isinstance(job, Training) else perform_replay(job)


def perform_replay(job: Job) -> Record:
    scene = runs.scene_of(job.scene)
    recorded = common.record_gradients(scene, job.steps, job.seed, RECORDINGS[job.mode])
    tasks = list(scene.tasks)
    found = {}
    for name, method in SETTINGS.items():
        winners = [tasks[number] for number in common.replay(recorded, method).winners]
        found[name] = common.winners_told(winners, scene)
    runs.advance(cost(job))
    return {
        "scene": job.scene,
        "method": f"replay, {job.mode}",
        "mode": job.mode,
        "seed": job.seed,
        "steps": job.steps,
        "settings": found,
    }


# What is written.


def report(records: Sequence[Record]) -> list[str]:
    said = [
        "# The dominance window",
        "W is dominance_window; history is what stability compares with. Thresholds are (0, 0, 0) "
        "unless the default ones are named. Differences are to W = 3 with the raw history and the "
        "same thresholds. Conflicts: steps with one. Share: of those that the task won. "
        "Streak: the most of them that one task won in a row, mean over the seeds and (largest). "
        "In the mild zone a step projects several times, each with a winner that enters the "
        "history; here its first counts.",
    ]
    for scene in common.scenes_in(records):
        own = [record for record in records if record["scene"] == scene]
        first = next(iter(SCENES[scene].tasks))
        columns = {
            "conflicts": lambda found: f"{statistics.fmean(r['conflicts'] for r in found):.0f}",
            f"{first}: share": lambda found, task=first: share(found, task),
            "streak": streak,
        }
        if VARIANTS[scene]:
            said += [
                *common.scene_heading(own, scene, f"{own[0]['steps']} steps."),
                common.score_table(own, scene, VARIANTS[scene], columns),
                common.beyond_sentence(own, scene, VARIANTS[scene]),
            ]
        said += replayed(own, scene, first)
    return said


def share(found: Sequence[dict[str, Any]], task: str) -> str:
    known = [f["won"][task] / f["conflicts"] for f in found if f["conflicts"]]
    return common.percent(statistics.fmean(known)) if known else ""


def streak(found: Sequence[dict[str, Any]]) -> str:
    longest = [f["longest_streak"] for f in found]
    return f"{statistics.fmean(longest):.1f} ({max(longest)})"


def replays(records: Sequence[Record], mode: str, name: str) -> list[dict[str, Any]]:
    return [record["settings"][name] for record in records if record.get("mode") == mode]


def replays_steps(records: Sequence[Record]) -> int:
    return next(record["steps"] for record in records if "mode" in record)


def replayed(records: Sequence[Record], scene: str, first: str) -> list[str]:
    heads = [""]
    for mode in RECORDINGS:
        heads += [f"{mode}: conflicts", f"{first}: share", "streak"]
    rows = [heads]
    for name in SETTINGS:
        cells = [name]
        for mode in RECORDINGS:
            found = replays(records, mode, name)
            cells.append(f"{statistics.fmean(f['conflicts'] for f in found):.0f}")
            cells += [share(found, first), streak(found)]
        rows.append(cells)
    return [
        f"## {scene}: the same gradients through all windows",
        f"Task gradients of {replays_steps(records)} steps of a training by the plain sum, with "
        "windows as in exact and in stochastic mode.",
        runs.markdown(rows),
    ]


def picture(records: Sequence[Record]) -> Figure:
    title = "Dominance window W, every conflict critical"
    return common.score_picture(records, VARIANTS, title, (BASELINE, "W = 3, raw"), draw_streaks)


def draw_streaks(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Longest streaks in the replays: bars of the means, a dot per seed."""
    for (mode, shift), color in zip(
        (("exact", -0.2), ("stochastic", 0.2)), (BLUE, SKY), strict=True
    ):
        for place, name in enumerate(SETTINGS):
            longest = [found["longest_streak"] for found in replays(records, mode, name)]
            label = f"{mode} mode" if place == 0 else None
            mean = statistics.fmean(longest)
            axes.barh(place + shift, mean, height=0.36, color=color, alpha=0.6, label=label)
            style = {"color": "black", "marker": "o", "markersize": 4, "linestyle": ""}
            axes.plot(longest, [place + shift] * len(longest), **style)
    axes.set_yticks(range(len(SETTINGS)), list(SETTINGS), fontsize=11)
    axes.invert_yaxis()
    axes.set_xlabel("longest winning streak, conflicts (dots: seeds)", fontsize=11)
    axes.set_title(f"{scene}: the plain sum's gradients, replayed", fontsize=13)
    axes.grid(axis="x", color=GREY, alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=10)


if __name__ == "__main__":
    sys.exit(main())
