"""From the command line's options to tables and pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gcond_kernels import ops

from .digits import Digits
from .methods import Method, methods_of
from .photos import Photos, bundled_files, files_in, read_images
from .pictures import write_pictures
from .scenes import InputError, Scene
from .summary import results, sentences, table
from .training import Run, evaluate, new_run, train

INTERRUPTED = 130


class Settings(NamedTuple):
    """What was asked for, checked."""

    images: Path | None
    scenes: tuple[str, ...]
    methods: tuple[Method, ...]
    steps: int | None
    seed: int
    output: Path
    device: torch.device
    backend: str


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo and returns its exit code."""
    console = Console(markup=False, highlight=False, emoji=False)
    runs: list[Run] = []
    try:
        settings = check(arguments)
        scenes = load(settings, console)
        make_folder(settings.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with one_thread():
        try:
            train_all(scenes, settings, runs, console)
            publish(runs, settings, console, interrupted=False)
        except KeyboardInterrupt:
            publish_interrupted(runs, settings, console)
            return INTERRUPTED
    return 0


def check(arguments: argparse.Namespace) -> Settings:
    """The settings, before anything is read or written."""
    scenes = ("photos", "digits") if arguments.scene == "both" else (arguments.scene,)
    if arguments.images is not None:
        if arguments.scene == "digits":
            raise InputError("--images goes with the photos scene, not with --scene digits")
        scenes = ("photos",)
    try:
        chosen = methods_of(arguments.methods)
    except ValueError as error:
        raise InputError(f"--methods: {error}") from None
    if arguments.steps is not None and arguments.steps < 1:
        raise InputError(f"--steps must be 1 or more, not {arguments.steps}")
    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed must be 0 or more and below 2**63, not {arguments.seed}")
    device = find_device(arguments.device)
    try:
        backend = ops.backend_for(arguments.backend, device).name
    except RuntimeError as error:
        raise InputError(f"--{error}" if str(error).startswith("backend") else str(error)) from None
    return Settings(
        arguments.images,
        scenes,
        chosen,
        arguments.steps,
        arguments.seed,
        arguments.output,
        device,
        backend,
    )


def find_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA where there is one."""
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


def load(settings: Settings, console: Console) -> list[Scene]:
    """The scenes with their data."""
    scenes: list[Scene] = []
    if "photos" in settings.scenes:
        files = bundled_files() if settings.images is None else files_in(settings.images)
        images, unreadable = read_images(files)
        if not images:
            raise InputError(f"--images {settings.images}: there is no readable image in it")
        if unreadable:
            names = ", ".join(path.name for path in unreadable)
            console.print(f"Left out, because they could not be read: {names}", soft_wrap=True)
        scenes.append(Photos(images))
    if "digits" in settings.scenes:
        scenes.append(Digits())
    return scenes


def make_folder(output: Path) -> None:
    """Makes the output folder: before the training, so that it is not in vain."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from None
    if not os.access(output, os.W_OK):
        raise InputError(f"--output {output}: the folder cannot be written to")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one CPU thread.

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
    scenes: Sequence[Scene], settings: Settings, runs: list[Run], console: Console
) -> None:
    """Trains every method on every scene; `runs` has also the one that is interrupted."""
    planned = [
        new_run(scene, method, settings.steps or scene.steps, settings.seed, settings.device)
        for scene in scenes
        for method in settings.methods
    ]
    total = sum(run.steps * step_cost(run) for run in planned)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=20.0) as progress:
        bar = progress.add_task("demo", total=total)
        for run in planned:
            runs.append(run)
            name = f"{run.scene.name}, {run.method.name}"
            progress.update(bar, description=name)
            for _ in train(run, settings.seed, settings.backend):
                progress.advance(bar, step_cost(run))
            progress.console.print(f"{name}: {run.steps} steps in {run.seconds:.1f} s")


def step_cost(run: Run) -> int:
    """Rough milliseconds of one step, so that the bar moves evenly through all runs."""
    return round(run.scene.step_cost * run.method.step_cost)


def publish(
    runs: Sequence[Run], settings: Settings, console: Console, *, interrupted: bool
) -> None:
    """Writes pictures and results.json, prints tables and sentences."""
    shown = {
        "seed": settings.seed,
        "device": str(settings.device),
        "backend": settings.backend,
        "images": None if settings.images is None else str(settings.images),
    }
    path = settings.output / "results.json"
    path.write_text(
        json.dumps(results(runs, shown, interrupted), indent=1, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    written = [path]
    for _, group in groupby(runs, key=lambda run: run.scene.name):
        of_scene = list(group)
        written += write_pictures(of_scene, settings.output)
        console.print(table(of_scene))
        console.print()
        for sentence in sentences(of_scene):
            console.print(sentence)
    console.print(f"\nWritten to {settings.output}:", soft_wrap=True)
    console.print(", ".join(path.name for path in written))


def publish_interrupted(runs: Sequence[Run], settings: Settings, console: Console) -> None:
    """The same with what has been done so far."""
    done = [run for run in runs if run.history]
    if not done:
        console.print("Interrupted before the first step: there is nothing to show.")
        return
    console.print("Interrupted: drawing what has been done so far ...")
    try:
        for run in done:
            if run.evaluations[-1].step != len(run.history):
                evaluate(run)
        publish(done, settings, console, interrupted=True)
        console.print(
            f"Interrupted: the pictures in {settings.output} show what was done until then.",
            soft_wrap=True,
        )
    except KeyboardInterrupt:
        console.print("Interrupted again: the pictures are incomplete.")
