"""What the methods cost between the two passes: from a Gramian to weights, on one core of the CPU.

    python bench/weighing.py [--output FILE.json]

For 2, 4 and 8 tasks, of one Gramian (granularity="model") and of 300 at once ("tensor").
"""

import argparse
import json
import platform
import statistics
import timeit
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gcond_kernels
from bench.record import cpu_name
from gcond_kernels.methods import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    GCond,
    GradNorm,
    GradVac,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
)

METHODS = (
    Sum(), GCond(), PCGrad(), GradVac(), GradNorm(), CAGrad(), MGDA(), UPGrad(), AlignedMTL(),
    IMTLG(), NashMTL(),
)  # fmt: skip
CASES = ((1, 2), (1, 4), (1, 8), (300, 2), (300, 4), (300, 8))  # Gramians, tasks
ROUNDS = 7


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    machine = {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcond_kernels": gcond_kernels.__version__,
    }
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()))
    table.add_column("median, ms")
    for count, tasks in CASES:
        table.add_column(f"{count} × K={tasks}", justify="right")
    figures: dict[str, list[dict[str, float]]] = {}
    for method in track(METHODS, transient=True):
        name = type(method).__name__
        figures[name] = [
            {"gramians": count, "tasks": tasks, **time_of(method, count, tasks)}
            for count, tasks in CASES
        ]
        table.add_row(name, *(f"{1e3 * figure['median']:.2f}" for figure in figures[name]))
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine, "seconds": figures}, indent=1))


def time_of(method, count: int, tasks: int) -> dict[str, float]:
    """Quartiles of one weighing of random Gramians."""
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(count, tasks, 20, generator=generator, dtype=torch.float64)
    S, losses = J @ J.mT, torch.ones(tasks)
    S = S[0] if count == 1 else S
    calls = 10 if count == 1 else 1
    method(S, losses)
    times = timeit.repeat(lambda: method(S, losses), number=calls, repeat=ROUNDS)
    low, median, high = statistics.quantiles([time / calls for time in times], n=4)
    return {"low": low, "median": median, "high": high}


if __name__ == "__main__":
    main()
