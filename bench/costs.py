"""The README's table of costs, from the record of `python -m bench cpu`: FILE.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import Figure, InputError, read
from bench.table import UNITS

# Operation, what of it, model, tasks: what the README shows, of what was measured.
SHOWN = (
    ("resolution", "", "even 10 k", 2),
    ("resolution", "", "mobilenetv3_small", 2),
    ("resolution", "", "mobilenetv3_small", 8),
    ("resolution", "", "mobilenetv3_small", 50),
    ("resolution", "", "even 25 M", 2),
    ("resolution", "", "even 300 M", 2),
    ("accumulate", "bfloat16, later", "even 25 M", 1),
    ("aggregation", "UPGrad", "mobilenetv3_small", 4),
    ("step", "exact", "5x64 MLP", 2),
    ("step", "exact", "mobilenetv3_small", 2),
    ("step", "stochastic", "mobilenetv3_small", 2),
    ("weighting", "UPGrad", "Gramian", 256),
)
HEADING = "| on a CPU"


def main(given: Sequence[str]) -> int:
    """Print the table of a record and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench costs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("record", type=Path, metavar="FILE")
    try:
        print(costs_of(read(parser.parse_args(given).record)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def costs_of(record: dict[str, Any]) -> str:
    """Return a line of Markdown for each of `SHOWN` that was measured."""
    machine = "{cpu}, {threads} threads, torch {torch}, load {load_average} to {load_average_after}"
    if "load_average_after" not in record["machine"]:
        raise InputError("a record of a run to its end is needed")
    about = machine.format_map(record["machine"])
    lines = [f"{HEADING} ({about}) | K | time | as a multiple of |", "| --- | --: | --: | --- |"]
    for shown in SHOWN:
        found = [f for f in record["figures"] if "seconds" in f and name_of(f) == shown]
        if found:
            lines.append(line_of(found))
    return "\n".join(lines)


def name_of(figure: Figure) -> tuple[str, str, str, int]:
    """Return a figure's entry of `SHOWN`."""
    return figure["operation"], figure["what"], figure["model"], figure["tasks"]


def line_of(figures: Sequence[Figure]) -> str:
    """Return one line of what stands beside the same cost."""
    first = figures[0]
    what = f"{first['operation']} {first['what']}".rstrip()
    if first["operation"] != "weighting":
        size = f"{first['parameters'] / 1e6:.3g} M in {first['tensors']} tensors"
        named = first["model"] if first["operation"] == "step" else ""
        what += f", {named.replace('_', ' ')}" * bool(named) + f", {size}"
    time = time_of(first["seconds"]["median"])
    time += "".join(missed(figure) for figure in figures if "beside" not in figure)
    beside = "; ".join(
        f"{figure['beside']} {figure['relative']['median']:.2f}{missed(figure)}"
        for figure in figures
        if "beside" in figure
    )
    return f"| {what} | {first['tasks']} | {time} | {beside} |"


def missed(figure: Figure) -> str:
    """Return the aim where it is missed."""
    if figure.get("met", True):
        return ""
    ((quantity, bound),) = figure["target"].items()
    return f" (aim {time_of(bound) if quantity == 'seconds' else bound})"


def time_of(seconds: float) -> str:
    """Return a time with three digits."""
    factor, unit, _ = next((entry for entry in UNITS if seconds * entry[0] >= 1.0), UNITS[-1])
    return f"{seconds * factor:.3g} {unit}"
