"""Pictures of the experiments' scores."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.experiments.common import SCENES, Record, scenes_in
from bench.experiments.tables import better, by_seed
from bench.experiments.training import Variant
from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREY, VERMILION

SEED_MARKERS = "os^vDPX*"


def score_picture(
    variants: dict[str, Sequence[Variant]],
    title: str,
    baseline: tuple[str, str],
    extra: Callable[[Axes, Sequence[Record], str], None] | None,
    records: Sequence[Record],
) -> Figure:
    """Draw each score of a scene in a panel, and what `extra` draws of each scene below.

    `baseline` is the key of the variant with a dashed line, and its name.
    """
    scenes = scenes_in(records)
    methods = {found["method"] for found in records}
    shown = {scene: [v for v in variants[scene] if v.key in methods] for scene in scenes}
    scores = [(scene, score) for scene in scenes for score in SCENES[scene].score_labels]
    scores = [(scene, score) for scene, score in scores if shown[scene]]
    rows = [
        2 + max(len(shown[scene]) for scene, _ in scores[first : first + 2])
        for first in range(0, len(scores), 2)
    ]
    scored = len(rows)
    rows += [12] * ((len(scenes) + 1) // 2 if extra else 0)
    figure = Figure(figsize=(13, sum(0.36 * r + 0.6 for r in rows) + 1.0), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False, height_ratios=rows)
    unused = list(panels.flat)
    for axes, (scene, score) in zip(panels.flat, scores, strict=False):
        draw_scores(axes, records, scene, score, shown[scene], baseline[0])
        unused.remove(axes)
    if extra:
        for axes, scene in zip(panels[scored:].flat, scenes, strict=False):
            extra(axes, [found for found in records if found["scene"] == scene], scene)
            unused.remove(axes)
    for axes in unused:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=15)
    handles = legend_handles(sorted({found["seed"] for found in records}), baseline[1])
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=12)
    return figure


def draw_scores(
    axes: Axes,
    records: Sequence[Record],
    scene: str,
    score: str,
    variants: Sequence[Variant],
    baseline: str,
) -> None:
    """Draw one score of a scene: a line per variant with a dot per seed, and the mean."""
    factor = 100.0 if SCENES[scene].score_in_percent else 1.0
    label = SCENES[scene].score_labels[score]
    for row, variant in enumerate(variants):
        runs = by_seed(records, scene, variant.key)
        scores = {seed: factor * found["scores"][score] for seed, found in runs.items()}
        mean = statistics.fmean(scores.values())
        for seed, value in scores.items():
            axes.plot(value, row, **seed_style(seed))
        axes.plot(mean, row, color=BLACK, marker="|", markersize=17, markeredgewidth=2.0)
        if variant.key == baseline:
            axes.axvline(mean, color=VERMILION, linewidth=1.0, linestyle="--", zorder=0)
    name_lines(axes, [variant.name for variant in variants], 12)
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.set_xlabel(f"validation {label} ({better(scene)})", fontsize=11)
    axes.set_title(f"{scene}: {label}", fontsize=13)


def name_lines(axes: Axes, names: Sequence[str], fontsize: int = 11) -> None:
    """Write the names of the lines from above to below."""
    axes.set_yticks(range(len(names)), list(names), fontsize=fontsize)
    axes.invert_yaxis()


def number_windows(axes: Axes, windows: Sequence[int]) -> None:
    """Write numbers of micro-batches below a logarithmic axis."""
    axes.set_xscale("log")
    axes.set_xticks(windows, [str(window) for window in windows])
    axes.minorticks_off()
    axes.set_xlabel("micro-batches in a window", fontsize=11)
    axes.grid(color=GREY, alpha=0.25)


def seed_style(seed: int) -> dict[str, Any]:
    """Return how the dot of a seed is drawn."""
    return {
        "linestyle": "",
        "marker": SEED_MARKERS[seed % len(SEED_MARKERS)],
        "markersize": 7,
        "color": BLUE,
        "markerfacecolor": "none",
        "markeredgewidth": 1.5,
    }


def legend_handles(seeds: Sequence[int], baseline: str) -> list[Line2D]:
    """Return the entries of the legend, with the name of the dashed line."""
    dots = [Line2D([], [], label=f"seed {seed}", **seed_style(seed)) for seed in seeds]
    mean = Line2D([], [], linestyle="", color=BLACK, marker="|", markersize=15, markeredgewidth=2.0)
    mean.set_label("mean")
    plain = Line2D([], [], color=VERMILION, linestyle="--", label=f"mean of {baseline}")
    return [*dots, mean, plain]
