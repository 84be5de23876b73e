"""The demo: two real multi-task models, trained by one method after another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .methods import ALL, DEFAULT, KEYS

INSTALL = 'pip install "gcond-kernels[demo]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options; needs none of the demo's own dependencies."""
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="train the photos scene on the images in this folder instead of those that come "
        "with scikit-image",
    )
    parser.add_argument(
        "--scene",
        choices=("photos", "digits", "both"),
        default="both",
        help="what to train (default: both; with --images only photos)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help=f"what to compare: {', '.join(KEYS)}, or {ALL}; plain, the sum by ordinary "
        f"accumulation, always is (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="optimizer steps per method (default: what the scene needs for a good result)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of models and micro-batches (default: 0)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="FOLDER",
        help="where pictures and results.json go (default: demo_output)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--backend", default="auto", help="auto, python, triton or cuda (default: auto)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        The exit code: 0, 1 where a library is missing, 2 after bad input, 130 after Ctrl-C.
    """
    try:
        # Only here: the package itself works without the demo's libraries.
        from .app import run
    except ModuleNotFoundError as error:
        library = (error.name or "gcond_kernels").partition(".")[0]
        if library == "gcond_kernels":  # a fault of ours, no missing library
            raise
        print(f"The demo needs {library}, which is missing: {INSTALL}", file=sys.stderr)
        return 1
    return run(arguments)
