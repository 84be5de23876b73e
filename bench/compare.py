"""What changed between two records: every figure that both have, as new over old.

Times depend on the machine; "fraction", the time of a copy over the time of the operation, hardly
does, for the copy was timed in the same run. A ratio is called within the spread where the
quartiles of old and new overlap. Counts that have not changed are not listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.record import Figure, InputError, read
from bench.table import Column, Table

Name = tuple[tuple[str, str | int], ...]

TIMES = ("seconds", "beside_seconds", "step", "resolve", "exposed", "reduce", "gather", "gain")
RATES = ("samples_per_second",)
COUNTS = (
    *("bytes", "bytes_moved", "launches", "synchronisations", "allocations", "allocated_bytes"),
    *("peak_bytes", "bytes_per_parameter", "bytes_per_parameter_and_task", "calls", "files"),
)
QUANTITIES = (*TIMES, "fraction", "relative", *RATES, *COUNTS)
PROBLEMS = ("skipped", "error")
# What follows from others, or was chosen for them; no part of a figure's name.
DERIVED = ("moved_per_parameter", "budget_per_parameter", "backend", "backward_passes", "rounds")
# What a name begins with; what else there is follows.
FIRST = ("section", "operation", "what", "by", "model", "parameters", "tensors", "tasks")
# Of a machine, what times depend on; the rest are versions.
HARDWARE = ("device", "cpu", "compute_capability", "multiprocessors", "cache_bytes", "threads")


class Change(NamedTuple):
    """One quantity of one figure, old and new."""

    name: str
    quantity: str
    old: float
    new: float
    within_spread: bool

    @property
    def ratio(self) -> float:
        """New over old."""
        if self.old == 0:
            return 1.0 if self.new == 0 else float("inf")
        return self.new / self.old


def main(given: Sequence[str]) -> int:
    """Compare two records and return the exit status: 1 without a figure in common."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("old", type=Path, help="the record to compare with")
    parser.add_argument("new", type=Path, help="the record that is compared")
    parsed = parser.parse_args(given)
    try:
        old, new = read(parsed.old), read(parsed.new)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    other_machine = print_machines(old["machine"], new["machine"])
    olds, news = by_name(old["figures"], parsed.old), by_name(new["figures"], parsed.new)
    common = [name for name in news if name in olds]
    if not common:
        print(f"{parsed.old} and {parsed.new} have no figure in common")
    found = [change for name in common for change in changes(name, olds[name], news[name])]
    print_changes(found, other_machine)
    for name in common:
        for when, figure in (("old", olds[name]), ("new", news[name])):
            for problem in set(PROBLEMS) & set(figure):
                print(f"{text_of(name)}: {problem} in the {when}: {figure[problem]}")
    for path, missing in ((parsed.old, set(olds) - set(news)), (parsed.new, set(news) - set(olds))):
        if missing:
            print("\n".join([f"\nonly in {path}:", *sorted(f"  {text_of(n)}" for n in missing)]))
    return 0 if common else 1


def by_name(figures: Sequence[Figure], path: Path) -> dict[Name, Figure]:
    """Return the figures by name; of two of one name the last, with a message."""
    named: dict[Name, Figure] = {}
    for figure in figures:
        name = name_of(figure)
        if name in named:
            print(f"{path} has two figures of one name, the last counts: {text_of(name)}")
        named[name] = figure
    return named


def name_of(figure: Figure) -> Name:
    """Return all fields of text and whole numbers that are no quantity, the known ones first."""
    others = sorted(set(figure) - set(FIRST) - set(QUANTITIES) - set(PROBLEMS) - set(DERIVED))
    fields = [(field, figure.get(field)) for field in (*FIRST, *others)]
    return tuple(
        (field, value)
        for field, value in fields
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    )


def text_of(name: Name) -> str:
    """Return a figure's name to be read."""
    named = dict(name)
    words = [str(named.pop(field)) for field in FIRST[:5] if field in named]
    if "parameters" in named:
        words.append(f"{named.pop('parameters') / 1e6:.4g} M")
    if "tensors" in named:
        words.append(f"in {named.pop('tensors')}")
    if "tasks" in named:
        words.append(f"K={named.pop('tasks')}")
    return " ".join([*words, *(f"{field}={value}" for field, value in named.items())])


def changes(name: Name, old: Figure, new: Figure) -> Iterator[Change]:
    """Return every quantity that both figures have."""
    for quantity in QUANTITIES:
        before, after = range_of(old.get(quantity)), range_of(new.get(quantity))
        if before is None or after is None:
            continue
        overlap = before[0] <= after[2] and after[0] <= before[2]
        spread = before[0] < before[2] or after[0] < after[2]
        yield Change(text_of(name), quantity, before[1], after[1], overlap and spread)


def range_of(value: Any) -> tuple[float, float, float] | None:
    """Return low, median and high; a number alone is all three."""
    if isinstance(value, Mapping) and {"low", "median", "high"} <= set(value):
        return value["low"], value["median"], value["high"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value, value, value
    return None


def print_machines(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Print how the two differ; return whether these are different machines."""
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    for key in differing:
        print(f"{key}: {old.get(key)} -> {new.get(key)}")
    other = any(key in old and key in new for key in differing if key in HARDWARE)
    if other:
        print("different machines: only counts and fractions compare; times are of the machines")
    if differing:
        print()
    return other


def print_changes(all_changes: Sequence[Change], other_machine: bool) -> None:
    """Print a line for each change; of counts that have not changed only how many."""

    def remark(change: Change) -> str:
        if other_machine and change.quantity in (*TIMES, *RATES):
            return "other machine"
        return "within spread" if change.within_spread else ""

    listed = [c for c in all_changes if c.quantity not in COUNTS or c.old != c.new]
    if listed:
        width = max(len(change.name) for change in listed)
        table = Table(
            (
                Column("figure", width, lambda c: c.name, left=True),
                Column("quantity", 20, lambda c: c.quantity.replace("_", " "), left=True),
                Column("old", 12, lambda c: number(c.old, c.quantity)),
                Column("new", 12, lambda c: number(c.new, c.quantity)),
                Column("new/old", 7, lambda c: f"{c.ratio:.3f}"),
                Column("", 0, remark),
            )
        )
        for change in listed:
            table.add(change)
    if len(listed) < len(all_changes):
        print(f"{len(all_changes) - len(listed)} counts are as they were")


def number(value: float, quantity: str) -> str:
    """Return a quantity to be read, times in milliseconds."""
    if quantity in TIMES:
        return f"{value * 1e3:.4g} ms"
    if quantity in COUNTS:
        return f"{value:,}"
    return f"{value:.4g}"
