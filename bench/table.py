"""The bench's table, a row for each figure as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]
HEAD = ("  operation", "K", "by", "time (quartiles)", "copy", "copy / time", "target", "")
WIDTHS = (38, 3, 24, 24, 9, 18, 9)
TO_THE_LEFT = (0, 2)
# Factor, unit and digits behind the point of a time.
UNITS = ((1.0, "s", 2), (1e3, "ms", 2), (1e6, "us", 1))


class Table:
    """Prints figures, those of one model below its name."""

    def __init__(self) -> None:
        self.model = ""
        print(line(HEAD), flush=True)

    def add(self, figure: Figure) -> None:
        """One figure, or why it could not be had."""
        model = (
            f"{figure['model']}: {figure['parameters'] / 1e6:.4g} M parameters in "
            f"{figure['tensors']} tensors"
        )
        if model != self.model:
            self.model = model
            print(model, flush=True)
        print(row(figure), flush=True)


def row(figure: Figure) -> str:
    """The row of a figure."""
    what = "  " + " ".join(filter(None, (figure["operation"], figure.get("what"))))
    named = (what, str(figure["tasks"]), figure["by"])
    for problem in ("skipped", "error"):
        if problem in figure:
            return line((*named, f"{problem}: {figure[problem]}"))
    copy, met = figure.get("copy_seconds"), figure.get("met")
    verdict = {True: "met", False: "missed", None: ""}[met]
    return line(
        (
            *named,
            time_of(figure["seconds"]) if "seconds" in figure else "",
            time_of(copy, quartiles=False) if copy else "",
            spread(figure["fraction"]) if copy else "",
            target_of(figure),
            "  ".join(filter(None, (verdict, *notes_of(figure)))),
        )
    )


def foot(figures: Sequence[Figure]) -> str:
    """What came of the targets, and what stands in the columns."""
    lines = [
        "medians with quartiles; copy: of the fewest bytes that the operation must move, in turn "
        "with it; B/par: bytes per parameter;",
        "ops: calls of torch's operations; reads: values that the host reads, waiting for a GPU",
    ]
    met = [figure["met"] for figure in figures if figure.get("met") is not None]
    if met:
        lines.append(f"targets: {sum(met)} of {len(met)} met")
    return "\n".join(lines)


def notes_of(figure: Figure) -> list[str]:
    """Other quantities than times."""
    notes = []
    if "relative" in figure:
        notes.append(f"{spread(figure['relative'])} x plain")
    if "samples_per_second" in figure:
        notes.append(f"{figure['samples_per_second']:.4g} samples/s")
    if "bytes_per_parameter" in figure:
        notes.append(f"peak {figure['bytes_per_parameter']:.2f} B/par")
    if "bytes_moved" in figure:
        if figure["bytes"]:  # else what it works on are no parameters
            notes.append(f"{figure['bytes_moved'] / figure['parameters']:.0f} B/par")
        notes.append(f"{figure['launches']} ops")
    if figure.get("synchronisations"):
        notes.append(f"{figure['synchronisations']} reads")
    return notes


def target_of(figure: Figure) -> str:
    """What the figure is held to."""
    if not figure.get("target"):
        return ""
    ((quantity, bound),) = figure["target"].items()
    if quantity == "fraction":
        return f">= {bound:.3g}"
    if quantity == "seconds":
        return f"<= {bound * 1e6:.0f} us"
    return f"<= {bound:.3g}"


def time_of(seconds: dict[str, float], quartiles: bool = True) -> str:
    """A time in a unit that suits it."""
    factor, unit, digits = next(
        (entry for entry in UNITS if seconds["median"] * entry[0] >= 1.0), UNITS[-1]
    )
    median, low, high = (f"{seconds[k] * factor:.{digits}f}" for k in ("median", "low", "high"))
    return f"{median} ({low}-{high}) {unit}" if quartiles else f"{median} {unit}"


def spread(values: dict[str, float]) -> str:
    """Median and quartiles."""
    return "{median:.2f} ({low:.2f}-{high:.2f})".format_map(values)


def line(cells: Sequence[str]) -> str:
    """Cells in columns; what comes behind the last column, or alone behind the names, is free."""
    parts = [
        f"{cell:{'<' if place in TO_THE_LEFT else '>'}{width}}"
        for place, (cell, width) in enumerate(zip(cells[:-1], WIDTHS, strict=False))
    ]
    return "  ".join([*parts, cells[-1]]).rstrip()
