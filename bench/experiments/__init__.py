"""The experiments: what the parts of GCond do one by one, on the demo's data."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]_*.py"))


def main(given: Sequence[str]) -> int:
    """Run the experiment that is named first, or all of them, and return the exit status."""
    names, given = NAMES, list(given)
    if given and not given[0].startswith("-"):
        first = given.pop(0)
        names = [name for name in NAMES if first in (name, name[0])]
        if not names:
            print(f"{first!r} is none of: {', '.join(NAMES)}", file=sys.stderr)
            return 2
    for name in names:
        print(name)
        module = importlib.import_module(f"bench.experiments.{name}")
        common = importlib.import_module("bench.experiments.common")
        if status := common.run(module.EXPERIMENT, given):
            return int(status)
    return 0
