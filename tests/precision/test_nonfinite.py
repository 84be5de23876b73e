"""Gradients that hold a NaN or an infinity: skipped, dropped, or named."""

import copy
import math

import pytest
import torch
from torch import nn

from gcond_kernels import GCond, GCondFused, LionLars
from tests.helpers.models import (
    TASKS,
    batches,
    flat_parameters,
    losses_of,
    model_of,
    same,
    sgd,
    without_counters,
)

BAD = [math.nan, -math.inf]
SIZE = 5
INDICES = [0, 2, SIZE - 1]
# Each pair of a value, an index and the tasks with that value occurs once.
CASES = [
    (bad, index, ["b", "abc"][(i + j) % 2])
    for i, bad in enumerate(BAD)
    for j, index in enumerate(INDICES)
]
HISTORIES = [("a", "raw"), ("b", "resolved"), ("c", "raw")]


class Run:
    """Two parameters and three tasks, whose gradients each step takes."""

    def __init__(self, backend, **options):
        self.p, self.q = nn.Parameter(torch.ones(SIZE)), nn.Parameter(torch.ones(SIZE))
        named = [("p", self.p), ("q", self.q)]
        base = torch.optim.AdamW(named, lr=0.1, betas=(0.0, 0.9), weight_decay=0.1)
        tasks = dict.fromkeys("abc", 1.0)
        options = {"accumulation_steps": 2, "momentum": 0.9} | options
        self.optimizer = GCondFused(base, tasks, backend=backend, **options)

    def window(self, gradients):
        """Per task a gradient of p, the same in both micro-batches; the last one resolves."""
        for _ in range(2):
            losses = {
                task: self.p @ gradient + (self.q * 0.5 @ gradient.nan_to_num(0.0, 0.0, 0.0))
                for task, gradient in gradients.items()
            }
            self.optimizer.backward(losses)

    def step(self, gradients):
        self.window(gradients)
        self.optimizer.step()

    def kept(self):
        """Everything that a step leaves to the next, except counters."""
        state = without_counters(copy.deepcopy(self.optimizer.state_dict()))
        return state, self.p.detach().clone(), self.q.detach().clone()


def gradients(seed=0, **replaced):
    generator = torch.Generator().manual_seed(seed)
    made = {task: torch.randn(SIZE, generator=generator) for task in "abc"}
    for task, (index, value) in replaced.items():
        made[task][index] = value
    return made


def steps_with_and_without(task, replaced, run, other):
    """Two steps of both, the second with a value in a task's gradient, and without the task."""
    for each in (run, other):
        each.step(gradients(1))
    run.step(gradients(2, **{task: replaced}))
    without = gradients(2)
    del without[task]
    other.step(without)
    assert same(run.kept(), other.kept())


@pytest.mark.parametrize(("bad", "index", "tasks"), CASES)
def test_skip_changes_nothing(backend, bad, index, tasks):
    run = Run(backend)
    run.step(gradients(1))
    before = run.kept()
    run.step(gradients(2, **dict.fromkeys(tasks, (index, bad))))
    assert same(before, run.kept())
    report = run.optimizer.report()
    assert report.skipped
    assert report.skipped_steps == 1
    assert report.nonfinite_tasks == list(tasks)
    assert report.nonfinite_steps == {task: int(task in tasks) for task in "abc"}
    assert report.step == 2
    for p in (run.p, run.q):
        assert torch.equal(p.grad, torch.zeros(SIZE))
    run.step(gradients(3))
    assert not same(before, run.kept())
    assert run.optimizer.report().skipped_steps == 1


@pytest.mark.parametrize(
    ("bad", "index", "task", "history"),
    [
        (BAD[(i + j) % 2], index, *task)
        for i, index in enumerate(INDICES)
        for j, task in enumerate(HISTORIES)
    ],
)
def test_drop_task_makes_the_step_without_that_task(backend, bad, index, task, history):
    """The bits are those of a window in which the task had no micro-batch."""
    options = {"on_nonfinite": "drop_task", "method": GCond(history=history)}
    run, other = Run(backend, **options), Run(backend, **options)
    steps_with_and_without(task, (index, bad), run, other)
    report = run.optimizer.report()
    assert not report.skipped
    assert report.skipped_steps == 0
    assert report.nonfinite_tasks == [task]
    assert report.weights[task] == 0.0
    assert not any(task in pair for pair in report.cosines)
    assert math.isfinite(report.gradient_norm)
    # It takes part in the next window.
    for each in (run, other):
        each.step(gradients(3))
    assert same(run.kept(), other.kept())
    assert run.optimizer.report().nonfinite_tasks == []
    assert run.optimizer.report().nonfinite_steps[task] == 1


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"update": LionLars()}])
def test_drop_task_with_options_that_use_norms(backend, options):
    run = Run(backend, on_nonfinite="drop_task", **options)
    steps_with_and_without("b", (1, math.nan), run, Run(backend, **options))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("index", INDICES)
def test_drop_task_skips_a_step_without_any_task(backend, bad, index):
    run = Run(backend, on_nonfinite="drop_task")
    run.step(gradients(1))
    before = run.kept()
    run.step(gradients(2, **dict.fromkeys("abc", (index, bad))))
    assert same(before, run.kept())
    assert run.optimizer.report().skipped
    assert run.optimizer.report().nonfinite_tasks == ["a", "b", "c"]


def test_drop_task_skips_a_step_with_weights_of_zero_alone(backend):
    p = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([p], lr=1.0)
    optimizer = GCondFused(base, {"a": 1.0, "b": 0.0}, on_nonfinite="drop_task", backend=backend)
    optimizer.backward({"a": p.sum() * math.nan, "b": p.sum()})
    optimizer.step()
    assert optimizer.report().skipped  # b takes no part
    assert torch.equal(p, torch.ones(2))


@pytest.mark.parametrize(("bad", "index", "tasks"), CASES)
def test_raise_names_task_and_parameter_and_changes_nothing(backend, bad, index, tasks):
    run = Run(backend, on_nonfinite="raise")
    run.step(gradients(1))
    now, storage = run.optimizer._resolver, run.optimizer._storage

    def kept():
        small = [storage.parameter_tasks, storage.was_shared, storage.momentum_steps, now.counters]
        state = [*small, storage.history, storage.momentum, *now.method_state.values()]
        return copy.deepcopy([state, run.p, run.q, run.optimizer.base.state_dict()])

    before = kept()
    bad_gradients = gradients(2, **dict.fromkeys(tasks, (index, bad)))
    for again in range(3):
        with pytest.raises(FloatingPointError, match=rf"task '{tasks[0]}': p[;.]"):
            run.optimizer.step() if again else run.window(bad_gradients)
        assert same(before, kept())
        assert run.p.grad is None
    run.optimizer.on_nonfinite = "drop_task"
    run.optimizer.step()
    assert run.optimizer.report().nonfinite_tasks == list(tasks)
    other = Run(backend, on_nonfinite="drop_task")
    other.step(gradients(1))
    other.step(bad_gradients)
    assert same(run.kept(), other.kept())


def test_the_next_window_drops_one_that_raised(backend):
    run, other = Run(backend, on_nonfinite="raise"), Run(backend)
    for each in (run, other):
        each.step(gradients(1))
    with pytest.raises(FloatingPointError):
        run.window(gradients(2, b=(1, math.nan)))
    with pytest.warns(UserWarning, match="of 2 micro-batches could not be resolved, and is droppe"):
        run.window(gradients(3))
    run.optimizer.step()
    other.step(gradients(3))
    assert same(run.kept(), other.kept())


def test_raise_counts_the_parameters(backend):
    model = model_of()
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = GCondFused(named, TASKS, on_nonfinite="raise", backend=backend)
    losses = losses_of(model, batches(1)[0])
    with pytest.raises(FloatingPointError, match=r"task 'b': 0\.weight and 3 more\. Nothing"):
        optimizer.backward({"a": losses["a"], "b": losses["b"] * math.inf})


def test_raise_is_silent_where_all_is_finite(backend):
    results = []
    for mode in ("raise", "skip", "drop_task"):
        model = model_of()
        optimizer = GCondFused(sgd(model), TASKS, momentum=0.5, on_nonfinite=mode, backend=backend)
        for batch in batches(4):
            optimizer.backward(losses_of(model, batch))
            optimizer.step()
        results.append(flat_parameters(model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_value_whose_square_leaves_float32_counts_as_not_finite(backend):
    p = nn.Parameter(torch.ones(2))
    optimizer = GCondFused(
        torch.optim.SGD([p], lr=0.1), TASKS, on_nonfinite="raise", backend=backend
    )
    with pytest.raises(FloatingPointError, match="task 'a': parameter 0"):
        optimizer.backward({"a": p @ torch.tensor([3e19, 0.0]), "b": p.sum()})


def test_the_count_survives_a_checkpoint(backend):
    run = Run(backend, on_nonfinite="drop_task")
    run.step(gradients(1))
    run.step(gradients(2, b=(0, math.nan)))
    run.step(gradients(2, a=(0, math.nan), b=(0, math.nan), c=(0, math.nan)))
    other = Run(backend, on_nonfinite="drop_task")
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for each in (run, other):
        each.step(gradients(3))
        report = each.optimizer.report()
        assert (report.step, report.skipped_steps) == (4, 1)
        assert report.nonfinite_steps == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize("history", ["raw", "resolved"])
def test_drop_task_keeps_the_history_of_the_others(backend, history):
    """The winner is the more stable task, though the other is the stronger one now."""
    stable, other = torch.eye(SIZE)[0], torch.eye(SIZE)[1]
    run = Run(backend, on_nonfinite="drop_task", method=GCond(history=history))
    run.step({"a": stable, "b": stable, "c": other})
    run.step({"a": stable, "b": stable * math.nan, "c": other - 5 * stable})
    (conflict,) = run.optimizer.report().conflicts
    assert conflict.tasks == ("a", "c")
    assert conflict.winner == "a"


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_sum_beyond_float16_changes_nothing(backend, on_nonfinite, granularity):
    """Each gradient fits; the step shares a parameter that was one task's own until then."""
    d = torch.tensor([1.0, 0.2, 0.0, 0.0])

    def run(beyond):
        p, q = nn.Parameter(torch.ones(4, dtype=torch.float16)), nn.Parameter(torch.ones(4))
        options = {"granularity": granularity, "momentum": 0.5, "backend": backend}
        options |= {"method": GCond(dominance_window=2), "on_nonfinite": on_nonfinite}
        optimizer = GCondFused(torch.optim.SGD([p, q], lr=0.0), TASKS, **options)

        def losses(a, b, b_of_q):
            of_p = (p * d.half()).float().sum()
            return {"a": a * of_p + 5 * q.sum(), "b": b * of_p + b_of_q * (q * d).sum()}

        for step in range(5):
            if step != 2:
                optimizer.backward(losses(1.0, -2.0, 0.0))
                optimizer.step()
                continue
            if not beyond:
                continue
            if on_nonfinite == "raise":
                with pytest.raises(FloatingPointError, match="the resolved gradient is not fin"):
                    optimizer.backward(losses(4e4, 6e4, -1.0))
                optimizer.on_nonfinite = "skip"
            else:
                optimizer.backward(losses(4e4, 6e4, -1.0))
            optimizer.step()
            report = optimizer.report()
            assert (report.skipped, report.nonfinite_tasks, report.conflicts) == (True, [], [])
            assert torch.equal(p.grad, torch.zeros_like(p))
            optimizer.on_nonfinite = on_nonfinite
        assert optimizer.report().conflicts
        assert optimizer._storage.parameter_tasks.tolist() == [[True, True], [True, False]]
        return without_counters(optimizer.state_dict()), p.grad, q.grad

    assert same(run(True), run(False))
