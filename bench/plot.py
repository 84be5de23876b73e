"""Pictures of what `python -m gcond_kernels bench` measured.

    python bench/plot.py bench.json [--output FOLDER]

    roofline.png        share of the copy's bandwidth that each operation reaches, by whom
    cost_by_size.png    time of a resolution against the number of parameters, 2 tasks
    cost_by_tasks.png   time of a resolution against the number of tasks, beside others

Quartiles are drawn as bars or bands. What was not measured is not drawn.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture
except ModuleNotFoundError:
    sys.exit('bench/plot.py needs matplotlib: pip install "gcond-kernels[plot]"')

from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREY, VERMILION

Figure = dict[str, Any]

TASKS_OF_ROOFLINE = 2
# Colours that colour-blind people can tell apart (Okabe and Ito), and a marker for each.
GREEN, ORANGE, PURPLE, SKY, YELLOW = "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#b8a800"
STYLES = {
    "python": (BLUE, "o", "this package, reference (plain torch)"),
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


def main(given=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON file that the bench wrote")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: the folder of the record"
    )
    arguments = parser.parse_args(given)
    try:
        record = json.loads(arguments.record.read_text())
        figures = [f for f in record["figures"] if "seconds" in f and "operation" in f]
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{arguments.record} is no record of the bench: {error!r}", file=sys.stderr)
        return 2
    folder = arguments.output or arguments.record.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    about = record["machine"]
    where = f"{about['device']}, torch {about['torch']}, commit {about['commit']}"
    for name, draw in (
        ("roofline", roofline),
        ("cost_by_size", cost_by_size),
        ("cost_by_tasks", cost_by_tasks),
    ):
        picture = draw(figures)
        if picture is None:
            print(f"{name}: nothing of it in {arguments.record}")
            continue
        picture.suptitle(where, fontsize=7, color=DIM)
        picture.savefig(folder / f"{name}.png", dpi=150)
        print(folder / f"{name}.png")
    return 0


def roofline(figures: list[Figure]) -> Picture | None:
    """Bars of copy time / time, an operation per group, of the largest model that has them."""
    figures = [
        f for f in figures if "fraction" in f and f["tasks"] in (1, TASKS_OF_ROOFLINE)
        and "masked" not in f["what"] and f["operation"] != "graddrop" and f["by"] in STYLES
        and not f["by"].startswith(("TorchJD", "published"))
    ]  # fmt: skip
    model = largest_model(f for f in figures if f["operation"] == "resolution")
    figures = [f for f in figures if f["model"] == model]
    if not figures:
        return None
    groups = list(dict.fromkeys((f["operation"], f["what"]) for f in figures))
    who = [by for by in STYLES if any(f["by"] == by for f in figures)]
    picture = Picture(
        figsize=(8.2, 0.9 + len(groups) * (0.24 + 0.17 * len(who))), layout="constrained"
    )
    axes = picture.subplots()
    height = 0.8 / len(who)
    for figure in figures:
        place = groups.index((figure["operation"], figure["what"]))
        y = place - 0.4 + height * (who.index(figure["by"]) + 0.5)
        bar(axes, figure, y, height)
    size = figures[0]
    axes.set_yticks(range(len(groups)), [label_of(*group) for group in groups])
    axes.invert_yaxis()
    axes.axvline(100, color=BLACK, linewidth=1)
    axes.text(
        100, 1.0, "copy", ha="center", va="bottom", fontsize=8, transform=axes.get_xaxis_transform()
    )
    axes.set_xlabel(
        "bandwidth of the fewest bytes that must move, in % of a copy's in the same run"
    )
    axes.set_xlim(0, max(112, 100 * max(f["fraction"]["high"] for f in figures) + 8))
    axes.set_title(
        f"{model}: {size['parameters'] / 1e6:.3g} M parameters in {size['tensors']} tensors, "
        f"{TASKS_OF_ROOFLINE} tasks", fontsize=10, pad=16,
    )  # fmt: skip
    legend(picture, axes, [(STYLES[by][0], STYLES[by][2]) for by in who])
    return finished(picture, axes)


def bar(axes: Axes, figure: Figure, y: float, height: float) -> None:
    value = {key: 100 * share for key, share in figure["fraction"].items()}
    error = [[value["median"] - value["low"]], [value["high"] - value["median"]]]
    colour = STYLES[figure["by"]][0]
    axes.barh(y, value["median"], height * 0.9, color=colour, xerr=error, ecolor=GREY)
    axes.text(value["high"] + 1, y, f"{value['median']:.0f}", va="center", fontsize=7)


def cost_by_size(figures: list[Figure]) -> Picture | None:
    """Lines of the time of a resolution over the parameters."""
    chosen = [f for f in figures if f["operation"] == "resolution" and f["model"] == "even"]
    return lines(
        [f for f in chosen if not f["what"]], "parameters", "parameters",
        "A resolution of 2 tasks, against the number of parameters (in 300 tensors)",
    )  # fmt: skip


def cost_by_tasks(figures: list[Figure]) -> Picture | None:
    """Lines of the time of a resolution over the tasks, of the largest model with most of them."""
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
    size = f"{chosen[0]['parameters'] / 1e6:.3g} M parameters in {chosen[0]['tensors']} tensors"
    return lines(chosen, "tasks", "tasks K", f"A resolution of {model}, {size}")


def lines(figures: list[Figure], across: str, label: str, title: str) -> Picture | None:
    """A line per way and one of the copy; both axes logarithmic."""
    who = [by for by in STYLES if any(f["by"] == by for f in figures)]
    if not who:
        return None
    picture = Picture(figsize=(8.2, 4.6), layout="constrained")
    axes = picture.subplots()
    for by in who:
        colour, marker, name = STYLES[by]
        own = sorted((f for f in figures if f["by"] == by), key=lambda f: f[across])
        draw_line(axes, [(f[across], f["seconds"]) for f in own], colour, marker, name)
    copies = {f[across]: f["copy_seconds"] for f in figures if "copy_seconds" in f}
    draw_line(axes, sorted(copies.items()), GREY, "", COPY, style="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs = sorted({f[across] for f in figures})
    axes.set_xticks(xs, [f"{x / 1e6:.3g} M" if across == "parameters" else str(x) for x in xs])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("milliseconds")
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title, fontsize=10)
    picture.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False
    )
    return finished(picture, axes)


def draw_line(
    axes: Axes, points: Iterable[tuple[float, dict[str, float]]], colour: str, marker: str,
    name: str, style: str = "-",
) -> None:  # fmt: skip
    points = list(points)
    x = [place for place, _ in points]
    median, low, high = (
        [1e3 * seconds[key] for _, seconds in points] for key in ("median", "low", "high")
    )
    axes.plot(x, median, color=colour, marker=marker, linestyle=style, label=name, markersize=6)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def largest_model(figures: Iterable[Figure]) -> str | None:
    sizes = {f["model"]: f["parameters"] for f in figures if f["model"] != "even"}
    return max(sizes, key=sizes.__getitem__, default=None)


def label_of(operation: str, what: str) -> str:
    if not what:
        return {"resolution": "whole\nresolution"}.get(operation, operation)
    dtype, _, turn = what.partition(", ")
    return f"{operation} {dtype}\n{turn} micro-batch"


def legend(picture: Picture, axes: Axes, entries: list[tuple[str, str]]) -> None:
    handles = [axes.barh([0], [0], color=colour, label=name) for colour, name in entries]
    picture.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def finished(picture: Picture, axes: Axes) -> Picture:
    axes.spines[["top", "right"]].set_visible(False)
    return picture


if __name__ == "__main__":
    sys.exit(main())
