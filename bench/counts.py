"""The counts of every operation by every backend: bytes, launches, host reads, allocations.

On small CPU tensors, where Triton's kernels run interpreted and those in CUDA C++ compiled for the
host; no time is taken, so the counts are the same on every machine.
tests/bench/test_counts.py holds the code to those in bench/results/counts.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import compare
from bench.counting import Counts, Run, count, interpreter_problem
from bench.inputs import Gradients, Storage, layout_of
from bench.recipe import Benchmark
from bench.record import Figure
from bench.table import Column, text
from gcond_kernels import ops

RECORD = Path(__file__).parent / "results" / "counts.json"
COMMAND = "python -m bench counts --output bench/results/counts.json"
CPU = torch.device("cpu")

# Weights and biases in turn. The weights are full chunks, the biases end within one.
WEIGHT, BIAS, PAIRS = 8192, 100, 2
PARAMETERS = PAIRS * (WEIGHT + BIAS)
TASKS = (2, 4, 8)
# What a backend leaves to the next one.
LACKING = {"cuda": ("graddrop",), "cpu": ("graddrop",)}
AT_ONCE = {"cuda": "cuda, one launch", "cpu": "cpu, one call"}

FOOT = """\
launches: torch's operations that move bytes, and launches of kernels; for cpu calls of the
extension, for CUDA these too, each as the launches that it makes on a GPU. Bytes moved: of torch's
operations all that they are given and make, as if nothing stayed in a cache; of Triton's kernels
what they load and store, counted by its interpreter; none for cpu and CUDA. Fewest: the bytes that
must move, with float32 gradients and momentum, bfloat16 history. Allocations: storages that torch's
operations made."""


def figures(_: argparse.Namespace) -> Iterator[Figure]:
    """Count every backend that there is."""
    if ops.unavailable("triton", CPU) is None:
        from tests.helpers import interpreter

        interpreter.patch()  # it is quicker, and loads and stores the same
        if problem := interpreter_problem():
            print(problem)
    for backend in ops.BACKENDS:
        if reason := ops.unavailable(backend, CPU):
            print(f"NOT COUNTED: backend {backend!r}: {reason}")
        else:
            yield from figures_of(backend)


class Case(NamedTuple):
    """An operation by a backend; `what` tells apart its variants."""

    operation: str
    what: str
    by: str
    tasks: int
    run: Run


def figures_of(backend: str) -> Iterator[Figure]:
    """Count first calls of every operation by a backend; their tables are NumPy's on the CPU."""
    for case in cases(backend):
        yield figure_of(case, count(case.run))


def figure_of(case: Case, counts: Counts) -> Figure:
    """Return the counts of one operation."""
    figure: Figure = {"section": "counts", **case._asdict()}
    del figure["run"]
    figure |= {"parameters": PARAMETERS, "tensors": 2 * PAIRS, **counts._asdict()}
    fewest = budget(case.operation, case.what, case.tasks)
    if fewest is not None and counts.bytes_moved is not None:
        figure["moved_per_parameter"] = round(counts.bytes_moved / PARAMETERS, 3)
        figure["budget_per_parameter"] = fewest
    return figure


FIRST, LATER = "first micro-batch", "later micro-batch"


def budget(operation: str, what: str, tasks: int) -> int | None:
    """Return the fewest bytes per parameter; None of an operation on K×K numbers."""
    gramian, graddrop = 4 * tasks + 2 * tasks, 4 * tasks + 8 + 4
    combine = graddrop + 2 * tasks
    return {
        "accumulate": 4 + 4 if what == FIRST else 4 + 8,
        "gramian": gramian,
        "combine": combine,
        "graddrop": graddrop,
        "resolve": gramian + combine,
    }.get(operation)


def cases(backend: str) -> Iterator[Case]:
    """Return all that is counted of a backend."""
    layout = layout_of([WEIGHT, BIAS] * PAIRS)
    gradients = Gradients(layout, torch.float32, CPU)
    for what in (FIRST, LATER):
        run = partial(gradients.accumulate, backend, what == FIRST)
        yield Case("accumulate", what, backend, 1, run)
    for tasks in TASKS:
        storage = Storage(tasks, layout, CPU)
        decision = storage.arbitrate(storage.products_in_float64(), "python")
        storage.reset()
        storage.accumulators.copy_(filled(tasks, layout.length))
        storage.history.copy_(storage.accumulators)
        products = storage.gramian("python")
        runs = {
            "gramian": storage.gramian,
            "arbitrate": partial(storage.arbitrate, products),
            "combine": partial(storage.combine, decision),
            "graddrop": storage.graddrop,
            "resolve": storage.resolve,
        }
        for operation, run in runs.items():
            if operation in LACKING.get(backend, ()):
                continue
            by = AT_ONCE.get(backend, backend) if operation == "resolve" else backend
            yield Case(operation, "", by, tasks, partial(run, backend=backend))


def filled(count: int, length: int) -> torch.Tensor:
    """Return gradients that conflict and look random, the same with every version of torch."""
    places = torch.arange(count * length).view(count, length)
    gradients = ((places * 7919 + places // length * 104729) % 10007).float() / 10007 - 0.5
    return gradients - 1.1 * gradients.mean(0)


def allocations_of(figure: Figure) -> str:
    """Return how many storages were made, and their bytes."""
    return f"{figure['allocations']} ({figure['allocated_bytes'] / 1e3:.1f} kB)"


COLUMNS = (
    Column("", 28, lambda f: f"{f['operation']} {f['what']}".strip(), left=True),
    Column("by", 16, text("by"), left=True),
    Column("K", 2, text("tasks")),
    Column("launches", 8, text("launches")),
    Column("bytes/parameter", 15, text("moved_per_parameter")),
    Column("fewest", 6, text("budget_per_parameter")),
    Column("host reads", 10, text("synchronisations")),
    Column("allocations", 18, allocations_of),
)
BENCHMARK = Benchmark(
    __doc__.splitlines()[0],
    COLUMNS,
    figures,
    foot=lambda _: FOOT,
    after=lambda path: compare.main([str(RECORD), str(path)]),
)
