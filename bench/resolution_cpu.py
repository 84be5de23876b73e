"""A resolution on the CPU beside a copy of as many bytes as it must move, in the same run.

    python bench/resolution_cpu.py [--tasks 2 4] [--millions 25] [--output FILE.json]

The bytes that must move per parameter (float32 gradients, bfloat16 history, momentum):
gramian reads 4K + 2K; combine reads 4K, reads and writes momentum (8), writes the gradient (4)
and the new history (2K). The copy reads half of them and writes half, past the cache; torch's
operations write through it, which costs the combine a further read of all that it writes.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gcond_kernels
from gcond_kernels import GCond, ops

ROUNDS = 15
TARGET = 1.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4], help="numbers of tasks K")
    parser.add_argument("--millions", type=float, default=25.0, help="parameters, in millions")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args()

    figures = [measure(tasks, arguments.millions) for tasks in arguments.tasks]
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcond_kernels": gcond_kernels.__version__,
    }
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()))
    for heading in ("K", "parameters", "MB", "copy", "gramian", "combine", "resolution", "ratio"):
        table.add_column(heading, justify="right")
    for f in figures:
        table.add_row(
            str(f["tasks"]),
            f"{f['parameters'] / 1e6:.1f} M",
            f"{f['budget_bytes'] / 1e6:.0f}",
            *[f"{f[name] * 1e3:.1f} ms" for name in ("copy", "gramian", "combine", "resolution")],
            f"{f['ratio']:.2f} ({f['ratio_low']:.2f}-{f['ratio_high']:.2f})",
        )
    Console().print(table)
    print(f"medians of {ROUNDS} rounds; ratio = resolution / copy, round by round, with quartiles")
    print(f"target: at most {TARGET}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1))


def measure(tasks: int, millions: float) -> dict[str, float]:
    """Times of the copy and of the resolution's parts, in seconds; the two take turns."""
    # Weights and biases in turn, as in a real model.
    sizes = [524_288, 1024] * max(1, round(millions * 1e6 / 525_312))
    offsets = [sum(sizes[:t]) for t in range(len(sizes))]
    total = sum(sizes)
    torch.manual_seed(0)
    rows = torch.randn(tasks, total)
    rows -= 1.1 * rows.mean(0)  # there is a conflict to resolve
    history = rows.bfloat16()
    momentum, steps = torch.zeros(total), torch.zeros(len(sizes), dtype=torch.int64)
    outputs = [torch.zeros(size) for size in sizes]
    scale = torch.ones(tasks, dtype=torch.float64)
    method = GCond()
    state = method.new_state(tasks, torch.device("cpu"))
    state["history_scale"] += 1.0
    budget = total * (6 * tasks + 6 * tasks + 12)
    source = torch.ones(budget // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def resolve() -> tuple[float, float]:
        start = time.perf_counter()
        products = ops.gramian(
            rows, offsets, sizes, scale=scale, history=history,
            history_scale=state["history_scale"],
        )  # fmt: skip
        middle = time.perf_counter()
        decision = method.resolve(products.total, products.cross, scale, state)
        ops.combine(
            rows, outputs, offsets, sizes, weights=decision.weights, scale=scale,
            finite=decision.finite, per_tensor=products.per_tensor, history=history,
            momentum=momentum, momentum_steps=steps, beta=0.9,
        )  # fmt: skip
        nonlocal weights
        weights = decision.weights
        return middle - start, time.perf_counter() - middle

    weights = torch.ones(tasks)
    resolve()
    check(outputs, (weights @ rows.double()).split(sizes))
    copies, gramians, combines = [], [], []
    for _ in range(ROUNDS):
        copies.append(timed(lambda: target.copy_(source)))
        first, second = resolve()
        gramians.append(first)
        combines.append(second)
    ratios = [(g + c) / t for g, c, t in zip(gramians, combines, copies, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "tasks": tasks,
        "parameters": total,
        "budget_bytes": budget,
        "copy": statistics.median(copies),
        "gramian": statistics.median(gramians),
        "combine": statistics.median(combines),
        "resolution": statistics.median(map(sum, zip(gramians, combines, strict=True))),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def check(outputs: list[torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    """After the first step the bias-corrected momentum is the resolved gradient itself."""
    for output, exact in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-5)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
