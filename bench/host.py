"""What the operations cost the host before their launches: 300 tensors, two tasks, tables known.

    GCOND_CUDA_HOST=1 TRITON_INTERPRET=1 python bench/host_time.py [--output FILE.json]

Needs no GPU: the launches themselves, some microseconds each, are left out. Triton's are replaced
by calls that do nothing; the CUDA backend is given tables of no pieces, for which its driver on
the host has next to nothing to do, but for the sums over all of them in gramian: these are timed
apart ("sums on the host") and are no part of what a launch costs. Beside them stands one call of
`data_ptr` for each of the 300 tensors, the least that any table of addresses costs in Python.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

import gcond_kernels
from bench.record import cpu_name
from gcond_kernels import GCond, _cuda, ops

TENSORS, TASKS = 300, 2
ROUNDS, CALLS = 15, 200
TARGET = 60e-6

KERNELS = {
    "accumulate": ["accumulate_kernel"],
    "gramian": ["products_kernel", "sum_kernel"],
    "arbitrate": ["arbitrate_kernel"],
    "combine": ["combine_kernel", "factor_kernel"],
    "graddrop": ["graddrop_kernel"],  # its factors are those of combine
}


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args(given)
    without_launches()
    figures = {name: seconds(call) for name, call in calls().items()}
    figures["cuda: gramian, sums on the host"] = sums_on_host()
    machine = {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gcond_kernels": gcond_kernels.__version__,
    }
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()))
    for heading in (f"{TENSORS} tensors", "median", "quartiles"):
        table.add_column(heading)
    for name, (low, median, high) in figures.items():
        table.add_row(name, f"{median * 1e6:.1f} µs", f"{low * 1e6:.1f}-{high * 1e6:.1f} µs")
    Console().print(table)
    print(f"{ROUNDS} rounds of {CALLS} calls; target of accumulate: {TARGET * 1e6:.0f} µs")
    if arguments.output:
        named = {
            n: dict(zip(("low", "median", "high"), f, strict=True)) for n, f in figures.items()
        }
        arguments.output.write_text(json.dumps({"machine": machine, "seconds": named}, indent=1))


def calls() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    sizes = (7,) * TENSORS
    offsets = tuple(range(0, 32 * TENSORS, 32))
    gradients = [torch.randn(size) for size in sizes]
    timed: dict[str, Callable[[], object]] = {
        "data_ptr of each": lambda: list(map(torch.Tensor.data_ptr, gradients))
    }
    for backend in ("triton", "cuda"):
        timed |= operations(backend, gradients, offsets, sizes)
    return timed


def operations(
    backend: str, gradients: list[torch.Tensor], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> dict[str, Callable[[], object]]:
    """The operations of one backend, without and with the checks of the public functions."""
    rows, history = torch.zeros(TASKS, 32 * TENSORS), torch.zeros(TASKS, 32 * TENSORS).bfloat16()
    momentum, steps = torch.zeros(32 * TENSORS), torch.zeros(TENSORS, dtype=torch.int64)
    scale, finite = torch.ones(TASKS, dtype=torch.float64), torch.tensor(True)
    draws = torch.tensor(0)
    small, method = torch.eye(TASKS, dtype=torch.float64), GCond()
    state = method.new_state(TASKS, torch.device("cpu"))
    room = ops.backend_for(backend, torch.device("cpu"))
    layout, average = ops.Layout(offsets, sizes), ops.Momentum(momentum, steps, 0.9)
    own = ops.TaskGradients(rows, layout, scale, history)
    kept = ops.ArbitrationState(**state)
    return {
        f"{backend}: accumulate": lambda: room.accumulate(
            rows[0], gradients, layout, 1.0, False
        ),
        f"{backend}: gramian": lambda: room.gramian(
            own, scale, None
        ),
        f"{backend}: arbitrate": lambda: room.arbitrate(small, small, scale, kept, method),
        f"{backend}: combine": lambda: room.combine(
            own, gradients, scale, finite, average, None
        ),
        f"{backend}: graddrop": lambda: room.graddrop(
            own, gradients, finite, ops.SignDropout(0, draws), average
        ),
        f"{backend}: ops.accumulate, with its checks": lambda: ops.accumulate(
            rows[0], gradients, layout, backend=backend
        ),
        f"{backend}: ops.resolve, with its checks": lambda: ops.resolve(
            own, gradients, state=kept, settings=method, momentum=average, backend=backend
        ),
    }  # fmt: skip


def sums_on_host() -> tuple[float, float, float]:
    """What the driver on the host spends on the 10 sums of gramian for two tasks with history.

    A call without the 4 that history adds is shorter by 4 of them.
    """
    whole = importlib.import_module("gcond_kernels.cuda.launch").cut(
        (0,), (7,), 4096, torch.device("cpu")
    )
    nothing = _cuda.Pieces(whole.segments, whole.chunks.table, whole.chunks.first, 0, 0, 4096)
    rows, scale = torch.zeros(TASKS, 32), torch.ones(TASKS, dtype=torch.float64)
    partials, matrix = torch.empty(10, 0), torch.empty(TASKS, TASKS, dtype=torch.float64)

    def time_of(cross: torch.Tensor | None) -> tuple[float, float, float]:
        return seconds(
            lambda: _cuda.gramian(
                -1, 0, nothing, TASKS, rows, rows, None, None, scale, scale, partials, matrix,
                cross, partials, None,
            )
        )  # fmt: skip

    pairs = zip(time_of(matrix), time_of(None), strict=True)
    low, median, high = (10 / 4 * (with_crosses - without) for with_crosses, without in pairs)
    return low, median, high


def without_launches() -> None:
    """Replaces Triton's launches by nothing, and leaves those in CUDA C++ no pieces."""
    for operation, names in KERNELS.items():
        module = importlib.import_module(f"gcond_kernels.triton_kernels.{operation}")
        for name in names:
            setattr(module, name, NoLaunch())
    launch = importlib.import_module("gcond_kernels.cuda.launch")
    cut, known = launch.cut, {}

    def of_no_pieces(*key: Any) -> Any:
        if key not in known:
            whole = cut(*key)
            pieces = launch._cuda.Pieces(
                whole.segments, whole.chunks.table, whole.chunks.first, 0, 0, key[2]
            )
            known[key] = whole._replace(pieces=pieces)
        return known[key]

    for operation in ("accumulate", "gramian", "combine", "graddrop", "resolve"):
        importlib.import_module(f"gcond_kernels.cuda.{operation}").cut = of_no_pieces


class NoLaunch:
    """`kernel[grid](...)` that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


def seconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Quartiles of the time of one call."""
    call()
    times = [t / CALLS for t in timeit.repeat(call, number=CALLS, repeat=ROUNDS)]
    low, median, high = statistics.quantiles(times, n=4)
    return low, median, high


if __name__ == "__main__":
    if os.environ.get("GCOND_CUDA_HOST") != "1" or os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set GCOND_CUDA_HOST=1 and TRITON_INTERPRET=1 (make bench-host does)")
    main()
