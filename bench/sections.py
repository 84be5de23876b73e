"""The benchmark of operations and training steps, beside others."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import operations, published, table, training
from bench.recipe import Benchmark
from bench.record import Figure, InputError
from bench.table import Column

SECTIONS = {"training": training, "operations": operations}


def benchmark(*names: str) -> Benchmark:
    """Return the benchmark of these sections."""
    sections = [SECTIONS[name] for name in names]

    def figures(options: argparse.Namespace) -> Iterator[Figure]:
        for section in sections:
            yield from section.figures(options)

    def arguments(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        for section in sections:
            section.add_arguments(parser)

    def checks(options: argparse.Namespace) -> None:
        check(options)
        for section in sections:
            section.check(options)

    return Benchmark(
        f"What {' and '.join(names)} cost on this machine, and beside others.",
        COLUMNS,
        figures,
        arguments,
        checks,
        group_of,
        foot,
        draw if "operations" in names else lambda _: None,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both sections."""
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    about = "for each comparison, about; at least 5 rounds are made (default: 2)"
    add("--seconds", type=float, default=2.0, help=about)
    about = "the GCond authors' grad_conductor.py, to be measured beside ours"
    add("--published-code", type=Path, metavar="FILE", help=about)


def check(options: argparse.Namespace) -> None:
    """Replace names by a device and a module."""
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        device = torch.empty(1, device=device).device  # with its number
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {options.device} cannot be used: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {options.device} cannot be used: only cpu and cuda can")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and events are made on the current one
    options.device = device
    if not 0 < options.seconds < math.inf:
        raise InputError("--seconds must be above 0")
    if options.published_code is not None:
        try:
            options.published_code = published.load(options.published_code)
        except ValueError as error:
            raise InputError(f"--published-code: {error}") from None
    torch.manual_seed(0)


def group_of(figure: Figure) -> str:
    text = "{model}: {millions:.4g} M parameters in {tensors} tensors"
    return text.format_map(figure | {"millions": figure["parameters"] / 1e6})


def foot(figures: Sequence[Figure]) -> str:
    """Return how many targets are met, and what stands in the columns."""
    met = [figure["met"] for figure in figures if "met" in figure]
    return (
        "medians with quartiles; copy: of the fewest bytes that the operation must move, in turn "
        "with it; B/par: bytes per parameter;\n"
        "ops: calls of torch's operations; reads: values that the host reads, waiting for a GPU\n"
        f"targets: {sum(met)} of {len(met)} met"
    )


def target_of(figure: Figure) -> str:
    if not figure.get("target"):
        return ""
    ((quantity, bound),) = figure["target"].items()
    if quantity == "seconds":
        return f"<= {bound * 1e6:.0f} us"
    return f"{'>=' if quantity == 'fraction' else '<='} {bound:.3g}"


def notes_of(figure: Figure) -> str:
    """Return whether the target is met, and other quantities than times."""
    notes = ["met" if figure["met"] else "missed"] if "met" in figure else []
    if "relative" in figure:
        notes.append(f"{table.ratio_of(figure['relative'])} x plain")
    if "samples_per_second" in figure:
        notes.append(f"{figure['samples_per_second']:.4g} samples/s")
    if "bytes_per_parameter" in figure:
        notes.append(f"peak {figure['bytes_per_parameter']:.2f} B/par")
    if "bytes_moved" in figure:
        if figure["bytes"]:  # else what it works on are no parameters
            notes.append(f"{figure['bytes_moved'] / figure['parameters']:.0f} B/par")
        notes.append(f"{figure['launches']} ops")
    if figure.get("synchronisations"):
        notes.append(f"{figure['synchronisations']} reads")
    return "  ".join(notes)


def operation_of(figure: Figure) -> str:
    return f"  {figure['operation']} {figure.get('what', '')}".rstrip()


COLUMNS = (
    Column("  operation", 38, operation_of, is_name=True, left=True),
    Column("K", 3, table.text("tasks"), is_name=True),
    Column("by", 24, table.text("by"), is_name=True, left=True),
    Column("time (quartiles)", 24, table.timed("seconds")),
    Column("copy", 24, table.timed("copy_seconds")),
    Column("copy / time", 18, lambda f: table.ratio_of(f["fraction"]) if "fraction" in f else ""),
    Column("target", 9, target_of),
    Column("", 0, notes_of),
)


def draw(path: Path) -> None:
    """Draw the pictures of a record beside it, where matplotlib is installed."""
    try:
        from bench import plot
    except ImportError as error:
        print(f"no pictures: {error.name} is not installed")
    else:
        plot.main([str(path)])
