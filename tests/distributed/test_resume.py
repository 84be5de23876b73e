"""States and checkpoints of several ranks: to the same bits, and in other numbers of ranks."""

import copy
import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as torchs

from gcond_kernels import TrainingState
from tests.conftest import slow
from tests.distributed.test_strategies import (
    METHODS,
    assert_masked_stay,
    assert_same_decisions,
    train_mixed,
)
from tests.helpers import distributed_training as t
from tests.helpers.models import same
from tests.helpers.ranks import join, start

# Each rank by its own state dict.


def load_own_state(parallelism, folder, saved_by, options=None):
    """Whether a fresh optimizer trains on to the same bits from a state of each rank, or of 0."""
    rank, size = t.world()
    data, _ = t.data_rank(parallelism, rank, size)
    model, optimizer = t.new_training(parallelism, **(options or {}))
    t.train_steps(model, optimizer, range(4), data)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.barrier()

    again, other = t.new_training(parallelism, **(options or {}))
    name = rank if saved_by == "each" else 0
    saved = torch.load(f"{folder}/{name}.pt", weights_only=False)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for training in ((model, optimizer), (again, other)):
        t.train_steps(*training, range(4, 7), data)
    return t.equal(t.parameters_of(model), t.parameters_of(again))


@pytest.mark.parametrize(
    ("parallelism", "saved_by", "method"),
    [
        *((parallelism, "each", "plain") for parallelism in (*t.STRATEGIES, "fsdp")),
        *((strategy, "first", "plain") for strategy in t.STRATEGIES),
        ("shard", "each", "by tensor"),
        ("fsdp", "each", "by tensor"),
    ],
)
def test_state_dict_goes_on_to_the_same_bits(ranks2, tmp_path, parallelism, saved_by, method):
    arguments = parallelism, str(tmp_path), saved_by, METHODS.get(method)
    assert ranks2(load_own_state, *arguments) == [True, True]


def load_earlier_states(strategy):
    """The own state is loaded before the first window; then that of two steps before a thaw."""
    results = []
    for reload in (False, True):
        model = t.new_model()
        model.last.requires_grad_(False)
        optimizer = t.new_optimizer(model, **t.distributed(strategy))
        if reload:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        t.train_steps(model, optimizer, range(2))
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        model.last.requires_grad_(True)
        for attempt in range(2 if reload else 1):
            if attempt == 1:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            t.train_steps(model, optimizer, range(2, 4))
        results.append(t.parameters_of(model))
    return t.equal(*results)


@pytest.mark.parametrize("strategy", t.STRATEGIES)
def test_state_of_fewer_parameters_than_there_are_now(ranks2, strategy):
    assert ranks2(load_earlier_states, strategy) == [True, True]


# The states that torch makes.


def new_used(parallelism):
    return t.new_training(parallelism, net=t.Used)


def everything(model, optimizer):
    """Parameters, rate, states of the base and of the optimizer itself."""
    base, storage, now = optimizer.base, optimizer._storage, optimizer._resolver
    kept = []
    if now.counters[0]:
        kept = [storage.history, storage.momentum, storage.momentum_steps, storage.parameter_tasks]
    state = [
        {name: t.full(value) for name, value in base.state.get(p, {}).items()}
        for p in model.parameters()
    ]
    rate = base.param_groups[0]["lr"]
    return copy.deepcopy(
        (t.parameters_of(model), state, rate, kept, now.method_state, now.counters)
    )


FORMS = {
    "plain": ({}, {}),
    "flat": ({"flatten_optimizer_state_dict": True},) * 2,
    "full": ({"full_state_dict": True},) * 2,
    "of rank 0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}


def states_of_torch(parallelism, steps):
    """By form: whether get_optimizer_state_dict changes nothing; and set_… carries all bits."""
    model, optimizer = new_used(parallelism)
    t.train_steps(model, optimizer, range(steps))
    trainings, unchanged = [(model, optimizer)], []
    for get, put in FORMS.values():
        before = everything(model, optimizer)
        options = torchs.StateDictOptions(**get)
        state = copy.deepcopy(torchs.get_optimizer_state_dict(model, optimizer, options=options))
        unchanged.append(same(everything(model, optimizer), before))
        again, other = new_used(parallelism)
        torchs.set_model_state_dict(again, copy.deepcopy(torchs.get_model_state_dict(model)))
        options = torchs.StateDictOptions(**put)
        torchs.set_optimizer_state_dict(again, other, state, options=options)
        trainings.append((again, other))
    for training in trainings:
        t.train_steps(*training, range(steps, steps + 2))
    first, *ends = [everything(*training) for training in trainings]
    carried = [same(first, end) for end in ends]
    return dict(zip(FORMS, zip(unchanged, carried, strict=True), strict=True))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("parallelism", ["shard", slow("replicate"), "fsdp"])
def test_states_of_torch_carry_everything_and_change_nothing(ranks2, parallelism, steps):
    """Plain, flat, full, and full on rank 0 alone; before the first window and after two."""
    for forms in ranks2(states_of_torch, parallelism, steps):
        assert forms == dict.fromkeys(FORMS, (True, True))


# Checkpoints that others go on from.


class ThroughTorch:
    """The states that torch makes of a model and its optimizer, without TrainingState."""

    def __init__(self, model, optimizer, flat):
        self.of = model, optimizer
        self.options = torchs.StateDictOptions(flatten_optimizer_state_dict=flat)

    def state_dict(self):
        model, optimizer = torchs.get_state_dict(*self.of, options=self.options)
        return {"model_state_dict": model, "optim_state_dict": optimizer}

    def load_state_dict(self, state):
        torchs.set_state_dict(*self.of, **state, options=self.options)


def train_on(parallelism, folder, save_after=None, steps=t.STEPS, options=None, flat=None):
    """A training that is saved after some steps, or goes on from what was saved there.

    Every step's window is that of one process that sees everything: so the number of ranks changes
    nothing but rounding. `flat` None is saved by a TrainingState, False and True by torch.
    """
    data, of = (0, 1) if parallelism is None else t.data_rank(parallelism, *t.world())
    model, optimizer = t.new_training(parallelism, 4 // of, **(options or {}))
    state = {"training": TrainingState(model, optimizer)}
    if flat is not None:
        state = {"training": ThroughTorch(model, optimizer, flat)}
    start = 0
    if save_after is None:
        dcp.load(state, checkpoint_id=folder)
        start = int(optimizer._resolver.counters[0])
    decisions = []
    for step in range(start, steps):
        t.window(optimizer, model, t.numbers_of(step, 0, 4)[data::of])
        decisions.append(t.decision_of(optimizer))
        if save_after == step + 1:
            dcp.save(state, checkpoint_id=folder)
    return t.parameters_of(model), decisions


@pytest.fixture
def run(ranks):
    """Runs a function in one process, where its first argument is None, or in ranks."""

    def run(size, function, parallelism, *args):
        alone = parallelism is None
        return t.of_all(
            [function(None, *args)] if alone else ranks(size)(function, parallelism, *args)
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "shard"), (4, "shard")),
        ((4, "shard"), (1, None)),
        ((1, None), (4, "shard")),
        ((2, "replicate"), (4, "shard")),
        ((4, "fsdp"), (2, "fsdp")),
        ((2, "fsdp"), (4, "fsdp_tp")),
        ((4, "fsdp_tp"), (2, "tp")),
        ((4, "shard"), (2, "fsdp")),
        ((4, "hsdp"), (2, "shard")),
    ],
)
def test_checkpoint_resumes_on_another_number_of_ranks(run, tmp_path, before, after):
    (size, parallelism), (later_size, later_parallelism) = before, after
    straight, decisions = run(size, train_on, parallelism, str(tmp_path), 8)
    resumed, later = run(later_size, train_on, later_parallelism, str(tmp_path))
    assert len(later) == t.STEPS - 8
    t.assert_close(resumed, straight)
    assert [d.winners for d in later] == [d.winners for d in decisions[8:]]
    for ours, theirs in zip(later, decisions[8:], strict=True):
        assert ours.weights == pytest.approx(theirs.weights, abs=1e-3)


@pytest.mark.parametrize(
    ("before", "after", "method"),
    [
        ("shard", None, "GradNorm"),
        ("fsdp", "replicate", "PCGrad"),
        (None, "fsdp", "by tensor"),
        slow("shard", None, "PCGrad"),
        slow("shard", None, "by tensor"),
        slow("shard", "fsdp", "by tensor"),
        slow("fsdp", None, "GradNorm"),
        slow("fsdp", None, "by tensor"),
        slow("fsdp", "replicate", "by tensor"),
        slow(None, "shard", "GradNorm"),
        slow(None, "shard", "by tensor"),
        slow(None, "fsdp", "PCGrad"),
    ],
)
def test_checkpoint_of_any_method_resumes(run, tmp_path, before, after, method):
    """In two ranks or one process; the mask is that of the state, not the one that was given."""
    options = METHODS[method]
    straight, decisions = run(2, train_on, before, str(tmp_path), 4, 10, options)
    options = options | {"share": 0.7}
    resumed, later = run(2, train_on, after, str(tmp_path), None, 10, options)
    assert len(later) == 6
    t.assert_close(resumed, straight)
    assert_same_decisions(later, decisions[4:])
    assert_masked_stay(resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "flat"),
    [
        ("shard", "fsdp", False),
        ("fsdp", None, True),
        (None, "shard", False),
        (None, "fsdp", True),
    ],
)
def test_what_torch_saves_by_itself_resumes(run, tmp_path, before, after, flat):
    """Without a TrainingState; sharded otherwise, in other numbers."""
    base = torch.optim.Adam
    options = {"granularity": "tensor", "net": t.Used, "share": 0.4, "base": base}
    straight, decisions = run(2, train_on, before, str(tmp_path), 4, 10, options, flat)
    resumed, later = run(2, train_on, after, str(tmp_path), None, 10, options, flat)
    assert len(later) == 6
    t.assert_close(resumed, straight)
    assert_same_decisions(later, decisions[4:])


@pytest.mark.parametrize(
    ("size", "strategy"), [(1, None), (2, "shard"), (2, "replicate"), (4, "shard")]
)
def test_checkpoint_of_parameters_of_all_sorts(run, tmp_path, size, strategy):
    """Scalars, channels-last weights and two types come back to the bit."""
    resumed = run(size, train_mixed, strategy, {}, str(tmp_path))
    assert t.equal(resumed, run(size, train_mixed, strategy, {}))


def frozen_since(parallelism, folder):
    """A state whose layer `first` is frozen when it is loaded, saved by `save` and `async_save`."""
    results = []
    for name in ("save", "async_save"):
        model, optimizer = t.new_training(parallelism)
        t.train_steps(model, optimizer, range(3))
        state = {"training": TrainingState(model, optimizer)}
        done = getattr(dcp, name)(state, checkpoint_id=f"{folder}/{name}")
        if name == "async_save":
            done.result()
        again = t.new_model()
        again.first.requires_grad_(False)
        again = t.parallelize(again, parallelism)
        other = t.new_optimizer(again, parallelism)
        dcp.load({"training": TrainingState(again, other)}, checkpoint_id=f"{folder}/{name}")
        getattr(model, "module", model).first.requires_grad_(False)
        for training in ((model, optimizer), (again, other)):
            t.train_steps(*training, range(3, 6))
        results.append((t.parameters_of(model), t.parameters_of(again)))
    return results


@pytest.mark.parametrize("parallelism", ["shard", slow("fsdp")])
def test_layer_that_was_frozen_since_it_was_saved_is_left_out(ranks2, tmp_path, parallelism):
    for of_rank in ranks2(frozen_since, parallelism, str(tmp_path)):
        for straight, resumed in of_rank:
            t.assert_close(resumed, straight)


def train_until_hit(rank, size, store, folder, signal_number, timeout):
    """A training that is saved after every second step, until rank 1 is hit in its sixth window."""
    join(rank, size, store, timeout)
    model, optimizer = t.new_training("shard", 4 // size)
    state = {"training": TrainingState(model, optimizer)}
    for step in range(t.STEPS):
        for position in range(rank, 4, size):
            optimizer.backward(t.losses_of(model, t.number_of(step, 0, position)))
            if (rank, step, position) == (1, 5, 1):
                os.kill(os.getpid(), signal_number)
        optimizer.step()
        if step % 2 == 1:
            dcp.save(state, checkpoint_id=f"{folder}/{step + 1:02}")


@pytest.mark.parametrize(("how", "seconds"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 5)])
def test_rank_killed_or_stuck_in_a_window(ranks4, tmp_path, how, seconds):
    """The others end with an error within the timeout, and the last checkpoint resumes."""
    saved = tmp_path / "saved"
    arguments = (str(tmp_path / "store"), str(saved), how, timedelta(seconds=seconds))
    other, hit = start(2, train_until_hit, [arguments] * 2)
    other.join(100)  # by far longer than it takes, and shorter than torch's own timeout
    ended = other.exitcode
    for process in (other, hit):
        process.kill()
        process.join()
    assert ended == 1
    assert hit.exitcode == -signal.SIGKILL

    checkpoints = sorted(folder.parent for folder in saved.glob("*/.metadata"))
    assert [folder.name for folder in checkpoints] == ["02", "04"]
    resumed, decisions = t.of_all(ranks4(train_on, "shard", str(checkpoints[-1])))
    assert len(decisions) == t.STEPS - 4
    alone, _ = train_on(None, str(tmp_path / "alone"), save_after=4)
    t.assert_close(resumed, alone)
