"""Peak memory of a window of micro-batches and its step, in bytes per parameter.

    python bench/memory.py [--tasks 2 4 8] [--width 2048] [--layers 8] [--output FILE.json]

The model is a stack of linear layers under SGD, the batch so small that activations do not count:
what is left is what the method itself keeps. Beside GCondFused stands plain gradient accumulation
of the sum, whose gradients stay in `.grad`. The model's own weights are not in the figures.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import gcond_kernels
from bench.record import cpu_name
from bench.training import peak_bytes
from gcond_kernels import GCondFused

MICRO_BATCHES = 2


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[2, 4, 8], help="numbers of tasks K"
    )
    parser.add_argument("--width", type=int, default=2048, help="of each layer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    arguments = parser.parse_args(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = arguments.width, arguments.layers, device

    runs = [("plain accumulation", 1), *(("GCondFused", tasks) for tasks in arguments.tasks)]
    figures = []
    for name, tasks in track(runs, "measuring"):
        run, size = window(tasks, *shape) if name == "GCondFused" else plain_window(*shape)
        peak = peak_bytes(run, device) / size
        figures.append({"what": name, "tasks": tasks, "bytes_per_parameter": round(peak, 2)})

    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcond_kernels": gcond_kernels.__version__,
        "parameters": size,
    }
    table = Table(title=", ".join(f"{key} {value}" for key, value in machine.items()))
    for heading in ("", "K", "peak, bytes per parameter"):
        table.add_column(heading)
    for figure in figures:
        table.add_row(*map(str, figure.values()))
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n"
        )


def model_and_batch(width: int, layers: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(device)
    return model, torch.randn(1, width, device=device)


def window(tasks: int, width: int, layers: int, device: str) -> tuple[Callable[[], None], int]:
    """A window of GCondFused with functions as losses, and the number of parameters."""
    model, x = model_and_batch(width, layers, device)
    optimizer = GCondFused(
        torch.optim.SGD(model.parameters(), lr=0.1),
        {f"task {k}": 1.0 for k in range(tasks)},
        accumulation_steps=MICRO_BATCHES,
    )

    def run() -> None:
        for _ in range(MICRO_BATCHES):
            optimizer.backward({task: lambda: model(x).pow(2).mean() for task in optimizer.tasks})
        optimizer.step()

    return run, sum(p.numel() for p in model.parameters())


def plain_window(width: int, layers: int, device: str) -> tuple[Callable[[], None], int]:
    """The same by plain accumulation in `.grad`."""
    model, x = model_and_batch(width, layers, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(MICRO_BATCHES):
            model(x).pow(2).mean().backward()
        optimizer.step()

    return run, sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
