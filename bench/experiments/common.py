"""The recipe of an experiment: jobs with several seeds, a record, tables and a picture.

A job is measured at one seed and scene; its figures have at least "scene", "seed", "steps" and
"method", "run", the key of its command, date and machine among the record's "runs", and, of a
training, "scores", name → validation score.
"""

from __future__ import annotations

import argparse
import hashlib
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
from examples.demo.physics import Burgers, Kovasznay
from examples.demo.scenes import Scene
from examples.demo.summary import about_scene, finite

RESULTS = Path(__file__).parents[1] / "results" / "experiments"
SCENES = {"photos": Photos, "digits": Digits, "kovasznay": Kovasznay, "burgers": Burgers}
# Fewer than in the demo, which has 240 and 300: there are some 200 runs. With less than 100 steps
# the photos' model is no better than before.
STEPS = {"photos": 120, "digits": 200}
# A third of the scenes' own steps: there are some 150 runs.
PHYSICS_STEPS = {"kovasznay": 400, "burgers": 600}
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
    steps: dict[str, int] = STEPS  # scene → steps, of the scenes that it has
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None
    # Raises ValueError where the options cannot be used; may change them.
    check: Callable[[argparse.Namespace], None] = lambda _: None
    # Measures what the jobs depend on, for the settings of the record.
    prepare: Callable[[argparse.Namespace], dict[str, Any]] = lambda _: {}
    appendix: Callable[[dict[str, Any]], Sequence[str]] = lambda _: ()  # of these settings
    seeds: int = 3
    # Whether runs with the same seed are compared: then seeds without all runs are left out.
    # Otherwise the first jobs of all seeds come first.
    paired: bool = True


def parse(experiment: Experiment, given: Sequence[str]) -> argparse.Namespace:
    """Return the checked options; exit where they cannot be used."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench experiments {experiment.name}", description=experiment.about
    )
    parser.add_argument(
        "--seeds", type=int, default=experiment.seeds, metavar="N", help="seeds 0 to N - 1"
    )
    defaults = " and ".join(f"{steps} of {scene}" for scene, steps in experiment.steps.items())
    parser.add_argument("--steps", type=int, metavar="N", help=f"default: {defaults}")
    parser.add_argument(
        "--scene",
        choices=(*experiment.steps, "all"),
        default="all",
        help="what the record has of other scenes stays",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the runs of the record that would be made in the same way again",
    )
    experiment.add_arguments(parser)
    found = parser.parse_args(given)
    if found.seeds < 1 or (found.steps is not None and found.steps < 1):
        parser.error("--seeds and --steps must be 1 or more")
    found.scenes = list(experiment.steps) if found.scene == "all" else [found.scene]
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
    target = options.output / f"{experiment.name}.json"
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    command = shlex.join(["python", "-m", "bench", "experiments", experiment.name, *given])
    machine = record.describe(torch.device("cpu")) | {"processes": processes()}
    interrupted = False
    result: dict[str, Any] = {"figures": []}

    def keep(found: Record) -> None:
        result["figures"].append(found | {"run": date})
        record.write(finite(result), target)

    try:
        prepared = experiment.prepare(options)
        jobs = plan(experiment, options)
        result = kept(target, jobs, options)
        result["runs"][date] = {"command": command, "machine": machine}
        result["settings"] |= prepared
        there = {found.get("job") for found in result["figures"]}
        perform_all([job for job in jobs if identity(job) not in there], keep)
    except KeyboardInterrupt:
        interrupted = True
        print(f"Interrupted: {target} has {len(result['figures'])} runs.")
    if show(experiment, result, target):
        for suffix in (".json", ".md", ".png"):
            print(target.with_suffix(suffix))
    return INTERRUPTED if interrupted else 0


def kept(target: Path, jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, Any]:
    """Return the record so far, with the settings and the number of the jobs that are planned.

    It keeps what it has of scenes that were not asked for and, to resume, of the same jobs.
    """
    empty: dict[str, Any] = {"runs": {}, "settings": {"scenes": {}, "planned": {}}, "figures": []}
    result = empty if not target.exists() else {name: record.read(target)[name] for name in empty}
    same = {identity(job) for job in jobs} if options.resume else set()
    result["figures"] = [
        found
        for found in result["figures"]
        if found["scene"] not in options.scenes or found.get("job") in same
    ]
    used = {found["run"] for found in result["figures"]}
    result["runs"] = {date: about for date, about in result["runs"].items() if date in used}
    settings = result["settings"]
    settings["scenes"] |= {name: about_scene(scene_of(name)) for name in options.scenes}
    for scene in options.scenes:
        seeds = Counter(job.seed for job in jobs if job.scene == scene)
        settings["planned"][scene] = [seeds[seed] for seed in range(options.seeds)]
    return result


def identity(job: Job) -> str:
    """Return what two jobs have in common only if they measure the same in the same way."""
    scene = scene_of(job.scene)
    numbers = scene.tasks, scene.accumulation_steps, scene.learning_rate
    about = (*job._replace(measure=job.measure.__qualname__), numbers)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def show(experiment: Experiment, result: dict[str, Any], target: Path) -> bool:
    """Write tables and picture beside the record; return whether there was something to show."""
    records = shown(experiment, result)
    if records:
        text = document(experiment, result | {"figures": records})
        target.with_suffix(".md").write_text(text, encoding="utf-8")
        experiment.picture(records).savefig(target.with_suffix(".png"), dpi=DPI)
    return bool(records)


def plan(experiment: Experiment, options: argparse.Namespace) -> list[Job]:
    """Return the jobs, photos last: they take long, and what is interrupted has the others."""
    jobs = [
        (place, job)
        for scene in sorted(options.scenes)
        for seed in range(options.seeds)
        for place, job in enumerate(experiment.jobs(options, scene, seed))
    ]
    if not experiment.paired:
        jobs.sort(key=lambda placed: placed[0])
    return [job for _, job in jobs]


def document(experiment: Experiment, result: dict[str, Any]) -> str:
    """Return the Markdown file of a record."""
    records = result["figures"]
    heading, *paragraphs = experiment.introduction
    for scene in scenes_in(records):
        paragraphs += experiment.section([r for r in records if r["scene"] == scene], scene)
    seeds = "; ".join(
        f"{scene} {', '.join(map(str, seeds_of(records, scene)))}" for scene in scenes_in(records)
    )
    which = f"Seeds, of initial parameters and micro-batches: {seeds}."
    planned = sum(map(sum, result["settings"]["planned"].values()))
    if len(records) < planned:
        left = "; incomplete seeds are left out" if experiment.paired else ""
        which += f" **Interrupted: {len(records)} of {planned} runs{left}.**"
    drawn = f"![{heading.lstrip('# ')}]({experiment.name}.png)"
    appendix = experiment.appendix(result["settings"])
    return "\n\n".join([heading, *made_by(result), which, *paragraphs, *appendix, drawn]) + "\n"


def made_by(result: dict[str, Any]) -> list[str]:
    """Return command, date and machine of each run that the records are of, and their scenes."""
    found = {}
    for date, about in sorted(result["runs"].items()):
        scenes = scenes_in([r for r in result["figures"] if r["run"] == date])
        machine = ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in about["machine"].items())
        if scenes:
            found[f"`{about['command']}`, {date}; {machine}."] = ", ".join(scenes)
    several = len(found) > 1
    return [f"{scenes}: {made}" if several else made for made, scenes in found.items()]


def shown(experiment: Experiment, result: dict[str, Any]) -> list[Record]:
    """Return the figures that can be compared, by seed: the jobs end in any order."""
    records = sorted(result["figures"], key=lambda found: found["seed"])
    return complete_seeds(records, result["settings"]["planned"]) if experiment.paired else records


def complete_seeds(records: Sequence[Record], planned: dict[str, Sequence[int]]) -> list[Record]:
    """Return the records of scenes and seeds with all runs; `planned` is scene → runs by seed."""
    there = Counter((found["scene"], found["seed"]) for found in records)
    return [
        found
        for found in records
        if there[found["scene"], found["seed"]] == planned[found["scene"]][found["seed"]]
    ]


def scenes_in(records: Sequence[Record]) -> list[str]:
    """Return the scenes that have records."""
    return [scene for scene in SCENES if any(found["scene"] == scene for found in records)]


def seeds_of(records: Sequence[Record], scene: str) -> list[int]:
    """Return the seeds that have records of a scene."""
    return sorted({found["seed"] for found in records if found["scene"] == scene})


@cache
def scene_of(name: str) -> Scene:
    """Return a scene with its data."""
    return Photos(read_images(bundled_files())[0]) if name == "photos" else SCENES[name]()


def processes() -> int:
    """Return how many jobs run at a time."""
    return min(PROCESSES, record.cores())


def set_up_process() -> None:
    """Use one thread, and leave Ctrl-C to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def perform(job: Job) -> Record:
    """Perform a job and return its record."""
    place = {"scene": job.scene, "seed": job.seed, "steps": job.steps}
    return place | job.measure(job) | {"job": identity(job)}


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
