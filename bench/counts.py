"""The counts of every operation by every backend: bytes, launches, host reads, allocations.

On small CPU tensors, where Triton's kernels run interpreted and those in CUDA C++ by their driver
on the host; no time is taken, so the counts are the same on every machine.
tests/bench/test_counts.py holds the code to those in bench/results/counts.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import compare
from bench.counting import Counts, Run, count, interpreter_problem
from bench.recipe import Benchmark
from bench.record import Figure
from bench.table import Column, text
from gcond_kernels import GCond, ops

RECORD = Path(__file__).parent / "results" / "counts.json"
COMMAND = "python -m bench counts --output bench/results/counts.json"
CPU = torch.device("cpu")

# Weights and biases in turn. The weights are full chunks, the biases end within one.
WEIGHT, BIAS, PAIRS = 8192, 100, 2
PARAMETERS = PAIRS * (WEIGHT + BIAS)
ALIGNMENT = 32
TASKS = (2, 4, 8)
# What a backend leaves to the next one.
LACKING = {"cuda": ("graddrop",)}

FOOT = """\
launches: torch's operations that move bytes, and launches of kernels; for CUDA calls of the
extension, each as the launches that it makes on a GPU. Bytes moved: of torch's operations all that
they are given and make, as if nothing stayed in a cache; of Triton's kernels what they load and
store, counted by its interpreter; none for CUDA. Fewest: the bytes that must move, with float32
gradients and momentum, bfloat16 history. Allocations: storages that torch's operations made."""


def figures(_: argparse.Namespace) -> Iterator[Figure]:
    """Count every backend that there is."""
    quicken_interpreter()
    for backend in ops.BACKENDS:
        if reason := ops.unavailable(backend, CPU):
            print(f"NOT COUNTED: backend {backend!r}: {reason}")
        else:
            yield from figures_of(backend)


def quicken_interpreter() -> None:
    """Make Triton's interpreter as quick as for the tests; it loads and stores the same."""
    if ops.unavailable("triton", CPU):
        return
    from tests.helpers import interpreter

    interpreter.patch()
    if problem := interpreter_problem():
        print(problem)


class Case(NamedTuple):
    """An operation by a backend; `what` tells apart its variants."""

    operation: str
    what: str
    by: str
    tasks: int
    run: Run


def figures_of(backend: str) -> Iterator[Figure]:
    """Count every operation by a backend.

    Of first calls: on the CPU the tables that they make are NumPy's, and count nothing.
    """
    for case in cases(backend):
        yield figure_of(case, count(case.run))


def figure_of(case: Case, counts: Counts) -> Figure:
    """Return the counts of one operation; bytes per parameter stand beside the fewest."""
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
    sizes = [WEIGHT, BIAS] * PAIRS
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    layout = ops.Layout.of([sum(padded[:place]) for place in range(len(padded))], sizes)
    accumulator, gradients = filled(1, sum(padded))[0], [filled(1, size)[0] for size in sizes]
    for what in (FIRST, LATER):
        run = partial(
            ops.accumulate,
            accumulator,
            gradients,
            layout,
            overwrite=what == FIRST,
            backend=backend,
        )
        yield Case("accumulate", what, backend, 1, run)
    for tasks in TASKS:
        accumulators = filled(tasks, sum(padded))
        accumulators -= 1.1 * accumulators.mean(0)  # there are conflicts to resolve
        for operation, operate in resolution(accumulators, layout).items():
            if operation in LACKING.get(backend, ()):
                continue
            at_once = backend == "cuda" and operation == "resolve"
            by = "cuda, one launch" if at_once else backend
            yield Case(operation, "", by, tasks, partial(operate, backend=backend))


def resolution(accumulators: torch.Tensor, layout: ops.Layout) -> dict[str, Callable[..., object]]:
    """Return the operations of a resolution with history and momentum; they take the backend."""
    tasks = len(accumulators)
    outputs = [torch.zeros(size) for size in layout.sizes]
    scale = torch.ones(tasks, dtype=torch.float64)
    finite, counter = torch.tensor(True), torch.tensor(0)
    steps = torch.zeros(len(outputs), dtype=torch.int64)
    momentum = ops.Momentum(torch.zeros_like(accumulators[0]), steps, 0.9)
    gradients = ops.TaskGradients(accumulators, layout, scale, accumulators.bfloat16())
    method = GCond()
    kept = {"state": ops.ArbitrationState(**method.new_state(tasks, CPU)), "settings": method}
    gramian = partial(ops.gramian, gradients, history_scale=scale)
    S, X, *_ = gramian(backend="python")
    written = {"finite": finite, "momentum": momentum}
    dropout = ops.SignDropout(0, counter)
    return {
        "gramian": gramian,
        "arbitrate": partial(ops.arbitrate, S, X, scale, **kept),
        "combine": partial(ops.combine, gradients, outputs, weights=scale, **written),
        "graddrop": partial(ops.graddrop, gradients, outputs, dropout=dropout, **written),
        "resolve": partial(ops.resolve, gradients, outputs, momentum=momentum, **kept),
    }


def filled(count: int, length: int) -> torch.Tensor:
    """Return numbers in [-0.5, 0.5) that look random, the same with every version of torch."""
    places = torch.arange(count * length).view(count, length)
    return ((places * 7919 + places // length * 104729) % 10007).float() / 10007 - 0.5


def allocations_of(figure: Figure) -> str:
    """Return how many storages were made, and their bytes."""
    return f"{figure['allocations']} ({figure['allocated_bytes'] / 1e3:.1f} kB)"


def moved_of(figure: Figure) -> str:
    """Return the bytes per parameter."""
    return f"{figure['moved_per_parameter']:.2f}" if "moved_per_parameter" in figure else ""


COLUMNS = (
    Column("", 28, lambda f: f"{f['operation']} {f['what']}".strip(), left=True),
    Column("by", 16, text("by"), left=True),
    Column("K", 2, text("tasks")),
    Column("launches", 8, text("launches")),
    Column("bytes/parameter", 15, moved_of),
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
