"""The recipe of every benchmark: options in, a table while it runs, one record out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import record
from bench.record import Figure, InputError
from bench.table import Column, Table

OUTPUT = Path("bench_output")
INTERRUPTED = 130


class Benchmark(NamedTuple):
    """What is measured: its table, its figures one after the other, and its options."""

    about: str
    columns: Sequence[Column]
    figures: Callable[[argparse.Namespace], Iterator[Figure]]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None
    # Raises InputError; may change the options.
    check: Callable[[argparse.Namespace], None] = lambda _: None
    # The heading above the figures of a group.
    group: Callable[[Figure], str] = lambda _: ""
    foot: Callable[[Sequence[Figure]], str] = lambda _: ""
    # Is given the record's path at the end.
    after: Callable[[Path], object] = lambda _: None


def run(benchmark: Benchmark, what: str, given: Sequence[str]) -> int:
    """Run a benchmark and return its exit status: 1 after a fault, 2 bad input, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {what}", description=benchmark.about)
    default = OUTPUT / f"{'bench' if what == 'all' else what}.json"
    about = "where the record goes (default: %(default)s); what was there is replaced"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help=about)
    benchmark.add_arguments(parser)
    options = parser.parse_args(given)
    try:
        benchmark.check(options)
        check_output(options.output)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) > 0:  # of torchrun: the first rank reports for all
        list(benchmark.figures(options))
        return 0
    return measure(benchmark, options, shlex.join(["python", "-m", "bench", what, *given]))


def measure(benchmark: Benchmark, options: argparse.Namespace, command: str) -> int:
    """Measure, print and write all figures; return the exit status."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    machine = record.describe(getattr(options, "device", torch.device("cpu")))
    result: dict[str, Any] = {"command": command, "date": date, "machine": machine, "figures": []}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    record.write(result, options.output)  # what was there is of another run
    table = Table(benchmark.columns, benchmark.group)
    try:
        for figure in benchmark.figures(options):
            table.add(figure)
            result["figures"].append(figure)
            record.write(result, options.output)  # now: what comes later may be stopped
    except KeyboardInterrupt:
        print(f"Interrupted: {options.output} holds what was measured until then.")
        return INTERRUPTED
    machine["load_average_after"] = record.load_average()
    record.write(result, options.output)
    print("load average {load_average} before, {load_average_after} after".format_map(machine))
    if foot := benchmark.foot(result["figures"]):
        print(foot)
    print(f"figures: {options.output}")
    benchmark.after(options.output)
    return int(any("error" in figure for figure in result["figures"]))


def check_output(path: Path) -> None:
    """Check that a file can be written there; make the default's folder."""
    if path.parent == OUTPUT:
        OUTPUT.mkdir(exist_ok=True)
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise InputError(
            f"--output {path} cannot be written: a file in a folder that is there is needed"
        )
