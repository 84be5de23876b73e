"""Pictures of the conflicts that a recorder holds; they need matplotlib."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.records import (
    ALL_ZONES,
    Record,
    check_count,
    percent,
    record_key,
    shortened,
)

if TYPE_CHECKING:  # matplotlib is needed only where a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Okabe and Ito's colours, which colour-blind people can distinguish.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
GREY = "#999999"
ZONE_COLORS = {"none": "#FFFFFF", "mild": "#FFF4D6", "moderate": "#FFE0A3", "critical": "#FFC46B"}
COLORS = (BLUE, VERMILION, GREEN, PURPLE, SKY, BLACK)
# Pairs differ in their markers too, not in colour alone.
PAIR_STYLES = tuple(zip(COLORS, "o^svDX", strict=True))
TASK_STYLES = tuple((color, line) for line in ("-", "--") for color in COLORS)

DPI = 110
LAYERS = 20
SMALLEST, LARGEST = 8.0, 11.0  # points of a layer's name; a longer name loses its middle
MOST_MARKED = 12  # tasks with a strip of their own; of more those with most marks
LONGEST_LABEL = 16  # characters of a task's name in the legend of norms
FEW_STEPS = 60  # up to this many are joined by lines, more get a running median
LEAST_HEIGHT = 0.09  # of a zone, in cosine, for its name to fit
NOTHING_TO_DRAW = "there is nothing to draw before {}: train some steps first (capacity above 0)"


def plot_conflicts(recorder: Recorder, path: str | os.PathLike[str]) -> Path:
    """Draw what conflicts there were, in which steps, and in which layers.

    From above: the cosines of the pairs over the zones; for each task the steps in which it won,
    and those that went against it (raised its loss to first order); the norms of the tasks'
    gradients, whose ratio is their balance; the layers that conflict most.

    On a GPU this synchronizes with the device. ::

        plot_conflicts(optimizer.recorder, "conflicts.png")

    Args:
        recorder: has recorded at least one step.
        path: of the picture; its suffix is the format, PNG without one. A missing folder is
            created, an existing picture is replaced.

    Returns:
        The path of the picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: nothing was recorded, or the path is that of a folder.
    """
    figure, target = _figure_and_path("plot_conflicts", path)
    if not len(recorder):
        raise ValueError(NOTHING_TO_DRAW.format("a step was recorded"))
    _draw_conflicts(figure, recorder)
    return _saved(figure, target)


def plot_layer_conflicts(
    recorder: Recorder, path: str | os.PathLike[str], *, threshold: float = 0.0, most: int = 25
) -> Path:
    """Draw how often tasks conflict in each layer, a bar for each, and return the path.

    In this order Recon (Shi et al. 2023, arXiv 2302.11289) makes layers task-specific:
    `split_conflicting_layers`. On a GPU this synchronizes with the device.

    Args:
        recorder: its `layers(threshold=threshold)` are drawn, highest count on top.
        path: of the picture, as in `plot_conflicts`.
        threshold: a pair of tasks with a cosine below it is a conflict.
        most: the largest number of layers, 1 or more.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no layer had a gradient of two tasks, the path is that of a folder, or `most` is
            out of its range.
    """
    figure, target = _figure_and_path("plot_layer_conflicts", path)
    check_count("most", most, 1)
    layers = recorder.layers(threshold=threshold)
    if not layers:
        raise ValueError(NOTHING_TO_DRAW.format("a layer had gradients of two tasks"))
    _draw_ranking(figure, layers, threshold, int(most))
    return _saved(figure, target)


def _figure_and_path(function: str, path: str | os.PathLike[str]) -> tuple[Figure, Path]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'{function} needs matplotlib, which is missing: pip install "gcond-kernels[plot]"'
        ) from error
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder: give the picture a name in it")
    figure = Figure(dpi=DPI)  # as it is saved: letters are not as wide at another resolution
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    return figure, target if target.suffix else target.with_suffix(".png")


def _saved(figure: Figure, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    return target


def _draw_conflicts(figure: Figure, recorder: Recorder) -> None:
    """Draw steps above and layers below, each with margins of its own."""
    records, tasks = recorder.rows(), recorder.tasks
    layers = sorted(recorder.layers(), key=lambda layer: -layer["share"])
    marks = _marks(records, tasks)
    strip = 0.55 + 0.24 * len(marks)
    heights = (8.5 + strip, _height(layers, LAYERS))
    figure.set_size_inches(13, sum(heights))
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    top, middle, norms = upper.subplots(3, 1, sharex=True, height_ratios=(4.6, strip, 2.4))
    _draw_cosines(top, recorder, records)
    _draw_marks(middle, records, marks)
    if len(tasks) > 1:
        often = f" (the {MOST_MARKED} with most)" if len(tasks) > MOST_MARKED else ""
        won = any(record["winner"] is not None for record in records)
        title = "Who won the first conflict of a step, and against" if won else "Against"
        middle.set_title(f"{title} whom the step went{often}", fontsize=12)
    _draw_norms(norms, records, tasks)
    handles, labels = top.get_legend_handles_labels()
    if handles:
        upper.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=11)
    axes = lower.subplots()
    axes.set_xlabel("% of the comparisons of two tasks that had a cosine below 0", fontsize=12)
    shares = [100.0 * layer["share"] for layer in layers]
    _draw_bars(figure, axes, layers, shares, LAYERS, "How often do they conflict in each layer?")


def _draw_ranking(figure: Figure, layers: Sequence[Record], threshold: float, most: int) -> None:
    """Draw the layers by their number of conflicts."""
    figure.set_size_inches(11, _height(layers, most))
    axes = figure.subplots()
    axes.set_xlabel("conflicts s(l), of all comparisons of two tasks in the layer", fontsize=12)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    title = f"Layers by conflicts: pairs of tasks with a cosine below {_number(threshold)}"
    conflicts = [layer["conflicts"] for layer in layers]
    _draw_bars(figure, axes, layers, conflicts, most, title)


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _height(layers: Sequence[Record], most: int) -> float:
    """Return the height of the bars of `most` layers, in inches."""
    return 1.5 + 0.46 * max(1, min(len(layers), most))


def shade_zones(axes: Axes, thresholds: tuple[float, float, float], labels: bool) -> None:
    """Shade the zones of (θ_crit, θ_main, θ_weak), with their names if `labels`."""
    critical, main, weak = thresholds
    bounds = (1.05, weak, main, critical, -1.05)
    for zone, (high, low) in zip(ALL_ZONES, pairwise(bounds), strict=True):
        axes.axhspan(low, high, color=ZONE_COLORS[zone], zorder=0)
        axes.axhline(low, color=GREY, linewidth=0.8, zorder=1)
        if labels and high - low >= LEAST_HEIGHT:
            # θ_crit itself is critical; the other thresholds belong to the zone above them.
            bound = "at most" if zone == "critical" else "below"
            text = "no conflict" if zone == "none" else f"{zone} ({bound} {_number(high)})"
            axes.text(
                1.0,
                (high + low) / 2,
                f"{text} ",
                transform=axes.get_yaxis_transform(),
                horizontalalignment="right",
                verticalalignment="center",
                fontsize=11,
            )
    axes.set_ylim(-1.05, 1.05)


def _draw_cosines(axes: Axes, recorder: Recorder, records: Sequence[Record]) -> None:
    """Draw the cosine of each pair, or the range of all where there are too many."""
    shade_zones(axes, recorder.thresholds, labels=True)
    names = {record_key("cosine", *pair): pair for pair in combinations(recorder.tasks, 2)}
    compared = [record for record in records if record["min_cosine"] is not None]
    title = "No step compared two tasks"
    if compared:
        share = percent(sum(r["zone"] != "none" for r in compared), len(compared), digits=0)
        title = f"Conflict in {share} of the steps that compared tasks ({len(compared)})"
    if len(names) <= len(PAIR_STYLES):
        for (key, (a, b)), style in zip(names.items(), PAIR_STYLES, strict=False):
            _draw_series(axes, compared, key, f"cosine of {_plain(a)} and {_plain(b)}", style)
    else:
        title += f"\n{len(names)} pairs are too many to tell apart: their range and the smallest"
        known = [[record[key] for key in names if record[key] is not None] for record in compared]
        axes.fill_between(
            [record["step"] for record in compared],
            [min(cosines) for cosines in known],
            [max(cosines) for cosines in known],
            color=GREY,
            alpha=0.45,
            linewidth=0.0,
            zorder=2.0,
            label="all pairs",
        )
        _draw_series(axes, compared, "min_cosine", "smallest of all pairs", (BLUE, "o"))
    if len(compared) > FEW_STEPS:
        label = f"lines: median of {2 * _half_window(compared) + 1} steps"
        axes.plot([], [], color=GREY, linewidth=2.2, label=label)
    axes.set_title(title, fontsize=14)
    axes.set_ylabel("cosine similarity", fontsize=12)
    skipped = [record["step"] for record in records if record["skipped"]]
    for index, step in enumerate(skipped):
        label = "" if index else "skipped step"
        axes.axvline(step, color=BLACK, linestyle=":", linewidth=1.2, zorder=1.5, label=label)


def _draw_series(
    axes: Axes, records: Sequence[Record], key: str, label: str, color_and_marker: tuple[str, str]
) -> None:
    """Draw one value of the records: points joined by lines, or with their running median."""
    steps, cosines = _known(records, key)
    color, marker = color_and_marker
    style: dict[str, Any] = {"color": color, "marker": marker, "zorder": 2.5}
    if len(records) <= FEW_STEPS:
        axes.plot(steps, cosines, linewidth=1.2, markersize=6, label=label, **style)
        return
    points: dict[str, Any] = {
        "markersize": 4.0 if len(records) <= 300 else 2.5,
        "markeredgewidth": 0.0,
    }
    axes.plot(steps, cosines, linestyle="", alpha=0.4, **points, **style)
    medians = _running_median(cosines, _half_window(records))
    # White below it: the line would be lost among points of its own colour.
    axes.plot(steps, medians, color="white", linewidth=4.5, zorder=3.0)
    axes.plot(steps, medians, color=color, linewidth=2.2, zorder=3.5)
    axes.plot([], [], linewidth=2.2, markersize=6, label=label, **style)  # for the legend alone


def _known(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Return the steps of which the records know a value, and their values."""
    known = [(record["step"], record[key]) for record in records if record[key] is not None]
    return [step for step, _ in known], [value for _, value in known]


def _running_median(values: Sequence[float], half: int) -> list[float]:
    """Return the median around each value, of up to `half` more on each side."""
    return [
        statistics.median(values[max(0, index - half) : index + half + 1])
        for index in range(len(values))
    ]


def _half_window(values: Sequence[object]) -> int:
    """Return how many steps a running median takes on each side."""
    return max(4, len(values) // 40)


def _plain(name: str) -> str:
    """Return a name so that matplotlib does not read a formula between dollar signs."""
    return name.replace("$", r"\$")


def _marks(records: Sequence[Record], tasks: Sequence[str]) -> list[tuple[str, list[int], str]]:
    """Return what is marked below the cosines: a name, the steps and a colour each."""
    several = tasks if len(tasks) > 1 else ()
    won = {task: [r["step"] for r in records if r["winner"] == task] for task in several}
    against = {task: _steps_where(records, record_key("rising", task)) for task in several}
    # Only GCond has winners, and of GradDrop it is not known against whom it goes.
    marks = _marks_of("{} won", won, BLUE) if any(won.values()) else []
    if any(record[record_key("rising", task)] is not None for record in records for task in tasks):
        marks += _marks_of("went against {}", against, VERMILION)
    taken = [record for record in records if not record["skipped"]]
    left_out = {task: _steps_where(taken, record_key("dropped", task)) for task in tasks}
    marks += _marks_of("{} left out", {t: steps for t, steps in left_out.items() if steps}, PURPLE)
    if skipped := _steps_where(records, "skipped"):
        marks.append(("skipped", skipped, BLACK))
    return marks


def _marks_of(
    name: str, steps: dict[str, list[int]], color: str
) -> list[tuple[str, list[int], str]]:
    """Return a mark for each task, or for those with most steps where there are too many."""
    most = sorted(steps, key=lambda task: -len(steps[task]))[:MOST_MARKED]
    return [(name.format(_plain(task)), steps[task], color) for task in steps if task in most]


def _steps_where(records: Sequence[Record], key: str) -> list[int]:
    """Return the steps in which a value of the records is true."""
    return [record["step"] for record in records if record[key]]


def _draw_marks(
    axes: Axes, records: Sequence[Record], marks: Sequence[tuple[str, list[int], str]]
) -> None:
    """Draw a strip for each kind, with a mark at each of its steps."""
    width = 1.6 if len(records) <= 300 else 0.8
    for index, (_, steps, color) in enumerate(marks):
        axes.eventplot(
            [steps], lineoffsets=index, linelengths=0.75, linewidths=width, colors=[color]
        )
    axes.set_yticks(range(len(marks)), [f"{name} ({len(steps)}×)" for name, steps, _ in marks])
    axes.set_ylim(len(marks) - 0.4, -0.6)
    axes.grid(axis="y", alpha=0.3)


def _draw_norms(axes: Axes, records: Sequence[Record], tasks: Sequence[str]) -> None:
    """Draw the norm of each task's gradient, or the range of all where there are too many."""
    keys = [record_key("shared_norm", task) for task in tasks]
    if len(tasks) <= len(TASK_STYLES):
        for task, key, style in zip(tasks, keys, TASK_STYLES, strict=False):
            label = f"of {_plain(shortened(task, LONGEST_LABEL))}"  # "_a" would be left out
            _draw_norm(axes, *_known(records, key), label, style)
    else:
        found = [(r["step"], [r[key] for key in keys if r[key]]) for r in records]
        found = [(step, norms) for step, norms in found if norms]
        low, high = ([end(norms) for _, norms in found] for end in (min, max))
        axes.fill_between([step for step, _ in found], low, high, color=GREY, label="of all tasks")
    ratios = [record["norm_ratio"] for record in records if record["norm_ratio"] is not None]
    title = "Norm of each task's gradient, over shared parameters"
    if ratios:
        title += f" (largest by smallest: {statistics.median(ratios):.3g}, median)"
    axes.set_title(title, fontsize=12)
    axes.set_yscale("log")
    axes.set_ylabel("norm", fontsize=12)
    axes.grid(axis="y", alpha=0.3)
    columns = 1 if len(tasks) <= len(COLORS) else 2
    axes.legend(loc="center right", fontsize=10 if columns == 1 else 8, ncols=columns)
    axes.set_xlabel("optimizer step", fontsize=12)
    first, last = min(r["step"] for r in records), max(r["step"] for r in records)
    length = max(last - first, 1)
    # Space for the names of the zones, and of the tasks.
    axes.set_xlim(first - 0.02 * length, last + 0.24 * length)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _draw_norm(
    axes: Axes, steps: list[int], norms: list[float], label: str, style: tuple[str, str]
) -> None:
    """Draw one task's norm: a line, and of many steps its running median."""
    color, line = style
    marker = "." if len(norms) <= FEW_STEPS else ""
    # A task without a gradient has no place on a logarithmic axis.
    norms = [norm if norm > 0.0 else math.nan for norm in norms]
    if len(norms) > FEW_STEPS:
        axes.plot(steps, norms, color=color, linewidth=0.7, alpha=0.35)
        norms = _running_median(norms, _half_window(norms))
    axes.plot(steps, norms, color=color, linestyle=line, linewidth=2.0, marker=marker, label=label)


def _draw_bars(
    figure: Figure,
    axes: Axes,
    layers: Sequence[Record],
    lengths: Sequence[float],
    most: int,
    title: str,
) -> None:
    """Draw a thin bar for each layer below its name, which may be of any length."""
    many = f" (the first {most} of {len(layers)})" if len(layers) > most else ""
    axes.set_title(f"{title}{many}", fontsize=13)
    layers, lengths = layers[:most], lengths[:most]
    places = range(len(layers))
    axes.set_yticks(places, [f"{place + 1}." for place in places])
    if not layers:
        axes.text(0.01, 0.5, "no parameter had a gradient of two tasks")
        return
    axes.barh(places, lengths, color=BLUE, height=0.36)
    axes.set_ylim(len(layers) - 0.5, -0.75)
    axes.set_xlim(0.0, 1.25 * max(*lengths, 1))  # space for the numbers
    figure.draw_without_rendering()  # only then it is known how wide the axes are
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 10.0}
    for place, length, layer in zip(places, lengths, layers, strict=True):
        numbers = (
            f"{layer['conflicts']} of {layer['compared']} ({percent(layer['share'], digits=0)})"
        )
        at = (length, place)
        axes.annotate(numbers, at, xytext=(4.0, 0.0), verticalalignment="center", **style)
        above = (0.0, place - 0.22)
        name = axes.annotate("", above, xytext=(3.0, 1.0), verticalalignment="bottom", **style)
        _fit(name, layer["layer"], 0.98 * axes.bbox.width)


def _fit(text: Annotation, layer: str, width: float) -> None:
    """Write a layer's name in one line of at most a width, smaller or without its middle."""
    length, size = len(shortened(layer, 1000)), LARGEST
    while True:
        text.set(text=_plain(shortened(layer, length)), fontsize=size)
        needed = text.get_window_extent().width
        if needed <= width:
            return
        if size > SMALLEST:
            size = max(SMALLEST, 0.98 * size * width / needed)
        else:
            length = min(length - 1, int(length * width / needed))
