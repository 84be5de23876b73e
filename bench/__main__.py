"""The command line: python -m bench [WHAT] [options], from the root of a checkout."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from bench.recipe import run

# Modules with a BENCHMARK, or sections of `sections`.
BENCHMARKS = {
    "all": "operations and training steps, beside others (the default)",
    "quick": "the same in a few minutes, of small models",
    "operations": "each operation by every backend, beside a copy and others",
    "training": "training steps beside plain accumulation and others, their time and memory",
    "cpu": "operations, aggregations and steps on a CPU, each beside its aim",
    "counts": "bytes, launches and host reads of each operation, counted and compared",
    "host": "what a call over 300 tensors costs the host; needs no GPU",
    "weighting": "from a Gramian to weights, by every method",
    "overlap": "what exchanging gradients early gains, with two processes",
}
# Modules with a command line of their own.
COMMANDS = {
    "experiments": "the paper's open questions, three seeds; most of an hour: [a ... h]",
    "compare": "the ratios of two records: OLD.json NEW.json",
    "costs": "the README's table of costs from the record of cpu: FILE.json",
    "plot": "the pictures of a record: FILE.json",
    "profiled": "some calls of each operation, for a profiler",
}
SECTIONS = {
    **dict.fromkeys(("all", "quick"), ("training", "operations")),
    **{name: (name,) for name in ("operations", "training")},
}
QUICK = ("--models=mobilenetv3_small", "--millions=1", "--tasks", "2", "4", "--seconds=0.2")
# Without a GPU their kernels run on the host; Triton reads this when it is imported.
ON_THE_HOST = ("counts", "host")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    what = given.pop(0) if given and not given[0].startswith("-") else "all"
    if what in COMMANDS:
        return int(importlib.import_module(f"bench.{what}").main(given))
    if what not in BENCHMARKS:
        print(f"{what!r} is none of:", file=sys.stderr)
        for name, sentence in {**BENCHMARKS, **COMMANDS}.items():
            print(f"  {name:<12} {sentence}", file=sys.stderr)
        return 2
    if what in ON_THE_HOST:
        os.environ.update(TRITON_INTERPRET="1", GCOND_CUDA_HOST="1")
    if what in SECTIONS:
        benchmark = importlib.import_module("bench.sections").benchmark(*SECTIONS[what])
    else:
        benchmark = importlib.import_module(f"bench.{what}").BENCHMARK
    return run(benchmark, what, [*(QUICK if what == "quick" else ()), *given])


if __name__ == "__main__":
    sys.exit(main())
