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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
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
from examples.demo.summary import finite

RESULTS = Path(__file__).parents[1] / "results" / "experiments"
SCENES = {"photos": Photos, "digits": Digits}
# Fewer than in the demo, which has 240 and 300: there are some 200 runs. With less than 100 steps
# the photos' model is no better than before.
STEPS = {"photos": 120, "digits": 200}
PROCESSES = 2
POLL = 0.5  # seconds between two looks at the progress
INTERRUPTED = 130
DPI = 110

Record = dict[str, Any]


class Job(NamedTuple):
    """One measurement, in a process of one thread.

    Attributes:
        seed: of initial parameters and micro-batches.
        scene: its name.
        steps: of the training.
        measure: makes the fields of the record that the job itself does not have. It calls
            `advance`, in all by `cost`.
        subject: what `measure` is of.
        cost: rough milliseconds, so that the bar moves evenly.
    """

    seed: int
    scene: str
    steps: int
    measure: Callable[[Job], Record]
    subject: Any
    cost: float


class Experiment(NamedTuple):
    """An experiment.

    Attributes:
        name: of its files.
        about: the question, in a line.
        jobs: makes the jobs of the options.
        report: makes the paragraphs of the Markdown file from the records.
        picture: draws the records.
        steps: default number of optimizer steps of each scene.
        add_arguments: adds options of its own.
        check: raises ValueError where these cannot be used; may change the options.
        settings: more for the record, from the options, after `jobs`.
        appendix: more paragraphs, from the record's settings.
    """

    name: str
    about: str
    jobs: Callable[[argparse.Namespace], Sequence[Job]]
    report: Callable[[Sequence[Record]], Sequence[str]]
    picture: Callable[[Sequence[Record]], Figure]
    steps: dict[str, int] = STEPS
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None
    check: Callable[[argparse.Namespace], None] = lambda _: None
    settings: Callable[[argparse.Namespace], dict[str, Any]] = lambda _: {}
    appendix: Callable[[dict[str, Any]], Sequence[str]] = lambda _: ()


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
        # Digits first: they take little, and what is interrupted has them.
        jobs += sorted(experiment.jobs(options), key=lambda job: (job.scene != "digits", job.seed))
        result["settings"] |= {"planned": len(jobs), **experiment.settings(options)}
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


def document(experiment: Experiment, result: dict[str, Any]) -> str:
    """Return the Markdown file of a record."""
    records = result["figures"]
    heading, *paragraphs = experiment.report(records)
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


def about_scene(scene: Scene) -> dict[str, Any]:
    """Return what the record says of a scene."""
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
    """Return a scene with its data."""
    return Photos(read_images(bundled_files())[0]) if name == "photos" else Digits()


# The processes.


def processes() -> int:
    """Return how many jobs run at a time."""
    return min(PROCESSES, record.cores())


def perform(job: Job) -> Record:
    """Perform a job and return its record."""
    return {"scene": job.scene, "seed": job.seed, "steps": job.steps, **job.measure(job)}


def perform_all(jobs: Sequence[Job], keep: Callable[[Record], None]) -> None:
    """Perform all jobs, with a bar; call `keep` with each record as soon as it is there."""
    if processes() == 1:
        for job in jobs:
            found = perform(job)
            keep(found)
            print(line(found))
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("d", 0.0), context.Event()
    total = sum(job.cost for job in jobs)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with (
        ProcessPoolExecutor(
            processes(), mp_context=context, initializer=start, initargs=(done, stop)
        ) as pool,
        Progress(*columns, TimeRemainingColumn(), speed_estimate_period=60.0) as progress,
    ):
        bar = progress.add_task("starting", total=total)
        pending = {pool.submit(perform, job) for job in jobs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in finished:
                    found = future.result()
                    keep(found)
                    progress.console.print(line(found), highlight=False)
                runs = f"{len(jobs) - len(pending)} of {len(jobs)} runs"
                completed = done.value if pending else total
                progress.update(bar, completed=completed, description=runs)
        except BaseException:
            stop.set()
            for future in pending:
                future.cancel()
            raise


def line(found: Record) -> str:
    """Return the line that is printed of a record."""
    scores = " ".join(f"{value:.4f}" for value in found.get("scores", {}).values())
    return f"{found['scene']}, {found['method']}, seed {found['seed']}: {scores}"


def start(done: Any, stop: Any) -> None:
    """Set up a process; Ctrl-C is handled by the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    start.shared = done, stop


def advance(cost: float) -> None:
    """Report that a part of a job is done, and end the job after an interruption."""
    if not hasattr(start, "shared"):  # in the only process
        return
    done, stop = start.shared
    with done.get_lock():
        done.value += cost
    if stop.is_set():
        raise KeyboardInterrupt
