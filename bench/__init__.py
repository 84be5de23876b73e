"""The bench: what each operation and a training step cost on this machine, and beside others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TASKS = (2, 4, 8, 16, 50)
MODELS = ("mobilenetv3_small", "convnext_tiny", "convnext_base", "transformer_1b")
MILLIONS = (1.0, 5.0, 25.0, 100.0, 400.0, 1000.0)
SECTIONS = ("operations", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the bench's options."""
    from bench import training

    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="operations, each backend beside others; training steps (default: both)",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        choices=MODELS,
        default=MODELS,
        help="whose tensors the operations work on (default: all; what does not fit in memory "
        "is left out, and said)",
    )
    parser.add_argument(
        "--millions",
        type=float,
        nargs="*",
        default=MILLIONS,
        metavar="N",
        help="parameters in even tensors, for cost against size with 2 tasks "
        f"(default: {' '.join(f'{size:g}' for size in MILLIONS)})",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        nargs="+",
        default=TASKS,
        metavar="K",
        help=f"numbers of tasks (default: {' '.join(map(str, TASKS))})",
    )
    parser.add_argument(
        "--published-code",
        type=Path,
        metavar="FILE",
        help="the GCond authors' grad_conductor.py, to be measured beside ours",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="for each comparison, about; at least 5 rounds are made (default: 2)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench_output/bench.json"),
        metavar="FILE",
        help="where the figures go (default: bench_output/bench.json); what was there is replaced",
    )
    training.add_arguments(parser)
