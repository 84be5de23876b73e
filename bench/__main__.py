"""The command line: python -m bench [WHAT] [options], from the root of a checkout."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

# What `python -m bench WHAT` runs: a module of this package, its first arguments, and a sentence.
COMMANDS = {
    "all": ("app", [], "operations and training steps, beside others (the default)"),
    "quick": (
        "app",
        "--models mobilenetv3_small --millions 1 --tasks 2 4 --seconds 0.2".split(),
        "the same in about a minute, of small models",
    ),
    "operations": ("app", ["--sections", "operations"], "each operation by every backend"),
    "training": ("app", ["--sections", "training"], "training steps, their time and memory"),
    "counts": ("counts", [], "bytes, launches and host reads of each operation, counted"),
    "host": ("host", [], "what a call over 300 tensors costs the host; needs no GPU"),
    "weighting": ("weighting", [], "from a Gramian to weights, by every method"),
    "overlap": ("overlap", [], "what exchanging gradients early gains, with two processes"),
    "experiments": ("experiments", [], "the paper's open questions, three seeds; most of an hour"),
    "compare": ("compare", [], "the ratios of two records: OLD.json NEW.json"),
    "plot": ("plot", [], "the pictures of a record: FILE.json"),
    "profiled": ("profiled", [], "some calls of each operation, for a profiler to look at"),
}
# Without a GPU their kernels run on the host; Triton reads this when it is imported.
ON_THE_HOST = ("counts", "host")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    what = given.pop(0) if given and not given[0].startswith("-") else "all"
    if what not in COMMANDS:
        print(f"{what!r} is none of:", file=sys.stderr)
        for name, (_, _, sentence) in COMMANDS.items():
            print(f"  {name:<12} {sentence}", file=sys.stderr)
        return 2
    if what in ON_THE_HOST:
        os.environ.update(TRITON_INTERPRET="1", GCOND_CUDA_HOST="1")
    module, first, _ = COMMANDS[what]
    return importlib.import_module(f"bench.{module}").main([*first, *given]) or 0


if __name__ == "__main__":
    sys.exit(main())
