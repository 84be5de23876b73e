"""The three operations that are bound by memory, a few times each, for a profiler to look at.

    ncu --csv --metrics dram__bytes.sum python bench/profiled.py --backend cuda

Prints the bytes that each must move (see gcond_kernels/bench/operations.py), for comparison.
"""

import argparse

import torch

from bench.inputs import Gradients, Storage, layout_of
from bench.models import shapes_of
from bench.operations import count_of

# The first call compiles and makes tables; a profiler skips it.
CALLS = 3


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("triton", "cuda", "python"), required=True)
    parser.add_argument("--model", default="convnext_base", help="whose tensors")
    parser.add_argument("--tasks", type=int, default=2, metavar="K")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(given)
    device, tasks = torch.device(arguments.device), arguments.tasks
    layout = layout_of([count_of(shape) for shape in shapes_of(arguments.model)])
    gradients = Gradients(layout, torch.float32, device)
    storage = Storage(tasks, layout, device)
    for _ in range(CALLS):
        gradients.accumulate(arguments.backend, overwrite=False)
        products = storage.gramian(arguments.backend)
        decision = storage.arbitrate(products, "python")
        storage.combine(products, decision, arguments.backend)
    budgets = {"accumulate": 12, "gramian": 6 * tasks, "combine": 6 * tasks + 12}
    for operation, bytes_each in budgets.items():
        print(f"{operation}: {bytes_each * layout.parameters / 1e6:.1f} MB must move")


if __name__ == "__main__":
    main()
