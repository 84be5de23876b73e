"""A picture of the conflicts that a recorder holds; needs matplotlib."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from itertools import combinations, pairwise
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcond_kernels.diagnostics.recorder import ALL_ZONES, Recorder, Row, row_key
from gcond_kernels.recipes.recon import shortened

if TYPE_CHECKING:  # an import at run time would ask for matplotlib where no picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
GREY = "#999999"
ZONE_COLORS = {"none": "#FFFFFF", "mild": "#FFF4D6", "moderate": "#FFE0A3", "critical": "#FFC46B"}
# Of the pairs; markers differ too, so that colour alone tells nothing.
PAIR_STYLES = tuple(zip((BLUE, VERMILION, GREEN, PURPLE, SKY, BLACK), "o^svDX", strict=True))
BAR = "#B9DDF3"  # a light sky blue: the layers' names are written on it

DPI = 110
LAYERS = 20
SMALLEST = 8.0  # points of a layer's name above its bar; what is longer loses its middle
WINNERS = 12
FEW_STEPS = 60  # so few are joined by lines; more get a running median
LEAST_HEIGHT = 0.09  # of a zone, in cosine: less has no room for its name


def plot_conflicts(recorder: Recorder, path: str | os.PathLike[str]) -> Path:
    """Draws the cosines over the steps, who won, and the layers that conflict most.

    On a GPU this waits for the device.

    Args:
        recorder: has recorded at least one step.
        path: of the picture; its ending names the format, PNG without one. A folder that is
            missing is made, a picture that is there is replaced.

    Returns:
        Where the picture is.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: nothing was recorded, or the path is that of a folder.
    """
    new_figure = _figure_class("plot_conflicts")
    target = _picture(path)
    rows = recorder.rows()
    if not rows:
        raise ValueError(
            "there is nothing to draw before a step was recorded: train some steps first "
            "(with record_steps above 0)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _draw(new_figure, recorder, rows).savefig(target, dpi=DPI)
    return target


def plot_layer_conflicts(
    recorder: Recorder,
    path: str | os.PathLike[str],
    *,
    threshold: float = 0.0,
    most: int = 25,
) -> Path:
    """Draws in which layers tasks conflict most often, as a bar of the count for each.

    Recon (Shi et al. 2023, arXiv 2302.11289) gives every task layers of its own by this order:
    `split_conflicting_layers`. On a GPU this waits for the device.

    Args:
        recorder: its `layers(threshold=threshold)` are drawn, highest count on top.
        path: of the picture, as in `plot_conflicts`.
        threshold: a pair of tasks with a cosine below it is a conflict.
        most: so many layers at most, 1 or more.

    Returns:
        Where the picture is.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no layer had a gradient of two tasks, the path is that of a folder, or most is
            no such number.
    """
    new_figure = _figure_class("plot_layer_conflicts")
    if not isinstance(most, Integral) or isinstance(most, bool) or most < 1:
        raise ValueError(f"most must be a whole number, 1 or more, not {most!r}")
    target = _picture(path)
    layers = recorder.layers(threshold=threshold)
    if not layers:
        raise ValueError(
            "there is nothing to draw before a layer had gradients of two tasks: train some steps "
            "first (with record_steps above 0)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _draw_ranking(new_figure, layers, threshold, int(most)).savefig(target, dpi=DPI)
    return target


def _figure_class(function: str) -> type[Figure]:
    """Of matplotlib, which is looked for only where a picture is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'{function} needs matplotlib, which is missing: pip install "gcond-kernels[plot]"'
        ) from error
    return Figure


def _picture(path: str | os.PathLike[str]) -> Path:
    """The path of a picture, which is a PNG where nothing else is said."""
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder: give the picture a name in it")
    return target if target.suffix else target.with_suffix(".png")


def _draw(new_figure: type[Figure], recorder: Recorder, rows: Sequence[Row]) -> Figure:
    """The picture: one part over the steps, one over the layers, each with margins of its own."""
    layers = sorted(recorder.layers(), key=lambda layer: -layer["share"])
    happened = _happened(rows, recorder.tasks)
    strip = 0.55 + 0.24 * len(happened)
    heights = (5.7 + strip, 1.3 + 0.3 * max(1, min(len(layers), LAYERS)))
    figure = new_figure(figsize=(13, sum(heights)))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    top, middle = upper.subplots(2, 1, sharex=True, height_ratios=(4.6, strip))
    _draw_cosines(top, recorder, rows)
    _draw_happened(middle, rows, happened)
    if len(recorder.tasks) > 1:
        often = f" (the {WINNERS} that won most often)" if len(recorder.tasks) > WINNERS else ""
        middle.set_title(f"Who won the first conflict of a step{often}", fontsize=12)
    _draw_legend(upper, top)
    _draw_layers(lower.subplots(), layers)
    return figure


def shade_zones(axes: Axes, thresholds: tuple[float, float, float], labels: bool) -> None:
    """Colours the zones of (θ_crit, θ_main, θ_weak), and names them."""
    critical, main, weak = thresholds
    bounds = (1.05, weak, main, critical, -1.05)
    for zone, (high, low) in zip(ALL_ZONES, pairwise(bounds), strict=True):
        axes.axhspan(low, high, color=ZONE_COLORS[zone], zorder=0)
        axes.axhline(low, color=GREY, linewidth=0.8, zorder=1)
        if labels and high - low >= LEAST_HEIGHT:
            # θ_crit itself is critical; the other thresholds belong to the zone above them.
            number = f"{high:.1f}" if high == round(high, 1) else f"{high:g}"
            bound = f"at most {number}" if zone == "critical" else f"below {number}"
            text = "no conflict" if zone == "none" else f"{zone} ({bound})".replace("-", "−")
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


def _draw_cosines(axes: Axes, recorder: Recorder, rows: Sequence[Row]) -> None:
    """Every pair's cosine, or the range of all where there are too many to tell apart."""
    shade_zones(axes, recorder.thresholds, labels=True)
    pairs = list(combinations(recorder.tasks, 2))
    keys = [row_key("cosine", a, b) for a, b in pairs]
    compared = [row for row in rows if row["min_cosine"] is not None]
    title = "No step compared two tasks"
    if compared:
        share = sum(row["zone"] != "none" for row in compared) / len(compared)
        title = (
            f"Conflict in {100.0 * share:.0f} % of the steps that compared tasks ({len(compared)})"
        )
    if len(pairs) <= len(PAIR_STYLES):
        for (a, b), key, (color, marker) in zip(pairs, keys, PAIR_STYLES, strict=False):
            _draw_series(
                axes, compared, key, f"cosine of {_plain(a)} and {_plain(b)}", color, marker
            )
    else:
        title += f"\n{len(pairs)} pairs are too many to tell apart: their range and the smallest"
        _draw_range(axes, compared, keys)
        _draw_series(axes, compared, "min_cosine", "smallest of all pairs", BLUE, "o")
    if len(compared) > FEW_STEPS:
        label = f"lines: median of {2 * _half_window(compared) + 1} steps"
        axes.plot([], [], color=GREY, linewidth=2.2, label=label)
    axes.set_title(title, fontsize=14)
    axes.set_ylabel("cosine similarity", fontsize=12)
    skipped = [row["step"] for row in rows if row["skipped"]]
    for place, step in enumerate(skipped):
        label = "" if place else "skipped step"
        axes.axvline(step, color=BLACK, linestyle=":", linewidth=1.2, zorder=1.5, label=label)


def _draw_series(
    axes: Axes, rows: Sequence[Row], key: str, label: str, color: str, marker: str
) -> None:
    """One pair: points that are joined, or of which the running median is drawn."""
    known = [(row["step"], row[key]) for row in rows if row[key] is not None]
    steps, cosines = [step for step, _ in known], [cosine for _, cosine in known]
    style: dict[str, Any] = {"color": color, "marker": marker, "zorder": 2.5}
    if len(rows) <= FEW_STEPS:
        axes.plot(steps, cosines, linewidth=1.2, markersize=6, label=label, **style)
        return
    size = 4.0 if len(rows) <= 300 else 2.5
    axes.plot(
        steps, cosines, linestyle="", markersize=size, alpha=0.4, markeredgewidth=0.0, **style
    )
    half = _half_window(rows)
    medians = [
        statistics.median(cosines[max(0, place - half) : place + half + 1])
        for place in range(len(cosines))
    ]
    # White below it: among points of its own colour a line is lost.
    axes.plot(steps, medians, color="white", linewidth=4.5, zorder=3.0)
    axes.plot(steps, medians, color=color, linewidth=2.2, zorder=3.5)
    axes.plot([], [], linewidth=2.2, markersize=6, label=label, **style)  # for the legend alone


def _half_window(rows: Sequence[Row]) -> int:
    """How many steps a running median takes on each side."""
    return max(4, len(rows) // 40)


def _plain(name: str) -> str:
    """A name as it is, which matplotlib would take for a formula between dollar signs."""
    return name.replace("$", r"\$")


def _draw_range(axes: Axes, rows: Sequence[Row], keys: Sequence[str]) -> None:
    known = [[row[key] for key in keys if row[key] is not None] for row in rows]
    axes.fill_between(
        [row["step"] for row in rows],
        [min(cosines) for cosines in known],
        [max(cosines) for cosines in known],
        color=GREY,
        alpha=0.45,
        linewidth=0.0,
        zorder=2.0,
        label="all pairs",
    )


def _happened(rows: Sequence[Row], tasks: Sequence[str]) -> list[tuple[str, list[int], str]]:
    """What is marked below the cosines: name, steps and colour of each kind."""
    won = {task: [row["step"] for row in rows if row["winner"] == task] for task in tasks}
    shown: Sequence[str] = tasks
    if len(tasks) > WINNERS:
        often = sorted(tasks, key=lambda task: -len(won[task]))[:WINNERS]
        shown = [task for task in tasks if task in often]
    kinds = [(f"{_plain(task)} won", won[task], BLUE) for task in shown]
    for task in tasks:
        key = row_key("dropped", task)
        left_out = [row["step"] for row in rows if row[key] and not row["skipped"]]
        if left_out:
            kinds.append((f"{_plain(task)} left out", left_out, VERMILION))
    skipped = [row["step"] for row in rows if row["skipped"]]
    if skipped:
        kinds.append(("skipped", skipped, BLACK))
    return kinds


def _draw_happened(
    axes: Axes, rows: Sequence[Row], kinds: Sequence[tuple[str, list[int], str]]
) -> None:
    """A strip per kind with a mark at every step of it."""
    width = 1.6 if len(rows) <= 300 else 0.8
    for place, (_, steps, color) in enumerate(kinds):
        axes.eventplot(
            [steps], lineoffsets=place, linelengths=0.75, linewidths=width, colors=[color]
        )
    axes.set_yticks(range(len(kinds)), [f"{name} ({len(steps)}×)" for name, steps, _ in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlabel("optimizer step", fontsize=12)
    axes.grid(axis="y", alpha=0.3)
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    span = max(last - first, 1)
    # Room for the names of the zones.
    axes.set_xlim(first - 0.02 * span, last + 0.24 * span)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _draw_legend(figure: SubFigure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=11)


def _draw_layers(axes: Axes, layers: Sequence[Row]) -> None:
    """A bar per layer with its name on it: a long name takes no room from the bars."""
    worst = layers[:LAYERS]
    many = f" (the worst {LAYERS} of {len(layers)})" if len(layers) > LAYERS else ""
    axes.set_title(f"How often do they conflict in each layer?{many}", fontsize=14)
    axes.set_xlim(0.0, 100.0)
    axes.set_xlabel("% of the comparisons of two tasks that had a cosine below 0", fontsize=12)
    if not worst:
        axes.set_yticks([])
        axes.text(1.0, 0.5, "no parameter had a gradient of two tasks", verticalalignment="center")
        axes.set_ylim(0.0, 1.0)
        return
    shares = [100.0 * layer["share"] for layer in worst]
    axes.barh(range(len(worst)), shares, color=BAR, height=0.85)
    for place, layer in enumerate(worst):
        name = _plain(layer["layer"])
        size = max(4.0, min(11.0, 1100.0 / len(name)))  # points: so that the longest just fits
        axes.text(0.4, place, name, verticalalignment="center", fontsize=size)
    labels = [
        f"{share:.0f} % of {layer['compared']}" for share, layer in zip(shares, worst, strict=True)
    ]
    axes.set_yticks(range(len(worst)), labels)
    axes.set_ylim(len(worst) - 0.4, -0.6)


def _draw_ranking(
    new_figure: type[Figure], layers: Sequence[Row], threshold: float, most: int
) -> Figure:
    """A thin bar per layer below its name: so a name of any length takes no room from the bars."""
    worst = layers[:most]
    places = range(len(worst))
    counts = [layer["conflicts"] for layer in worst]
    # As it is saved: letters of a size are not as wide at another resolution.
    figure = new_figure(figsize=(11, 1.5 + 0.46 * len(worst)), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    axes = figure.subplots()
    axes.barh(places, counts, color=BLUE, height=0.36)
    axes.set_yticks(places, [f"{place + 1}." for place in places])
    axes.set_ylim(len(worst) - 0.5, -0.75)
    axes.set_xlim(0.0, 1.25 * max(*counts, 1))  # room for the numbers
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_xlabel("conflicts s(l), of all comparisons of two tasks in the layer", fontsize=12)
    below = f"{threshold:g}".replace("-", "−")
    many = f" (the first {most} of {len(layers)})" if len(layers) > most else ""
    axes.set_title(
        f"Layers by conflicts: pairs of tasks with a cosine below {below}{many}", fontsize=13
    )
    figure.draw_without_rendering()  # only then it is known how wide the axes are
    for place, layer in enumerate(worst):
        _write_name(axes, place, layer["layer"])
        count, share = layer["conflicts"], 100.0 * layer["share"]
        axes.annotate(
            f"{count} of {layer['compared']} ({share:.0f} %)",
            (count, place),
            xytext=(4.0, 0.0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=10,
        )
    return figure


def _write_name(axes: Axes, place: int, layer: str) -> None:
    """Above the bar, in one line that is as wide as the axes at most."""
    name = shortened(layer, 1000)
    text = axes.annotate(
        _plain(name),
        (0.0, place - 0.22),
        xytext=(3.0, 1.0),
        textcoords="offset points",
        verticalalignment="bottom",
        fontsize=11.0,
    )
    room = 0.98 * axes.bbox.width
    length, size = len(name), 11.0
    while (width := text.get_window_extent().width) > room:
        if size > SMALLEST:
            size = max(SMALLEST, 0.98 * size * room / width)
            text.set_fontsize(size)
        else:
            length = min(length - 1, int(length * room / width))
            text.set_text(_plain(shortened(layer, length)))
