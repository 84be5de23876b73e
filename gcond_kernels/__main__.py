"""The command line: python -m gcond_kernels info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gcond_kernels import info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gcond_kernels",
        description="Gradient conflict resolution for multi-task training.",
        epilog="The demo and the bench are in a checkout: make demo, make bench.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, device, and which backend serves which operation")
    parser.parse_args(arguments)
    print(info.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
