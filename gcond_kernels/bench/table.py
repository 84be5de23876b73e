"""The bench's table, a row for each figure as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]
WIDTHS = (51, 24, 26, 11, 20, 9)
HEAD = ("what", "by", "time (quartiles)", "copy", "copy/time", "target")


def print_head() -> None:
    """The names of the columns."""
    print(line(*HEAD, ""), flush=True)


def print_row(figure: Figure) -> None:
    """One figure, or why it could not be had."""
    for problem in ("skipped", "error"):
        if problem in figure:
            print(f"{name_of(figure)}, {figure['by']}: {problem}: {figure[problem]}", flush=True)
            return
    copy, met = figure.get("copy_seconds"), figure.get("met")
    last = {True: "met", False: "missed", None: ""}[met] + notes_of(figure)
    print(
        line(
            name_of(figure),
            figure["by"],
            time_of(figure["seconds"]) if "seconds" in figure else "",
            time_of(copy, quartiles=False) if copy else "",
            spread(figure["fraction"]) if copy else "",
            target_of(figure),
            last,
        ),
        flush=True,
    )


def print_foot(figures: Sequence[Figure]) -> None:
    """What came of the targets, and what stands in the columns."""
    met = [figure["met"] for figure in figures if figure.get("met") is not None]
    if met:
        print(f"targets: {sum(met)} of {len(met)} met")
    print("medians with quartiles; copy: as many bytes as the operation must move, in turn with it")


def name_of(figure: Figure) -> str:
    """What was done, on what."""
    what = " ".join(filter(None, (figure["operation"], figure.get("what"))))
    size = f"{figure['parameters'] / 1e6:.4g} M in {figure['tensors']}"
    return f"{what}, {figure['model']} ({size}), K={figure['tasks']}"


def notes_of(figure: Figure) -> str:
    """Other quantities than times."""
    notes = []
    if "relative" in figure:
        notes.append(f"{spread(figure['relative'])} x plain")
    if "samples_per_second" in figure:
        notes.append(f"{figure['samples_per_second']:.4g} samples/s")
    if "bytes_per_parameter" in figure:
        notes.append(f"peak {figure['bytes_per_parameter']:.2f} B/parameter")
    if "bytes_moved" in figure:
        per_parameter = figure["bytes_moved"] / figure["parameters"]
        notes.append(f"{per_parameter:.0f} B/parameter, {figure['launches']} operations")
    if figure.get("synchronisations"):
        notes.append(f"{figure['synchronisations']} host reads")
    return "  ".join(["", *notes]) if notes else ""


def target_of(figure: Figure) -> str:
    """What the figure is held to."""
    if not figure.get("target"):
        return ""
    ((quantity, bound),) = figure["target"].items()
    if quantity == "fraction":
        return f">= {bound:.2f}"
    if quantity == "seconds":
        return f"<= {bound * 1e6:.0f} us"
    return f"<= {bound:.2f}"


def time_of(seconds: dict[str, float], quartiles: bool = True) -> str:
    """A time in a unit that suits it."""
    factor, unit, digits = next(
        (entry for entry in UNITS if seconds["median"] * entry[0] >= 1.0), UNITS[-1]
    )
    median, low, high = (f"{seconds[k] * factor:.{digits}f}" for k in ("median", "low", "high"))
    return f"{median} ({low}-{high}) {unit}" if quartiles else f"{median} {unit}"


UNITS = ((1.0, "s", 2), (1e3, "ms", 2), (1e6, "us", 1))


def spread(values: dict[str, float]) -> str:
    """Median and quartiles."""
    return "{median:.2f} ({low:.2f}-{high:.2f})".format_map(values)


def line(*cells: str) -> str:
    """Cells in columns; the first two to the left."""
    parts = [
        f"{cell:{'<' if i < 2 else '>'}{w}}"
        for i, (cell, w) in enumerate(zip(cells, WIDTHS, strict=False))
    ]
    return "  ".join([*parts, cells[-1]]).rstrip()
