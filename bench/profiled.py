"""The three operations that are bound by memory, a few times each, for a profiler.

    ncu --csv --metrics dram__bytes.sum python -m bench profiled --backend cuda

Prints the bytes that each must move (see operations.py), for comparison.
"""

import argparse
from collections.abc import Sequence

import torch

from bench.inputs import Gradients, Storage
from bench.operations import model_layout

# The first call compiles and makes tables; a profiler skips it.
CALLS = 3


def main(given: Sequence[str]) -> int:
    """Call the operations."""
    parser = argparse.ArgumentParser(prog="python -m bench profiled")
    parser.add_argument("--backend", choices=("triton", "cuda", "python"), required=True)
    parser.add_argument("--model", default="convnext_base", help="whose tensors")
    parser.add_argument("--tasks", type=int, default=2, metavar="K")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(given)
    device, tasks = torch.device(options.device), options.tasks
    layout = model_layout(options.model)
    gradients = Gradients(layout, torch.float32, device)
    storage = Storage(tasks, layout, device)
    for _ in range(CALLS):
        gradients.accumulate(options.backend, overwrite=False)
        decision = storage.arbitrate(storage.gramian(options.backend), "python")
        storage.combine(decision, options.backend)
    budgets = {"accumulate": 12, "gramian": 6 * tasks, "combine": 6 * tasks + 12}
    for operation, bytes_each in budgets.items():
        print(f"{operation}: {bytes_each * layout.parameters / 1e6:.1f} MB must move")
    return 0
