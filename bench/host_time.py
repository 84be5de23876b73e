"""What one `accumulate` costs the host before the launch: 300 gradients, addresses seen before.

    python bench/host_time.py [--output FILE.json]

Needs no GPU: the launch itself is left out. Beside it stands one call of `data_ptr` for each of
the 300 tensors, the least that any table of addresses costs in Python.
"""

import argparse
import json
import platform
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from resolution_cpu import cpu_name
from rich.console import Console
from rich.table import Table

import gcond_kernels
from gcond_kernels import ops, triton_kernels

TENSORS = 300
ROUNDS, CALLS = 15, 200
TARGET = 60e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args()
    figures = {name: seconds(call) for name, call in calls().items()}
    machine = {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gcond_kernels": gcond_kernels.__version__,
    }
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()))
    for heading in ("300 tensors", "median", "quartiles"):
        table.add_column(heading)
    for name, (low, median, high) in figures.items():
        table.add_row(name, f"{median * 1e6:.0f} µs", f"{low * 1e6:.0f}-{high * 1e6:.0f} µs")
    Console().print(table)
    print(f"{ROUNDS} rounds of {CALLS} calls; target of the backend: {TARGET * 1e6:.0f} µs")
    if arguments.output:
        named = {
            n: dict(zip(("low", "median", "high"), f, strict=True)) for n, f in figures.items()
        }
        arguments.output.write_text(json.dumps({"machine": machine, "seconds": named}, indent=1))


def calls() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    sizes = [7] * TENSORS
    offsets = list(range(0, 32 * TENSORS, 32))
    row = torch.zeros(32 * TENSORS)
    gradients = [torch.randn(size) for size in sizes]
    without_launches()
    return {
        "data_ptr of each": lambda: list(map(torch.Tensor.data_ptr, gradients)),
        "accumulate of the backend, as the optimizer calls it": lambda: triton_kernels.accumulate(
            row, gradients, offsets, sizes, 1.0, False
        ),
        "ops.accumulate, with its checks": lambda: ops.accumulate(
            row, gradients, offsets, sizes, backend="triton"
        ),
    }


def without_launches() -> None:
    """Puts a launch that does nothing in the place of Triton's."""
    # Not by name: the package's attribute of that name is the function, not its module.
    triton_kernels.accumulate.__globals__["accumulate_kernel"] = NoLaunch()
    ops.unavailable = lambda backend, device: None


class NoLaunch:
    """`kernel[grid](...)` that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


def seconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Quartiles of the time of one call."""
    times = [t / CALLS for t in timeit.repeat(call, number=CALLS, repeat=ROUNDS)]
    low, median, high = statistics.quantiles(times, n=4)
    return low, median, high


if __name__ == "__main__":
    main()
