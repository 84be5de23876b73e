"""Bytes, launches, waits of the host and allocations of every operation by every backend, counted.

    python bench/counts.py [--output FILE.json]

On small CPU tensors, where Triton's kernels run interpreted and those in CUDA C++ by their driver
on the host; no time is taken, so the counts are the same on every machine. tests/test_counts.py
holds the code to those in bench/results/counts.json.
"""

import argparse
import functools
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gcond_kernels
from bench.counting import Counts, count, interpreter_problem
from gcond_kernels import GCond, ops

Run = Callable[[], object]
Figure = dict[str, Any]

RECORD = Path(__file__).parent / "results" / "counts.json"
COMMAND = "python bench/counts.py --output bench/results/counts.json"
CPU = torch.device("cpu")

# Weights and biases in turn. The weights are of whole pieces, the biases end within one.
WEIGHT, BIAS, PAIRS = 8192, 100, 2
PARAMETERS = PAIRS * (WEIGHT + BIAS)
ALIGNMENT = 32
TASKS = (2, 4, 8)

ABOUT = {
    "launches": (
        "torch's operations that move bytes, and launches of kernels; for CUDA calls of the "
        "extension, each as the launches that it makes on a GPU"
    ),
    "bytes_moved": (
        "of torch's operations all that they are given and make, as if nothing stayed in a cache; "
        "of Triton's kernels what they load and store, counted by its interpreter; null for CUDA: "
        "compiled kernels do not count"
    ),
    "moved_per_parameter": "bytes_moved over all parameters",
    "budget_per_parameter": (
        "the fewest bytes that must move, with float32 gradients and momentum, bfloat16 history"
    ),
    "synchronisations": "reads of a tensor's value by the host",
    "allocations": "storages that torch's operations made, of allocated_bytes together",
}


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the counts as JSON to this file")
    arguments = parser.parse_args(given)
    quicken_interpreter()
    counted = []
    for backend in ops.BACKENDS:
        if reason := ops.unavailable(backend, CPU):
            print(f"NOT COUNTED: backend {backend!r}: {reason}")
        else:
            counted += figures(backend)
    print(table(counted))
    if arguments.output:
        record = {"machine": versions(), "about": ABOUT, "figures": counted}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def quicken_interpreter() -> None:
    """As for the tests; what the kernels load and store stays the same."""
    if ops.unavailable("triton", CPU):
        return
    from tests.helpers import interpreter

    interpreter.patch()
    if problem := interpreter_problem():
        print(problem)


def versions() -> dict[str, str | None]:
    """Of what takes part."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "gcond_kernels": gcond_kernels.__version__,
    }


class Case(NamedTuple):
    """An operation by a backend; `what` tells apart its variants."""

    operation: str
    what: str
    by: str
    tasks: int
    run: Run


def figures(backend: str) -> Iterator[Figure]:
    """The counts of every operation by a backend.

    Of first calls: on the CPU the tables that they make are NumPy's, and count nothing.
    """
    for case in cases(backend):
        yield figure_of(case, count(case.run))


def figure_of(case: Case, counts: Counts) -> Figure:
    """The counts of one operation; bytes per parameter stand beside the fewest."""
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
    """The fewest bytes per parameter; of an operation on K×K numbers None."""
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
    """All that is counted of a backend."""
    sizes = [WEIGHT, BIAS] * PAIRS
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    offsets = [sum(padded[:place]) for place in range(len(padded))]
    accumulator, gradients = filled(1, sum(padded))[0], [filled(1, size)[0] for size in sizes]
    for what in (FIRST, LATER):
        add = functools.partial(
            ops.accumulate,
            accumulator,
            gradients,
            ops.Layout.of(offsets, sizes),
            overwrite=what == FIRST,
        )
        yield Case("accumulate", what, backend, 1, functools.partial(add, backend=backend))
    for tasks in TASKS:
        rows = filled(tasks, sum(padded))
        rows -= 1.1 * rows.mean(0)  # there are conflicts to resolve
        for operation, run in resolution(rows, offsets, sizes).items():
            at_once = backend == "cuda" and operation == "resolve"
            by = "cuda, one launch" if at_once else backend
            yield Case(operation, "", by, tasks, functools.partial(run, backend=backend))


def resolution(
    rows: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]
) -> dict[str, Callable[..., object]]:
    """The operations of a resolution with history and momentum; they are told the backend."""
    outputs = [torch.zeros(size) for size in sizes]
    scale = torch.ones(len(rows), dtype=torch.float64)
    finite, draws = torch.tensor(True), torch.tensor(0)
    steps = torch.zeros(len(sizes), dtype=torch.int64)
    momentum = ops.Momentum(torch.zeros_like(rows[0]), steps, 0.9)
    layout = ops.Layout.of(offsets, sizes)
    gradients = ops.TaskGradients(rows, layout, scale, rows.bfloat16())
    method = GCond()
    state = ops.ArbitrationState(**method.new_state(len(rows), CPU))
    gramian = functools.partial(ops.gramian, gradients, history_scale=scale)
    products = gramian(backend="python")
    return {
        "gramian": gramian,
        "arbitrate": functools.partial(
            ops.arbitrate, products.total, products.cross, scale, state=state, settings=method
        ),
        "combine": functools.partial(
            ops.combine, gradients, outputs, weights=scale, finite=finite, momentum=momentum
        ),
        "graddrop": functools.partial(
            ops.graddrop, gradients, outputs, finite=finite,
            dropout=ops.SignDropout(0, draws), momentum=momentum,
        ),
        "resolve": functools.partial(
            ops.resolve, gradients, outputs, state=state, settings=method, momentum=momentum
        ),
    }  # fmt: skip


def filled(rows: int, length: int) -> torch.Tensor:
    """Numbers in [-0.5, 0.5) that look random, the same with every version of torch."""
    places = torch.arange(rows * length).view(rows, length)
    return ((places * 7919 + places // length * 104729) % 10007).float() / 10007 - 0.5


def table(counted: Sequence[Figure]) -> str:
    """The counts as lines of text."""
    lines = [
        ("", "by", "K", "launches", "bytes/parameter", "fewest", "host reads", "allocations"),
    ]
    for figure in counted:
        each = figure.get("moved_per_parameter")
        lines.append(
            (
                f"{figure['operation']} {figure['what']}".strip(),
                figure["by"],
                str(figure["tasks"]),
                str(figure["launches"]),
                "" if each is None else f"{each:.2f}",
                str(figure.get("budget_per_parameter", "")),
                str(figure["synchronisations"]),
                f"{figure['allocations']} ({figure['allocated_bytes'] / 1e3:.1f} kB)",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


if __name__ == "__main__":
    main()
