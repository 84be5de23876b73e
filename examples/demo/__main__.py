"""The command line of the demo: python -m examples.demo [options], from the root of a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import add_arguments
from . import main as run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train two real multi-task models; tables and pictures.",
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except KeyboardInterrupt:  # before there was anything to leave behind
        print("Interrupted before the first step.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
