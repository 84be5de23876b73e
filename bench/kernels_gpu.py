"""The Triton operations on a GPU, beside a copy of as many bytes in the same run.

    python bench/kernels_gpu.py [--output FILE.json] [--millions 100] [--tasks 2 4 8]

The bytes that must move per parameter, with gradients of e bytes and K tasks: accumulate e + 4
in the first micro-batch, which overwrites, and e + 8 in a later one; gramian 4K + 2K with a
bfloat16 history; combine 4K + 8 + 4 + 2K with momentum, float32 outputs and the new history. The
copy reads half of the bytes and writes half. "fraction" is the time of the copy divided by the
time of the operation.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gcond_kernels
from gcond_kernels import GCond, GCondFused, ops

DEVICE = torch.device("cuda", 0)
ROUNDS = 31
WARM_UP = 10
# Calls before the clock starts: while the device is busy with them the host gets ahead of it.
LEAD = 5
# A round of some milliseconds, far longer than the clock's grain.
BYTES_A_ROUND = 20e9
LEAST_REPETITIONS = 5
# Calls timed on the host before it waits: few enough that no launch waits for a full queue.
BATCH = 20

# Weights and biases in turn, as in a real model.
PAIRS, BIAS = 150, 1024
SMALL_PAIRS, SMALL_BIAS, SMALL_PARAMETERS = 71, 128, 2_500_000
TRAINED_LAYERS, TRAINED_WIDTH = 5, 2048
MOST_TASKS_WITH_TARGET = 8

Figure = dict[str, Any]


class Target(NamedTuple):
    """What a figure is held to: at least `bound` of a fraction, at most that of all else."""

    quantity: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether a value of this quantity is as good as the target."""
        if self.quantity == "fraction":
            return value >= self.bound
        if self.quantity == "bytes_per_parameter_and_task":
            # Sums of K×K numbers grow with the tasks too, by some hundredths of a byte.
            value = round(value, 1)
        return value <= self.bound

    def __str__(self) -> str:
        if self.quantity == "fraction":
            return f">= {self.bound:.2f}"
        if self.quantity == "seconds":
            return f"<= {self.bound * 1e6:.0f} us"
        return f"<= {self.bound:.1f} B"


OPERATION = Target("fraction", 0.90)
RESOLUTION = Target("fraction", 0.88)
GRAPH = Target("seconds", 25e-6)
EAGER = Target("seconds", 150e-6)
ACCUMULATE = Target("seconds", 60e-6)
MEMORY = Target("bytes_per_parameter_and_task", 6.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--millions", type=float, default=100.0, help="parameters, in millions")
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[2, 4, 8], help="numbers of tasks K"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench/kernels_gpu.py measures on a GPU: torch finds no CUDA device here",
            file=sys.stderr,
        )
        return 2

    torch.cuda.set_device(DEVICE)
    torch.manual_seed(0)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print_row("figure", "time (quartiles)", "copy", "fraction (quartiles)", "target", "")
    figures: list[Figure] = []
    failed = False
    for group in groups(arguments.tasks, round(arguments.millions * 1e6)):
        try:
            for figure in group:
                print_figure(figure)
                figures.append(figure)
                if arguments.output:  # now: what comes later may fail, or be stopped
                    record = {"machine": about, "figures": figures}
                    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        except Exception as error:
            print(f"failed: {type(error).__name__}: {error}", flush=True)
            failed = True
    print(f"medians of {ROUNDS} rounds; the fraction is copy / time, round by round")
    return int(failed)


def groups(tasks: Sequence[int], parameters: int) -> Iterator[Iterator[Figure]]:
    """All figures, in groups that share their tensors."""
    yield accumulate_figures(parameters)
    for count in tasks:
        yield operation_figures(count, parameters)
    yield small_figures()
    yield host_figures()
    yield memory_figures()


# What is measured.


class Storage:
    """Everything that a resolution of K tasks reads and writes, filled at random.

    Args:
        tasks: K.
        sizes: elements of each parameter tensor.
    """

    def __init__(self, tasks: int, sizes: Sequence[int]) -> None:
        self.sizes, self.offsets, self.total = list(sizes), offsets_of(sizes), sum(sizes)
        self.rows = torch.randn(tasks, self.total, device=DEVICE)
        self.rows -= 1.1 * self.rows.mean(0)  # there is a conflict to resolve
        self.history = self.rows.bfloat16()
        self.momentum = torch.randn(self.total, device=DEVICE)
        self.steps = torch.zeros(len(sizes), dtype=torch.int64, device=DEVICE)
        self.outputs = [torch.randn(size, device=DEVICE) for size in sizes]
        self.scale = torch.ones(tasks, dtype=torch.float64, device=DEVICE)
        self.method = GCond()
        self.state = self.method.new_state(tasks, DEVICE)
        self.state["history_scale"] += 1.0
        self.products = self.gramian()
        self.decision = self.arbitrate()

    def gramian(self) -> ops.Gramians:
        """All inner products, as of now."""
        return ops.gramian(
            self.rows,
            self.offsets,
            self.sizes,
            scale=self.scale,
            history=self.history,
            history_scale=self.state["history_scale"],
            backend="triton",
        )

    def arbitrate(self) -> ops.Arbitration:
        """The weights that follow from the products found last."""
        total, cross, _ = self.products
        return self.method.resolve(total, cross, self.scale, self.state, "triton")

    def combine(self) -> None:
        """Writes outputs, momentum and history by the last decision."""
        ops.combine(
            self.rows,
            self.outputs,
            self.offsets,
            self.sizes,
            weights=self.decision.weights,
            scale=self.scale,
            finite=self.decision.finite,
            per_tensor=self.products.per_tensor,
            history=self.history,
            momentum=self.momentum,
            momentum_steps=self.steps,
            beta=0.9,
            backend="triton",
        )

    def resolve(self) -> None:
        """A whole resolution."""
        self.products = self.gramian()
        self.decision = self.arbitrate()
        self.combine()


def accumulate_figures(parameters: int) -> Iterator[Figure]:
    """Device time of accumulate, for gradients of two types."""
    sizes = sizes_of(parameters, PAIRS, BIAS)
    total = sum(sizes)
    for dtype in (torch.float32, torch.bfloat16):
        later = accumulate_of(sizes, dtype)
        first = accumulate_of(sizes, dtype, overwrite=True)
        name, e = f"accumulate {str(dtype)[6:]}", dtype.itemsize
        yield beside_copy(f"{name}, first micro-batch", first, total * (e + 4), OPERATION)
        yield beside_copy(f"{name}, later micro-batch", later, total * (e + 8), OPERATION)


def operation_figures(tasks: int, parameters: int) -> Iterator[Figure]:
    """Device time of gramian, combine and a whole resolution."""
    storage = Storage(tasks, sizes_of(parameters, PAIRS, BIAS))
    reading, writing = storage.total * 6 * tasks, storage.total * (6 * tasks + 12)
    for name, run, budget, target in (
        ("gramian", storage.gramian, reading, OPERATION),
        ("combine", storage.combine, writing, OPERATION),
        ("resolution", storage.resolve, reading + writing, RESOLUTION),
    ):
        known = target if tasks <= MOST_TASKS_WITH_TARGET else None
        millions = storage.total / 1e6
        yield beside_copy(f"{name}, K = {tasks}, {millions:.0f} M", run, budget, known)


def small_figures() -> Iterator[Figure]:
    """A resolution that takes no longer than its launches, by graph and by single calls."""
    storage = Storage(2, sizes_of(SMALL_PARAMETERS, SMALL_PAIRS, SMALL_BIAS))
    name = f"resolution, K = 2, {storage.total / 1e6:.1f} M in {len(storage.sizes)} tensors"
    yield on_host(f"{name}, eager, host", storage.resolve, EAGER)
    replay = captured(storage.resolve)
    yield beside_copy(f"{name}, graph", replay, storage.total * (12 * 2 + 12), GRAPH)


def host_figures() -> Iterator[Figure]:
    """What one accumulate costs the host, without and with the checks of the public function."""
    sizes = sizes_of(SMALL_PARAMETERS, PAIRS, SMALL_BIAS)
    name = f"accumulate of {len(sizes)} tensors"
    yield on_host(f"{name}, host", accumulate_of(sizes, torch.float32), ACCUMULATE)
    checked = accumulate_of(sizes, torch.float32, checked=True)
    yield on_host(f"{name} with checks, host", checked, ACCUMULATE)


def accumulate_of(
    sizes: Sequence[int], dtype: torch.dtype, overwrite: bool = False, checked: bool = False
) -> Callable[[], None]:
    """A call of accumulate on gradients of its own; `checked` is the public function."""
    offsets, lengths = offsets_of(sizes), list(sizes)
    accumulator = torch.randn(sum(sizes), device=DEVICE)
    gradients = [torch.randn(size, dtype=dtype, device=DEVICE) for size in sizes]
    direct = ops.backend_module("triton", DEVICE, "accumulate").accumulate

    def run() -> None:
        direct(accumulator, gradients, offsets, lengths, 1.0, overwrite)

    def run_checked() -> None:
        ops.accumulate(
            accumulator, gradients, offsets, lengths, overwrite=overwrite, backend="triton"
        )

    return run_checked if checked else run


def memory_figures() -> Iterator[Figure]:
    """How much the peak of device memory grows with the tasks."""
    peak_of_training(2)  # from here on torch has what it keeps for good: room for products, say
    peaks = {}
    for tasks in (2, 4):
        peaks[tasks], parameters = peak_of_training(tasks)
    growth = (peaks[4] - peaks[2]) / 2 / parameters
    name = f"peak memory of training, {parameters / 1e6:.0f} M, K = 2 to 4"
    record = {"peak_bytes": peaks, "parameters": parameters, MEMORY.quantity: growth}
    yield {"name": name, **record, **judged(MEMORY, growth)}


def peak_of_training(tasks: int) -> tuple[int, int]:
    """Bytes that a window of training has allocated at most, and the number of parameters."""
    model = torch.nn.Sequential()
    for _ in range(TRAINED_LAYERS):
        model.append(torch.nn.Linear(TRAINED_WIDTH, TRAINED_WIDTH)).append(torch.nn.ReLU())
    model.to(DEVICE)
    weights = {f"task {task}": 1.0 for task in range(tasks)}
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = GCondFused(base, weights, accumulation_steps=2, backend="triton")
    x = torch.randn(64, TRAINED_WIDTH, device=DEVICE)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    for _ in range(2):
        optimizer.backward({task: lambda: model(x).pow(2).mean() for task in optimizer.tasks})
    optimizer.step()
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    return peak, sum(p.numel() for p in model.parameters())


def sizes_of(parameters: int, pairs: int, bias: int) -> list[int]:
    """Elements of weights and biases in turn, about `parameters` together."""
    weight = bias * max(1, round(parameters / pairs / bias - 1))
    return [weight, bias] * pairs


def offsets_of(sizes: Sequence[int]) -> list[int]:
    """Where each tensor's segment starts, in elements; the sizes leave all of them aligned."""
    offsets = [0]
    for size in sizes[:-1]:
        offsets.append(offsets[-1] + size)
    return offsets


# How it is measured.


def beside_copy(name: str, run: Callable[[], object], budget: int, target: Target | None) -> Figure:
    """Times `run` and a copy that moves `budget` bytes; the two take turns, round by round."""
    source = torch.empty(budget // 2, dtype=torch.uint8, device=DEVICE).random_()
    copied = torch.empty_like(source)

    def copy() -> None:
        copied.copy_(source)

    for once in (run, copy):
        for _ in range(WARM_UP):
            once()
    repetitions = max(LEAST_REPETITIONS, round(BYTES_A_ROUND / budget))
    rounds = [
        (device_seconds(run, repetitions), device_seconds(copy, repetitions)) for _ in range(ROUNDS)
    ]
    record = {
        "bytes": budget,
        "seconds": quartiles([own for own, _ in rounds]),
        "copy_seconds": quartiles([other for _, other in rounds]),
        "fraction": quartiles([other / own for own, other in rounds]),
    }
    value = record[target.quantity]["median"] if target else 0.0
    return {"name": name, **record, **judged(target, value)}


def on_host(name: str, run: Callable[[], object], target: Target) -> Figure:
    """Times how long the host is busy with a call."""
    for _ in range(WARM_UP):
        run()
    seconds = quartiles([host_seconds(run, BATCH) for _ in range(ROUNDS)])
    return {"name": name, "seconds": seconds, **judged(target, seconds["median"])}


def device_seconds(run: Callable[[], object], repetitions: int) -> float:
    """Seconds that one call takes on the device."""
    for _ in range(LEAD):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repetitions):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repetitions


def host_seconds(run: Callable[[], object], repetitions: int) -> float:
    """Seconds that the host takes to issue one call; the device may be at work still."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        run()
    return (time.perf_counter() - start) / repetitions


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The same work as a CUDA graph."""
    run()  # a capture cannot make the tables of addresses
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def judged(target: Target | None, value: float) -> Figure:
    """What a figure was to reach, and whether it did."""
    if target is None:
        return {"target": None, "met": None}
    return {"target": {target.quantity: target.bound}, "met": target.met(value)}


# What is shown.


def machine() -> dict[str, Any]:
    """The GPU and the versions of all that takes part."""
    import triton

    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": properties.name,
        "driver": driver_version(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "gcond_kernels": gcond_kernels.__version__,
    }


def driver_version() -> str | None:
    """As nvidia-smi tells it, which torch does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def print_figure(figure: Figure) -> None:
    copy, target, met = figure.get("copy_seconds"), figure["target"], figure["met"]
    if "seconds" in figure:
        time_text = spread(figure["seconds"], 1e6, 1) + " us"
    else:
        time_text = f"{figure[MEMORY.quantity]:.3f} B per parameter and task"
    print_row(
        figure["name"],
        time_text,
        f"{copy['median'] * 1e6:.1f} us" if copy else "",
        spread(figure["fraction"], 1.0, 3) if copy else "",
        str(Target(*next(iter(target.items())))) if target else "",
        {True: "met", False: "missed", None: ""}[met],
    )


def spread(values: dict[str, float], unit: float, digits: int) -> str:
    """Median and quartiles in multiples of 1 / `unit`."""
    low, median, high = (f"{values[k] * unit:.{digits}f}" for k in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def print_row(*cells: str) -> None:
    widths = (60, 31, 11, 22, 10)
    first, *others, last = cells
    aligned = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
    print("  ".join([f"{first:<{widths[0]}}", *aligned, last]).rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
