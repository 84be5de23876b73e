"""The command line: python -m gcond_kernels info | demo | bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gcond_kernels import bench, demo, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gcond_kernels",
        description="Gradient conflict resolution for multi-task training.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, device, and which backend serves which operation")
    demo.add_arguments(
        commands.add_parser("demo", help="train two real multi-task models; tables and pictures")
    )
    bench.add_arguments(
        commands.add_parser("bench", help="what operations and training steps cost here")
    )
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        print(info.describe())
        return 0
    if parsed.command == "bench":
        return bench.main(parsed)
    try:
        return demo.main(parsed)
    except KeyboardInterrupt:  # before there was anything to leave behind
        print("Interrupted before the first step.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
