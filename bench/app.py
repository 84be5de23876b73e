"""Runs the bench: figures one after the other, a table as they come, and a record of them."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import add_arguments, table, training
from bench import record as machine
from bench.operations import Bench, Figure
from bench.record import InputError

INTERRUPTED = 130


def main(given: list[str] | None = None) -> int:
    """Run the bench.

    Returns:
        The exit code: 0, 1 where something could not be measured for a fault, 2 after bad input,
        130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(given))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    """Measures what was asked for; the exit code."""
    device, published = check(arguments)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and events are made on the current one
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.describe(device),
        "figures": [],
    }
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    write(record, arguments.output)  # what was there is of another run
    rows = table.Table()
    try:
        for figure in figures(arguments, device, published):
            rows.add(figure)
            record["figures"].append(figure)
            write(record, arguments.output)  # now: what comes later may be stopped
    except KeyboardInterrupt:
        print(f"Interrupted: {arguments.output} holds what was measured until then.")
        return INTERRUPTED
    print(table.foot(record["figures"]))
    print(f"figures: {arguments.output}; pictures: python -m bench plot {arguments.output}")
    return int(any("error" in figure for figure in record["figures"]))


def check(arguments: argparse.Namespace) -> tuple[torch.device, ModuleType | None]:
    """The device and the published code; errors before anything is measured."""
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        device = torch.empty(1, device=device).device  # with its number
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {arguments.device} cannot be used: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {arguments.device} cannot be used: only cpu and cuda can")
    if min(arguments.tasks) < 2:
        raise InputError(f"--tasks {min(arguments.tasks)}: a conflict takes two tasks or more")
    if not 0 < arguments.seconds < math.inf or min(arguments.millions, default=1) < 1:
        raise InputError("--seconds must be above 0, --millions 1 or more")
    training.check_options(arguments)
    folder = arguments.output.absolute().parent
    if arguments.output == Path("bench_output/bench.json"):
        folder.mkdir(exist_ok=True)
    if not folder.is_dir() or not os.access(folder, os.W_OK) or arguments.output.is_dir():
        raise InputError(
            f"--output {arguments.output} cannot be written: a file in a folder that is there is "
            "needed"
        )
    if arguments.published_code is None:
        return device, None
    from bench import published

    try:
        return device, published.load(arguments.published_code)
    except ValueError as error:
        raise InputError(f"--published-code: {error}") from None


def figures(
    arguments: argparse.Namespace, device: torch.device, published: ModuleType | None
) -> Iterator[Figure]:
    """All that was asked for; first what takes least time."""
    if "training" in arguments.sections:
        yield from training.figures(device, arguments, published)
    if "operations" in arguments.sections:
        sizes = [round(millions * 1e6) for millions in arguments.millions]
        yield from Bench(
            device, arguments.models, sizes, arguments.tasks, published, arguments.seconds
        ).figures()


def write(record: dict[str, Any], path: Path) -> None:
    """Replaces the record as a whole, so that there is one at any time."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
