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
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from bench.experiments.runs import (
    INTERRUPTED,
    SCENES,
    Record,
    about_run,
    advance,
    better,
    by_seed,
    chance_sentence,
    draw_scores,
    figures,
    handles,
    markdown,
    perform_all,
    scene_of,
    told,
    write_json,
)
from examples.demo.methods import METHODS, PLAIN, methods_of
from examples.demo.summary import cosines, incidence, means
from examples.demo.training import new_run, train

RESULTS = Path(__file__).parents[1] / "results" / "experiments" / "h_methods.json"
METHOD_OF = {method.key: method for method in METHODS}
# Relative times that spread by more than this over the seeds stay out of the tables.
STEADY = 0.2


class Job(NamedTuple):
    """One run."""

    seed: int
    scene: str
    method: str
    steps: int


def main(given=None) -> int:
    arguments = parse(given)
    jobs = [
        Job(seed, scene, method.key, arguments.steps or SCENES[scene].steps)
        for seed in range(arguments.seeds)
        for scene in arguments.scenes
        for method in arguments.chosen
    ]
    about = about_run(arguments.scenes)
    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        records.sort(key=place)
        write_json(arguments.output, about, records, planned=len(jobs))

    try:
        perform_all(jobs, perform, cost, line, keep)
    except KeyboardInterrupt:
        print(f"Interrupted after {len(records)} of {len(jobs)} runs.")
    if records:
        write_report(arguments.output, about, records, planned=len(jobs))
    return 0 if len(records) == len(jobs) else INTERRUPTED


def parse(given) -> argparse.Namespace:
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
    arguments = parser.parse_args(given)
    if arguments.seeds < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--seeds and --steps must be 1 or more")
    try:
        arguments.chosen = methods_of(arguments.methods)
    except ValueError as error:
        parser.error(f"--methods: {error}")
    arguments.scenes = list(SCENES) if arguments.scene == "both" else [arguments.scene]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    return arguments


def place(record: Record) -> tuple[int, int, int]:
    """Where a run comes in files and tables."""
    method = list(METHOD_OF).index(record["method"])
    return list(SCENES).index(record["scene"]), method, record["seed"]


# The runs, each in one of the processes.


def cost(job: Job) -> float:
    """Rough milliseconds of a run, so that the bar moves evenly."""
    return job.steps * SCENES[job.scene].step_cost * METHOD_OF[job.method].step_cost


def line(record: Record) -> str:
    scores = " ".join(f"{value:.4f}" for value in record["scores"].values())
    what = f"{record['scene']}, {record['name']}, seed {record['seed']}"
    return f"{what}: {scores} ({record['seconds']:.1f} s)"


def perform(job: Job) -> Record:
    """Trains one method on one scene."""
    method, scene = METHOD_OF[job.method], scene_of(job.scene)
    run = new_run(scene, method, job.steps, job.seed, torch.device("cpu"))
    times, before = [], time.process_time()
    for _ in train(run, job.seed):
        now = time.process_time()
        times.append(now - before)
        advance(cost(job) / job.steps)
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


def methods_in(records: Sequence[Record], scene: str) -> list[str]:
    """In the order of the list, whatever the results are."""
    there = {record["method"] for record in records if record["scene"] == scene}
    return [key for key in METHOD_OF if key in there]


def report(path: Path, about: dict[str, Any], records: Sequence[Record], *, planned: int) -> str:
    """The Markdown file."""
    seeds = sorted({record["seed"] for record in records})
    said = [
        "# What the methods come to on the demo's two scenes",
        told(about),
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
    times, note = relative_times(records, scene)
    return [
        f"## {scene}: {about['title']}",
        f"{steps} steps of {about['accumulation_steps']} micro-batches; loss weights {weights}; "
        f"scores ({better(scene)}) of {about['validation']}.",
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
    rows = [heads]
    for method in methods_in(records, scene):
        cells = [METHOD_OF[method].name]
        for task in about["scores"]:
            of_task = figures(records, scene, method, task, PLAIN.key)
            cells += [of_task.mean_cell(), of_task.gap_cell()]
        shares = [record["incidence"] for record in by_seed(records, scene, method).values()]
        known = [share for share in shares if share is not None]
        cells.append(f"{100.0 * statistics.fmean(known):.0f} %" if known else "")
        if times is not None:
            cells.append(f"{times[method]:.2f}" if method in times else "")
        rows.append(cells)
    return markdown(rows)


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
            of_task = figures(records, scene, method, task, PLAIN.key)
            count += of_task.error is not None
            if of_task.beyond:
                unit = " points" if of_task.percent else ""
                found.append(f"{of_task.number(of_task.gap, '+')}{unit} in {label}")
        if found:
            beyond.append(f"{METHOD_OF[method].name} ({', '.join(found)})")
    if count == 0:
        return "There is nothing to compare with the plain sum over more than one seed."
    return chance_sentence(count, seeds, beyond)


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
            names = {key: METHOD_OF[key].name for key in methods_in(records, scene)}
            draw_scores(axes, records, scene, task, names, PLAIN.key)
            axes.set_xlabel(f"validation {label} ({better(scene)})", fontsize=12)
            axes.set_title(f"{scene}: {label}", fontsize=13)
        for axes in of_scene[1:]:
            axes.tick_params(labelleft=False)
    figure.suptitle("Validation scores by method and seed", fontsize=15)
    seeds = sorted({record["seed"] for record in records})
    figure.legend(
        handles=handles(seeds, "the plain sum"),
        loc="outside lower center",
        ncols=len(seeds) + 2,
        fontsize=12,
    )
    return figure


if __name__ == "__main__":
    sys.exit(main())
