"""The command line of the demo: python -m examples.demo [options], from the root of a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .methods import ALL, BOUNDARY_X10, KEYS

INSTALL = 'pip install "gcond-kernels[demo]"'
SCENES = ("kovasznay", "burgers", "digits", "photos")
DEFAULT = ("kovasznay", "digits", "photos")


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; needs none of the demo's own libraries."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train multi-task models by one method after another; tables and pictures.",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="train the photos scene on the images in this folder instead of those that come "
        "with scikit-image",
    )
    parser.add_argument(
        "--scene",
        nargs="+",
        choices=SCENES,
        default=DEFAULT,
        metavar="NAME",
        help=f"what to train: {', '.join(SCENES)} (default: {' '.join(DEFAULT)}; with --images "
        "only photos)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help=f"what to compare: {', '.join(KEYS)}, {BOUNDARY_X10.key}, or {ALL} but the last; "
        "plain, the sum by ordinary accumulation, always is (default: some for each scene)",
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
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status: 0, 1 where a library is missing, 2 after bad input, 130 after Ctrl-C.
    """
    options = options_of(arguments)
    try:
        # Only here: the demo's libraries may be missing.
        from .app import run

        return run(options)
    except ModuleNotFoundError as error:
        library = (error.name or "gcond_kernels").partition(".")[0]
        if library in ("gcond_kernels", "examples"):  # a fault of ours, no missing library
            raise
        print(f"The demo needs {library}, which is missing: {INSTALL}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to leave behind
        print("Interrupted before the first step.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
