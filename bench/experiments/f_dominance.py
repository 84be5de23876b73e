"""Does the dominance window keep one task from winning all conflicts?

Trains with windows of 0, 1, 3 and 5 and both histories. In the mild zone both tasks give way,
whoever wins: so the thresholds are (0, 0, 0) here, where every conflict is critical and the winner
gives way in nothing; the default thresholds stand beside. Then it replays the task gradients of a
training by the plain sum.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from bench.experiments.common import (
    PHYSICS_STEPS,
    SCENES,
    STEPS,
    Experiment,
    Job,
    Record,
    scene_of,
)
from bench.experiments.pictures import name_lines, score_picture
from bench.experiments.tables import markdown, percent, score_section
from bench.experiments.training import (
    Variant,
    conflicts_of,
    jobs_of,
    record_gradients,
    recorded_steps,
    replay,
    with_micro_batches,
)
from gcond_kernels import GCond
from gcond_kernels.diagnostics.plots import BLUE, GREY, SKY

HISTORIES = {"raw": (0, 1, 3, 5), "resolved": (0, 3)}  # and the windows that are trained
BASELINE = "critical raw 3"
RECORDINGS = {"exact": False, "stochastic": True}
SETTINGS = {
    f"{history}, W = {window}": GCond(
        dominance_window=window, history=history, thresholds=(0.0, 0.0, 0.0)
    )
    for history in HISTORIES
    for window in HISTORIES["raw"]
}


def variants() -> list[Variant]:
    """Return the variants that are trained: critical thresholds, then the default ones."""
    found = []
    for history, windows in HISTORIES.items():
        for window in windows:
            key, name = f"critical {history} {window}", f"{history}, W = {window}"
            found.append(Variant(key, name, SETTINGS[name], "" if key == BASELINE else BASELINE))
    for window, baseline in ((3, ""), (0, "default raw 3")):
        name = f"default thresholds, raw, W = {window}"
        method = GCond(dominance_window=window)
        found.append(Variant(f"default raw {window}", name, method, baseline))
    return found


# Photos take long and hardly conflict: their gradients are replayed.
VARIANTS: dict[str, list[Variant]] = {
    "photos": [],
    **dict.fromkeys(("digits", "kovasznay", "burgers"), variants()),
}


def jobs(options: argparse.Namespace, scene: str, seed: int) -> list[Job]:
    """Return the trainings, and recordings with what all windows make of them."""
    steps = recorded_steps(options, scene)
    recordings = [Job(seed, scene, steps, replays, mode) for mode in RECORDINGS]
    return jobs_of(VARIANTS, options, scene, seed) + recordings


def replays(job: Job) -> Record:
    """Replay a recording with all settings."""
    mode, scene = job.subject, scene_of(job.scene)
    tasks, found = list(scene.tasks), {}
    if RECORDINGS[mode]:  # a micro-batch for each task at least
        scene = with_micro_batches(scene, max(len(tasks), scene.accumulation_steps))
    recorded = record_gradients(scene, job.steps, job.seed, RECORDINGS[mode])
    for name, method in SETTINGS.items():
        winners = [tasks[number] for number in replay(recorded, method).winners]
        found[name] = conflicts_of(winners, scene)
    return {"method": f"replay, {mode}", "mode": mode, "settings": found}


INTRODUCTION = (
    "# The dominance window",
    "W is dominance_window; history is what stability compares with. Thresholds are (0, 0, 0) "
    "unless the default ones are named. Differences are to W = 3 with the raw history and the "
    "same thresholds. Conflicts: steps with one. Share: of those that the task won. "
    "Streak: the most of them that one task won in a row, mean over the seeds and (largest). "
    "In the mild zone a step projects several times, each with a winner that enters the "
    "history; here its first counts.",
)


def section(records: Sequence[Record], scene: str) -> list[str]:
    """Return the scores where there were trainings, and the replays."""
    first = next(iter(SCENES[scene].tasks))
    columns = {
        "conflicts": conflicts,
        f"{first}: share": lambda found: share(found, first),
        "streak": streak,
    }
    said = []
    if VARIANTS[scene]:
        what = f"{records[0]['steps']} steps."
        said += score_section(records, scene, VARIANTS[scene], what, columns)
    rows = [[""], *([name] for name in SETTINGS)]
    for mode in RECORDINGS:
        rows[0] += [f"{mode}: conflicts", f"{first}: share", "streak"]
        for row, name in zip(rows[1:], SETTINGS, strict=True):
            row += [column(settings_of(records, mode, name)) for column in columns.values()]
    steps = next(found["steps"] for found in records if "mode" in found)
    return [
        *said,
        f"## {scene}: the same gradients through all windows",
        f"Task gradients of {steps} steps of a training by the plain sum, with "
        "windows as in exact and in stochastic mode.",
        markdown(rows),
    ]


def conflicts(found: Sequence[Record]) -> str:
    """Return the mean number of steps with a conflict."""
    return f"{statistics.fmean(f['conflicts'] for f in found):.0f}"


def share(found: Sequence[Record], task: str) -> str:
    """Return the share of the conflicts that a task won."""
    known = [f["won"][task] / f["conflicts"] for f in found if f["conflicts"]]
    return percent(statistics.fmean(known)) if known else ""


def streak(found: Sequence[Record]) -> str:
    """Return the longest streak, mean over the seeds and largest."""
    longest = [f["longest_streak"] for f in found]
    return f"{statistics.fmean(longest):.1f} ({max(longest)})"


def settings_of(records: Sequence[Record], mode: str, name: str) -> list[dict[str, Any]]:
    """Return what one setting made of the recordings of a mode."""
    return [found["settings"][name] for found in records if found.get("mode") == mode]


def draw_streaks(axes: Axes, records: Sequence[Record], scene: str) -> None:
    """Draw the longest streaks in the replays: bars of the means, a dot per seed."""
    for mode, shift, color in (("exact", -0.2, BLUE), ("stochastic", 0.2, SKY)):
        for place, name in enumerate(SETTINGS):
            longest = [found["longest_streak"] for found in settings_of(records, mode, name)]
            label = f"{mode} mode" if place == 0 else None
            mean = statistics.fmean(longest)
            axes.barh(place + shift, mean, height=0.36, color=color, alpha=0.6, label=label)
            style = {"color": "black", "marker": "o", "markersize": 4, "linestyle": ""}
            axes.plot(longest, [place + shift] * len(longest), **style)
    name_lines(axes, list(SETTINGS))
    axes.set_xlabel("longest winning streak, conflicts (dots: seeds)", fontsize=11)
    axes.set_title(f"{scene}: replay of the plain sum's steps", fontsize=13)
    axes.grid(axis="x", color=GREY, alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=10)


PICTURE = partial(
    score_picture,
    VARIANTS,
    "Dominance window W, every conflict critical",
    (BASELINE, "W = 3, raw"),
    draw_streaks,
)
EXPERIMENT = Experiment(
    "f_dominance",
    __doc__.splitlines()[0],
    jobs,
    INTRODUCTION,
    section,
    PICTURE,
    STEPS | PHYSICS_STEPS,
)
