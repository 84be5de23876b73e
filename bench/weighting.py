"""The weighting of every method, from a Gramian to weights, on one core of the CPU.

For 2, 4 and 8 tasks, of one Gramian (granularity="model") and of 300 at once ("tensor").
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Iterator
from itertools import product

import torch

from bench.recipe import Benchmark
from bench.record import Figure, quartiles
from bench.table import Column, text, timed
from gcond_kernels import methods

METHODS = (
    *(methods.Sum(), methods.GCond(), methods.PCGrad(), methods.GradVac(), methods.GradNorm()),
    *(methods.CAGrad(), methods.MGDA(), methods.UPGrad(), methods.AlignedMTL()),
    *(methods.DWA(), methods.FAMO(), methods.STCH(), methods.RLW()),
    methods.UncertaintyWeighting(),
    *(methods.IMTLG(), methods.ConFIG(), methods.NashMTL(), methods.FairGrad()),
    *(methods.NormBalancing(), methods.ExcessMTL(), methods.NonConflicting(methods.Sum())),
)
ROUNDS = 7


def figures(_: argparse.Namespace) -> Iterator[Figure]:
    """Measure every method."""
    torch.set_num_threads(1)
    for method, gramians, tasks in product(METHODS, (1, 300), (2, 4, 8)):
        yield {
            "section": "weighting",
            "by": type(method).__name__,
            "gramians": gramians,
            "tasks": tasks,
            "seconds": time_of(method, gramians, tasks),
        }


def time_of(method: methods.Method, gramians: int, tasks: int) -> dict[str, float]:
    """Return the time of one weighting of random Gramians."""
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(gramians, tasks, 20, generator=generator, dtype=torch.float64)
    S, losses = J @ J.mT, torch.ones(tasks)
    S = S[0] if gramians == 1 else S
    calls = 10 if gramians == 1 else 1
    method(S, losses)
    times = timeit.repeat(lambda: method(S, losses), number=calls, repeat=ROUNDS)
    return quartiles([time / calls for time in times])


COLUMNS = (
    Column("  method", 14, lambda figure: f"  {figure['by']}", left=True),
    Column("Gramians", 8, text("gramians")),
    Column("K", 3, text("tasks")),
    Column("time (quartiles)", 24, timed("seconds")),
)
BENCHMARK = Benchmark(__doc__.splitlines()[0], COLUMNS, figures)
