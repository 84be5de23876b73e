"""What the methods come to on the demo's two scenes, with several seeds.

    python bench/methods.py [--seeds 3] [--steps N] [--scene both] [--methods all]
                            [--output bench/results/methods.json]

Trains as `python -m gcond_kernels demo` does: the same models, data, AdamW and default options.
The seed decides on the initial parameters and on the micro-batches, which are the same for all
methods. One thread for each run, and two runs at a time where there are two cores.

Beside the JSON file there are tables of the same name (.md) and a picture (.png). The JSON file is
written after every run: what was done before an interruption is kept.

    seconds  of training, by the clock, without validation
    step     median time that the processor worked on a step: other processes do not count, though
             what they leave of its caches and clock rate does
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from resolution_cpu import cpu_name
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from scipy.special import stdtr

import gcond_kernels
from gcond_kernels.demo.digits import Digits
from gcond_kernels.demo.methods import METHODS, PLAIN, methods_of
from gcond_kernels.demo.photos import Photos, bundled_files, read_images
from gcond_kernels.demo.scenes import Scene
from gcond_kernels.demo.summary import cosines, finite, incidence, means
from gcond_kernels.demo.training import new_run, train
from gcond_kernels.plot import BLACK, BLUE, GREY, VERMILION

RESULTS = Path(__file__).parent / "results" / "methods.json"
SCENES = {"photos": Photos, "digits": Digits}
METHOD_OF = {method.key: method for method in METHODS}
PROCESSES = 2
POLL = 0.5  # seconds between two looks at the progress
# Relative times that spread by more than this over the seeds stay out of the tables.
STEADY = 0.2
SEED_MARKERS = "os^vDPX*"
INTERRUPTED = 130

Record = dict[str, Any]


class Job(NamedTuple):
    """One run."""

    seed: int
    scene: str
    method: str
    steps: int


def main() -> int:
    arguments = parse()
    jobs = [
        Job(seed, scene, method.key, arguments.steps or SCENES[scene].steps)
        for seed in range(arguments.seeds)
        for scene in arguments.scenes
        for method in arguments.chosen
    ]
    about = describe(arguments)
    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        records.sort(key=place)
        write_json(arguments.output, about, records, planned=len(jobs))

    try:
        perform_all(jobs, keep)
    except KeyboardInterrupt:
        print(f"Interrupted after {len(records)} of {len(jobs)} runs.")
    if records:
        write_report(arguments.output, about, records, planned=len(jobs))
    return 0 if len(records) == len(jobs) else INTERRUPTED


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--steps", type=int, metavar="N", help="default: those of the scene")
    parser.add_argument("--scene", choices=(*SCENES, "both"), default="both")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], metavar="NAME", help="as of the demo (default all)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="FILE.json", help=f"default: {RESULTS.name}"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--seeds and --steps must be 1 or more")
    try:
        arguments.chosen = methods_of(arguments.methods)
    except ValueError as error:
        parser.error(f"--methods: {error}")
    arguments.scenes = list(SCENES) if arguments.scene == "both" else [arguments.scene]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    return arguments


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, and of which machine."""
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
        "scenes": {name: about_scene(scene_of(name)) for name in arguments.scenes},
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


def place(record: Record) -> tuple[int, int, int]:
    """Where a run comes in files and tables."""
    method = list(METHOD_OF).index(record["method"])
    return list(SCENES).index(record["scene"]), method, record["seed"]


# The runs, each in one of the processes.


def perform_all(jobs: Sequence[Job], keep: Callable[[Record], None]) -> None:
    """Trains all of them, with a bar; `keep` is called with each as soon as it is there."""
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


def cost(job: Job) -> float:
    """Rough milliseconds of a run, so that the bar moves evenly."""
    return job.steps * SCENES[job.scene].step_cost * METHOD_OF[job.method].step_cost


def line(record: Record) -> str:
    scores = " ".join(f"{value:.4f}" for value in record["scores"].values())
    what = f"{record['scene']}, {record['name']}, seed {record['seed']}"
    return f"{what}: {scores} ({record['seconds']:.1f} s)"


def start(done: Any, stop: Any) -> None:
    """Readies a process; Ctrl-C is the business of the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    perform.done, perform.stop = done, stop


def perform(job: Job) -> Record:
    """Trains one method on one scene."""
    method, scene = METHOD_OF[job.method], scene_of(job.scene)
    run = new_run(scene, method, job.steps, job.seed, torch.device("cpu"))
    times, before = [], time.process_time()
    for _ in train(run, job.seed):
        now = time.process_time()
        times.append(now - before)
        with perform.done.get_lock():
            perform.done.value += cost(job) / job.steps
        if perform.stop.is_set():
            raise KeyboardInterrupt
        before = time.process_time()
    values = cosines(run)
    return {
        "scene": job.scene,
        "method": method.key,
        "name": method.name,
        "mode": method.mode,
        "resolver": None if method.resolver is None else repr(method.resolver),
        "seed": job.seed,
        "steps": job.steps,
        **means(run.evaluations[-1]),
        "incidence": incidence(run),
        "median_cosine": statistics.median(values) if values else None,
        "backward_passes": run.backward_passes,
        "seconds": run.seconds,
        "step": statistics.median(times),
    }


# What is written.


def write_json(
    path: Path, about: dict[str, Any], records: Sequence[Record], *, planned: int
) -> None:
    """In a file beside it first: a run that is ended meanwhile leaves the old one whole."""
    whole = {**about, "planned_runs": planned, "runs": records}
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(finite(whole), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


def write_report(
    path: Path, about: dict[str, Any], records: Sequence[Record], *, planned: int
) -> None:
    """The tables and the picture."""
    path.with_suffix(".md").write_text(
        report(path, about, records, planned=planned), encoding="utf-8"
    )
    picture(about, records).savefig(path.with_suffix(".png"), dpi=110)
    for suffix in (".json", ".md", ".png"):
        print(path.with_suffix(suffix))


class Figures(NamedTuple):
    """One method's values of one score over the seeds, and the differences to the plain sum."""

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


def figures(records: Sequence[Record], scene: str, method: str, task: str) -> Figures:
    """Of the seeds that there are; differences of those that there is a plain sum of."""
    own = by_seed(records, scene, method)
    plain = by_seed(records, scene, PLAIN.key)
    values = {seed: record["scores"][task] for seed, record in own.items()}
    gaps = []
    if method != PLAIN.key:
        gaps = [v - plain[seed]["scores"][task] for seed, v in values.items() if seed in plain]
    return Figures(list(values.values()), gaps, SCENES[scene].score_in_percent)


def by_seed(records: Sequence[Record], scene: str, method: str) -> dict[int, Record]:
    return {r["seed"]: r for r in records if r["scene"] == scene and r["method"] == method}


def methods_in(records: Sequence[Record], scene: str) -> list[str]:
    """In the order of the list, whatever the results are."""
    there = {record["method"] for record in records if record["scene"] == scene}
    return [key for key in METHOD_OF if key in there]


def report(path: Path, about: dict[str, Any], records: Sequence[Record], *, planned: int) -> str:
    """The Markdown file."""
    machine, seeds = about["machine"], sorted({record["seed"] for record in records})
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
    said = [
        "# What the methods come to on the demo's two scenes",
        f"`{about['command']}`, {about['date']}; {told}.",
        f"Seeds {', '.join(map(str, seeds))}: of initial parameters and micro-batches, the same "
        "for all methods. Each has the default options of its class. Some make a sum of the "
        "gradients and some a mean, but all share a learning rate: AdamW, the optimizer of all of "
        "them, makes the same steps whatever constant factor the gradients have. CAGrad, MGDA, "
        "AlignedMTL, IMTLG and NashMTL set a balance between the tasks that is not that of the "
        "loss weights: what they gain in a score other loss weights may give the plain sum, which "
        "was not tried.",
        "Mean ± standard deviation over the seeds; difference to the plain sum with the same seed, "
        "mean ± standard error over the seeds; incidence of conflict, the share of pairs of tasks "
        "with a cosine below 0, mean over steps and seeds. In the order of the list, not of the "
        "results.",
    ]
    if any(record["method"] == "sum" for record in records):
        said.append(
            "Sum makes the gradients of the plain sum but for rounding, which training amplifies: "
            "what lies between the two is chance."
        )
    if len(records) < planned:
        said.append(f"**Interrupted after {len(records)} of {planned} runs.**")
    for scene in about["scenes"]:
        if methods_in(records, scene):
            said += of_scene(about["scenes"][scene], records, scene)
    dots = f"![Dots per seed and the mean of each method]({path.with_suffix('.png').name})"
    return "\n\n".join([*said, dots]) + "\n"


def of_scene(about: dict[str, Any], records: Sequence[Record], scene: str) -> list[str]:
    """One scene's heading, table and sentences."""
    steps = next(record["steps"] for record in records if record["scene"] == scene)
    weights = ", ".join(f"{task} {weight:g}" for task, weight in about["loss_weights"].items())
    better = "in %, higher is better" if SCENES[scene].score_in_percent else "lower is better"
    times, note = relative_times(records, scene)
    return [
        f"## {scene}: {about['title']}",
        f"{steps} steps of {about['accumulation_steps']} micro-batches; loss weights {weights}; "
        f"scores ({better}) of {about['validation']}.",
        table(about, records, scene, times),
        sentence(about, records, scene),
        note,
    ]


def table(
    about: dict[str, Any], records: Sequence[Record], scene: str, times: dict[str, float] | None
) -> str:
    heads = ["method"]
    for label in about["scores"].values():
        heads += [label, "difference"]
    heads += ["incidence"] if times is None else ["incidence", "step"]
    rows = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for method in methods_in(records, scene):
        cells = [METHOD_OF[method].name]
        for task in about["scores"]:
            of_task = figures(records, scene, method, task)
            cells += [of_task.mean_cell(), of_task.gap_cell()]
        shares = [record["incidence"] for record in by_seed(records, scene, method).values()]
        known = [share for share in shares if share is not None]
        cells.append(f"{100.0 * statistics.fmean(known):.0f} %" if known else "")
        if times is not None:
            cells.append(f"{times[method]:.2f}" if method in times else "")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def relative_times(records: Sequence[Record], scene: str) -> tuple[dict[str, float] | None, str]:
    """Method → time of a step, plain sum is 1, if that is steady over the seeds; and a note."""
    plain = by_seed(records, scene, PLAIN.key)
    ratios = {}
    for method in methods_in(records, scene):
        own = by_seed(records, scene, method)
        of_seeds = [r["step"] / plain[seed]["step"] for seed, r in own.items() if seed in plain]
        if of_seeds:
            ratios[method] = of_seeds
    spread = max(((max(r) - min(r)) / statistics.fmean(r) for r in ratios.values()), default=0.0)
    how = (
        "median processor time of a step relative to the plain sum with the same seed, on a "
        f"machine that other processes used too; over the seeds it spreads by up to {spread:.0%}"
    ).replace("%", " %")
    if spread > STEADY:
        return None, f"Times are left out of the table (they are in the JSON file): {how}."
    return {method: statistics.fmean(r) for method, r in ratios.items()}, f"Step: {how}."


def sentence(about: dict[str, Any], records: Sequence[Record], scene: str) -> str:
    """Which differences are beyond twice their standard error, and how much that says."""
    count, beyond = 0, []
    seeds = len(by_seed(records, scene, PLAIN.key))
    if seeds < 2:
        return "With a single seed there is no telling a difference from chance."
    for method in methods_in(records, scene):
        found = []
        for task, label in about["scores"].items():
            of_task = figures(records, scene, method, task)
            count += of_task.error is not None
            if of_task.beyond:
                unit = " points" if of_task.percent else ""
                found.append(f"{of_task.number(of_task.gap, '+')}{unit} in {label}")
        if found:
            beyond.append(f"{METHOD_OF[method].name} ({', '.join(found)})")
    if count == 0:
        return "There is nothing to compare with the plain sum over more than one seed."
    number = sum(text.count(" in ") for text in beyond)
    chance = 2.0 * float(stdtr(seeds - 1, -2.0))  # of Student's t
    which = f": {'; '.join(beyond)}" if beyond else ""
    return (
        f"Beyond twice their standard error over the seeds are {number} of {count} differences"
        f"{which}. {seeds} seeds are few: between methods that do not differ at all, chance alone "
        f"would take {100.0 * chance:.0f} % of the differences beyond that, here some "
        f"{chance * count:.0f} of {count}."
    )


def picture(about: dict[str, Any], records: Sequence[Record]) -> Figure:
    """A panel for every scene and score: a dot per seed, and the mean."""
    scenes = [scene for scene in about["scenes"] if methods_in(records, scene)]
    columns = max(len(about["scenes"][scene]["scores"]) for scene in scenes)
    rows = max(len(methods_in(records, scene)) for scene in scenes)
    height = len(scenes) * (0.3 * rows + 1.2) + 1.2
    figure = Figure(figsize=(13, height), layout="constrained")
    panels = figure.subplots(len(scenes), columns, squeeze=False)
    for scene, of_scene in zip(scenes, panels, strict=True):
        for (task, label), axes in zip(
            about["scenes"][scene]["scores"].items(), of_scene, strict=True
        ):
            draw(axes, records, scene, task)
            better = "%, higher" if SCENES[scene].score_in_percent else "lower"
            axes.set_xlabel(f"validation {label} ({better} is better)", fontsize=12)
            axes.set_title(f"{scene}: {label}", fontsize=13)
        for axes in of_scene[1:]:
            axes.tick_params(labelleft=False)
    figure.suptitle("Validation scores by method and seed", fontsize=15)
    seeds = sorted({record["seed"] for record in records})
    figure.legend(
        handles=handles(seeds), loc="outside lower center", ncols=len(seeds) + 2, fontsize=12
    )
    return figure


def draw(axes: Axes, records: Sequence[Record], scene: str, task: str) -> None:
    """One score of all methods of a scene."""
    methods = methods_in(records, scene)
    factor = 100.0 if SCENES[scene].score_in_percent else 1.0
    for row, method in enumerate(methods):
        runs = by_seed(records, scene, method)
        scores = {seed: factor * record["scores"][task] for seed, record in runs.items()}
        mean = statistics.fmean(scores.values())
        for seed, score in scores.items():
            axes.plot(score, row, **seed_style(seed))
        axes.plot(mean, row, color=BLACK, marker="|", markersize=17, markeredgewidth=2.0)
        if method == PLAIN.key:
            axes.axvline(mean, color=VERMILION, linewidth=1.0, linestyle="--", zorder=0)
    names = [METHOD_OF[method].name for method in methods]
    axes.set_yticks(range(len(methods)), names, fontsize=12)
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


def handles(seeds: Sequence[int]) -> list[Line2D]:
    dots = [Line2D([], [], label=f"seed {seed}", **seed_style(seed)) for seed in seeds]
    mean = Line2D([], [], linestyle="", color=BLACK, marker="|", markersize=15, markeredgewidth=2.0)
    mean.set_label("mean")
    plain = Line2D([], [], color=VERMILION, linestyle="--", label="mean of the plain sum")
    return [*dots, mean, plain]


if __name__ == "__main__":
    sys.exit(main())
