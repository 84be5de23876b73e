"""The history of conflicts: what is kept, what is read from it, and its picture."""

import copy
import csv
import io
import math
import pickle
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gcond_kernels import GCond, GCondFused, ops
from gcond_kernels.diagnostics import plots as plot
from gcond_kernels.diagnostics import recorder
from gcond_kernels.diagnostics.plots import plot_conflicts, plot_layer_conflicts
from gcond_kernels.diagnostics.recorder import ALL_ZONES, Recorder, row_key, zone_of
from gcond_kernels.recipes.recon import conflict_table, split_conflicting_layers
from tests.helpers.host_reads import HostReads

THRESHOLDS = (-0.8, -0.5, 0.0)
NAMES = ("first.weight", "first.bias", "last.weight")


def gradients_of(tasks: int, seed: int, tensors: int = len(NAMES)) -> list[torch.Tensor]:
    """Per tensor the gradients of all tasks: [K, 5] float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tasks, 5, generator=generator, dtype=torch.float64) for _ in range(tensors)]


def two_tasks(cosine: float) -> list[torch.Tensor]:
    """One tensor in which the gradients of two tasks have this cosine."""
    other = [cosine, math.sqrt(1.0 - cosine**2)]
    return [torch.tensor([[1.0, 0.0], other], dtype=torch.float64)]


def add(
    kept: Recorder, gradients, number=1, names=NAMES, dropped=(), skipped=False, momentum=False
) -> None:
    """Records one step; `dropped` are tasks without a finite gradient."""
    K = len(kept.tasks)
    gone = torch.tensor([task in dropped for task in range(K)])
    rows = torch.stack(gradients)  # [T, K, n]
    rows = rows.masked_fill(gone[:, None], math.nan if skipped else 0.0)
    if momentum:  # a row beyond the tasks', opposed to all of them
        rows = torch.cat([rows, -rows.sum(1, keepdim=True)], dim=1)
    per_tensor = rows @ rows.mT
    gramian = per_tensor.sum(0)[:K, :K].contiguous()
    method = GCond(thresholds=kept.thresholds)
    scale = torch.ones(K, dtype=torch.float64)
    decision = method.resolve(
        gramian, gramian, scale, method.new_state(K, torch.device("cpu")), backend="python"
    )
    number = torch.as_tensor(number)
    kept.record(number, names[: len(gradients)], gramian, per_tensor, decision, gone)


def filled(steps: int, tasks: int = 2, keep: int = 1000, **options) -> Recorder:
    kept = Recorder([f"task{task}" for task in range(tasks)], THRESHOLDS, keep)
    for number in range(1, steps + 1):
        add(kept, gradients_of(tasks, number), number, **options)
    return kept


def with_cosines(cosines, thresholds=THRESHOLDS) -> Recorder:
    kept = Recorder("ab", thresholds, 1000)
    for number, cosine in enumerate(cosines, start=1):
        add(kept, two_tasks(cosine), number)
    return kept


# What is kept.


def test_only_the_latest_steps_are_kept_oldest_first():
    kept = Recorder("ab", THRESHOLDS, 4)
    for number in range(1, 12):
        add(kept, gradients_of(2, number), number)
        expected = list(range(max(1, number - 3), number + 1))
        assert [row["step"] for row in kept.rows()] == expected
        assert len(kept) == len(expected)


def test_steps_keep_the_order_they_came_in_whatever_their_number():
    kept = Recorder("ab", THRESHOLDS, 3)
    for number in (1, 2, 3, 4, 2):  # as after loading an older state
        add(kept, gradients_of(2, number), number)
    assert [row["step"] for row in kept.rows()] == [3, 4, 2]


def test_nothing_is_kept_of_no_steps():
    kept = filled(3, keep=0)
    assert len(kept) == 0
    assert kept.rows() == kept.layers() == []
    assert "record_steps is 0" in kept.advise()


def test_a_recorder_without_a_step_is_empty():
    kept = Recorder("ab", THRESHOLDS, 5)
    assert len(kept) == 0
    assert kept.rows() == kept.layers() == []
    assert "train some steps" in kept.advise()
    kept.clear()


def test_clear_forgets_in_place():
    kept = filled(7, keep=5)
    ring = kept._ring
    kept.clear()
    assert len(kept) == 0
    assert kept.rows() == kept.layers() == []
    add(kept, gradients_of(2, 0), 8)
    assert kept._ring is ring  # a CUDA graph goes on writing there
    assert [row["step"] for row in kept.rows()] == [8]
    assert [row["compared"] for row in kept.layers()] == [1, 1]


@pytest.mark.parametrize("keep", [3, 10])
def test_a_task_that_is_added_had_nothing_in_the_steps_before(keep):
    kept, before = filled(5, keep=keep, dropped=(1,)), filled(5, keep=keep, dropped=(1,)).rows()
    kept.add_task("new")
    assert kept.tasks == ("task0", "task1", "new")
    of_new = {
        "cosine/task0/new": None, "cosine/task1/new": None, "norm/new": None, "weight/new": None,
        "dropped/new": False,
    }  # fmt: skip
    assert kept.rows() == [row | of_new for row in before]
    add(kept, gradients_of(3, 7), 6)
    fresh = Recorder(kept.tasks, THRESHOLDS, keep)
    add(fresh, gradients_of(3, 7), 6)
    assert kept.rows()[-1] == fresh.rows()[-1]
    assert kept.rows()[:-1] == [row | of_new for row in before][-keep + 1 :]
    assert "Looked at" in kept.advise()
    empty = Recorder("ab", THRESHOLDS, keep)
    empty.add_task("c")
    add(empty, gradients_of(3, 7), 6)
    assert empty.rows()[0]["norm/c"] == fresh.rows()[0]["norm/new"]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
@pytest.mark.parametrize("max_iterations", [None, 0])
def test_nothing_is_read_from_the_device_while_recording(tasks, names, max_iterations):
    kept = Recorder([f"task{task}" for task in range(tasks)], THRESHOLDS, 3)
    G = gradients_of(tasks, 0, len(names))
    per_tensor = torch.stack([g @ g.T for g in G])
    method = GCond(max_iterations=max_iterations)
    state = method.new_state(tasks, torch.device("cpu"))
    scale = torch.ones(tasks, dtype=torch.float64)
    total = per_tensor.sum(0)
    decision = method.resolve(total, total, scale, state, backend="python")
    dropped, number = torch.zeros(tasks, dtype=torch.bool), torch.tensor(1)
    with HostReads() as reads:
        for _ in range(5):
            kept.record(number, names, total, per_tensor, decision, dropped)
    assert reads.found == []
    assert len(kept) == 3
    assert [row["conflicts"] for row in kept.rows()] == [
        int((decision.events[:, 0] >= 0).sum())
    ] * 3


def test_a_replayed_graph_would_record_every_step():
    # The same host code again and again: all that differs lies in tensors.
    kept = Recorder("ab", THRESHOLDS, 4)
    number = torch.tensor(0)
    for _ in range(6):
        number += 1
        add(kept, two_tasks(-0.5), number)
    assert [row["step"] for row in kept.rows()] == [3, 4, 5, 6]


def test_what_was_given_may_be_written_over_afterwards():
    kept = Recorder("ab", THRESHOLDS, 4)
    number, G = torch.tensor(1), torch.eye(2, dtype=torch.float64)
    events = torch.full((4, 5), math.nan, dtype=torch.float64)
    weights, finite = torch.ones(2, dtype=torch.float64), torch.tensor(True)
    decision = ops.Arbitration(weights, G, events, finite)
    kept.record(number, NAMES[:1], G, G[None], decision, torch.zeros(2, dtype=torch.bool))
    before = kept.rows()
    for tensor in (number, G, events, weights, finite):
        tensor.zero_()
    assert kept.rows() == before


def test_a_first_step_in_a_capture_is_not_recorded_and_said(monkeypatch):
    kept = Recorder("ab", THRESHOLDS, 4)
    monkeypatch.setattr(recorder, "is_capturing", lambda device: True)
    with pytest.warns(UserWarning, match="one step before the capture"):
        add(kept, two_tasks(0.5))
    assert len(kept) == 0
    monkeypatch.setattr(recorder, "is_capturing", lambda device: False)
    add(kept, two_tasks(0.5))
    monkeypatch.setattr(recorder, "is_capturing", lambda device: True)
    add(kept, two_tasks(0.5))
    assert len(kept) == 2


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
@pytest.mark.parametrize("steps", [0, 7])
def test_a_copy_goes_on_by_itself(twin_of, steps):
    kept = filled(steps, tasks=3, keep=5)
    twin = twin_of(kept)
    assert twin.rows() == kept.rows()
    assert twin.layers() == kept.layers()
    before = kept.rows()
    add(twin, gradients_of(3, 8), 8)
    assert twin.rows()[-1]["step"] == 8
    assert kept.rows() == before


# Rows.


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_rows_are_what_numpy_computes(tasks):
    kept = filled(6, tasks=tasks, momentum=True)
    names = kept.tasks
    for number, row in enumerate(kept.rows(), start=1):
        G = torch.cat(gradients_of(tasks, number), dim=1).numpy()
        norms = np.linalg.norm(G, axis=1)
        cosines = {
            f"cosine/{names[i]}/{names[j]}": G[i] @ G[j] / (norms[i] * norms[j])
            for i, j in combinations(range(tasks), 2)
        }
        assert {key: row[key] for key in row if key.startswith("cosine/")} == pytest.approx(cosines)
        assert [row[f"norm/{task}"] for task in names] == pytest.approx(norms)
        smallest = min(cosines.values(), default=None)
        assert row["min_cosine"] == (None if smallest is None else pytest.approx(smallest))
        assert row["step"] == number
        assert not row["skipped"]
        assert not any(row[f"dropped/{task}"] for task in names)
        if smallest is None or smallest >= 0.0:
            assert (row["conflicts"], row["winner"]) == (0, None)
            assert [row[f"weight/{task}"] for task in names] == [1.0] * tasks
        else:
            assert row["conflicts"] > 0
            worst = min(cosines, key=cosines.get)
            assert row["winner"] in worst.split("/")[1:]
            assert [row[f"weight/{task}"] for task in names] != [1.0] * tasks


def test_rows_hold_plain_values_for_a_table():
    rows = filled(4, tasks=3).rows()
    kinds = {bool, int, float, str, type(None)}
    assert all(type(value) in kinds for row in rows for value in row.values())
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    assert len(table.getvalue().splitlines()) == 5


def test_one_task_has_no_pairs():
    kept = filled(3, tasks=1)
    row = kept.rows()[0]
    assert row["zone"] is row["min_cosine"] is row["winner"] is None
    assert not any(key.startswith("cosine/") for key in row)
    assert kept.layers() == []
    assert "one task alone" in kept.advise()


@pytest.mark.parametrize(
    ("cosine", "zone"),
    [
        (0.5, "none"),
        (0.0, "none"),
        (-1e-9, "mild"),
        (-0.5, "mild"),
        (-0.5001, "moderate"),
        (-0.7999, "moderate"),
        (-0.8, "critical"),
        (-1.0, "critical"),
    ],
)
def test_zones_at_the_thresholds(cosine, zone):
    assert zone_of(cosine, THRESHOLDS) == zone
    if round(cosine, 4) == cosine and cosine not in (-0.5, -0.8):  # rounding of the root decides
        assert with_cosines([cosine]).rows()[0]["zone"] == zone


def test_what_is_no_conflict_is_not_critical_either():
    assert zone_of(-1.0, (-1.0, -1.0, -1.0)) == "none"
    assert zone_of(0.1, (-0.8, -0.5, 0.2)) == "mild"
    assert with_cosines([0.1], (-0.8, -0.5, 0.2)).rows()[0]["zone"] == "mild"


def test_a_skipped_step_counts_only_as_skipped():
    kept = Recorder("abc", THRESHOLDS, 10)
    add(kept, gradients_of(3, 0), 1)
    before = kept.layers()
    add(kept, gradients_of(3, 1), 2, dropped=(1,), skipped=True)
    row = kept.rows()[1]
    assert row["skipped"]
    assert row["zone"] is row["min_cosine"] is row["winner"] is None
    assert [row[f"cosine/{a}/{b}"] for a, b in combinations("abc", 2)] == [None] * 3
    assert [row[f"dropped/{task}"] for task in "abc"] == [False, True, False]
    assert row["norm/b"] is None
    assert row["norm/a"] > 0.0
    assert [row[f"weight/{task}"] for task in "abc"] == [0.0] * 3
    assert kept.layers() == before


def test_a_dropped_task_is_compared_with_none():
    kept = Recorder("abc", THRESHOLDS, 10)
    add(kept, gradients_of(3, 1), 1, dropped=(1,))
    (row,) = kept.rows()
    assert not row["skipped"]
    assert row["cosine/a/b"] is row["cosine/b/c"] is row["norm/b"] is None
    assert row["cosine/a/c"] == row["min_cosine"]
    assert [row[f"dropped/{task}"] for task in "abc"] == [False, True, False]
    assert [layer["compared"] for layer in kept.layers()] == [1, 1]  # a and c


def test_a_task_without_a_gradient_has_a_norm_of_zero_and_no_cosine():
    kept = Recorder("ab", THRESHOLDS, 10)
    add(kept, [torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)])
    (row,) = kept.rows()
    assert row["norm/b"] == 0.0
    assert row["cosine/a/b"] is row["zone"] is None
    assert not row["dropped/b"]
    assert kept.layers() == []


def test_slashes_in_names_do_not_make_keys_alike():
    cosines = {("a/b", "c"): -0.5, ("a", "b/c"): 0.25}
    tasks = ["a/b", "c", "a", "b/c"]
    rows = torch.zeros(4, 4, dtype=torch.float64)
    for (one, other), cosine in cosines.items():
        i, j = tasks.index(one), tasks.index(other)
        rows[i, i] = 1.0
        rows[j, i], rows[j, j] = cosine, math.sqrt(1.0 - cosine**2)
    kept = Recorder(tasks, THRESHOLDS, 5)
    add(kept, [rows])
    (row,) = kept.rows()
    assert row["cosine/a%2Fb/c"] == row[row_key("cosine", "a/b", "c")] == pytest.approx(-0.5)
    assert row["cosine/a/b%2Fc"] == pytest.approx(0.25)
    assert {key for key in row if key.startswith("norm/")} == {
        "norm/a%2Fb", "norm/c", "norm/a", "norm/b%2Fc"
    }  # fmt: skip
    assert row["weight/c"] > 0.0
    assert row["dropped/b%2Fc"] is False
    assert len([key for key in row if key.startswith("cosine/")]) == 6
    assert "a/b and c" in kept.advise()
    assert plot._draw(plot._figure_class("x"), kept, kept.rows()).axes


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (("a/b", "c"), ("a", "b/c")),
        (("a/b",), ("a%2Fb",)),
        (("%2F",), ("%252F",)),
        (("%2/",), ("%2%2F",)),
        (("%25/",), ("%/",)),
        (("a", ""), ("a/",)),
    ],
)
def test_keys_of_other_names_are_others(names, others):
    assert row_key("cosine", *names) != row_key("cosine", *others)


def test_names_without_a_slash_are_in_keys_as_they_are():
    assert row_key("norm", "top 5 %") == "norm/top 5 %"
    assert row_key("cosine", "a", "b") == "cosine/a/b"


# What changes while training.


@pytest.mark.parametrize("keep", [2, 10])
def test_a_task_may_be_added_while_training(keep):
    kept = Recorder("ab", THRESHOLDS, keep)
    for number in range(1, 4):
        add(kept, gradients_of(2, number), number, dropped=[0] if number == 3 else [])
    before, layers = kept.rows(), kept.layers()
    kept.add_task("c")
    assert kept.tasks == ("a", "b", "c")
    nothing = {"cosine/a/c": None, "cosine/b/c": None, "norm/c": None, "weight/c": None}
    assert kept.rows() == [{**row, **nothing, "dropped/c": False} for row in before]
    assert kept.layers() == layers
    expected = filled(0, tasks=3)
    expected.tasks = kept.tasks
    add(kept, gradients_of(3, 4), 4)
    add(expected, gradients_of(3, 4), 4)
    assert kept.rows()[-1] == expected.rows()[-1]
    assert None not in [kept.rows()[-1][key] for key in nothing]
    assert len(kept.rows()) == min(keep, 4)
    assert [row["compared"] for row in kept.layers()] == [2 + 3, 2 + 3]
    assert kept.advise()
    assert plot._draw(plot._figure_class("x"), kept, kept.rows()).axes


@pytest.mark.parametrize("keep", [0, 5])
def test_a_task_may_be_added_before_the_first_step(keep):
    kept = Recorder("ab", THRESHOLDS, keep)
    kept.add_task("c")
    add(kept, gradients_of(3, 1))
    assert len(kept.rows()) == min(keep, 1)


def test_a_task_is_added_once():
    kept = filled(2)
    with pytest.raises(ValueError, match="'task1' already: give it another name"):
        kept.add_task("task1")
    assert kept.tasks == ("task0", "task1")


def test_a_task_is_added_without_waiting_for_the_device():
    kept = filled(2)
    with HostReads() as reads:
        kept.add_task("c")
    assert reads.found == []


def test_thresholds_may_be_set_at_any_time():
    kept = with_cosines([-0.9, -0.6, -0.2])
    assert [row["zone"] for row in kept.rows()] == ["critical", "moderate", "mild"]
    kept.thresholds = (-0.95, -0.9, -0.3)
    assert [row["zone"] for row in kept.rows()] == ["mild", "mild", "none"]
    add(kept, two_tasks(-0.99), 4)
    assert [row["zone"] for row in kept.rows()] == ["mild", "mild", "none", "critical"]
    assert "in 75.0 % of 4 comparisons" in kept.advise()


# Layers.


@pytest.mark.parametrize("tasks", [2, 3])
def test_layers_are_counted_apart(tasks):
    kept = filled(9, tasks=tasks, keep=2, momentum=True)  # counted on, whatever the ring forgets
    differ = False
    for threshold in (0.0, -0.02, -0.3):
        seen = {"first": 0, "last": 0}
        below = {"first": 0, "last": 0}
        for number in range(1, 10):
            first, bias, last = gradients_of(tasks, number)
            for name, G in (("first", torch.cat([first, bias], dim=1)), ("last", last)):
                for i, j in combinations(range(tasks), 2):
                    seen[name] += 1
                    cosine = torch.nn.functional.cosine_similarity(G[i], G[j], dim=0)
                    below[name] += bool(cosine < threshold)
        layers = kept.layers(threshold)
        assert {layer["layer"]: layer["compared"] for layer in layers} == seen
        assert {layer["layer"]: layer["conflicts"] for layer in layers} == below
        assert all(layer["share"] == layer["conflicts"] / layer["compared"] for layer in layers)
        scores = [layer["conflicts"] for layer in layers]
        assert scores == sorted(scores, reverse=True)
        differ |= len(set(scores)) > 1
    assert differ


class LargestTensor(TorchDispatchMode):
    """Within it `elements` is the size of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_one_long_layer_among_many_takes_no_more_memory_than_its_tensors():
    tasks, short, long = 4, 50, 300
    names = [f"block{layer}.weight" for layer in range(short)]
    names += [f"prompts.{number}" for number in range(long)]
    G = gradients_of(tasks, 0, len(names))
    with LargestTensor() as largest:
        kept = Recorder([str(task) for task in range(tasks)], THRESHOLDS, 1)
        add(kept, G, names=names)
    assert largest.elements <= len(names) * max(tasks * tasks, tasks * 5)
    assert len(kept.layers()) == short + 1
    pairs = tasks * (tasks - 1) // 2
    assert all(layer["compared"] == pairs for layer in kept.layers())


def test_the_tensors_of_a_layer_may_lie_apart():
    kept = Recorder("ab", THRESHOLDS, 4)
    agreed = torch.ones(2, 5, dtype=torch.float64)
    opposed = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 5)
    names = ("x.weight", "y", "x.bias", "z.weight", "x.scale")
    # In x two of three tensors of equal length agree, in z its one does not.
    add(kept, [opposed, opposed, agreed, opposed, agreed], names=names)
    assert {layer["layer"]: layer["conflicts"] for layer in kept.layers()} == {
        "x": 0, "y": 1, "z": 1,
    }  # fmt: skip


@pytest.mark.parametrize("threshold", [-1.0, 0.01, -0.025, 1.0])
def test_a_threshold_of_layers_is_one_that_was_counted(threshold):
    with pytest.raises(ValueError, match=f"multiple of 0.01.*{threshold}"):
        filled(2).layers(threshold)


def test_every_hundredth_is_a_threshold():
    cosines = [-0.995, -0.505, -0.015, -0.005, -1e-20, 0.0, 0.5]
    kept = with_cosines(cosines)
    for hundredths in range(-99, 1):
        (layer,) = kept.layers(hundredths / 100)
        assert layer["conflicts"] == sum(cosine < hundredths / 100 for cosine in cosines)
        assert layer["compared"] == len(cosines)


def test_incidence_is_the_share_of_pairs_below_zero():
    kept = Recorder("abc", THRESHOLDS, 10)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    add(kept, [torch.stack([a, -a, b]).double()], 1)  # one pair of three
    add(kept, [torch.stack([a, 0 * a, a]).double()], 2)  # none of one
    add(kept, [torch.stack([a, 0 * a, 0 * a]).double()], 3)  # nothing to compare
    assert [row["incidence"] for row in kept.rows()] == [1 / 3, 0.0, None]
    assert kept.incidence() == pytest.approx(1 / 6)
    assert "Incidence of conflict" in kept.advise()
    assert "16.7 %" in kept.advise()
    assert Recorder("ab", THRESHOLDS, 10).incidence() is None


def test_equal_shares_stay_in_the_order_of_the_model():
    kept = Recorder("ab", THRESHOLDS, 4)
    same, opposed = torch.ones(2, 5).double(), torch.tensor([[1.0], [-1.0]]).double().expand(2, 5)
    add(kept, [same, opposed, same, opposed], names=("w", "x", "y", "z"))
    assert [layer["layer"] for layer in kept.layers()] == ["x", "z", "w", "y"]


def test_layers_of_two_models_stay_apart(tmp_path):
    names = [f"group{group}.0.{name}" for group in (0, 1) for name in ("weight", "bias")]
    kept = Recorder("ab", THRESHOLDS, 4)
    same, opposed = torch.ones(2, 5).double(), torch.tensor([[1.0], [-1.0]]).double().expand(2, 5)
    add(kept, [same, same, opposed, opposed], names=names)
    assert [(row["layer"], row["conflicts"]) for row in kept.layers()] == [
        ("group1.0", 1), ("group0.0", 0),
    ]  # fmt: skip
    lines = conflict_table(kept).splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == ["group1.0", "group0.0"]
    model = nn.ModuleDict({f"group{g}": nn.Sequential(nn.Linear(1, 1)) for g in (0, 1)})
    split = split_conflicting_layers(model, [row["layer"] for row in kept.layers()[:1]], ["a", "b"])
    assert split.layers == ("group1.0",)
    with pytest.raises(ValueError, match=r"there is no .group1\.0. in Sequential"):
        split_conflicting_layers(model["group1"], ["group1.0"], ["a", "b"])
    plot_layer_conflicts(kept, tmp_path / "layers.png")
    bars = plot._draw(plot._figure_class("x"), kept, kept.rows()).axes[-1]
    assert {"group1.0", "group0.0"} <= {text.get_text() for text in bars.texts}


def test_a_parameter_of_one_task_alone_is_left_out():
    kept = Recorder("ab", THRESHOLDS, 4)
    shared, head = gradients_of(2, 0, 2)
    head[1] = 0.0
    add(kept, [shared, head], names=("shared", "head"))
    assert [layer["layer"] for layer in kept.layers()] == ["shared"]


def test_parameters_may_come_while_training():
    kept = Recorder("ab", THRESHOLDS, 4)
    opposed = torch.tensor([[1.0], [-1.0]]).double().expand(2, 5)
    add(kept, [opposed], 1)
    add(kept, [opposed, opposed, -opposed], 2)
    add(kept, [opposed, opposed, -opposed], 3)
    counted = {layer["layer"]: layer["conflicts"] for layer in kept.layers()}
    assert counted == {"first": 3, "last": 2}
    add(kept, [opposed, opposed, -opposed, opposed], 4, names=(*NAMES, "last.bias"))
    counted = {layer["layer"]: layer["conflicts"] for layer in kept.layers()}
    assert counted == {"first": 4, "last": 3}
    assert [row["step"] for row in kept.rows()] == [1, 2, 3, 4]


# Advice.


def test_parameters_may_go_and_change_places_while_training():
    """What was counted of their layer stays, under its name."""
    kept, alone = Recorder("ab", THRESHOLDS, 1000), Recorder("ab", THRESHOLDS, 1000)
    first, gone, last, back = (gradients_of(2, seed, 1)[0] for seed in range(4))
    add(kept, [first, gone, last], names=("first.w", "gone.w", "last.w"))
    add(kept, [last, first], names=("last.w", "first.w"))
    add(kept, [back, last, first], names=("gone.w", "last.w", "first.w"))
    for gradient in (gone, back):
        add(alone, [gradient], names=("gone.w",))
    seen = {row["layer"]: row for row in kept.layers()}
    assert [seen[name]["compared"] for name in ("first", "gone", "last")] == [3, 2, 3]
    assert [seen["gone"]] == alone.layers()
    for name, gradient in (("first", first), ("last", last)):
        below = bool(gradient[0] @ gradient[1] < 0.0)
        assert seen[name]["conflicts"] == 3 * below
    assert len(kept) == 3


def test_advice_waits_for_enough_steps():
    assert "Verdict: too early" in with_cosines([-0.9] * 19).advise()
    assert "Verdict: too early" not in with_cosines([-0.9] * 20).advise()


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [
        ([0.5] * 96 + [-0.9] * 4, "hardly ever conflict"),
        ([0.5] * 50 + [-0.03] * 50, "the conflicts are weak, with a median cosine of -0.030"),
        ([0.5] * 50 + [-0.3] * 50, "mostly mild"),
        ([0.5] * 90 + [-0.3] * 1 + [-0.9] * 9, "few, but not mild"),
        ([0.5] * 90 + [-0.6] * 10, "worth resolving: it is moderate or critical in 10.0 %"),
        ([-0.03] * 80 + [-0.9] * 20, "worth resolving: it is moderate or critical in 20.0 %"),
    ],
)
def test_the_verdict_follows_the_numbers(cosines, verdict):
    said = with_cosines(cosines).advise()
    assert verdict in said
    plain = "hardly" in verdict or "weak" in verdict
    assert ("The result is close to the plain sum." in said) == plain
    assert ("compare with the plain sum" in said) != plain
    assert ("1 of 2 backward passes" in said) == plain


def test_weak_conflicts_are_called_so_whatever_the_zones_are():
    assert "the conflicts are weak" in with_cosines([-0.02] * 30, (-0.01, -0.01, 0.0)).advise()


def test_advice_says_what_it_looked_at():
    said = with_cosines([0.5] * 50 + [-0.2] * 25 + [-0.6] * 15 + [-0.9] * 10).advise()
    assert "Looked at 100 steps (1 to 100)." in said
    lines = [line.split() for line in said.splitlines()]
    assert ["no", "conflict", "50.0", "%"] in lines
    assert ["mild", "25.0", "%"] in lines
    assert ["moderate", "15.0", "%"] in lines
    assert ["critical", "10.0", "%"] in lines
    assert "a and b conflict: in 50.0 % of 100 comparisons." in said
    assert "The median cosine in those is -0.40." in said
    assert "50.0 % of 100 comparisons: first" in said
    assert "Skipped" not in said


def test_advice_names_the_worst_pair_and_layers():
    kept = Recorder("abc", THRESHOLDS, 100)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    opposed = torch.stack([a, b, 0.3 * a - b]).double()  # only b and c
    agreeing = torch.stack([a, a, a]).double() * 0.01
    for number in range(1, 25):
        torn = opposed if number % 2 else agreeing
        if number == 2:
            torn = torch.stack([a, -a, -a]).double()  # a and b, a and c: a rare pair comes first
        add(kept, [agreeing, torn], number, names=("calm", "torn"))
    said = kept.advise()
    assert "b and c conflict most: in 50.0 % of 24 comparisons." in said
    assert "19.4 % of 72 comparisons: torn" in said
    assert "calm" not in said


def test_advice_goes_by_the_thresholds_of_the_method():
    """With θ_weak at 0.3 a cosine of 0.1 is a conflict, below it at -0.3 one of -0.1 is none."""
    cosines = 30 * [0.1, -0.1, -0.4]
    assert "in 100.0 % of 90 comparisons" in with_cosines(cosines, (-0.8, -0.5, 0.3)).advise()
    assert "in 33.3 % of 90 comparisons" in with_cosines(cosines, (-0.8, -0.5, -0.3)).advise()


def test_advice_names_no_layer_that_was_compared_too_seldom():
    kept = with_cosines(30 * [-0.1])
    opposed = [*two_tasks(-0.1), *two_tasks(-1.0)]
    for number in range(recorder.ENOUGH_STEPS - 1):
        add(kept, opposed, number, names=("first.weight", "seldom"))
    assert "comparisons: first" in kept.advise()
    assert "seldom" not in kept.advise()
    add(kept, opposed, names=("first.weight", "seldom"))
    assert "comparisons: seldom" in kept.advise()


def test_advice_says_what_was_left_out():
    kept = Recorder("abc", THRESHOLDS, 100)
    for number in range(1, 41):
        skipped, dropped = number <= 4, (1,) if number <= 6 else ()
        add(kept, gradients_of(3, number), number, dropped=dropped, skipped=skipped)
    said = kept.advise()
    assert "Skipped, as a gradient was not finite: 4 steps (10.0 %)." in said
    assert "Without b, as it was not finite: 2 steps (5.0 %)." in said
    assert "Without a" not in said


def test_advice_where_nothing_could_be_compared():
    kept = Recorder("ab", THRESHOLDS, 100)
    for number in range(1, 31):
        add(kept, gradients_of(2, number), number, dropped=(0, 1), skipped=True)
    assert "Verdict: none." in kept.advise()


# The picture.


def open_png(path) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width = imread(path).shape[:2]
    return width, height


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
    width, height = open_png(path)
    assert width == 1430
    assert 700 < height < 2500


def axes_of(kept: Recorder):
    from matplotlib.figure import Figure

    figure = plot._draw(Figure, kept, kept.rows())
    figure.canvas.draw()
    upper, lower = figure.subfigs
    return *upper.axes, *lower.axes


def labels_of(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def tick_names(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_few_pairs_are_drawn_each_and_many_by_their_range():
    top, _, _ = axes_of(filled(5, tasks=3))
    pairs = [("task0", "task1"), ("task0", "task2"), ("task1", "task2")]
    assert labels_of(top) == [f"cosine of {a} and {b}" for a, b in pairs]
    kept = filled(5, tasks=8)
    top, _, _ = axes_of(kept)
    assert labels_of(top) == ["all pairs", "smallest of all pairs"]
    assert "28 pairs are too many" in top.get_title()
    drawn = next(line for line in top.lines if line.get_label() == "smallest of all pairs")
    assert list(drawn.get_ydata()) == [row["min_cosine"] for row in kept.rows()]


def test_winners_dropped_tasks_and_skipped_steps_are_marked():
    kept = Recorder("ab", THRESHOLDS, 10)
    add(kept, two_tasks(-0.9), 1)
    add(kept, two_tasks(-0.9), 2, dropped=(0,), skipped=True)
    add(kept, two_tasks(-0.9), 3, dropped=(1,))
    top, strip, _ = axes_of(kept)
    assert tick_names(strip) == ["a won (1×)", "b won (0×)", "b left out (1×)", "skipped (1×)"]
    marked = [[float(x) for x in marks.get_positions()] for marks in strip.collections]
    assert marked == [[1.0], [], [3.0], [2.0]]
    (line,) = [line for line in top.lines if line.get_label() == "skipped step"]
    assert list(line.get_xdata()) == [2, 2]


def test_zones_are_named_by_the_thresholds_there_is_room_for():
    top, _, _ = axes_of(with_cosines([0.5], (-0.75, -0.72, -0.2)))
    assert [text.get_text().strip() for text in top.texts] == [
        "no conflict",
        "mild (below −0.2)",
        "critical (at most −0.75)",
    ]


def test_names_are_drawn_as_they_are_and_fit():
    names = ("_first$_$", "module." * 26 + "weight", *(f"layer{number}" for number in range(28)))
    kept = Recorder(["_a$x$", "_b"], THRESHOLDS, 10)
    add(kept, gradients_of(2, 0, 30), names=names)
    top, strip, bars = axes_of(kept)
    assert labels_of(top) == [r"cosine of _a\$x\$ and _b"]
    assert tick_names(strip)[0].startswith(r"_a\$x\$ won")
    worst = sorted(kept.layers(), key=lambda layer: -layer["share"])[: plot.LAYERS]
    assert [text.get_text().replace(r"\$", "$") for text in bars.texts] == [
        layer["layer"] for layer in worst
    ]
    assert tick_names(bars) == [f"{100 * layer['share']:.0f} % of 1" for layer in worst]
    assert "the worst 20 of 30" in bars.get_title()
    edge = bars.get_window_extent().x1
    assert all(text.get_window_extent().x1 <= edge for text in bars.texts)


def test_the_folder_is_made_and_png_the_default(tmp_path):
    path = plot_conflicts(filled(2), str(tmp_path / "new" / "folder" / "picture"))
    assert path == tmp_path / "new" / "folder" / "picture.png"
    open_png(path)


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(ValueError, match="train some steps first"):
        plot_conflicts(Recorder("ab", THRESHOLDS, 5), tmp_path / "new" / "picture.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is a folder"):
        plot_conflicts(filled(2), tmp_path)


def test_without_matplotlib_its_extra_is_named():
    program = """
import sys
sys.modules["matplotlib"] = None
from gcond_kernels.diagnostics.plots import plot_conflicts, plot_layer_conflicts
from gcond_kernels.recipes.recon import conflict_table, split_conflicting_layers
try:
    plot_conflicts(None, "picture.png")
except ImportError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stderr == ""
    assert 'pip install "gcond-kernels[plot]"' in ended.stdout


# Through the optimizer.


def trained(steps: int, bad=(), **options) -> GCondFused:
    """Two tasks that pull one layer apart; of the steps in `bad` task "b" is NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    base = torch.optim.SGD(model.named_parameters(), lr=0.05)
    optimizer = GCondFused(base, {"a": 1.0, "b": 0.5}, **options)
    for number in range(1, steps + 1):
        y = model(torch.randn(8, 4))
        losses = {"a": (y[:, 0] - 1).square().mean(), "b": (y[:, 0] + 1).square().mean()}
        if number in bad:
            losses["b"] = losses["b"] * math.nan
        optimizer.backward({task: losses[task] for task in optimizer.active_tasks})
        optimizer.step()
    return optimizer


def test_the_optimizer_records_what_it_reports(backend):
    optimizer = trained(6, backend=backend, momentum=0.9, record_steps=4)
    rows, report = optimizer.recorder.rows(), optimizer.report()
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert rows[-1]["cosine/a/b"] == report.min_cosine == rows[-1]["min_cosine"]
    assert rows[-1]["conflicts"] == len(report.conflicts)
    assert {task: rows[-1][f"weight/{task}"] for task in "ab"} == report.weights
    assert {task: rows[-1][f"norm/{task}"] for task in "ab"} == report.norms
    assert rows[-1]["winner"] == (report.conflicts[0].winner if report.conflicts else None)
    layers = {layer["layer"]: layer["compared"] for layer in optimizer.recorder.layers()}
    assert layers == {"0": 6, "2": 6}
    assert rows[-1]["incidence"] == report.incidence
    assert rows[-1]["zone"] == report.zone


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task"])
def test_the_optimizer_records_what_was_not_finite(on_nonfinite):
    optimizer = trained(5, bad=(2, 4), on_nonfinite=on_nonfinite)
    rows = optimizer.recorder.rows()
    assert [row["skipped"] for row in rows] == [
        n in (2, 4) and on_nonfinite == "skip" for n in range(1, 6)
    ]
    assert [row["dropped/b"] for row in rows] == [n in (2, 4) for n in range(1, 6)]
    assert [row["zone"] is None for row in rows] == [n in (2, 4) for n in range(1, 6)]
    assert all(layer["compared"] == 3 for layer in optimizer.recorder.layers())


def test_the_optimizer_advises():
    optimizer = trained(25)
    assert "Verdict: this conflict is worth resolving" in optimizer.advise()
    assert optimizer.advise() == optimizer.recorder.advise()
    assert "micro-batches" in trained(3, mode="stochastic", accumulation_steps=2).advise()
    assert "record_steps" in trained(3, record_steps=0).advise()


def test_the_optimizers_recorder_is_copied_with_it():
    optimizer = trained(4)
    twin = copy.deepcopy(optimizer)
    assert twin.recorder.rows() == optimizer.recorder.rows()
    assert pickle.loads(pickle.dumps(optimizer)).recorder.rows() == optimizer.recorder.rows()


@pytest.mark.parametrize("record_steps", [-1, 1.5, "all", True])
def test_the_option_is_checked(record_steps):
    with pytest.raises(ValueError, match="record_steps"):
        trained(0, record_steps=record_steps)


def test_all_zones_are_in_the_order_of_the_thresholds():
    assert ALL_ZONES == ("none", "mild", "moderate", "critical")
