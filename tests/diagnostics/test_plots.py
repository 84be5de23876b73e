"""The pictures of conflicts."""

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from gcond_kernels.diagnostics import plots
from gcond_kernels.diagnostics.plots import plot_conflicts, plot_layer_conflicts
from gcond_kernels.diagnostics.recorder import Recorder
from tests.helpers.recorded import (
    LAYERS,
    THRESHOLDS,
    RecordedLayers,
    add,
    filled,
    gradients_of,
    two_tasks,
    with_cosines,
)


@pytest.mark.parametrize(
    ("steps", "tasks", "options"),
    [
        (1, 2, {}),
        (3, 1, {}),
        (70, 3, {}),
        (5, 8, {}),
        (80, 16, {"dropped": (1,)}),
        (4, 2, {"dropped": (0,), "skipped": True}),
    ],
)
def test_a_picture_of_any_run(tmp_path, steps, tasks, options):
    path = plot_conflicts(filled(steps, tasks=tasks, **options), tmp_path / "conflicts.png")
    assert path == tmp_path / "conflicts.png"
    height, width = imread(path).shape[:2]
    assert width == 1430
    assert 1000 < height < 2600


def test_a_picture_with_slashes_in_names_and_of_a_task_that_was_added(tmp_path):
    kept = Recorder(["a/b", "c"], THRESHOLDS, 5)
    add(kept, gradients_of(2, 1), 1)
    kept.add_task("a")
    add(kept, gradients_of(3, 2), 2)
    assert plot_conflicts(kept, tmp_path / "conflicts.png").exists()


def drawn_by(draw, *args):
    figure = plots._figure_and_path("", "picture")[0]
    draw(figure, *args)
    figure.canvas.draw()
    return figure


def axes_of(kept: Recorder):
    figure = drawn_by(plots._draw_conflicts, kept)
    upper, lower = figure.subfigs
    return *upper.axes, *lower.axes


def labels_of(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def tick_names(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_few_pairs_are_drawn_each_and_many_by_their_range():
    top, *_ = axes_of(filled(5, tasks=3))
    pairs = [("task0", "task1"), ("task0", "task2"), ("task1", "task2")]
    assert labels_of(top) == [f"cosine of {a} and {b}" for a, b in pairs]
    kept = filled(5, tasks=8)
    top, *_ = axes_of(kept)
    assert labels_of(top) == ["all pairs", "smallest of all pairs"]
    assert "28 pairs are too many" in top.get_title()
    drawn = next(line for line in top.lines if line.get_label() == "smallest of all pairs")
    assert list(drawn.get_ydata()) == [row["min_cosine"] for row in kept.rows()]


def test_winners_dropped_tasks_and_skipped_steps_are_marked():
    kept = Recorder("ab", THRESHOLDS, 10)
    add(kept, two_tasks(-0.9), 1)
    add(kept, two_tasks(-0.9), 2, dropped=(0,), skipped=True)
    add(kept, two_tasks(-0.9), 3, dropped=(1,))
    top, strip, *_ = axes_of(kept)
    assert tick_names(strip) == [
        *("a won (1×)", "b won (0×)", "went against a (0×)", "went against b (1×)"),
        *("b left out (1×)", "skipped (1×)"),
    ]
    marked = [[float(x) for x in marks.get_positions()] for marks in strip.collections]
    assert marked == [[1.0], [], [], [1.0], [3.0], [2.0]]
    assert (
        strip.get_title() == "Who won the first conflict of a step, and against whom the step went"
    )
    (line,) = [line for line in top.lines if line.get_label() == "skipped step"]
    assert list(line.get_xdata()) == [2, 2]


def test_without_winners_it_is_drawn_against_whom_steps_went():
    kept = Recorder([f"task{task}" for task in range(14)], THRESHOLDS, 10)
    for number in range(1, 4):
        add(kept, gradients_of(14, number), number, max_iterations=0)  # the plain sum
    _, strip, *_ = axes_of(kept)
    counts = {task: sum(row[f"rising/{task}"] for row in kept.rows()) for task in kept.tasks}
    most = sorted(counts, key=lambda task: -counts[task])[:12]
    names = [f"went against {task} ({n}×)" for task, n in counts.items() if task in most]
    assert tick_names(strip) == names
    assert strip.get_title() == "Against whom the step went (the 12 with most)"


def test_norms_are_drawn_over_the_steps_on_a_logarithmic_axis():
    kept = Recorder("abc", THRESHOLDS, 10)
    for number in range(1, 6):
        gradients = [torch.tensor([[3.0], [0.5], [0.0]]).double() * number]
        add(kept, gradients, number)
    *_, norms, _ = axes_of(kept)
    assert norms.get_yscale() == "log"
    assert norms.get_title().endswith("(largest by smallest: 6, median)")
    drawn = {line.get_label(): list(line.get_ydata()) for line in norms.lines}
    assert drawn["of a"] == pytest.approx([3.0, 6.0, 9.0, 12.0, 15.0])
    assert drawn["of b"] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5])
    assert all(math.isnan(norm) for norm in drawn["of c"])
    *_, norms, _ = axes_of(filled(5, tasks=13))
    assert [text.get_text() for text in norms.get_legend().get_texts()] == ["of all tasks"]


def test_zones_are_named_by_the_thresholds_there_is_room_for():
    top, *_ = axes_of(with_cosines([0.5], (-0.75, -0.72, -0.2)))
    assert [text.get_text().strip() for text in top.texts] == [
        "no conflict",
        "mild (below −0.2)",
        "critical (at most −0.75)",
    ]


def test_names_are_drawn_as_they_are_and_fit():
    names = ("_first$_$", "module." * 26 + "weight", *(f"layer{number}" for number in range(28)))
    kept = Recorder(["_a$x$", "_b"], THRESHOLDS, 10)
    add(kept, gradients_of(2, 0, 30), names=names)
    top, strip, norms, bars = axes_of(kept)
    assert labels_of(top) == [r"cosine of _a\$x\$ and _b"]
    assert any(name.startswith(r"went against _a\$x\$") for name in tick_names(strip))
    assert [text.get_text() for text in norms.get_legend().get_texts()] == [
        *(r"of _a\$x\$", "of _b")
    ]
    worst = sorted(kept.layers(), key=lambda layer: -layer["share"])[: plots.LAYERS]
    texts = [text.get_text().replace(r"\$", "$") for text in bars.texts]
    assert texts[1::2] == [layer["layer"] for layer in worst]
    assert texts[::2] == [
        f"{n} of 1 ({100 * n} %)" for n in (layer["conflicts"] for layer in worst)
    ]
    assert [bar.get_width() for bar in bars.patches] == [100 * layer["share"] for layer in worst]
    assert bars.get_title() == "How often do they conflict in each layer? (the first 20 of 30)"


@pytest.mark.parametrize(
    ("plot", "recorder", "empty"),
    [
        (plot_conflicts, filled(2), Recorder("ab", THRESHOLDS, 5)),
        (plot_layer_conflicts, RecordedLayers(LAYERS), RecordedLayers([])),
    ],
    ids=["conflicts", "layers"],
)
def test_a_folder_is_made_png_the_default_and_nothing_no_picture(tmp_path, plot, recorder, empty):
    path = plot(recorder, str(tmp_path / "new" / "folder" / "picture"))
    assert path == tmp_path / "new" / "folder" / "picture.png"
    assert imread(path).std() > 0.05
    with pytest.raises(ValueError, match="is a folder"):
        plot(recorder, tmp_path)
    with pytest.raises(ValueError, match=r"nothing to draw before .*train some steps first"):
        plot(empty, tmp_path / "other" / "picture.png")
    assert not (tmp_path / "other").exists()


def test_options_of_the_picture_of_layers(tmp_path):
    recorder = RecordedLayers(LAYERS)
    plot_layer_conflicts(recorder, tmp_path / "layers", threshold=-0.1)
    assert recorder.threshold == -0.1
    for most in (0, -1, 1.0, True, "3"):
        with pytest.raises(ValueError, match="most must be a whole number, 1 or more"):
            plot_layer_conflicts(recorder, tmp_path / "p.png", most=most)


@pytest.mark.parametrize("function", ["plot_conflicts", "plot_layer_conflicts"])
def test_without_matplotlib_the_error_names_its_extra(function):
    program = f"""
import sys
sys.modules["matplotlib"] = None
from gcond_kernels.diagnostics import plots
from gcond_kernels.recipes.recon import conflict_table, split_conflicting_layers
try:
    plots.{function}(None, "picture.png")
except ImportError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{function} needs matplotlib")
    assert 'pip install "gcond-kernels[plot]"' in ended.stdout


# The picture of layers.


def drawn(rows, threshold=-0.02, most=25):
    layers = RecordedLayers(rows).layers(threshold=threshold)
    figure = drawn_by(plots._draw_ranking, layers, threshold, most)
    return figure, figure.axes[0]


def is_within(box, outer) -> bool:
    horizontal = outer.x0 <= box.x0 and box.x1 <= outer.x1
    return horizontal and outer.y0 <= box.y0 and box.y1 <= outer.y1


@pytest.mark.parametrize("layers", [1, 2, 30])
def test_the_picture_has_room_for_all_that_is_in_it(layers):
    rows = [
        (f"{place}.$W$_" + "W" * (60 * (layers - 1 - place)), 1000 * place, 100000)
        for place in range(layers)
    ]
    figure, axes = drawn(rows)
    assert figure.dpi == plots.DPI  # letters of a size are not as wide at another resolution
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 2 * min(layers, 25)
    assert all(is_within(box, axes.get_window_extent()) for box in boxes)
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
    for bar in axes.patches:
        # A name's letters stand above its bar, the numbers beside.
        assert not any(bar.get_window_extent().shrunk(0.99, 0.99).overlaps(b) for b in boxes)
    assert all(text.get_fontsize() >= 8.0 for text in axes.texts)
    labels = (axes.title, axes.xaxis.label, *axes.get_yticklabels())
    assert all(is_within(label.get_window_extent(), figure.bbox) for label in labels)


def test_the_picture_says_what_the_table_says():
    _, axes = drawn(LAYERS, most=3)
    assert [bar.get_width() for bar in axes.patches] == [30, 29, 3]
    heights = [bar.get_window_extent().y0 for bar in axes.patches]
    assert heights == sorted(heights, reverse=True)
    texts = [text.get_text() for text in axes.texts]
    assert texts[1::2][0] == "body.2.0"
    assert texts[1::2][2] == "head"
    assert texts[::2] == ["30 of 40 (75 %)", "29 of 30 (97 %)", "3 of 40 (8 %)"]
    title = "Layers by conflicts: pairs of tasks with a cosine below −0.02 (the first 3 of 4)"
    assert axes.get_title() == title
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1.", "2.", "3."]
    _, none = drawn([("head", 0, 3)], threshold=0.0)
    assert none.get_title().endswith("a cosine below 0")
    assert none.get_xlim()[1] >= 1.0
