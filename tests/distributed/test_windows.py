"""Windows in which ranks do not have the same: micro-batches, gradients, failures."""

import copy
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers import distributed_training as t


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_other_numbers_of_micro_batches(ranks2, strategy):
    """Ranks in turn have a full window, a short one, and none at all, also in the first step."""
    counts = [(2, 3), (0, 3), (3, 0), (1, 3), (3, 3), (0, 1)]
    _, decisions, decisions_alone = t.train_both(ranks2, strategy, counts=counts)
    micro_batches = [decision.micro_batches for decision in decisions]
    assert micro_batches == [decision.micro_batches for decision in decisions_alone]
    assert micro_batches[-1] == {"a": 1, "b": 1, "c": 1}


def nan_on_rank_1(parallelism, on_nonfinite):
    """A NaN in one micro-batch of one rank, in the middle of three steps."""
    rank, size = t.world()
    model, optimizer = t.new_training(parallelism, on_nonfinite=on_nonfinite)
    data, _ = t.data_rank(parallelism, rank, size)
    seen = []
    for step in range(3):
        for position, number in enumerate(t.numbers_of(step, data)):
            losses = t.losses_of(model, number)
            if (step, position, rank) == (1, 1, 1):
                losses["b"] = losses["b"] * torch.tensor(float("nan"))
            try:
                optimizer.backward(losses)
            except FloatingPointError as error:  # from the last micro-batch
                seen.append(str(error))
                optimizer.on_nonfinite = "skip"
        optimizer.step()
        seen.append((optimizer.report().nonfinite_tasks, optimizer.report().skipped))
    return t.parameters_of(model), seen


@pytest.mark.parametrize("parallelism", [*t.STRATEGIES, "fsdp"])
@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
def test_nan_on_one_rank_has_the_same_effect_on_all(ranks2, parallelism, on_nonfinite):
    parameters, seen = t.of_all(ranks2(nan_on_rank_1, parallelism, on_nonfinite))
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    if on_nonfinite == "raise":
        assert "Nothing was changed" in seen.pop(1)
    assert seen[0] == seen[2] == ([], False)
    assert seen[1] == (["b"], on_nonfinite != "drop_task")


def overflow_on_rank_1(strategy):
    """Loss scaling where rank 1 alone overflows in the second step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model, optimizer = t.new_training(strategy, 1, grad_scaler=scaler)
    scales = []
    for step in range(3):
        losses = t.losses_of(model, *t.numbers_of(step, count=1))
        if (step, dist.get_rank()) == (1, 1):
            losses["a"] = losses["a"] * 3e38
        optimizer.backward(losses)
        optimizer.step()
        scaler.update()
        scales.append((scaler.get_scale(), optimizer.report().skipped))
    return t.parameters_of(model), scales


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_overflow_on_one_rank_lowers_the_scale_on_all(ranks2, strategy):
    _, scales = t.of_all(ranks2(overflow_on_rank_1, strategy))
    assert scales == [(256.0, False), (128.0, True), (128.0, False)]


def scaler_step_without_data():
    """Through GradScaler.step, where rank 1 has no loss in the first window."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model, optimizer = t.new_training("shard", 1, grad_scaler=scaler)
    for step in range(2):
        if step > 0 or dist.get_rank() == 0:
            optimizer.backward(t.losses_of(model, *t.numbers_of(step, count=1)))
        scaler.step(optimizer)
        scaler.update()
    return t.parameters_of(model)


def test_scaler_step_on_a_rank_without_data(ranks2):
    t.of_all(ranks2(scaler_step_without_data))


class TwoPaths(nn.Module):
    """The side path is taken only where it is asked for."""

    def __init__(self):
        super().__init__()
        self.main, self.side, self.never = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x, side):
        return self.main(x) + (self.side(x) if side else 0.0)


def layer_of_rank_1(strategy):
    """A layer that only rank 1 uses, in the second step: which parameters have a gradient?"""
    model, optimizer = t.new_training(strategy, 1, net=TwoPaths)
    present = []
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        y = model(x, side=step == 1 and dist.get_rank() == 1)
        optimizer.backward({"a": y[:, 0].mean(), "b": -y[:, 1].mean(), "c": y.square().mean()})
        optimizer.resolve()
        present.append([p.grad is not None for p in model.parameters()])
        optimizer.step()
    return t.parameters_of(model), present


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_parameter_that_one_rank_uses_has_a_gradient_on_all(ranks2, strategy):
    _, present = t.of_all(ranks2(layer_of_rank_1, strategy))
    without_side = [True, True, False, False, False, False]
    assert present == [without_side, [True] * 4 + [False] * 2, without_side]


# Failures, when accumulators may have been sent.


def fail():
    raise ValueError("no such luck")


def failing_last_task(strategy, fails, steps):
    """The last task of the last micro-batch fails on rank 1 when the others are sent."""
    model, optimizer = t.new_training(strategy, steps)
    messages, values = [], []
    for step in range(2):
        for position, number in enumerate(t.numbers_of(step, count=steps)):
            losses = t.loss_functions(model, number)
            values.append(losses["c"]().item())
            if fails and (step, position, dist.get_rank()) == (1, steps - 1, 1):
                losses["c"] = fail
            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    optimizer.backward(losses)
            except ValueError as error:
                messages += [str(error), *(str(warning.message) for warning in warned)]
                with pytest.raises(RuntimeError) as full:
                    optimizer.backward(t.losses_of(model, number))
                messages.append(str(full.value))
        optimizer.step()
    report = optimizer.report()
    mean = sum(values[-steps:]) / steps
    return t.parameters_of(model), (report.micro_batches, report.losses["c"]), mean, messages


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_task_that_fails_when_others_are_sent(ranks2, strategy, steps):
    results = ranks2(failing_last_task, strategy, True, steps)
    parameters, (micro_batches, loss) = t.of_all(results)
    means = [mean for _, _, mean, _ in results]
    assert loss == pytest.approx(means[0])  # of the rank whose gradient counts
    # A shard goes where an accumulator was that must have arrived, for which a host does not wait.
    sent = ["a"] if strategy == "shard" else ["a", "b"]
    assert micro_batches == {task: (2 if task in sent else 1) * steps for task in t.TASKS}
    assert results[0][3] == []
    error, warning, again = results[1][3]
    assert error == "no such luck"
    assert f"the gradients of {sent} were sent to the other ranks: those stay" in warning
    assert "on its way to the other ranks: call step() before backward()" in again
    without, (micro_batches, loss) = t.of_all(ranks2(failing_last_task, strategy, False, steps))
    assert micro_batches == {"a": 2 * steps, "b": 2 * steps, "c": 2 * steps}
    assert loss == pytest.approx(sum(means) / 2)
    assert not t.equal(parameters, without)


def repeated_after_failure(strategy, mode):
    """A function fails after tensors were passed back; in stochastic mode in the second task."""
    model, optimizer = t.new_training(strategy, 3 if mode == "stochastic" else 1, mode=mode)
    for step in range(3):
        for number in t.numbers_of(step, count=optimizer.accumulation_steps):
            first, *_ = optimizer.active_tasks
            losses = t.losses_of(model, number, optimizer.active_tasks)
            fails = "b" if mode == "stochastic" else "a"
            if (step, dist.get_rank(), first) == (1, 1, fails):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with pytest.raises(ValueError, match="no such luck"):
                        optimizer.backward({**losses, first: fail})
                if not optimizer.active_tasks:  # the accumulator of another task was sent before
                    break
                losses = t.losses_of(model, number, optimizer.active_tasks)
            optimizer.backward(losses)
        optimizer.step()
    return t.parameters_of(model), t.decision_of(optimizer)


def repeated_after_failure_alone():
    """In stochastic mode the failing rank has no more than its first micro-batch in that step."""
    model, optimizer = t.new_training(None, 6)
    for step in range(3):
        for position, task in enumerate(t.TASKS):
            for rank in range(1 if step == 1 and position else 2):
                number = t.number_of(step, rank, position)
                optimizer.backward(t.losses_of(model, number, [task]))
        optimizer.step()
    return t.parameters_of(model)


@pytest.mark.parametrize("mode", ["exact", "stochastic"])
@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_failed_micro_batch_is_repeated_where_nothing_was_sent(ranks2, strategy, mode):
    parameters, _ = t.of_all(ranks2(repeated_after_failure, strategy, mode))
    exact = mode == "exact"
    alone = t.train_alone(2, counts=[(1, 1)] * 3)[0] if exact else repeated_after_failure_alone()
    t.assert_close(parameters, alone)


def retried(strategy, load):
    """A short window with a NaN on rank 1, raised, then gone on with otherwise, or from a state."""
    model, optimizer = t.new_training(strategy, on_nonfinite="raise")
    saved = copy.deepcopy(optimizer.state_dict())
    losses = t.losses_of(model, *t.numbers_of(0, count=1))
    factor = float("nan") if dist.get_rank() == 1 else 1.0
    optimizer.backward({**losses, "b": losses["b"] * factor})
    messages = []

    def attempt(*calls):
        for call in calls:
            with pytest.raises((FloatingPointError, RuntimeError)) as raised:
                call()
            messages.append(str(raised.value))

    attempt(optimizer.step, lambda: optimizer.backward(t.losses_of(model, 1)))
    if load:
        optimizer.load_state_dict(saved)
    else:
        optimizer.on_nonfinite = "drop_task"
        optimizer.step()
    t.window(optimizer, model, t.numbers_of(1, count=1))
    micro_batches = optimizer.report().micro_batches
    optimizer.mode = "stochastic"
    t.window(optimizer, model, range(t.MICRO_BATCHES))
    for number in range(2):  # an accumulator is on its way
        optimizer.backward(t.losses_of(model, number, optimizer.active_tasks))
    attempt(lambda: optimizer.load_state_dict(saved), optimizer.drop_window)
    optimizer.step()
    return t.parameters_of(model), micro_batches, messages


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_accumulators_that_were_reduced_take_no_more(ranks2, strategy, load):
    results = ranks2(retried, strategy, load)
    assert t.of_all(results)[1] == {"a": 2, "b": 2, "c": 2}
    for _, _, (raised, full, loading, dropping) in results:
        assert "Nothing was changed" in raised
        assert "on its way to the other ranks: call step() before backward()" in full
        assert "on its way to the other ranks: load a state between" in loading
        assert "on its way to the other ranks: call step() instead" in dropping


def collective_before_step():
    """A collective of the user's before step(), where one rank's window is short."""
    rank, _ = t.world()
    model, optimizer = t.new_training("shard")
    sums = []
    for step in range(3):
        count = t.MICRO_BATCHES if rank == 0 or step == 0 else 1
        for number in t.numbers_of(step, count=count):
            optimizer.backward(t.losses_of(model, number))
        optimizer.resolve()  # where the other rank waits, in its last backward
        tensor = torch.tensor([float(rank)])
        dist.all_reduce(tensor)
        sums.append(tensor.item())
        optimizer.step()
    return t.parameters_of(model), sums


def test_collectives_of_the_user_where_windows_differ(ranks2):
    assert t.of_all(ranks2(collective_before_step))[1] == [1.0, 1.0, 1.0]


def nothing_then_something():
    model, optimizer = t.new_training("shard")
    for step in range(2):
        with pytest.raises(RuntimeError, match="nothing was accumulated on any of the 2 ranks"):
            optimizer.step()
        t.train_steps(model, optimizer, [step])
    return t.parameters_of(model)


def test_training_goes_on_after_a_step_of_nothing(ranks2):
    t.assert_close(t.of_all(ranks2(nothing_then_something)), t.train_alone(2, {}, 2)[0])


# Parameters that come later.


def thawed(strategy, ranks=None):
    """A layer is thawed after two steps: history and momentum are sharded anew."""
    model = t.new_model()
    model.second.requires_grad_(False)
    options = t.distributed(strategy) if strategy else {"steps": ranks * t.MICRO_BATCHES}
    optimizer = t.new_optimizer(model, **options)
    for step in range(8):
        if step == 2:
            model.second.requires_grad_(True)
        counts = [t.MICRO_BATCHES] * (ranks or 1)
        numbers = t.numbers_of(step) if strategy else t.numbers_of_all(step, counts)
        t.window(optimizer, model, numbers)
    return t.parameters_of(model)


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_thawed_parameters(ranks2, strategy):
    t.assert_close(t.of_all(ranks2(thawed, strategy)), thawed(None, 2))


def older_than_the_process_group():
    with mock.patch.object(dist, "is_initialized", return_value=False):
        model, optimizer = t.new_training()
    with pytest.raises(RuntimeError, match="make it after init_process_group"):
        optimizer.backward(t.losses_of(model, 0))


def test_optimizer_that_is_older_than_the_process_group(ranks2):
    ranks2(older_than_the_process_group)
