"""The run of the demo: checked options, trainings, then tables, sentences and pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gcond_kernels import ops

from .digits import Digits
from .methods import methods_of
from .photos import Photos, bundled_files, files_in, read_images
from .physics import Burgers, Kovasznay
from .pictures import write_pictures
from .scenes import InputError, Scene
from .summary import results, sentences, table
from .training import Run, evaluate, new_run, train

INTERRUPTED = 130


def run(options: argparse.Namespace) -> int:
    """Run the demo and return its exit status."""
    console = Console(markup=False, highlight=False, emoji=False)
    runs: list[Run] = []
    try:
        check(options)
        scenes = load(options, console)
        make_folder(options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with one_thread():
        try:
            train_all(scenes, options, runs, console)
            publish(runs, options, console, interrupted=False)
        except KeyboardInterrupt:
            publish_interrupted(runs, options, console)
            return INTERRUPTED
    return 0


def check(options: argparse.Namespace) -> None:
    """Check the options before anything is read or written; replace names by what they mean."""
    if options.images is not None:
        if "photos" not in options.scene:
            names = " ".join(options.scene)
            raise InputError(f"--images goes with the photos scene, not with --scene {names}")
        options.scene = ["photos"]
    try:
        options.methods = options.methods and methods_of(options.methods)
    except ValueError as error:
        raise InputError(f"--methods: {error}") from None
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps must be 1 or more, not {options.steps}")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed must be 0 or more and below 2**63, not {options.seed}")
    options.device = find_device(options.device)
    try:
        options.backend = ops.backend_for(options.backend, options.device).name
    except RuntimeError as error:
        raise InputError(f"--{error}" if str(error).startswith("backend") else str(error)) from None


def find_device(name: str | None) -> torch.device:
    """Return the device of a name; by default CUDA where there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: there is no such device") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: the demo runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine or this build of torch does not have it")
    return device


def load(options: argparse.Namespace, console: Console) -> list[Scene]:
    """Return the scenes with their data."""
    others = {scene.name: scene for scene in (Kovasznay, Burgers, Digits)}
    return [
        others[name]() if name in others else load_photos(options.images, console)
        for name in dict.fromkeys(options.scene)
    ]


def load_photos(folder: Path | None, console: Console) -> Photos:
    """Return the photos scene, with the images in a folder or those of scikit-image."""
    images, unreadable = read_images(bundled_files() if folder is None else files_in(folder))
    if not images:
        raise InputError(f"--images {folder}: there is no readable image in it")
    if unreadable:
        names = ", ".join(path.name for path in unreadable)
        console.print(f"Left out, because they could not be read: {names}", soft_wrap=True)
    return Photos(images)


def make_folder(output: Path) -> None:
    """Make the output folder: before the training, so that it is not in vain."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from None
    if not os.access(output, os.W_OK):
        raise InputError(f"--output {output}: the folder cannot be written to")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one CPU thread.

    Models this small gain little from more, and lose much where another process is using the
    cores. And the results do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_all(
    scenes: Sequence[Scene], options: argparse.Namespace, runs: list[Run], console: Console
) -> None:
    """Train every method on every scene; `runs` has also the one that is interrupted."""
    planned = []
    for scene in scenes:
        for method in options.methods or methods_of(scene.methods):
            if not scene.fits(method):
                console.print(f"{scene.name}: {method.name} is left out, it does not fit the tasks")
                continue
            steps = options.steps or scene.steps
            planned.append(new_run(scene, method, steps, options.seed, options.device))
    # Rough milliseconds of one step, so that the bar moves evenly through all runs.
    costs = [round(run.scene.step_cost * run.method.step_cost) for run in planned]
    total = sum(run.steps * cost for run, cost in zip(planned, costs, strict=True))
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, speed_estimate_period=20.0
    ) as progress:
        bar = progress.add_task("demo", total=total)
        for run, cost in zip(planned, costs, strict=True):
            runs.append(run)
            name = f"{run.scene.name}, {run.method.name}"
            progress.update(bar, description=name)
            for _ in train(run, options.seed, options.backend):
                progress.advance(bar, cost)
            progress.console.print(f"{name}: {run.steps} steps in {run.seconds:.1f} s")


def publish(
    runs: Sequence[Run], options: argparse.Namespace, console: Console, *, interrupted: bool
) -> None:
    """Write pictures and results.json, print tables and sentences."""
    settings = {
        "seed": options.seed,
        "device": str(options.device),
        "backend": options.backend,
        "images": None if options.images is None else str(options.images),
    }
    path = options.output / "results.json"
    text = json.dumps(results(runs, settings, interrupted), indent=1, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")
    written = [path]
    for _, group in groupby(runs, key=lambda run: run.scene.name):
        of_scene = list(group)
        written += write_pictures(of_scene, options.output)
        console.print(table(of_scene))
        console.print()
        for sentence in sentences(of_scene):
            console.print(sentence)
    console.print(f"\nWritten to {options.output}:", soft_wrap=True)
    console.print(", ".join(path.name for path in written))


def publish_interrupted(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """Publish what has been done so far."""
    done = [run for run in runs if run.history]
    if not done:
        console.print("Interrupted before the first step: there is nothing to show.")
        return
    console.print("Interrupted: drawing what has been done so far ...")
    try:
        for run in done:
            if run.evaluations[-1].step != len(run.history):
                evaluate(run)
        publish(done, options, console, interrupted=True)
        console.print(
            f"Interrupted: the pictures in {options.output} show what was done until then.",
            soft_wrap=True,
        )
    except KeyboardInterrupt:
        console.print("Interrupted again: the pictures are incomplete.")
