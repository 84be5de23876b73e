"""What the benchmarks have in common that train on the demo's scenes with several seeds.

A run is whatever a function makes of a job, in one of two processes with one thread each; what it
returns, a record, has at least "scene", "method", "seed" and "scores", task → validation score.
"""

import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from scipy.special import stdtr

import gcond_kernels
from bench.record import cpu_name
from examples.demo.digits import Digits
from examples.demo.photos import Photos, bundled_files, read_images
from examples.demo.scenes import Scene
from examples.demo.summary import finite
from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREY, VERMILION

SCENES = {"photos": Photos, "digits": Digits}
PROCESSES = 2
POLL = 0.5  # seconds between two looks at the progress
SEED_MARKERS = "os^vDPX*"
INTERRUPTED = 130

Job = TypeVar("Job")
Record = dict[str, Any]


# What was asked for, and of which machine.


def about_run(scenes: Sequence[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "device": cpu_name(),
            "cores": cores(),
            "processes": processes(),
            "threads_of_each": 1,
            "load_average_before": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gcond_kernels": gcond_kernels.__version__,
        },
        "scenes": {name: about_scene(scene_of(name)) for name in scenes},
    }


def about_scene(scene: Scene) -> dict[str, Any]:
    return {
        "title": scene.title,
        "loss_weights": scene.tasks,
        "accumulation_steps": scene.accumulation_steps,
        "learning_rate": scene.learning_rate,
        "validation": scene.validation_note,
        "scores": scene.score_labels,
    }


def told(about: dict[str, Any]) -> str:
    """The same as a line below a heading."""
    machine = ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in about["machine"].items())
    return f"`{about['command']}`, {about['date']}; {machine}."


@cache
def scene_of(name: str) -> Scene:
    return Photos(read_images(bundled_files())[0]) if name == "photos" else Digits()


def cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes() -> int:
    return min(PROCESSES, cores())


# The runs, each in one of the processes.


def perform_all(
    jobs: Sequence[Job],
    perform: Callable[[Job], Record],
    cost: Callable[[Job], float],
    line: Callable[[Record], str],
    keep: Callable[[Record], None],
) -> None:
    """Performs all of them, with a bar; `keep` is called with each record as soon as it is there.

    A run tells of its progress by `advance`, in all by `cost` of its job.
    """
    if processes() == 1:
        torch.set_num_threads(1)
        for job in jobs:
            record = perform(job)
            keep(record)
            print(line(record))
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("d", 0.0), context.Event()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    total = sum(map(cost, jobs))
    with (
        ProcessPoolExecutor(
            processes(), mp_context=context, initializer=start, initargs=(done, stop)
        ) as pool,
        Progress(*columns, speed_estimate_period=60.0) as progress,
    ):
        bar = progress.add_task("starting", total=total)
        pending = {pool.submit(perform, job) for job in jobs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in finished:
                    record = future.result()
                    keep(record)
                    progress.console.print(line(record), highlight=False)
                runs = f"{len(jobs) - len(pending)} of {len(jobs)} runs"
                completed = done.value if pending else total
                progress.update(bar, completed=completed, description=runs)
        except BaseException:
            stop.set()
            for future in pending:
                future.cancel()
            raise


def start(done: Any, stop: Any) -> None:
    """Readies a process; Ctrl-C is the business of the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    start.shared = done, stop


def advance(cost: float) -> None:
    """Tells that a part of a run is done, and ends it where the whole was interrupted."""
    if not hasattr(start, "shared"):  # in the only process
        return
    done, stop = start.shared
    with done.get_lock():
        done.value += cost
    if stop.is_set():
        raise KeyboardInterrupt


def write_json(
    path: Path, about: dict[str, Any], records: Sequence[Record], *, planned: int
) -> None:
    """In a file beside it first: a run that is ended meanwhile leaves the old one whole."""
    whole = {**about, "planned_runs": planned, "runs": records}
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(finite(whole), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


# Scores, and differences to a run with the same seed.


class Figures(NamedTuple):
    """One method's values of one score over the seeds, and the differences to another's."""

    values: list[float]
    gaps: list[float]
    percent: bool

    @property
    def error(self) -> float | None:
        """Standard error of the mean difference; None of a single seed."""
        if len(self.gaps) < 2:
            return None
        return statistics.stdev(self.gaps) / math.sqrt(len(self.gaps))

    @property
    def beyond(self) -> bool:
        """Whether the mean difference is beyond twice that, and more than rounding."""
        if self.error is None or float(self.number(self.gap)) == 0.0:
            return False
        return abs(self.gap) > 2.0 * self.error

    @property
    def gap(self) -> float:
        """The mean difference."""
        return statistics.fmean(self.gaps)

    def number(self, value: float, sign: str = "") -> str:
        """As it is printed; rounded, for a comparison, without a sign."""
        digits, factor = (2, 100.0) if self.percent else (4, 1.0)
        rounded = round(factor * value, digits) + 0.0  # which leaves no minus before a zero
        text = f"{rounded:{sign}.{digits}f}"
        return text.replace("-", "−") if sign else text

    def mean_cell(self) -> str:
        """Mean ± standard deviation."""
        mean = self.number(statistics.fmean(self.values))
        if len(self.values) < 2:
            return mean
        return f"{mean} ± {self.number(statistics.stdev(self.values))}"

    def gap_cell(self) -> str:
        """Mean difference ± standard error; empty where there is none."""
        if not self.gaps:
            return ""
        gap = self.number(self.gap, "+")
        return gap if self.error is None else f"{gap} ± {self.number(self.error)}"


def figures(
    records: Sequence[Record], scene: str, method: str, task: str, baseline: str
) -> Figures:
    """Of the seeds that there are; differences of those that there is a baseline of."""
    own = by_seed(records, scene, method)
    plain = by_seed(records, scene, baseline)
    values = {seed: record["scores"][task] for seed, record in own.items()}
    gaps = []
    if method != baseline:
        gaps = [v - plain[seed]["scores"][task] for seed, v in values.items() if seed in plain]
    return Figures(list(values.values()), gaps, SCENES[scene].score_in_percent)


def by_seed(records: Sequence[Record], scene: str, method: str) -> dict[int, Record]:
    return {r["seed"]: r for r in records if r["scene"] == scene and r["method"] == method}


def better(scene: str) -> str:
    return "in %, higher is better" if SCENES[scene].score_in_percent else "lower is better"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its heads, the first column text."""
    lines = [rows[0], [":--", *["--:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def chance_sentence(count: int, seeds: int, beyond: Sequence[str]) -> str:
    """How many differences are beyond twice their standard error, and how much that says.

    `beyond` names them: "which (difference in score, …)".
    """
    number = sum(text.count(" in ") for text in beyond)
    chance = 2.0 * float(stdtr(seeds - 1, -2.0))  # of Student's t
    which = f": {'; '.join(beyond)}" if beyond else ""
    return (
        f"Beyond twice their standard error over the seeds are {number} of {count} differences"
        f"{which}. {seeds} seeds are few: between methods that do not differ at all, chance alone "
        f"would take {100.0 * chance:.0f} % of the differences beyond that, here some "
        f"{chance * count:.0f} of {count}."
    )


# Pictures.


def draw_scores(
    axes: Axes,
    records: Sequence[Record],
    scene: str,
    task: str,
    names: dict[str, str],
    baseline: str,
) -> None:
    """One score of a scene: a line per method (key → name) with a dot per seed, and the mean."""
    factor = 100.0 if SCENES[scene].score_in_percent else 1.0
    for row, method in enumerate(names):
        runs = by_seed(records, scene, method)
        scores = {seed: factor * record["scores"][task] for seed, record in runs.items()}
        mean = statistics.fmean(scores.values())
        for seed, score in scores.items():
            axes.plot(score, row, **seed_style(seed))
        axes.plot(mean, row, color=BLACK, marker="|", markersize=17, markeredgewidth=2.0)
        if method == baseline:
            axes.axvline(mean, color=VERMILION, linewidth=1.0, linestyle="--", zorder=0)
    axes.set_yticks(range(len(names)), list(names.values()), fontsize=12)
    axes.invert_yaxis()
    axes.grid(axis="y", color=GREY, alpha=0.25)


def seed_style(seed: int) -> dict[str, Any]:
    return {
        "linestyle": "",
        "marker": SEED_MARKERS[seed % len(SEED_MARKERS)],
        "markersize": 7,
        "color": BLUE,
        "markerfacecolor": "none",
        "markeredgewidth": 1.5,
    }


def handles(seeds: Sequence[int], baseline: str) -> list[Line2D]:
    """Of a legend, with what the dashed line is called."""
    dots = [Line2D([], [], label=f"seed {seed}", **seed_style(seed)) for seed in seeds]
    mean = Line2D([], [], linestyle="", color=BLACK, marker="|", markersize=15, markeredgewidth=2.0)
    mean.set_label("mean")
    plain = Line2D([], [], color=VERMILION, linestyle="--", label=f"mean of {baseline}")
    return [*dots, mean, plain]
