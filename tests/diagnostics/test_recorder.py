"""The recorder: what is kept, what changes while training, and what is read."""

import copy
import csv
import io
import math
import pickle
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gcond_kernels import MGDA, GCond, GCondFused
from gcond_kernels.diagnostics import recorder
from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.diagnostics.records import record_key, zone_of
from tests.helpers.host_reads import HostReads
from tests.helpers.recorded import (
    NAMES,
    THRESHOLDS,
    add,
    filled,
    gradients_of,
    resolved,
    two_tasks,
    with_cosines,
)

AGREEING = torch.ones(2, 5, dtype=torch.float64)
ONE = torch.tensor([[1.0], [0.0]])
OPPOSED = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 5)


def steps_of(kept) -> list[int]:
    return [record["step"] for record in kept.rows()]


def conflicts_of(kept) -> dict[str, int]:
    return {layer["layer"]: layer["conflicts"] for layer in kept.layers()}


# What is kept.


def test_only_the_latest_steps_are_kept_oldest_first():
    kept = Recorder("ab", THRESHOLDS, 4)
    for number in range(1, 12):
        add(kept, gradients_of(2, number), number)
        expected = list(range(max(1, number - 3), number + 1))
        assert steps_of(kept) == expected
        assert len(kept) == len(expected)


def test_steps_keep_the_order_they_came_in_whatever_their_number():
    kept = Recorder("ab", THRESHOLDS, 3)
    for number in (1, 2, 3, 4, 2):  # as after loading an older state
        add(kept, gradients_of(2, number), number)
    assert steps_of(kept) == [3, 4, 2]


@pytest.mark.parametrize(("steps", "keep", "advice"), [(3, 0, "is 0"), (0, 5, "train some steps")])
def test_a_recorder_without_steps_is_empty(steps, keep, advice):
    kept = filled(steps, keep=keep)
    assert len(kept) == 0
    assert kept.rows() == kept.layers() == []
    assert advice in kept.advise()
    kept.clear()


def test_clear_drops_all_in_place():
    kept = filled(7, keep=5)
    table = kept._buffers.table
    kept.clear()
    assert len(kept) == 0
    assert kept.rows() == kept.layers() == []
    add(kept, gradients_of(2, 0), 8)
    assert kept._buffers.table is table  # a CUDA graph goes on writing there
    assert steps_of(kept) == [8]
    assert [row["compared"] for row in kept.layers()] == [1, 1]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
@pytest.mark.parametrize("max_iterations", [None, 0])
def test_recording_reads_nothing_from_the_device(tasks, names, max_iterations):
    kept = Recorder([f"task{task}" for task in range(tasks)], THRESHOLDS, 3)
    step = resolved(gradients_of(tasks, 0, len(names)), names=names, max_iterations=max_iterations)
    with HostReads() as reads:
        for _ in range(5):
            kept.record(step)
    assert reads.found == []
    assert len(kept) == 3
    conflicts = int((step.decision.events[:, 0] >= 0).sum())
    assert [record["conflicts"] for record in kept.rows()] == [conflicts] * 3


def test_steps_wait_to_be_written_together_but_not_for_long(monkeypatch):
    monkeypatch.setattr(recorder, "TOGETHER", 4)
    kept, waiting = Recorder("ab", THRESHOLDS, 100), []
    for number in range(1, 12):
        # Other methods, and other settings, have events of another shape.
        add(kept, gradients_of(2, number), number, max_iterations=0 if number in (7, 8) else None)
        waiting.append(len(kept._waiting))
    assert waiting == [1, 2, 3, 0, 1, 2, 1, 2, 1, 2, 3]
    alone = Recorder("ab", THRESHOLDS, 100)
    for number in range(1, 12):
        add(alone, gradients_of(2, number), number, max_iterations=0 if number in (7, 8) else None)
        len(alone)  # writes it
    assert kept.rows() == alone.rows()
    assert kept.layers() == alone.layers()


def test_waiting_steps_are_bounded_in_bytes(monkeypatch):
    step = resolved(gradients_of(3, 1), number=1)
    monkeypatch.setattr(recorder, "BYTES_TOGETHER", 2 * step.nbytes)
    kept, waiting = Recorder("abc", THRESHOLDS, 100), []
    for number in range(1, 8):
        add(kept, gradients_of(3, number), number)
        waiting.append(len(kept._waiting))
    assert waiting == [1, 2, 0, 1, 2, 0, 1]


def test_decisions_of_other_shapes_are_written_apart():
    parameter = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = GCondFused(
        torch.optim.SGD([parameter], lr=0.1), TASKS, method=GCond(max_iterations=0)
    )
    for number in range(6):
        if number == 3:  # without events too, but with other coefficients
            optimizer.method = MGDA()
        train_one(optimizer, parameter)
    assert steps_of(optimizer.recorder) == [1, 2, 3, 4, 5, 6]


def test_a_step_that_cannot_be_recorded_is_complete(monkeypatch):
    parameter = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = GCondFused(torch.optim.SGD([parameter], lr=0.1), TASKS)

    def fails(_resolution):
        raise MemoryError("no memory for the records")

    monkeypatch.setattr(optimizer.recorder, "record", fails)
    before = parameter.detach().clone()
    with pytest.warns(UserWarning, match="recorder has lost its latest steps: MemoryError"):
        train_one(optimizer, parameter)
    assert not torch.equal(parameter.detach(), before)
    assert optimizer.report().step == 1


TASKS = {"a": 1.0, "b": 1.0}


def train_one(optimizer, parameter):
    assert optimizer.backward(
        {"a": parameter.square().sum(), "b": (parameter - 2.0).square().sum()}
    )
    optimizer.step()


def test_a_replayed_graph_would_record_every_step():
    # The same host code again and again: all that differs lies in tensors.
    kept = Recorder("ab", THRESHOLDS, 4)
    number = torch.tensor(0)
    for _ in range(6):
        number += 1
        add(kept, two_tasks(-0.5), number)
    assert steps_of(kept) == [3, 4, 5, 6]


def test_what_was_recorded_may_be_overwritten_afterwards():
    kept, step = Recorder("ab", THRESHOLDS, 4), resolved(two_tasks(-0.5))
    kept.record(step)
    before = kept.rows()
    for tensor in (step.counters, step.gramian, *step.decision[::2], step.decision.finite):
        tensor.zero_()
    assert kept.rows() == before


def test_a_first_step_in_a_capture_warns_that_it_is_not_recorded(monkeypatch):
    kept = Recorder("ab", THRESHOLDS, 4)
    monkeypatch.setattr(recorder, "is_capturing", lambda _: True)
    with pytest.warns(UserWarning, match="one step before the capture"):
        add(kept, two_tasks(0.5))
    assert len(kept) == 0
    monkeypatch.setattr(recorder, "is_capturing", lambda _: False)
    add(kept, two_tasks(0.5))
    monkeypatch.setattr(recorder, "is_capturing", lambda _: True)
    add(kept, two_tasks(0.5))
    assert len(kept) == 2


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
@pytest.mark.parametrize("steps", [0, 7])
def test_a_copy_records_by_itself(twin_of, steps):
    kept = filled(steps, tasks=3, keep=5)
    twin, before = twin_of(kept), kept.rows()
    assert twin.rows() == before
    assert twin.layers() == kept.layers()
    add(twin, gradients_of(3, 8), 8)
    assert steps_of(twin)[-1] == 8
    assert kept.rows() == before


@pytest.mark.parametrize("steps", [0, 3, 5, 13])
@pytest.mark.parametrize("capacity", [0, 1, 4, 9])
def test_a_new_capacity_keeps_the_latest_steps_that_fit(steps, capacity):
    kept = filled(steps, keep=5)
    before, layers = kept.rows(), kept.layers()
    kept.capacity = capacity
    assert kept.capacity == capacity
    assert kept.rows() == before[max(len(before) - capacity, 0) :]
    assert kept.layers() == layers
    for number in (20, 21):
        add(kept, gradients_of(2, number), number)
    expected = [*(record["step"] for record in before), 20, 21]
    assert steps_of(kept) == expected[max(len(expected) - capacity, 0) :]
    kept.capacity = 2
    for number in (30, 31, 32):
        add(kept, gradients_of(2, number), number)
    assert steps_of(kept) == [31, 32]


@pytest.mark.parametrize("change", [lambda kept: setattr(kept, "capacity", 7), "add_task"])
def test_a_graph_that_was_captured_before_does_not_write_into_new_buffers(change):
    kept = filled(6, keep=5)
    old = kept._buffers
    kept.add_task("new") if change == "add_task" else change(kept)
    before = kept.rows()
    old.table.fill_(-1.0)  # as a replay does
    old.recorded.add_(1)
    assert kept.rows() == before


@pytest.mark.parametrize("capacity", [-1, 1.5, "all", True])
def test_a_capacity_is_a_number_of_steps(capacity):
    kept = filled(2)
    with pytest.raises(ValueError, match="capacity must be a whole number, 0 or more, not"):
        kept.capacity = capacity
    assert kept.capacity == 1000
    with pytest.raises(ValueError, match="capacity must be"):
        Recorder("ab", THRESHOLDS, capacity)


# Records.


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_rows_are_what_numpy_computes(tasks):
    kept = filled(6, tasks=tasks)
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
    ("cosine", "zone", "thresholds"),
    [
        (0.5, "none", THRESHOLDS),
        (0.0, "none", THRESHOLDS),
        (-1e-9, "mild", THRESHOLDS),
        (-0.5, "mild", THRESHOLDS),
        (-0.5001, "moderate", THRESHOLDS),
        (-0.7999, "moderate", THRESHOLDS),
        (-0.8, "critical", THRESHOLDS),
        (-1.0, "critical", THRESHOLDS),
        (-1.0, "none", (-1.0, -1.0, -1.0)),
        (0.1, "mild", (-0.8, -0.5, 0.2)),
    ],
)
def test_zones_at_the_thresholds(cosine, zone, thresholds):
    assert zone_of(cosine, thresholds) == zone
    if round(cosine, 4) == cosine and cosine not in (-0.5, -0.8):  # rounding of the root decides
        assert with_cosines([cosine], thresholds).rows()[0]["zone"] == zone


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


def test_names_with_slashes_do_not_share_keys():
    cosines = {("a/b", "c"): -0.5, ("a", "b/c"): 0.25}
    tasks = ["a/b", "c", "a", "b/c"]
    J = torch.zeros(4, 4, dtype=torch.float64)
    for (one, other), cosine in cosines.items():
        i, j = tasks.index(one), tasks.index(other)
        J[i, i] = 1.0
        J[j, i], J[j, j] = cosine, math.sqrt(1.0 - cosine**2)
    kept = Recorder(tasks, THRESHOLDS, 5)
    add(kept, [J])
    (record,) = kept.rows()
    assert record["cosine/a%2Fb/c"] == record[record_key("cosine", "a/b", "c")]
    assert record["cosine/a%2Fb/c"] == pytest.approx(-0.5)
    assert record["cosine/a/b%2Fc"] == pytest.approx(0.25)
    norms = [key for key in record if key.startswith("norm/")]
    assert norms == ["norm/a%2Fb", "norm/c", "norm/a", "norm/b%2Fc"]
    assert record["weight/c"] > 0.0
    assert record["dropped/b%2Fc"] is False
    assert len([key for key in record if key.startswith("cosine/")]) == 6
    assert "a/b and c" in kept.advise()


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
def test_different_names_have_different_keys(names, others):
    assert record_key("cosine", *names) != record_key("cosine", *others)


def test_keys_hold_names_without_a_slash_unchanged():
    assert record_key("norm", "top 5 %") == "norm/top 5 %"
    assert record_key("cosine", "a", "b") == "cosine/a/b"


# What changes while training.


@pytest.mark.parametrize("keep", [2, 3, 10])
def test_a_task_that_is_added_had_nothing_in_the_steps_before(keep):
    kept = Recorder("ab", THRESHOLDS, keep)
    for number in range(1, 4):
        add(kept, gradients_of(2, number), number, dropped=[0] if number == 3 else [])
    before, layers = kept.rows(), kept.layers()
    kept.add_task("c")
    assert kept.tasks == ("a", "b", "c")
    per_task = ("norm", "shared_norm", "weight", "descent", "rising", "loss")
    nothing = dict.fromkeys(["cosine/a/c", "cosine/b/c", *(f"{each}/c" for each in per_task)])
    padded = [record | nothing | {"dropped/c": False} for record in before]
    assert kept.rows() == padded
    assert kept.layers() == layers
    fresh = Recorder("abc", THRESHOLDS, keep)
    for each in (kept, fresh):
        add(each, gradients_of(3, 4), 4)
    assert kept.rows()[-1] == fresh.rows()[-1]
    assert [key for key in nothing if kept.rows()[-1][key] is None] == ["loss/c"]  # not given here
    assert kept.rows()[:-1] == padded[-keep + 1 :]
    assert [layer["compared"] for layer in kept.layers()] == [2 + 3, 2 + 3]
    assert "Looked at" in kept.advise()


@pytest.mark.parametrize("keep", [0, 5])
def test_a_task_may_be_added_before_the_first_step(keep):
    kept = Recorder("ab", THRESHOLDS, keep)
    kept.add_task("c")
    add(kept, gradients_of(3, 1))
    assert len(kept.rows()) == min(keep, 1)


def test_a_task_is_added_once_and_without_synchronizing_with_the_device():
    kept = filled(2)
    with pytest.raises(ValueError, match="'task1' already: give it another name"):
        kept.add_task("task1")
    assert kept.tasks == ("task0", "task1")
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
    kept = filled(9, tasks=tasks, keep=2)  # layers are counted over all steps
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


@pytest.mark.parametrize(
    ("gradients", "names", "layers"),
    [
        # In x two of three tensors with equal norms agree, in z its one does not.
        (
            [OPPOSED, OPPOSED, AGREEING, OPPOSED, AGREEING],
            ("x.weight", "y", "x.bias", "z.weight", "x.scale"),
            [("y", 1), ("z", 1), ("x", 0)],
        ),
        # Equal shares stay in the order of the model.
        (
            [AGREEING, OPPOSED, AGREEING, OPPOSED],
            ("w", "x", "y", "z"),
            [("x", 1), ("z", 1), ("w", 0), ("y", 0)],
        ),
        # Of two models.
        (
            [AGREEING, AGREEING, OPPOSED, OPPOSED],
            ("0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"),
            [("1.0", 1), ("0.0", 0)],
        ),
        # A parameter of one task alone.
        ([AGREEING, OPPOSED * ONE], ("shared", "head"), [("shared", 0)]),
    ],
)
def test_layers_are_those_of_the_names(gradients, names, layers):
    kept = Recorder("ab", THRESHOLDS, 4)
    add(kept, gradients, names=names)
    assert list(conflicts_of(kept).items()) == layers


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


def test_parameters_may_come_while_training():
    kept = Recorder("ab", THRESHOLDS, 4)
    add(kept, [OPPOSED], 1)
    for number in (2, 3):
        add(kept, [OPPOSED, OPPOSED, OPPOSED], number)
    assert conflicts_of(kept) == {"first": 3, "last": 2}
    add(kept, [OPPOSED] * 4, 4, names=(*NAMES, "last.bias"))
    assert conflicts_of(kept) == {"first": 4, "last": 3}
    assert steps_of(kept) == [1, 2, 3, 4]


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


# Through the optimizer.


def trained(steps: int, bad=(), capacity=1000, **options) -> GCondFused:
    """Two tasks that pull one layer apart; of the steps in `bad` task "b" is NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    base = torch.optim.SGD(model.named_parameters(), lr=0.05)
    optimizer = GCondFused(base, {"a": 1.0, "b": 0.5}, **options)
    optimizer.recorder.capacity = capacity
    for number in range(1, steps + 1):
        y = model(torch.randn(8, 4))
        losses = {"a": (y[:, 0] - 1).square().mean(), "b": (y[:, 0] + 1).square().mean()}
        if number in bad:
            losses["b"] = losses["b"] * math.nan
        optimizer.backward({task: losses[task] for task in optimizer.active_tasks})
        optimizer.step()
    return optimizer


def test_the_optimizer_records_what_it_reports(backend):
    optimizer = trained(6, backend=backend, momentum=0.9, capacity=4)
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
    assert "Verdict: the tasks conflict" in optimizer.advise()
    assert optimizer.advise() == optimizer.recorder.advise()
    assert "micro-batches" in trained(3, mode="stochastic", accumulation_steps=2).advise()
    assert "capacity" in trained(3, capacity=0).advise()


def test_a_copy_of_an_optimizer_has_a_copy_of_its_recorder():
    optimizer = trained(4)
    twin = copy.deepcopy(optimizer)
    assert twin.recorder.rows() == optimizer.recorder.rows()
    assert pickle.loads(pickle.dumps(optimizer)).recorder.rows() == optimizer.recorder.rows()
