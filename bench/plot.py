"""Pictures of the figures of operations.

    roofline.png        share of the copy's bandwidth that each operation reaches, by whom
    cost_by_size.png    time of a resolution against the number of parameters, 2 tasks
    cost_by_tasks.png   time of a resolution against the number of tasks, beside others

Quartiles are drawn as bars or bands. What was not measured is not drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from bench.record import Figure, InputError, read
from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREY, VERMILION

TASKS_OF_ROOFLINE = 2
# Colors that color-blind people can tell apart (Okabe and Ito), and a marker for each.
GREEN, ORANGE, PURPLE, SKY, YELLOW = "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#b8a800"
STYLES = {
    "python": (BLUE, "o", "this package, reference (plain torch)"),
    "cpu": (VERMILION, "D", "this package, C++ on the CPU"),
    "triton": ("#332288", "s", "this package, Triton"),
    "cuda": (VERMILION, "D", "this package, CUDA C++"),
    "cuda, apart": (VERMILION, "D", "this package, CUDA C++"),
    "cuda, one launch": (BLACK, "P", "this package, CUDA C++, one launch"),
    "torch foreach": (GREEN, "^", "plain torch, _foreach_*"),
    "torch loop": (ORANGE, "v", "plain torch, tensor by tensor"),
    "TorchJD PCGrad": (PURPLE, "x", "TorchJD, PCGrad"),
    "TorchJD UPGrad": (SKY, "+", "TorchJD, UPGrad"),
    "TorchJD CAGrad": (YELLOW, "1", "TorchJD, CAGrad"),
    "published code": ("#882255", "*", "published GCond code"),
}
COPY = "copy of the bytes that this\npackage must move"
DIM = "#666666"
QUARTILES = ("median", "low", "high")


def main(given: Sequence[str]) -> int:
    """Draw the pictures of a record and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("record", type=Path, help="JSON file that the bench wrote")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: that of the record")
    options = parser.parse_args(given)
    try:
        record = read(options.record)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    figures = [f for f in record["figures"] if "seconds" in f and "operation" in f]
    folder = options.output or options.record.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    about = record["machine"]
    where = f"{about.get('device')}, torch {about.get('torch')}, commit {about.get('commit')}"
    for draw in (roofline, cost_by_size, cost_by_tasks):
        picture = draw(figures)
        if picture is None:
            print(f"{draw.__name__}: nothing of it in {options.record}")
            continue
        picture.suptitle(where, fontsize=7, color=DIM)
        path = folder / f"{draw.__name__}.png"
        picture.savefig(path, dpi=150)
        print(path)
    return 0


def roofline(figures: list[Figure]) -> Picture | None:
    """Draw bars of copy time / time, an operation per group, of the largest model with them."""
    figures = [figure for figure in figures if is_in_roofline(figure)]
    model = largest_model(f for f in figures if f["operation"] == "resolution")
    figures = [f for f in figures if f["model"] == model]
    if not figures:
        return None
    groups = list(dict.fromkeys((f["operation"], f["what"]) for f in figures))
    who = [by for by in STYLES if any(f["by"] == by for f in figures)]
    height = 0.8 / len(who)
    size = 8.2, 0.9 + len(groups) * (0.24 + 0.17 * len(who))
    picture, axes = new_picture(size, f"{model}: {size_of(figures[0])}, {TASKS_OF_ROOFLINE} tasks")
    for figure in figures:
        place = groups.index((figure["operation"], figure["what"]))
        y = place - 0.4 + height * (who.index(figure["by"]) + 0.5)
        bar(axes, figure, y, height)
    axes.set_yticks(range(len(groups)), [label_of(*group) for group in groups])
    axes.invert_yaxis()
    axes.axvline(100, color=BLACK, linewidth=1)
    above = axes.get_xaxis_transform()
    axes.text(100, 1.0, "copy", ha="center", va="bottom", fontsize=8, transform=above)
    axes.set_xlabel("bandwidth of the fewest bytes that must move, in % of a copy's, in one run")
    axes.set_xlim(0, max(112, 100 * max(f["fraction"]["high"] for f in figures) + 8))
    handles = [axes.barh([0], [0], color=STYLES[by][0], label=STYLES[by][2]) for by in who]
    picture.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return picture


def new_picture(size: tuple[float, float], title: str) -> tuple[Picture, Axes]:
    """Return an empty picture and its axes."""
    picture = Picture(figsize=size, layout="constrained")
    axes = picture.subplots()
    axes.set_title(title, fontsize=10, pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def is_in_roofline(figure: Figure) -> bool:
    return (
        "fraction" in figure
        and figure["tasks"] in (1, TASKS_OF_ROOFLINE)
        and "masked" not in figure["what"]
        and figure["operation"] != "graddrop"
        and figure["by"] in STYLES
        and not figure["by"].startswith(("TorchJD", "published"))
    )


def size_of(figure: Figure) -> str:
    return f"{figure['parameters'] / 1e6:.3g} M parameters in {figure['tensors']} tensors"


def bar(axes: Axes, figure: Figure, y: float, height: float) -> None:
    value = {key: 100 * share for key, share in figure["fraction"].items()}
    error = [[value["median"] - value["low"]], [value["high"] - value["median"]]]
    color = STYLES[figure["by"]][0]
    axes.barh(y, value["median"], height * 0.9, color=color, xerr=error, ecolor=GREY)
    axes.text(value["high"] + 1, y, f"{value['median']:.0f}", va="center", fontsize=7)


def cost_by_size(figures: list[Figure]) -> Picture | None:
    """Draw the time of a resolution over the parameters."""
    chosen = [f for f in figures if f["operation"] == "resolution" and f["model"] == "even"]
    title = "A resolution of 2 tasks, against the number of parameters (in 300 tensors)"
    return lines([f for f in chosen if not f["what"]], "parameters", "parameters", title)


def cost_by_tasks(figures: list[Figure]) -> Picture | None:
    """Draw the time of a resolution over the tasks, of the largest model with most of them."""
    chosen = [f for f in figures if f["operation"] == "resolution" and not f["what"]]
    counts: dict[str, set[int]] = {}
    for figure in chosen:
        counts.setdefault(figure["model"], set()).add(figure["tasks"])
    counts = {model: tasks for model, tasks in counts.items() if len(tasks) > 1}
    if not counts:
        return None
    most = max(map(len, counts.values()))
    model = largest_model(f for f in chosen if len(counts.get(f["model"], ())) == most)
    chosen = [f for f in chosen if f["model"] == model]
    return lines(chosen, "tasks", "tasks K", f"A resolution of {model}, {size_of(chosen[0])}")


def lines(figures: list[Figure], across: str, label: str, title: str) -> Picture | None:
    """Draw a line per competitor and one of the copy; both axes logarithmic."""
    who = [by for by in STYLES if any(f["by"] == by for f in figures)]
    if not who:
        return None
    picture, axes = new_picture((8.2, 4.6), title)
    for by in who:
        color, marker, name = STYLES[by]
        own = {f[across]: f["seconds"] for f in figures if f["by"] == by}
        draw_line(axes, own, color, marker=marker, label=name)
    copies = {f[across]: f["copy_seconds"] for f in figures if "copy_seconds" in f}
    draw_line(axes, copies, GREY, linestyle="--", label=COPY)
    axes.loglog()
    xs = sorted({f[across] for f in figures})
    axes.set_xticks(xs, [f"{x / 1e6:.3g} M" if across == "parameters" else str(x) for x in xs])
    axes.minorticks_off()
    axes.set(xlabel=label, ylabel="milliseconds")
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    drawn = axes.get_legend_handles_labels()
    picture.legend(*drawn, loc="outside right upper", fontsize=8, frameon=False)
    return picture


def draw_line(axes: Axes, times: dict[float, dict[str, float]], color: str, **style: str) -> None:
    """Draw times with a band between the quartiles."""
    x = sorted(times)
    median, low, high = ([1e3 * times[place][key] for place in x] for key in QUARTILES)
    axes.plot(x, median, color=color, markersize=6, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def largest_model(figures: Iterable[Figure]) -> str | None:
    sizes = {f["model"]: f["parameters"] for f in figures if f["model"] != "even"}
    return max(sizes, key=sizes.__getitem__, default=None)


def label_of(operation: str, what: str) -> str:
    if not what:
        return {"resolution": "whole\nresolution"}.get(operation, operation)
    dtype, _, turn = what.partition(", ")
    return f"{operation} {dtype}\n{turn} micro-batch"
