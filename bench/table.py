"""The table of a benchmark: a line for each figure as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.record import Figure

# Factor, unit and digits behind the point of a time.
UNITS = ((1.0, "s", 2), (1e3, "ms", 2), (1e6, "us", 1))


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    width: int  # longer cells push the rest of the line aside
    cell: Callable[[Any], str]
    is_name: bool = False  # a part of the figure's name, shown beside a reason for no value too
    left: bool = False


class Table:
    """Prints figures as lines; those of one group below its heading."""

    def __init__(
        self, columns: Sequence[Column], group: Callable[[Figure], str] = lambda _: ""
    ) -> None:
        self.columns, self.group_of, self.group = columns, group, ""
        self._print([column.heading for column in columns])

    def add(self, figure: Any) -> None:
        """Print a figure, or why there is no value of it."""
        group = self.group_of(figure)
        if group != self.group:
            self.group = group
            print(group, flush=True)
        for problem in ("skipped", "error"):
            if problem in figure:
                named = [column.cell(figure) for column in self.columns if column.is_name]
                self._print([*named, f"{problem}: {figure[problem]}"])
                return
        self._print([column.cell(figure) for column in self.columns])

    def _print(self, cells: Sequence[str]) -> None:
        aligned = [
            f"{cell:{'<' if column.left else '>'}{column.width}}"
            for cell, column in zip(cells[:-1], self.columns, strict=False)
        ]
        print("  ".join([*aligned, cells[-1]]).rstrip(), flush=True)


def text(field: str) -> Callable[[Figure], str]:
    """Return the cell of a field that is shown as it is."""
    return lambda figure: str(figure.get(field, ""))


def timed(field: str) -> Callable[[Figure], str]:
    """Return the cell of a time with quartiles."""
    return lambda figure: time_of(figure[field]) if field in figure else ""


def time_of(seconds: dict[str, float]) -> str:
    """Return a time with quartiles in a unit that suits it."""
    size = abs(seconds["median"])
    factor, unit, digits = next((entry for entry in UNITS if size * entry[0] >= 1.0), UNITS[-1])
    median, low, high = (f"{seconds[k] * factor:.{digits}f}" for k in ("median", "low", "high"))
    return f"{median} ({low}-{high}) {unit}"


def ratio_of(values: dict[str, float]) -> str:
    """Return a median with quartiles."""
    return "{median:.2f} ({low:.2f}-{high:.2f})".format_map(values)
