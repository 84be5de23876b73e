"""The recipe of an experiment: jobs with several seeds, a record, tables and a picture.

A job is measured at one seed and scene; its record has at least "scene", "seed", "steps" and
"method", and, of a training, "scores", task → validation score.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bench import record
from examples.demo.digits import Digits
from examples.demo.photos import Photos, bundled_files, read_images
from examples.demo.scenes import Scene
from examples.demo.summary import about_scene, finite

RESULTS = Path(__file__).parents[1] / "results" / "experiments"
SCENES = {"photos": Photos, "digits": Digits}
# Fewer than in the demo, which has 240 and 300: there are some 200 runs. With less than 100 steps
# the photos' model is no better than before.
STEPS = {"photos": 120, "digits": 200}
PROCESSES = 2
INTERRUPTED = 130
DPI = 110

Record = dict[str, Any]


class Job(NamedTuple):
    """One measurement, in a process of one thread."""

    seed: int  # of initial parameters and micro-batches
    scene: str
    steps: int
    measure: Callable[[Job], Record]  # returns what the job itself does not have
    subject: Any


class Experiment(NamedTuple):
    """An experiment: its jobs, and what its files show of their records."""

    name: str
    about: str  # the question, in a line
    jobs: Callable[[argparse.Namespace, str, int], Sequence[Job]]  # of options, scene and seed
    introduction: Sequence[str]  # the heading of the Markdown file, and a paragraph
    section: Callable[[Sequence[Record], str], Sequence[str]]  # of the records of a scene
    picture: Callable[[Sequence[Record]], Figure]
    steps: dict[str, int] = STEPS
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None
    # Raises ValueError where the options cannot be used; may change them.
    check: Callable[[argparse.Namespace], None] = lambda _: None
    # Measures what the jobs depend on, for the settings of the record.
    prepare: Callable[[argparse.Namespace], dict[str, Any]] = lambda _: {}
    appendix: Callable[[dict[str, Any]], Sequence[str]] = lambda _: ()  # of these settings


def parse(experiment: Experiment, given: Sequence[str]) -> argparse.Namespace:
    """Return the checked options; exit where they cannot be used."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench experiments {experiment.name}", description=experiment.about
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    defaults = " and ".join(f"{steps} of {scene}" for scene, steps in experiment.steps.items())
    parser.add_argument("--steps", type=int, metavar="N", help=f"default: {defaults}")
    parser.add_argument("--scene", choices=(*SCENES, "both"), default="both")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    experiment.add_arguments(parser)
    found = parser.parse_args(given)
    if found.seeds < 1 or (found.steps is not None and found.steps < 1):
        parser.error("--seeds and --steps must be 1 or more")
    found.scenes = list(SCENES) if found.scene == "both" else [found.scene]
    found.steps_of = {scene: found.steps or experiment.steps[scene] for scene in found.scenes}
    try:
        experiment.check(found)
    except ValueError as error:
        parser.error(str(error))
    found.output.mkdir(parents=True, exist_ok=True)
    return found


def run(experiment: Experiment, given: Sequence[str]) -> int:
    """Perform the jobs, write the record after each of them, then tables and picture."""
    options = parse(experiment, given)
    torch.set_num_threads(1)  # as in the processes: a model this small gains nothing from more
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "experiments", experiment.name, *given]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": record.describe(torch.device("cpu")) | {"processes": processes()},
        "settings": {"scenes": {name: about_scene(scene_of(name)) for name in options.scenes}},
        "figures": [],
    }
    target = options.output / f"{experiment.name}.json"

    def keep(found: Record) -> None:
        result["figures"].append(found)
        record.write(finite(result), target)

    jobs: list[Job] = []
    interrupted = False
    try:
        prepared = experiment.prepare(options)
        jobs += plan(experiment, options)
        result["settings"] |= {"planned": len(jobs), **prepared}
        perform_all(jobs, keep)
    except KeyboardInterrupt:
        interrupted = True
        print(f"Interrupted after {len(result['figures'])} of {len(jobs)} runs.")
    records = complete_seeds(result["figures"], jobs)
    if records:
        text = document(experiment, result | {"figures": records})
        target.with_suffix(".md").write_text(text, encoding="utf-8")
        experiment.picture(records).savefig(target.with_suffix(".png"), dpi=DPI)
        for suffix in (".json", ".md", ".png"):
            print(target.with_suffix(suffix))
    return INTERRUPTED if interrupted else 0


def plan(experiment: Experiment, options: argparse.Namespace) -> list[Job]:
    """Return the jobs, digits first: they take little, and what is interrupted has them."""
    return [
        job
        for scene in sorted(options.scenes)
        for seed in range(options.seeds)
        for job in experiment.jobs(options, scene, seed)
    ]


def document(experiment: Experiment, result: dict[str, Any]) -> str:
    """Return the Markdown file of a record."""
    records = result["figures"]
    heading, *paragraphs = experiment.introduction
    for scene in scenes_in(records):
        paragraphs += experiment.section([r for r in records if r["scene"] == scene], scene)
    machine = ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in result["machine"].items())
    seeds = "; ".join(
        f"{scene} {', '.join(map(str, seeds_of(records, scene)))}" for scene in scenes_in(records)
    )
    which = f"Seeds, of initial parameters and micro-batches: {seeds}."
    if len(records) < result["settings"]["planned"]:
        which += (
            f" **Interrupted: {len(records)} of {result['settings']['planned']} runs; incomplete "
            "seeds are left out.**"
        )
    drawn = f"![{heading.lstrip('# ')}]({experiment.name}.png)"
    made = f"`{result['command']}`, {result['date']}; {machine}."
    appendix = experiment.appendix(result["settings"])
    return "\n\n".join([heading, made, which, *paragraphs, *appendix, drawn]) + "\n"


def complete_seeds(records: Sequence[Record], jobs: Sequence[Job]) -> list[Record]:
    """Return the records of scenes and seeds with all runs: others cannot be compared."""
    planned = Counter((job.scene, job.seed) for job in jobs)
    there = Counter((found["scene"], found["seed"]) for found in records)
    complete = [
        r for r in records if there[r["scene"], r["seed"]] == planned[r["scene"], r["seed"]]
    ]
    return sorted(complete, key=lambda found: found["seed"])  # they end in any order


def scenes_in(records: Sequence[Record]) -> list[str]:
    """Return the scenes that have records."""
    return [scene for scene in SCENES if any(found["scene"] == scene for found in records)]


def seeds_of(records: Sequence[Record], scene: str) -> list[int]:
    """Return the seeds that have records of a scene."""
    return sorted({found["seed"] for found in records if found["scene"] == scene})


@cache
def scene_of(name: str) -> Scene:
    """Return a scene with its data."""
    return Photos(read_images(bundled_files())[0]) if name == "photos" else Digits()


def processes() -> int:
    """Return how many jobs run at a time."""
    return min(PROCESSES, record.cores())


def set_up_process() -> None:
    """Use one thread, and leave Ctrl-C to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def perform(job: Job) -> Record:
    """Perform a job and return its record."""
    return {"scene": job.scene, "seed": job.seed, "steps": job.steps, **job.measure(job)}


def perform_all(jobs: Sequence[Job], keep: Callable[[Record], None]) -> None:
    """Perform all jobs, with a bar; call `keep` with each record as soon as it is there."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with ExitStack() as stack:  # which ends the processes, after an interruption too
        performed = map(perform, jobs)
        if processes() > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(processes(), set_up_process))
            performed = pool.imap_unordered(perform, jobs)
        progress = Progress(*columns, TimeRemainingColumn(), speed_estimate_period=60.0)
        stack.enter_context(progress)
        # In rough milliseconds, so that the bar moves evenly.
        total = sum(job.steps * SCENES[job.scene].step_cost for job in jobs)
        bar = progress.add_task("starting", total=total)
        for count, found in enumerate(performed, start=1):
            keep(found)
            scores = " ".join(f"{value:.4f}" for value in found.get("scores", {}).values())
            line = f"{found['scene']}, {found['method']}, seed {found['seed']}: {scores}"
            progress.console.print(line, highlight=False)
            cost = found["steps"] * SCENES[found["scene"]].step_cost
            progress.update(bar, advance=cost, description=f"{count} of {len(jobs)} runs")
